"""Memory that a CPU convolution takes and gives back inside itself, which no tensor shows.

oneDNN copies inputs, outputs and weights to layouts whose channels are padded to blocks of 16; at the peak of a step
that is a fifth of everything. Read from the allocations of torch 2.13 (oneDNN with AVX-512, fp32 and bf16), convolution
by convolution; `bench/memory.py` repeats the comparison for whole steps.
"""

from math import prod

import torch
from torch import Tensor

BLOCK = 16
SMALL_PROBLEM = 20480
"""A single fp32 sample with fewer elements in its first four axes is not given to oneDNN (aten Convolution.cpp)."""


def convolution_bytes(inputs: Tensor, weight: Tensor, stride: tuple[int, ...], transposed: bool, output: Tensor) -> int:
    """Most bytes held at once by a forward convolution beside its arguments, its output included."""
    result = _bytes(output)
    if _without_onednn(inputs, weight, stride):
        return result + (_column_bytes(inputs, weight, output, transposed) if _is_wide(weight) else 0)
    blocked = _blocked(output)
    own = 0
    if not _is_wide(weight) and output.dtype != torch.float32:
        own = 2 * blocked * _busy(output) // output.shape[0]
    narrow = inputs.shape[1] < BLOCK and _is_wide(weight)
    before = own + (0 if narrow else _blocked(inputs)) + _blocked_weight(weight) + blocked
    copies = 2 if transposed and output.dtype == torch.float32 else 1
    return max(before, blocked + copies * result)


def convolution_backward_bytes(
    gradient: Tensor,
    inputs: Tensor,
    weight: Tensor,
    stride: tuple[int, ...],
    transposed: bool,
    wants_input: bool,
) -> int:
    """Most bytes held at once by a convolution's backward pass beside its arguments, its results included."""
    result = _bytes(inputs) if wants_input else 0
    if _without_onednn(inputs, weight, stride):
        return result + _column_bytes(inputs, weight, gradient, transposed) + _bytes(weight)
    half, wide = inputs.dtype != torch.float32, _is_wide(weight)
    gradient_bytes, input_bytes, weight_bytes = _blocked(gradient), _blocked(inputs), _blocked_weight(weight)
    to_input = 0
    if wants_input:
        accumulator = 4 * inputs.numel() * _busy(inputs) // inputs.shape[0] if half and not wide else 0
        to_input = max(gradient_bytes + weight_bytes + input_bytes + accumulator, input_bytes + result)
    narrow = wide and inputs.shape[1] < BLOCK
    to_weight = result + gradient_bytes + (0 if narrow else input_bytes) + weight_bytes
    return max(to_input, to_weight + _reduction_bytes(gradient, inputs, weight, stride, transposed))


def _reduction_bytes(
    gradient: Tensor, inputs: Tensor, weight: Tensor, stride: tuple[int, ...], transposed: bool
) -> int:
    """What the gradient of the weights is summed up in: transposed copies of one sample, and weights, per thread."""
    threads = torch.get_num_threads()
    if inputs.dtype == torch.float32:
        return (threads - 1) * _blocked_weight(weight)
    if not _is_wide(weight):
        return 0
    if transposed:
        return _blocked(gradient)
    per_thread = _blocked(gradient) // gradient.shape[0] + 2 * _blocked_weight(weight)
    if max(stride) == 1 and inputs.shape[1] >= BLOCK:
        width = inputs.shape[-1]
        per_thread += _blocked(inputs) // inputs.shape[0] * (width + weight.shape[-1] - 1) // width
    return threads * per_thread


def _without_onednn(inputs: Tensor, weight: Tensor, stride: tuple[int, ...]) -> bool:
    """Whether aten computes with columns itself: ConvParams::use_mkldnn for dense fp32 tensors."""
    if inputs.dtype != torch.float32:
        return False
    kernel = weight.shape[2:]
    worth_it = max(stride) > 1 or inputs.shape[0] >= 16 or max(kernel[-2:]) > 1 or torch.get_num_threads() > 1
    large = min(kernel[-2:]) > 3 or inputs.shape[0] > 1 or prod(inputs.shape[:4]) > SMALL_PROBLEM
    return not (worth_it and large)


def _column_bytes(inputs: Tensor, weight: Tensor, output: Tensor, transposed: bool) -> int:
    wide, narrow = (output, inputs) if transposed else (inputs, output)
    places = narrow.shape[0] * prod(narrow.shape[2:])
    return places * wide.shape[1] * prod(weight.shape[2:]) * inputs.element_size()


def _is_wide(weight: Tensor) -> bool:
    return max(weight.shape[2:]) > 1


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
