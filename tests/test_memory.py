"""Budgets, the simulated peak of a training step against what torch really allocates, and shapes to stay away from."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from autoseg.errors import UserError
from autoseg.network import losses_sums, memory, simulate, unet
from autoseg.network.accumulators import free_ram_bytes
from autoseg.network.device import Device, cpu_convolves_bf16
from autoseg.network.label_kinds import Labelling
from autoseg.records import AugmentSpec, Budget, Configuration, Memory, NetworkSpec, TrainSpec

GIB = 2**30
THICK_SLICES = ((1, 1, 1), (1, 2, 2), (2, 2, 2))
FLAT_KERNELS = ((1, 3, 3), (1, 3, 3), (3, 3, 3))


def configuration(
    patch: tuple[int, ...],
    batch: int = 2,
    strides: tuple[tuple[int, ...], ...] | None = None,
    features: tuple[int, ...] = (16, 32, 64),
    optimizer: str = "adamw",
    loss: str = "dice_ce",
    **spec: Any,
) -> Configuration:
    dimension, stages = len(patch), len(features)
    network = {
        "in_channels": 1,
        "classes": 3,
        "kernels": ((3,) * dimension,) * stages,
        "encoder_blocks": (2,) * stages,
        "decoder_blocks": (2,) * (stages - 1),
        "strides": strides or ((1,) * dimension,) + ((2,) * dimension,) * (stages - 1),
    }
    return Configuration(
        name="any",
        dimension=dimension,
        spacing_mm=(1.0, 1.0, 1.0),
        median_shape_voxels=(40, 40, 40),
        patch_voxels=patch,
        batch_size=batch,
        normalization=("zscore",),
        mask_for_normalization=(False,),
        network=NetworkSpec(**network | spec, dimension=dimension, features=features),
        train=TrainSpec(optimizer=optimizer, loss=loss, augment=AugmentSpec(rotation_rad=(0.0,))),
        memory=Memory(source="assumed", peak_bytes=0),
    )


THICK = {"strides": THICK_SLICES, "kernels": FLAT_KERNELS}
TWENTY: tuple[tuple[str, Configuration], ...] = (
    ("fp32", configuration((48, 48))),
    ("bf16", configuration((48, 48), batch=5, classes=2, features=(16, 32))),
    ("fp32", configuration((64, 40), kind="residual")),
    ("bf16", configuration((64, 32), features=(32, 64), in_channels=3)),
    ("fp32", configuration((32, 32), batch=12, norm="batch", optimizer="sgd", features=(16, 32))),
    ("bf16", configuration((32, 48), batch=6, norm="group", classes=9)),
    ("fp32", configuration((48, 64), batch=1, deep_supervision=False, features=(16, 32))),
    ("bf16", configuration((16, 16, 16))),
    ("fp32", configuration((16, 24, 16), features=(32, 64))),
    ("fp32", configuration((24, 16, 16), batch=3, in_channels=4, features=(16, 32))),
    ("bf16", configuration((20, 28, 20), features=(16, 32), optimizer="sgd")),
    ("fp32", configuration((16, 16, 16), kind="residual", features=(16, 32))),
    ("bf16", configuration((16, 16, 24), kind="residual", classes=5, features=(16, 32))),
    ("fp32", configuration((8, 24, 24), **THICK)),
    ("bf16", configuration((6, 32, 32), **THICK, in_channels=2)),
    ("fp32", configuration((4, 48, 40), **THICK, kind="residual")),
    ("bf16", configuration((10, 24, 32), **THICK, norm="group")),
    ("fp32", configuration((24, 24, 24), features=(24, 48), norm="batch")),
    ("bf16", configuration((16, 16, 16), features=(32, 64), dropout=0.2)),
    ("bf16", configuration((16, 16, 16), features=(32, 64), classes=40)),
    ("fp32", configuration((16, 16, 16), features=(32, 64), kind="residual", block="bottleneck", bias=True)),
    ("bf16", configuration((32, 32), kind="residual", squeeze_excitation=4, stochastic_depth=0.2, features=(32, 64))),
    ("bf16", configuration((16, 16, 16), upsampling="linear", features=(16, 32))),
    ("fp32", configuration((8, 24, 24), **THICK, upsampling="linear")),
)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ------------------------------------------------------------------------------------------------ simulation


@pytest.mark.parametrize(("precision", "planned"), TWENTY, ids=lambda each: getattr(each, "patch_voxels", each))
def test_the_simulated_peak_is_within_two_percent_of_what_torch_allocates(
    precision: str, planned: Configuration
) -> None:
    if precision == "bf16" and not cpu_convolves_bf16():
        pytest.skip("this CPU has no convolutions in bf16, and nobody trains with torch's own")
    simulated = simulate.replay(planned, precision, "cpu").peak_with_copies_bytes
    real = simulate.real_cpu_peak(planned, precision)
    if real < 0.98 * simulated:  # torch's profiler may lose an allocation on a busy machine; it never invents one
        real = max(real, simulate.real_cpu_peak(planned, precision))
    # what oneDNN copies was read off CPUs with AVX-512, with and without instructions of its own for bf16
    unread = computes_in_tiles() if precision == "bf16" else not cpu_convolves_bf16()
    assert simulated == pytest.approx(real, rel=0.1 if unread else 0.02)


def test_regions_and_a_table_of_what_was_annotated_are_counted() -> None:
    planned = configuration((48, 48), features=(8, 16), classes=8, encoder_blocks=(1, 1), decoder_blocks=(1,))
    regions, in_part, found = Labelling(tuple((k,) for k in range(1, 9))), Labelling((), True), []
    for labelling in (regions, in_part):
        found.append(simulate.replay(planned, "fp32", "cpu", labelling).peak_with_copies_bytes)
        real = simulate.real_cpu_peak(planned, "fp32", labelling)
        assert found[-1] == pytest.approx(real, rel=0.02 if cpu_convolves_bf16() else 0.1)
    assert found[1] > 1.2 * found[0]  # regions have losses one after the other


@pytest.mark.parametrize("loss", ["dice_cldice", "tversky", "dice_ce"])
def test_a_step_of_one_region_has_a_loss(loss: str) -> None:
    planned = configuration((16, 16), features=(4, 8), classes=1, loss=loss)
    step = simulate.make_step(planned, Device(torch.device("cpu"), "fp32"), Labelling(((1, 2),)))
    assert torch.isfinite(step.run())


def computes_in_tiles() -> bool:
    """Whether this CPU has AMX, for which oneDNN has kernels that nobody has read yet."""
    info = Path("/proc/cpuinfo")
    return info.is_file() and "amx_bf16" in info.read_text()


@pytest.mark.parametrize("patch", [(32, 32), (16, 16, 16)])
def test_a_reading_for_a_card_is_the_same_on_every_machine(patch: tuple[int, ...]) -> None:
    """Without oneDNN this CPU takes the convolutions that one without bf16 takes, in another layout."""
    planned = configuration(patch)
    expected = simulate.replay(planned, "bf16", "cuda")
    torch.backends.mkldnn.set_flags(_enabled=False)
    try:
        found = simulate.replay(planned, "bf16", "cuda")
    finally:
        torch.backends.mkldnn.set_flags(_enabled=True)
    assert found == expected


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_fake_tensors_live_and_die_like_real_ones(precision: str) -> None:
    planned = configuration((16, 16, 16), kind="residual")
    with simulate.LiveBytes() as live:
        step = simulate.make_step(planned, Device(torch.device("cpu"), precision))
        step.run()
        live.peak_bytes = live.live_bytes
        step.run()
    assert simulate.replay(planned, precision, "cpu").peak_bytes == pytest.approx(live.peak_bytes, rel=0.001)


def test_the_tracker_counts_a_storage_once_and_forgets_it_when_it_dies() -> None:
    with simulate.LiveBytes() as live:
        kept = torch.zeros(1000)
        view = kept[10:].view(3, -1)
        assert live.live_bytes == 4000
        del kept
        assert live.live_bytes == 4000
        del view
        assert live.live_bytes == 0
    assert live.peak_bytes == 4000
    assert sum(change for _, change in live.events) == 0


def test_an_average_of_the_weights_is_counted() -> None:
    planned = configuration((16, 16))
    train = planned.train.model_copy(update={"average_decay": 0.99})
    averaged, plain = (
        simulate.replay(each, "fp32").peak_bytes for each in (planned.model_copy(update={"train": train}), planned)
    )
    weights = sum(weight.numel() for weight in unet.build(planned.network).parameters())
    assert averaged - plain == 4 * weights


def test_a_simulation_changes_nothing_outside_itself() -> None:
    torch.manual_seed(3)
    before, pieces, sizes = torch.get_rng_state(), losses_sums._pieces, dict(losses_sums.PIECE)
    simulate.replay(configuration((16, 16)), "bf16")
    assert torch.equal(torch.get_rng_state(), before)
    assert losses_sums._pieces is pieces
    assert sizes == losses_sums.PIECE
    assert type(torch.zeros(1)) is torch.Tensor


def test_a_replay_for_a_card_does_nothing_that_only_cpus_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Instance norms would hide it: torch's leave channels last, and with it what is meant for CPUs."""
    calls: list[str] = []
    raised = unet._Transposed.apply
    monkeypatch.setattr(unet._Transposed, "apply", lambda *given: calls.append("bias apart") or raised(*given))
    planned = configuration((32, 32), batch=12, norm="batch")
    for device, expected in (("cuda", []), ("cpu", ["bias apart", "bias apart"])):
        calls.clear()
        simulate.replay(planned, "bf16", device)
        assert calls == expected


def test_memory_grows_linearly_with_the_batch() -> None:
    one, two, four = (
        simulate.replay(configuration((32, 32, 32), batch=b, features=(16, 32)), "bf16").peak_bytes for b in (1, 2, 4)
    )
    assert four - two == pytest.approx(2 * (two - one), rel=0.02)


def test_large_patches_and_many_classes_are_simulated_in_seconds_without_memory() -> None:
    planned = configuration((128, 128, 128), classes=105, features=(32, 64, 128, 256, 320, 320))
    assert simulate.replay(planned, "bf16").peak_bytes > 5 * GIB


def test_group_norm_needs_more_on_cuda_where_autocast_computes_it_in_fp32() -> None:
    planned = configuration((32, 32, 32), norm="group")
    assert (
        simulate.replay(planned, "bf16", "cuda").peak_bytes > 1.1 * simulate.replay(planned, "bf16", "cpu").peak_bytes
    )


# ------------------------------------------------------------------------------------------------ allocator


def test_the_allocator_takes_small_middle_and_large_segments() -> None:
    mib = 2**20
    assert simulate.reserved_by([(1, 100)]) == 2 * mib
    assert simulate.reserved_by([(1, 5 * mib)]) == 20 * mib
    assert simulate.reserved_by([(1, 11 * mib)]) == 12 * mib
    assert simulate.reserved_by([(i, 1000) for i in range(2048)]) == 2 * mib
    assert simulate.reserved_by([(i, 1025) for i in range(2048)]) == 4 * mib


def test_the_allocator_uses_freed_blocks_again_and_merges_neighbours() -> None:
    mib = 2**20
    again = [(1, 40 * mib), (1, -40 * mib), (2, 30 * mib), (3, 10 * mib)]
    assert simulate.reserved_by(again) == 40 * mib
    merged = [(1, 9 * mib), (2, 9 * mib), (1, -9 * mib), (2, -9 * mib), (3, 18 * mib)]
    assert simulate.reserved_by(merged) == 20 * mib
    apart = [(1, 9 * mib), (2, 9 * mib), (1, -9 * mib), (3, 18 * mib)]
    assert simulate.reserved_by(apart) == 38 * mib


def test_a_card_must_hold_more_than_the_tensors_and_a_cpu_no_context() -> None:
    reading = simulate.Reading(10 * GIB, 11 * GIB, GIB, 12 * GIB)
    assert memory.needed_bytes(reading, "cuda") > 12 * GIB * (1 + memory.MARGIN) + memory.CONTEXT_BYTES
    assert memory.needed_bytes(reading, "cpu") == int(11 * GIB * memory.CPU_HEAP)


# ------------------------------------------------------------------------------------------------ budgets


@pytest.mark.parametrize(
    ("text", "expected"),
    [("11GB", 11 * GIB), ("11GiB", 11 * GIB), (" 8000 mb", 8000 * 2**20), ("1.5G", 3 * GIB // 2), ("1TB", 1024 * GIB)],
)
def test_memory_is_read_in_powers_of_two(text: str, expected: int) -> None:
    assert memory.parse_bytes(text) == expected


@pytest.mark.parametrize(
    "text", ["", "11", "eleven GB", "0GB", "-4GB", "4 parsecs", "1e3GB", "nanGB", "0.0000000001MB"]
)
def test_memory_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="--memory"):
        memory.budget_for(text, None)


def test_memory_alone_plans_for_a_card_that_is_not_there() -> None:
    budget = memory.budget_for("11GB")
    assert (budget.device, budget.total_bytes) == ("cuda", 11 * GIB)
    assert budget.budget_bytes == 11 * GIB - memory.RESERVE_BYTES
    measure, source = memory.measurer(budget)
    assert source == "simulated"
    assert memory.CONTEXT_BYTES < measure(configuration((16, 16))) < budget.budget_bytes


def test_a_card_smaller_than_the_reserve_is_refused() -> None:
    with pytest.raises(UserError, match=r"^50 MB on a CUDA card leaves nothing to train with after 0\.25 GB"):
        memory.budget_for("50MB")


def test_a_gpu_that_is_not_there_is_refused() -> None:
    with pytest.raises(UserError, match="cuda:99"):
        memory.budget_for(None, "cuda:99")


def test_the_cpu_gives_half_its_memory_but_at_most_eight_gigabytes(monkeypatch: pytest.MonkeyPatch) -> None:
    for allowed, expected in ((6 * GIB, 3 * GIB), (64 * GIB, 8 * GIB)):
        monkeypatch.setattr(memory, "allowed_ram_bytes", lambda allowed=allowed: allowed)
        budget = memory.budget_for(None, "cpu")
        assert (budget.device, budget.total_bytes, budget.budget_bytes) == ("cpu", allowed, expected)
        assert memory.budget_for("4GB", "cpu").budget_bytes == 4 * GIB
        with pytest.raises(UserError, match="this machine allows"):
            memory.budget_for("65GB", "cpu")


def test_what_a_process_may_use_is_never_more_than_the_machine_has() -> None:
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < memory.allowed_ram_bytes() <= physical
    assert memory.allowed_ram_bytes(Path("nowhere"), Path("nowhere")) == physical


def test_the_limit_of_a_job_counts_for_its_tasks(tmp_path: Path) -> None:
    """A scheduler limits the job; its tasks, cgroups below, have no limit of their own."""
    task = tmp_path / "system.slice" / "job_7" / "step_0" / "task_0"
    task.mkdir(parents=True)
    (task / "memory.max").write_text("max\n")
    (tmp_path / "system.slice" / "job_7" / "memory.max").write_text("1234567\n")
    (tmp_path / "own").write_text("0::/system.slice/job_7/step_0/task_0\n")
    assert memory.allowed_ram_bytes(tmp_path, tmp_path / "own") == 1234567


def test_what_cgroups_use_already_is_not_free(tmp_path: Path) -> None:
    """At each level its own limit and use count; files that nobody reads give way."""
    job = tmp_path / "job"
    task = job / "task"
    task.mkdir(parents=True)
    (tmp_path / "own").write_text("0::/job/task\n")
    (tmp_path / "info").write_text("MemTotal: 900 kB\nMemAvailable:      500 kB\n")

    def free() -> int:
        return free_ram_bytes(tmp_path, tmp_path / "own", tmp_path / "info")

    assert free() == 500 * 1024
    (task / "memory.max").write_text("max\n")
    (task / "memory.current").write_text("300000\n")
    assert free() == 500 * 1024
    (job / "memory.max").write_text("400000\n")
    (job / "memory.current").write_text("350000\n")
    assert free() == 50_000
    (job / "memory.stat").write_text("anon 100000\nfile 250000\ninactive_file 200000\nactive_file 50000\n")
    assert free() == 250_000
    (job / "memory.current").write_text("700000\n")
    assert free() == 0
    first = tmp_path / "memory" / "job"  # version 1
    first.mkdir(parents=True)
    (job / "memory.max").unlink()
    (tmp_path / "own").write_text("4:memory:/job\n")
    (first / "memory.limit_in_bytes").write_text("300000\n")
    (first / "memory.usage_in_bytes").write_text("290000\n")
    (first / "memory.stat").write_text("inactive_file 1\ntotal_inactive_file 20000\n")
    assert free() == 30_000


def test_a_system_that_does_not_tell_its_memory_has_a_usual_amount(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "sysconf")
    assert memory.allowed_ram_bytes(tmp_path, tmp_path / "own") == memory.UNKNOWN_RAM_BYTES
    assert free_ram_bytes(tmp_path, tmp_path / "own", tmp_path / "info") == memory.UNKNOWN_RAM_BYTES


def test_a_card_gives_what_other_processes_leave_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "pick", lambda name: Device(torch.device("cuda", 1), "bf16"))
    monkeypatch.setattr(memory, "native_precision", lambda device: "bf16")
    monkeypatch.setattr(memory, "_card", lambda card: memory._Card(24 * GIB, 9 * GIB, GIB, "570.1"))
    budget = memory.budget_for(None, "cuda:1")
    assert (budget.device, budget.driver, budget.total_bytes) == ("cuda:1", "570.1", 24 * GIB)
    assert budget.budget_bytes == 16 * GIB - memory.RESERVE_BYTES
    assert memory.budget_for("11GB", "cuda:1").budget_bytes == 11 * GIB - memory.RESERVE_BYTES
    assert memory.budget_for("20GB", "cuda:1").budget_bytes == 16 * GIB - memory.RESERVE_BYTES
    with pytest.raises(UserError, match=r"has 16\.00 GB free of 24\.00 GB"):
        memory.budget_for("80GB", "cuda:1")
    assert memory.measurer(budget)[1] == "measured"


def test_a_card_has_no_more_than_cuda_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    known = SimpleNamespace(uuid="", total_memory=22 * GIB)
    fake = SimpleNamespace(memory_reserved=lambda card: GIB, get_device_properties=lambda card: known)
    monkeypatch.setattr(memory.torch, "cuda", fake)
    monkeypatch.setattr(memory, "_ask_nvml", lambda uuid: memory._Card(24 * GIB, 2 * GIB, None, "570.1"))
    assert memory._card(torch.device("cuda", 0)) == (22 * GIB, 2 * GIB, GIB, "570.1")


def failing_card(monkeypatch: pytest.MonkeyPatch, error: Exception, simulated_bytes: int) -> list[str]:
    """A card of 8 GB on which every step fails; what is done to clean it is listed."""
    calls: list[str] = []

    def fail(*_: object) -> None:
        raise error

    fake = SimpleNamespace(
        mem_get_info=lambda card: (3 * GIB, 8 * GIB),
        max_memory_reserved=lambda card: 2 * GIB,
        empty_cache=lambda: calls.append("emptied"),
        reset_peak_memory_stats=lambda card: calls.append("reset"),
        synchronize=lambda card: None,
        max_memory_allocated=lambda card: GIB,
    )
    monkeypatch.setattr(memory.torch, "cuda", fake)
    monkeypatch.setattr(memory, "set_up", lambda device: None)
    monkeypatch.setattr(memory.simulation, "make_step", fail)
    reading = simulate.Reading(simulated_bytes, simulated_bytes, 0, simulated_bytes)
    monkeypatch.setattr(memory.simulation, "replay", lambda *_: reading)
    return calls


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("FIND was unable to find an engine to execute this computation"),
        RuntimeError("GET was unable to find an engine to execute this computation"),
    ],
)
@pytest.mark.parametrize("simulated", [6 * GIB, 40 * GIB])
def test_a_step_that_does_not_fit_is_simulated_and_leaves_the_card_clean(
    monkeypatch: pytest.MonkeyPatch, error: Exception, simulated: int
) -> None:
    calls = failing_card(monkeypatch, error, simulated)
    found = memory.measure_on_device(configuration((16, 16)), Device(torch.device("cuda", 0), "bf16"))
    assert found > max(8 * GIB, simulated)
    assert calls[-2:] == ["emptied", "reset"]


def test_a_step_that_fails_otherwise_is_no_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    failing_card(monkeypatch, RuntimeError("CUDA error: device-side assert triggered"), GIB)
    with pytest.raises(RuntimeError, match="assert"):
        memory.measure_on_device(configuration((16, 16)), Device(torch.device("cuda", 0), "bf16"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_simulation_never_promises_less_than_a_card_needs() -> None:
    device = Device(torch.device("cuda", 0), "bf16")
    planned = configuration((96, 96, 96), features=(32, 64, 128, 256, 320))
    before = torch.cuda.memory_allocated(0)
    # without the context: in this process it also holds whatever other tests compiled
    simulated = memory.needed_bytes(simulate.replay(planned, "bf16", "cuda")) - memory.CONTEXT_BYTES
    _, reserved = memory.device_peaks(planned, device)
    assert reserved <= simulated <= 1.5 * reserved
    assert torch.cuda.memory_allocated(0) == before


# ------------------------------------------------------------------------------------------------ safe shapes

PLANNED_SHAPES = (
    ((40, 56, 40), ((1, 1, 1), (2, 2, 2), (2, 2, 2), (2, 2, 2))),
    ((32, 32, 32), ((1, 1, 1), (2, 2, 2), (2, 2, 2), (2, 2, 2))),
    ((20, 64, 48), ((1, 1, 1), (1, 2, 2), (2, 2, 2), (1, 2, 2))),
    ((8, 16, 16), ((1, 1, 1), (2, 2, 2), (2, 2, 2), (2, 1, 2))),
)


@pytest.mark.parametrize(("patch", "strides"), PLANNED_SHAPES)
def test_every_planned_strided_convolution_is_right_in_bf16(
    patch: tuple[int, ...], strides: tuple[tuple[int, ...], ...]
) -> None:
    planned = configuration(patch, strides=strides, features=(16, 32, 64, 64))
    torch.manual_seed(0)
    network = unet.build(planned.network)
    size = patch
    for stage, stride in zip(network.encoder, strides, strict=True):
        convolution = stage[0].conv
        size_in, size = size, tuple(s // t for s, t in zip(size, stride, strict=True))
        if max(stride) > 1:
            _same_in_both(convolution, torch.randn(2, convolution.in_channels, *size_in))
    for level, up in enumerate(network.up):
        below = strides[: level + 2]
        size_in = tuple(
            p // d for p, d in zip(patch, (_product(axis) for axis in zip(*below, strict=True)), strict=True)
        )
        _same_in_both(up, torch.randn(2, up.in_channels, *size_in))


def _same_in_both(convolution: nn.Module, x: torch.Tensor) -> None:
    exact, rough = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected = convolution(exact)
    with torch.autocast("cpu", torch.bfloat16):
        found = convolution(rough)
    slope = torch.randn_like(expected)
    expected.backward(slope)
    found.float().backward(slope)
    assert (found - expected).abs().max() < 0.05 * expected.abs().max()
    assert (rough.grad - exact.grad).abs().max() < 0.05 * exact.grad.abs().max()


def _product(numbers: tuple[int, ...]) -> int:
    result = 1
    for number in numbers:
        result *= number
    return result



def test_a_budget_says_which_torch_it_was_made_with() -> None:
    budget = memory.budget_for("8GB")
    assert isinstance(budget, Budget)
    assert budget.torch_version == torch.__version__
