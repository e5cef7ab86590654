"""Memory that CPU convolutions take inside themselves, which no tensor shows.

They give it back at their end. oneDNN computes either in blocked layouts, copying inputs, outputs and weights with
channels padded to blocks of 16, or channels-last, copying only what is not; at the peak of a step that is a tenth to a
fifth of everything. Read from the allocations of torch 2.13 (oneDNN with AVX-512, fp32 and bf16), convolution by
convolution; `bench/memory.py` repeats the comparison for whole steps. That was with one and two threads; with 4 it
counts up to 9 % too much for a whole step in bf16, with 16 up to 34 % (fp32: 13 %), and never too little.
"""

from math import prod

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

BLOCK = 16
SMALL_PROBLEM = 20480
"""A single fp32 sample with fewer elements in its first four axes is not given to oneDNN (aten Convolution.cpp)."""
SHALLOW = 2
SHALLOW_WEIGHTS = 4
"""3D inputs of at most SHALLOW slices: in fp32 each thread takes SHALLOW_WEIGHTS copies of the weights for their
gradient, and the columns of one slice."""


def convolution_bytes(inputs: Tensor, weight: Tensor, stride: tuple[int, ...], transposed: bool, output: Tensor) -> int:
    """Most bytes held at once by a forward convolution beside its arguments, its output included."""
    result, half = _bytes(output), output.dtype != torch.float32
    if _without_onednn(inputs, weight, stride):
        columns = 0 if _is_pointwise(weight) else _column_bytes(inputs, weight, output, transposed)
        return result + columns
    accumulator = 2 * _blocked(output) * _busy(output) // output.shape[0] if half and _is_pointwise(weight) else 0
    if _is_channels_last(inputs, weight):
        return result + _reordered(inputs) + _blocked_weight(weight) + accumulator
    narrow = inputs.shape[1] < BLOCK and not _is_pointwise(weight)
    copies = (0 if narrow else _blocked(inputs)) + _blocked_weight(weight) + _blocked(output)
    return max(accumulator + copies, _blocked(output) + (2 if transposed and not half else 1) * result)


def convolution_backward_bytes(
    gradient: Tensor, inputs: Tensor, weight: Tensor, stride: tuple[int, ...], transposed: bool, wants_input: bool
) -> int:
    """Most bytes held at once by a convolution's backward pass beside its arguments, its results included."""
    result = _bytes(inputs) if wants_input else 0
    if _without_onednn(inputs, weight, stride):
        no_columns = _is_pointwise(weight) and weight.ndim == 4
        return result + _bytes(weight) + (0 if no_columns else _column_bytes(inputs, weight, gradient, transposed))
    half, pointwise = inputs.dtype != torch.float32, _is_pointwise(weight)
    accumulator = 2 * _blocked(inputs) * _busy(inputs) // inputs.shape[0] if half and pointwise and wants_input else 0
    weight_bytes = _blocked_weight(weight)
    sums = _summing_bytes(gradient, inputs, weight, stride, transposed)
    if _is_channels_last(inputs, weight):
        copies = _reordered(gradient) + _reordered(inputs)
        return copies + result + weight_bytes + max(accumulator, sums, 2 * weight_bytes)
    to_input = 0
    if wants_input:
        copies = _blocked(gradient) + _blocked(inputs) + weight_bytes
        to_input = max(copies + accumulator, _blocked(inputs) + result)
    if _is_shallow(inputs, weight):
        return max(to_input, result + weight_bytes + sums)
    narrow = not pointwise and inputs.shape[1] < BLOCK
    copies = _blocked(gradient) + (0 if narrow else _blocked(inputs)) + weight_bytes
    return max(to_input, result + copies + (0 if pointwise else sums))


def _summing_bytes(gradient: Tensor, inputs: Tensor, weight: Tensor, stride: tuple[int, ...], transposed: bool) -> int:
    """What the gradient of the weights is summed up in: weights in fp32, and in bf16 transposed copies of a sample."""
    threads, weight_bytes = torch.get_num_threads(), _blocked_weight(weight)
    if _is_shallow(inputs, weight):
        columns = inputs.shape[1] * prod(weight.shape[2:]) * prod(gradient.shape[-2:]) * gradient.element_size()
        return threads * (SHALLOW_WEIGHTS * weight_bytes + columns)
    if inputs.dtype == torch.float32:
        return (threads - 1) * weight_bytes
    if transposed:
        return _blocked(gradient)
    sample = _blocked(gradient) // gradient.shape[0]
    if max(stride) == 1 and (inputs.shape[1] >= BLOCK or _is_pointwise(weight)):
        width = inputs.shape[-1]
        sample += _blocked(inputs) // inputs.shape[0] * (width + weight.shape[-1] - 1) // width
    # threads share the samples where those are larger than the weights, else the channels
    return (threads if sample > 2 * weight_bytes else 1) * (sample + 2 * weight_bytes)


def _without_onednn(inputs: Tensor, weight: Tensor, stride: tuple[int, ...]) -> bool:
    """Whether aten computes with columns itself: ConvParams::use_mkldnn for dense fp32 tensors."""
    if inputs.dtype != torch.float32:
        return False
    kernel = weight.shape[2:]
    worth_it = max(stride) > 1 or inputs.shape[0] >= 16 or max(kernel[-2:]) > 1 or torch.get_num_threads() > 1
    large = min(kernel[-2:]) > 3 or inputs.shape[0] > 1 or prod(inputs.shape[:4]) > SMALL_PROBLEM
    return not (worth_it and large)


def _is_channels_last(inputs: Tensor, weight: Tensor) -> bool:
    return any(suggest_memory_format(each) != torch.contiguous_format for each in (inputs, weight))


def _is_shallow(inputs: Tensor, weight: Tensor) -> bool:
    return (
        inputs.ndim == 5 and inputs.shape[2] <= SHALLOW and weight.shape[2] > SHALLOW and inputs.dtype == torch.float32
    )


def _is_pointwise(weight: Tensor) -> bool:
    return max(weight.shape[2:]) == 1


def _column_bytes(inputs: Tensor, weight: Tensor, output: Tensor, transposed: bool) -> int:
    wide, narrow = (output, inputs) if transposed else (inputs, output)
    places = narrow.shape[0] * prod(narrow.shape[2:])
    return places * wide.shape[1] * prod(weight.shape[2:]) * inputs.element_size()


def _reordered(tensor: Tensor) -> int:
    """Bytes of the channels-last copy, none where the tensor is channels-last already."""
    return _bytes(tensor) if suggest_memory_format(tensor) == torch.contiguous_format else 0


def _busy(tensor: Tensor) -> int:
    return min(torch.get_num_threads(), tensor.shape[0])


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _padded(channels: int) -> int:
    return -(-channels // BLOCK) * BLOCK


def _blocked(tensor: Tensor) -> int:
    return _bytes(tensor) // tensor.shape[1] * _padded(tensor.shape[1])


def _blocked_weight(weight: Tensor) -> int:
    return _padded(weight.shape[0]) * _padded(weight.shape[1]) * prod(weight.shape[2:]) * weight.element_size()
