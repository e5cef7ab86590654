"""network/muon.py: updates are orthogonal, as large as AdamW's, and none at all where a step is to be left out."""

import pytest
import torch
from torch import nn

from autoseg.network.muon import ITERATIONS, MOMENTUM, POLYNOMIAL, RMS, Muon, orthogonal


@pytest.mark.parametrize("shape", [(4, 50), (16, 16), (30, 5)])
def test_all_directions_of_an_update_are_about_as_long(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    uneven = left @ torch.diag(torch.logspace(0, -1, min(shape))) @ right
    lengths = torch.linalg.svdvals(orthogonal([uneven])[0])
    assert lengths.min() > 0.6
    assert lengths.max() < 1.3


@pytest.mark.parametrize("shape", [(6, 20), (20, 6)])
def test_iterations_on_the_gram_matrix_are_those_on_the_matrix(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    plain = matrix.double() / matrix.double().norm()
    a, b, c = POLYNOMIAL
    for _ in range(ITERATIONS):
        gram = plain @ plain.T
        plain = a * plain + (b * gram + c * gram @ gram) @ plain
    assert torch.allclose(orthogonal([matrix])[0].double(), plain, atol=1e-5)


def test_matrices_of_one_size_are_done_together_and_stay_apart() -> None:
    draws = torch.Generator().manual_seed(4)
    shapes = [(4, 50), (16, 16), (30, 4), (4, 8), (16, 5)]
    matrices = [torch.randn(shape, generator=draws) for shape in shapes]
    for found, matrix in zip(orthogonal(matrices), matrices, strict=True):
        torch.testing.assert_close(found, orthogonal([matrix])[0])


def test_no_gradient_gives_no_update() -> None:
    assert not orthogonal([torch.zeros(3, 5)])[0].any()


@pytest.mark.parametrize("laid_out", [torch.contiguous_format, torch.channels_last_3d])
def test_a_step_is_momentum_made_orthogonal_with_adamws_decay(laid_out: torch.memory_format) -> None:
    draws = torch.Generator().manual_seed(2)
    start, first, second = (torch.randn(6, 4, 3, 3, 3, generator=draws) for _ in range(3))
    weight = nn.Parameter(start.clone().contiguous(memory_format=laid_out))
    optimizer = Muon([weight], [], 0.1, weight_decay=0.5, fused=True)
    expected, momentum = start, torch.zeros_like(start)
    for gradient in (first, second):
        weight.grad = gradient.contiguous(memory_format=laid_out)
        optimizer.step()
        momentum = MOMENTUM * momentum + (1 - MOMENTUM) * gradient
        looked_ahead = MOMENTUM * momentum + (1 - MOMENTUM) * gradient
        update = orthogonal([looked_ahead.flatten(1)])[0].view_as(start) * RMS * (4 * 27) ** 0.5
        expected = expected * (1 - 0.1 * 0.5) - 0.1 * update
    assert weight.is_contiguous(memory_format=laid_out)
    assert torch.allclose(weight, expected, atol=1e-5)


def test_updates_are_as_large_as_those_of_adamw() -> None:
    draws = torch.Generator().manual_seed(3)
    weight = nn.Parameter(torch.zeros(16, 16, 3, 3, 3))
    optimizer = Muon([weight], [], 1.0, weight_decay=0.0, fused=True)
    weight.grad = torch.randn(weight.shape, generator=draws)
    optimizer.step()
    assert weight.square().mean().sqrt().item() == pytest.approx(RMS, rel=0.3)


def test_a_marked_step_changes_neither_weights_nor_momentum() -> None:
    weight = nn.Parameter(torch.ones(4, 2, 3, 3))
    optimizer = Muon([weight], [], 0.1, weight_decay=0.1, fused=True)
    weight.grad = torch.full_like(weight, torch.nan)
    optimizer.found_inf = torch.ones(())  # type: ignore[attr-defined]
    optimizer.step()
    assert torch.equal(weight, torch.ones_like(weight))
    assert not optimizer.state[weight]["momentum"].any()
