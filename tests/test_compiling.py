"""network/compiling.py: when a step is compiled, and that trying it leaves no trace."""

import os
import signal
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autoseg.events import Event, Warned
from autoseg.network import compile_workers, losses, unet
from autoseg.network import compiling as module
from autoseg.network.compiling import pays_to_compile, pays_to_record, try_compile
from autoseg.network.device import Device
from autoseg.records import NetworkSpec

CPU = Device(torch.device("cpu"), "fp32")
CARD = Device(torch.device("cuda", 0), "bf16")
LOSS = losses.build("dice_ce", batch_dice=False)
GIB = 2**30


def a_network() -> nn.Module:
    spec = NetworkSpec(
        dimension=2, in_channels=1, classes=3, features=(4, 8), strides=((1, 1), (2, 2)), kernels=((3, 3), (3, 3)),
        encoder_blocks=(1, 1), decoder_blocks=(1,), norm="batch",
    )  # fmt: skip
    return unet.build(spec).train()


def a_batch() -> tuple[Tensor, Tensor]:
    chance = torch.Generator().manual_seed(0)
    image = torch.randn(2, 1, 16, 16, generator=chance).contiguous(memory_format=torch.channels_last)
    return image, torch.randint(-1, 3, (2, 16, 16), generator=chance, dtype=torch.int16)


@pytest.mark.parametrize(
    ("name", "precision", "seconds_left", "pays"),
    [
        ("cuda:0", "bf16", None, True), ("cuda:0", "bf16", 10_000.0, True), ("cuda:0", "bf16", 60.0, False),
        ("cuda:0", "fp32", None, False), ("cpu", "fp32", None, False), ("cpu", "bf16", None, False),
        ("cpu", "bf16", 10_000.0, False), ("mps", "fp16", None, False),
    ],
)  # fmt: skip
def test_compiling_pays_only_where_it_earns_back_its_time(
    name: str, precision: str, seconds_left: float | None, pays: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module.sys, "platform", "linux")
    assert pays_to_compile(Device(torch.device(name), precision), seconds_left) == pays
    monkeypatch.setattr(module.sys, "platform", "win32")
    assert not pays_to_compile(Device(torch.device(name), precision), seconds_left)


def test_only_steps_far_smaller_than_the_card_are_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda card: (GIB, 8 * GIB))
    assert pays_to_record(CARD, GIB)
    assert not pays_to_record(CARD, 3 * GIB)
    assert not pays_to_record(CPU, GIB)


def test_a_compiler_that_fails_is_told_in_one_line_and_training_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(whole: Callable[..., Tensor], mode: str | None, dynamic: bool) -> Callable[..., Tensor]:
        def run(*batch: Tensor) -> Tensor:
            raise RuntimeError("no compiler here")

        return run

    events: list[Event] = []
    monkeypatch.setattr(torch, "compile", broken)
    assert try_compile(a_network(), LOSS, a_batch(), CPU, events.append) is None
    assert len(events) == 1
    assert isinstance(events[0], Warned)
    assert "RuntimeError" in events[0].text


@pytest.mark.skipif(not Path(f"/proc/self/task/{os.getpid()}/children").is_file(), reason="needs /proc")
def test_a_compiler_whose_process_dies_is_no_longer_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import config
    from torch._inductor.async_compile import AsyncCompile

    monkeypatch.setattr(config, "compile_threads", 2)  # on one core torch has no such processes
    pools: list[Any] = []
    orphans: list[int] = []

    def forsaken(whole: Callable[..., Tensor], mode: str | None, dynamic: bool) -> Callable[..., Tensor]:
        def run(*batch: Tensor) -> Tensor:
            pools.append(AsyncCompile.process_pool())
            assert pools[-1].submit(abs, -7).result(60) == 7
            main = pools[-1].process.pid
            orphans.extend(map(int, Path(f"/proc/{main}/task/{main}/children").read_text().split()))
            coming = pools[-1].submit(time.sleep, 600)
            pools[-1].process.kill()  # one that it has begun itself is asleep
            return coming.result(30)

        return run

    events: list[Event] = []
    monkeypatch.setattr(torch, "compile", forsaken)
    for _ in range(2):
        assert try_compile(a_network(), LOSS, a_batch(), CPU, events.append) is None
    for orphan in orphans:  # the rest of it is gone once these are
        os.kill(orphan, signal.SIGKILL)
    for pool in pools:
        pool.read_thread.join(30)
    assert [type(event) for event in events] == [Warned, Warned]
    assert all("(RuntimeError)" in event.text for event in events), "not a TimeoutError"
    assert len(set(map(id, pools))) == 2, "the second time with new processes"
    assert not any(thread.name == "InductorSubproc" for thread in threading.enumerate())


def test_only_descriptors_of_the_pools_own_pipes_are_closed() -> None:
    (read, far_write), (far_read, write), (other, another) = os.pipe(), os.pipe(), os.pipe()
    words = ["python", "main.py", "--workers=2", f"--read-fd={far_read}", f"--write-fd={far_write}"]
    strange = ["python", f"--read-fd={other}", f"--write-fd={read}", "--write-fd=987654"]
    with os.fdopen(read, "rb") as reading, os.fdopen(write, "wb") as writing:
        for args in (strange, words, words):
            process = SimpleNamespace(args=args)
            compile_workers.close_other_ends(
                SimpleNamespace(process=process, read_pipe=reading, write_pipe=writing)
            )
        assert reading.read() == b"", "the end comes"
        for end in (other, another, writing.fileno()):
            os.fstat(end)
        for end in (far_read, far_write):
            with pytest.raises(OSError):
                os.fstat(end)
    os.close(other)
    os.close(another)


@pytest.mark.parametrize(("records", "mode", "runs"), [(False, None, 1), (True, "reduce-overhead", 3)])
def test_trying_the_compiled_step_leaves_no_trace(
    monkeypatch: pytest.MonkeyPatch, records: bool, mode: str | None, runs: int
) -> None:
    seen: list[Any] = []
    network = a_network()

    def eager(whole: Callable[..., Tensor], mode: str | None, dynamic: bool) -> Callable[..., Tensor]:
        seen.append(mode)
        return whole

    monkeypatch.setattr(torch, "compile", eager)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    counted = network.register_forward_hook(lambda *_: seen.append("run"))
    step = try_compile(network, LOSS, a_batch(), CPU, lambda event: pytest.fail(f"{event} was not expected"), records)
    counted.remove()
    assert seen == [mode, *["run"] * runs]
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert all(weight.grad is None for weight in network.parameters())
    assert step is not None
    image, labels = a_batch()
    assert torch.equal(step(image, labels), LOSS(network(image), labels))


def test_every_further_network_and_batch_is_compiled_for_its_own_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs: list[Any] = []
    real = torch.compile

    def keep(graph: Any, examples: Any) -> Any:
        inputs.extend(examples)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda whole, mode, dynamic: real(whole, backend=keep, dynamic=dynamic))
    with torch._dynamo.config.patch(recompile_limit=2):
        for samples in (1, 2, 3):
            before = len(inputs)
            image, labels = (tensor.repeat(2, *[1] * (tensor.ndim - 1))[:samples] for tensor in a_batch())
            network = a_network()
            step = try_compile(network, LOSS, (image, labels), CPU, lambda event: pytest.fail(f"{event}"))
            assert step is not None
            assert len(inputs) > before
    assert all(isinstance(each, Tensor) for each in inputs)  # no sizes that are left open


def test_what_the_compiler_warns_of_is_not_said_and_other_warnings_are(monkeypatch: pytest.MonkeyPatch) -> None:
    def compiled(whole: Callable[..., Tensor], mode: str | None, dynamic: bool) -> Callable[..., Tensor]:
        def run(*tensors: Tensor) -> Tensor:
            for name in ("torch._inductor.lowering", "torch._dynamo.variables", "torch.nn.functional"):
                warnings.warn_explicit(f"by {name}", UserWarning, "file.py", 1, name)
            return whole(*tensors)

        return run

    monkeypatch.setattr(torch, "compile", compiled)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert try_compile(a_network(), LOSS, a_batch(), CPU, lambda event: pytest.fail(f"{event}")) is not None
    assert [str(each.message) for each in said] == ["by torch.nn.functional"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("records", [False, True])
def test_the_compiled_step_has_the_gradient_of_the_eager_one(records: bool) -> None:
    card = Device(torch.device("cuda", 0), "fp32")
    network = a_network().to(card.torch_device)
    batch = tuple(tensor.to(card.torch_device) for tensor in a_batch())
    step = try_compile(network, LOSS, batch, card, lambda event: pytest.fail(f"{event} was not expected"), records)
    assert step is not None
    found = []
    for run in (step, lambda image, labels: LOSS(network(image), labels)):
        for _ in range(3):
            network.zero_grad(set_to_none=True)
            value = run(*batch)
            value.backward()
        found.append([value.detach().clone(), *(weight.grad.clone() for weight in network.parameters())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
