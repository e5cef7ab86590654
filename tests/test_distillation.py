"""The loss of a student, probabilities in 8 bits (network/distillation.py), and its size (planning/student.py)."""

import numpy as np
import pytest
import torch
from planned import a_configuration

from autoseg.errors import UserError
from autoseg.network import losses
from autoseg.network.distillation import distilling, divergence, from_8_bits, pooled, to_8_bits
from autoseg.planning.student import choose_student


def nothing(logits: object, labels: torch.Tensor) -> torch.Tensor:
    return torch.zeros(())


def some(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def target(teacher: torch.Tensor, labels: int = 0) -> torch.Tensor:
    return torch.cat((torch.full_like(teacher[:, :1], labels), teacher), 1)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
def test_the_divergence_is_that_of_the_softened_distributions(temperature: float) -> None:
    logits, teacher = some((2, 3, 4, 5)), torch.softmax(some((2, 3, 4, 5), 1), 1)
    p, z = teacher.numpy(), logits.numpy()
    soft = p ** (1 / temperature) / (p ** (1 / temperature)).sum(1, keepdims=True)
    q = np.exp(z / temperature) / np.exp(z / temperature).sum(1, keepdims=True)
    expected = (soft * np.log(soft / q)).sum(1).mean()
    assert float(divergence(logits, teacher, temperature)) == pytest.approx(expected, rel=1e-6)


def test_the_divergence_of_regions_is_the_sum_of_those_of_each() -> None:
    logits, teacher = some((2, 2, 4)), torch.sigmoid(some((2, 2, 4), 1))
    p, q = torch.sigmoid(torch.logit(teacher) / 2), torch.sigmoid(logits / 2)
    expected = (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).sum(1).mean()
    marked = torch.cat((torch.ones_like(teacher[:, :1]), teacher), 1)
    assert float(divergence(logits, marked, 2.0, regions=True)) == pytest.approx(float(expected), rel=1e-6)
    outside = torch.cat((marked, torch.zeros_like(marked)), 2)  # nothing is said of as many voxels again
    wider = torch.cat((logits, some((2, 2, 4), 3)), 2)
    assert float(divergence(wider, outside, 2.0, regions=True)) == pytest.approx(float(expected), rel=1e-6)
    half = torch.cat((marked * 0.7, torch.zeros_like(marked)), 2)  # as at the edge of a moved patch
    assert float(divergence(wider, half, 2.0, regions=True)) == pytest.approx(float(expected), rel=1e-5)


def test_a_student_that_agrees_learns_nothing_more() -> None:
    logits = some((1, 3, 6)).requires_grad_()
    value = divergence(logits, torch.softmax(logits.detach(), 1), 3.0)
    value.backward()
    assert float(value.detach()) == pytest.approx(0, abs=1e-9)
    assert logits.grad is not None
    assert float(logits.grad.abs().max()) < 1e-8


def test_the_gradient_is_that_of_differences() -> None:
    teacher = torch.softmax(some((2, 3, 4), 1), 1)
    teacher[0, :, 2] = 0.0  # nothing is said there
    logits = some((2, 3, 4)).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: 3.0 * divergence(z, teacher, 2.0), [logits])


def test_the_gradient_keeps_its_size_when_the_temperature_rises() -> None:
    """Hinton et al. 2015, equation 4: for high temperatures T^2 times the gradient tends to (z - v) / K."""
    z, v = some((1, 4, 1)), some((1, 4, 1), 1)
    z, v = (z - z.mean()).requires_grad_(), v - v.mean()
    loss = distilling(nothing, 1000.0, 0.0)
    loss(z, target(torch.softmax(v, 1))).backward()
    assert z.grad is not None
    torch.testing.assert_close(z.grad, (z.detach() - v) / 4, rtol=0.05, atol=1e-3)


def test_voxels_of_which_teachers_say_nothing_do_not_count() -> None:
    teacher = torch.softmax(some((1, 3, 8), 1), 1)
    teacher[..., 4:] = 0.0
    logits = some((1, 3, 8)).requires_grad_()
    value = divergence(logits, teacher, 2.0)
    value.backward()
    assert logits.grad is not None
    assert not logits.grad[..., 4:].any()
    assert logits.grad[..., :4].abs().min() > 0
    torch.testing.assert_close(value, divergence(logits[..., :4], teacher[..., :4], 2.0))
    assert not divergence(logits, torch.zeros_like(teacher), 2.0).any()


def test_the_labels_have_their_weight_and_lower_outputs_theirs() -> None:
    hard = losses.build("ce", batch_dice=False)
    logits = [some((1, 3, 8, 8)), some((1, 3, 4, 4), 1)]
    teacher = torch.softmax(some((1, 3, 8, 8), 2), 1)
    labels = torch.randint(0, 3, (1, 8, 8), generator=torch.Generator().manual_seed(0))
    both = torch.cat((labels.unsqueeze(1).double(), teacher), 1)
    taught = sum(
        weight * 4 * float(divergence(output, pooled(teacher, output), 2.0))
        for output, weight in zip(logits, (2 / 3, 1 / 3), strict=True)
    )
    expected = 0.3 * float(hard(logits, labels)) + 0.7 * taught
    assert float(distilling(hard, 2.0, 0.3)(logits, both)) == pytest.approx(expected, rel=1e-6)
    small = torch.nn.functional.avg_pool2d(teacher, 2)
    torch.testing.assert_close(pooled(teacher, logits[1]), small)


def test_the_overlap_is_with_what_the_teachers_find_most_likely() -> None:
    overlap = losses.build("dice", batch_dice=False)
    logits, teacher = some((1, 3, 8, 8)), torch.softmax(some((1, 3, 8, 8), 2), 1)
    teacher[..., 0] = 0.0  # nothing is said there
    expected = teacher.argmax(1)
    expected[..., 0] = -1
    both = target(teacher, labels=1)
    alone = distilling(nothing, 2.0, 0.25)(logits, both)
    found = distilling(nothing, 2.0, 0.25, overlap=overlap)(logits, both)
    assert float(found - alone) == pytest.approx(0.75 * float(overlap(logits, expected)), rel=1e-6)


def test_the_overlap_of_regions_is_with_what_is_likelier_than_not_and_counts_every_region_alike() -> None:
    overlap = losses.build("dice", batch_dice=False, regions=((1,),))
    logits, teacher = some((1, 2, 8, 8)), torch.sigmoid(some((1, 2, 8, 8), 2))
    marked = torch.cat((torch.ones_like(teacher[:, :1]), teacher), 1)
    marked[..., 0] = 0.0  # nothing is said there
    expected = (teacher >= 0.5).long()
    expected[..., 0] = -1
    both = target(marked, labels=1)
    alone = distilling(nothing, 2.0, 0.25, regions=True)(logits, both)
    found = distilling(nothing, 2.0, 0.25, regions=True, overlap=overlap)(logits, both)
    mean = (overlap(logits[:, :1], expected[:, 0]) + overlap(logits[:, 1:], expected[:, 1])) / 2
    assert float(found - alone) == pytest.approx(0.75 * float(mean), rel=1e-6)


def test_the_padding_around_an_image_without_labels_is_no_label() -> None:
    seen: list[torch.Tensor] = []

    def hard(logits: object, labels: torch.Tensor) -> torch.Tensor:
        seen.append(labels)
        return torch.zeros(())

    teacher = torch.softmax(some((2, 3, 4, 4), 2), 1)
    teacher[:, :, :, 3] = 0.0  # outside of the images
    both = target(teacher)
    both[1, 0, :, :3] = -1  # the second has no labels
    distilling(hard, 1.0, 0.5)(some((2, 3, 4, 4)), both)
    assert (seen[0][0] == 0).all()
    assert (seen[0][1] == -1).all()


def test_what_labels_do_not_say_of_a_sample_its_teachers_say_with_more_weight() -> None:
    teacher = torch.softmax(some((2, 3, 4, 4), 2), 1)
    logits, both = some((2, 3, 4, 4)), target(teacher)
    taught = float(divergence(logits, teacher, 1.0))
    assert float(distilling(nothing, 1.0, 0.6)(logits, both)) == pytest.approx(0.4 * taught, rel=1e-6)
    both[1, 0] = -1
    assert float(distilling(nothing, 1.0, 0.6)(logits, both)) == pytest.approx(0.7 * taught, rel=1e-6)
    both[:, 0] = -1
    assert float(distilling(nothing, 1.0, 0.6)(logits, both)) == pytest.approx(taught, rel=1e-6)


def test_where_nothing_is_annotated_the_teachers_alone_are_learned_from() -> None:
    hard = losses.build("dice_ce", batch_dice=False)
    logits = some((1, 3, 8, 8)).float().requires_grad_()
    value = distilling(hard, 2.0, 0.5)(logits, target(torch.softmax(some((1, 3, 8, 8), 2).float(), 1), labels=-1))
    value.backward()
    assert torch.isfinite(value)
    assert logits.grad is not None
    assert logits.grad.abs().max() > 0


@pytest.mark.parametrize("extreme", [50.0, -50.0])
def test_extreme_logits_give_finite_gradients(extreme: float) -> None:
    for regions in (False, True):
        logits = torch.full((1, 3, 4), extreme, dtype=torch.bfloat16)
        logits[:, 0] = -extreme
        logits.requires_grad_()
        teacher = torch.eye(3)[None, :, [0, 1, 2, 0]]
        said = torch.cat((torch.ones_like(teacher[:, :1]), teacher), 1) if regions else teacher
        divergence(logits, said, 2.0, regions).backward()
        assert logits.grad is not None
        assert torch.isfinite(logits.grad).all()


def test_eight_bits_keep_small_probabilities_and_those_near_one() -> None:
    p = np.array([0.0004, 0.001, 0.02, 0.3, 0.5, 0.9, 0.995, 0.9996], np.float32)
    again = from_8_bits(to_8_bits(p))
    assert again.dtype == np.float32
    assert np.all(np.abs(again - p) <= 0.014)
    assert np.all(np.abs(again - p) <= 0.06 * np.minimum(p, 1 - p))
    ends = from_8_bits(to_8_bits(np.array([0.0, 1.0], np.float32)))
    assert ends[0] < 2e-6
    assert ends[1] > 1 - 2e-6


def test_what_nobody_says_stays_little_also_of_many_classes_and_softened() -> None:
    said = np.zeros(117, np.float32)
    said[5] = 1.0
    soft = from_8_bits(to_8_bits(said)) ** (1 / 2.0)
    assert soft[5] / soft.sum() > 0.85


def test_every_stored_value_comes_back_as_itself() -> None:
    values = np.arange(255, dtype=np.uint8)
    np.testing.assert_array_equal(to_8_bits(from_8_bits(values)), values)


@pytest.mark.parametrize(("size", "first", "share"), [("standard", 32, 1.0), ("small", 16, 0.25), ("tiny", 8, 0.0625)])
def test_a_student_has_the_teachers_grid_and_fewer_channels(size: str, first: int, share: float) -> None:
    spec = a_configuration().network.model_copy(update={"features": (32, 64)})
    teacher = a_configuration(network=spec)
    student, choice = choose_student(teacher, size, lambda configuration: 7, "simulated")
    assert student.name == f"3d_student_{size}"
    assert student.network.features == (first, 2 * first)
    assert (student.memory.peak_bytes, student.memory.source) == (7, "simulated")
    back = {"name": teacher.name, "network": teacher.network, "memory": teacher.memory}
    assert student.model_copy(update=back) == teacher
    percent = float(choice.because.split(" % of the operations")[0].split()[-1])
    assert percent == pytest.approx(100 * share, rel=0.25)


def test_another_size_is_refused_with_those_there_are() -> None:
    with pytest.raises(UserError, match="standard, small, tiny"):
        choose_student(a_configuration(), "huge", lambda configuration: 1, "assumed")
