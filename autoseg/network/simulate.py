"""How many bytes a training step needs at its peak, replayed without a device.

It is replayed on tensors that have shapes but no memory. The step is the one that training runs: network, loss with
deep supervision, mixed precision, gradients, clipping and optimizer state. It runs on fake CPU tensors: without a GPU,
torch can build no fake CUDA tensors that learn. What CUDA would do otherwise (autocast rules, size of the loss's
pieces, allocator, workspaces) is added here and marked.

Legend: B batch, C channel, Z Y X voxels (2D: Y X).
"""

import weakref
from bisect import bisect_left, insort
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from autoseg.network import kernels, losses, losses_sums, unet
from autoseg.network.device import Device, layout
from autoseg.network.label_kinds import Labelling
from autoseg.network.step import make_optimizer, step
from autoseg.records import Configuration

MIB = 2**20
CONVOLUTIONS = (nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d)
CONVOLUTION = torch.ops.aten.convolution.default
DEVICE = torch.ops.prim.device.default
CONVOLUTION_BACKWARD = torch.ops.aten.convolution_backward.default

Event = tuple[int, int]
"""A number that names one piece of memory, and the bytes it takes (positive) or gives back (negative)."""


@dataclass(frozen=True, slots=True)
class Reading:
    """What one training step needed.

    peak_bytes: largest sum of live tensors, to be compared with torch.cuda.max_memory_allocated() without workspaces.
    peak_with_copies_bytes: the same with what a CPU's convolutions copy inside themselves.
    workspace_bytes: the allowance for the convolution that needs the largest workspace.
    reserved_bytes: what CUDA's caching allocator would hold for the tensors and those workspaces together.
    """

    peak_bytes: int
    peak_with_copies_bytes: int
    workspace_bytes: int
    reserved_bytes: int


# ------------------------------------------------------------------------------------------------ the step


class Step(NamedTuple):
    """One training step that can be repeated, and what a training keeps; `average` of the weights where one is kept."""

    network: nn.Module
    optimizer: torch.optim.Optimizer
    average: list[Tensor]
    run: Callable[[], Tensor]


def make_step(configuration: Configuration, device: Device, labelling: Labelling = Labelling()) -> Step:
    """The training step of `configuration` on `device`, on a batch without content; nothing has run yet."""
    spec, train = configuration.network, configuration.train
    where, laid_out = device.torch_device, layout(configuration.dimension, device)
    with where:  # not .to(), here and below: fake parameters refuse to be swapped
        network = unet.build(spec).train()
    for module in network.modules():
        if isinstance(module, CONVOLUTIONS):
            module.weight = nn.Parameter(module.weight.detach().contiguous(memory_format=laid_out))
    optimizer = make_optimizer(network, train, device)
    loss = losses.loss_of(configuration, labelling.regions)
    shape = (configuration.batch_size, *configuration.patch_voxels)
    image = torch.zeros(shape[0], spec.in_channels, *shape[1:], device=where).contiguous(memory_format=laid_out)
    labels = torch.zeros(shape, dtype=torch.int16, device=where)
    in_part = (torch.ones(shape[0], spec.classes, dtype=torch.bool, device=where),) if labelling.in_part else ()
    average = [weight.detach().clone() for weight in network.parameters()] if train.average_decay else []

    def run() -> Tensor:
        return step(network, optimizer, loss, image, labels, device, train.clip_norm, extra=in_part)

    return Step(network, optimizer, average, run)


# ------------------------------------------------------------------------------------------------ the replay


class LiveBytes(TorchDispatchMode):
    """Follows every storage that an operation returns until it is freed; works on fake and on real tensors.

    `events` lists what was taken and given back since the start, `workspaces` the largest allowance per convolution.
    Memory that a kernel takes and frees inside itself is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live_bytes = self.peak_bytes = self.peak_with_copies_bytes = self.workspace_bytes = 0
        self.events: list[Event] = []
        self._alive: dict[int, weakref.ref] = {}
        self._names = iter(range(1, 2**62))

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is DEVICE and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # two thirds of all calls; the long way takes a quarter of the replay
        before = self.live_bytes
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._see(leaf)
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        if func is CONVOLUTION:
            inside = kernels.convolution_bytes(args[0], args[1], tuple(args[3]), args[6], result)
            self.peak_with_copies_bytes = max(self.peak_with_copies_bytes, before + inside)
            self._allow_workspace(args[0], args[1], result)
        elif func is CONVOLUTION_BACKWARD:
            gradient, inputs, weight = args[:3]
            inside = kernels.convolution_backward_bytes(gradient, inputs, weight, tuple(args[4]), args[7], args[10][0])
            self.peak_with_copies_bytes = max(self.peak_with_copies_bytes, before + inside)
            self._allow_workspace(gradient, inputs, weight)
        self.peak_with_copies_bytes = max(self.peak_with_copies_bytes, self.live_bytes)
        return result

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive or size == 0:
            return
        name = next(self._names)

        def freed(_: weakref.ref) -> None:
            del self._alive[key]
            self.live_bytes -= size
            self.events.append((name, -size))

        self._alive[key] = weakref.ref(storage, freed)
        self.live_bytes += size
        self.events.append((name, size))

    def _allow_workspace(self, *tensors: Tensor) -> None:
        # cuDNN copies half-precision input, output and weights to channels-last, and no setting limits it
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        self.workspace_bytes = max(self.workspace_bytes, size)
        name = next(self._names)
        self.events += [(name, size), (name, -size)]


class _CudaCasts(TorchFunctionMode):
    """Casts where CUDA's autocast differs from the CPU's: group norm in fp32, pooling and interpolation in half.

    Source: the two lists in torch/csrc and aten/src/ATen/autocast_mode.h; losses leave autocast by themselves.
    """

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is nn.functional.group_norm:
            args = tuple(arg.float() if isinstance(arg, Tensor) else arg for arg in args)
        if func in (torch._C._nn.avg_pool2d, torch._C._nn.avg_pool3d, nn.functional.interpolate):
            with torch.autocast("cpu", enabled=False):
                return func(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def replay(
    configuration: Configuration, precision: str, device_type: str = "cuda", labelling: Labelling = Labelling()
) -> Reading:
    """Replay one warm training step without computing it; see `Reading`. Takes about a second, no memory.

    Args:
        configuration: what to train.
        precision: "fp32", "bf16" or "fp16".
        device_type: "cuda" or "cpu": whose autocast rules and loss pieces are meant.
    """
    device = Device(torch.device("cpu"), precision)
    with ExitStack() as stack:
        stack.enter_context(_few_pieces(device_type))
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        if device_type == "cuda":
            stack.enter_context(_layouts_of_cuda())
            stack.enter_context(_operators_of_cuda())
        if device_type == "cuda" and precision != "fp32":
            stack.enter_context(_CudaCasts())
        live = stack.enter_context(LiveBytes())
        step = make_step(configuration, device, labelling)
        _fill_optimizer_state(step)
        live.peak_bytes = live.peak_with_copies_bytes = live.live_bytes
        step.run()
        events = list(live.events)
    return Reading(live.peak_bytes, live.peak_with_copies_bytes, live.workspace_bytes, reserved_by(events))


def _fill_optimizer_state(step: Step) -> None:
    """What a first step leaves behind, at a tenth of its time: moments of every parameter."""
    for parameter in step.network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    step.optimizer.step()
    step.optimizer.zero_grad(set_to_none=True)


@contextmanager
def _few_pieces(device_type: str) -> Iterator[None]:
    """Let the losses go through the first two and the last piece only: the pieces between need the same memory.

    With 100 classes there are thousands. Their size is that of `device_type`, though the tensors are on the CPU.
    """
    whole, sizes = losses_sums._pieces, dict(losses_sums.PIECE)

    def few(logits_BKN: Tensor) -> Iterator[slice]:
        pieces = list(whole(logits_BKN))
        return iter(pieces if len(pieces) < 4 else (*pieces[:2], pieces[-1]))

    losses_sums.PIECE["cpu"] = sizes.get(device_type, sizes["cuda"])
    losses_sums._pieces = few
    try:
        yield
    finally:
        losses_sums._pieces = whole
        losses_sums.PIECE.update(sizes)


@contextmanager
def _operators_of_cuda() -> Iterator[None]:
    """Let instance norms and upsamplings be torch's, as on a card, though the tensors are on the CPU."""
    on_cpus, raised = unet.InstanceNorm._sample_by_sample, unet._raised
    unet.InstanceNorm._sample_by_sample = lambda self, x: False  # type: ignore[method-assign]
    unet._raised = lambda up, x: up(x)
    try:
        yield
    finally:
        unet.InstanceNorm._sample_by_sample = on_cpus  # type: ignore[method-assign]
        unet._raised = raised


@contextmanager
def _layouts_of_cuda() -> Iterator[None]:
    """Let convolutions put out channels-last wherever their input or weights are, as cuDNN does.

    Fake tensors ask which library this machine's CPU would take, and of those only oneDNN has cuDNN's rule
    (cudnn_conv_suggest_memory_format and mkldnn_conv_use_channels_last in aten's ConvUtils.h). A CPU without bf16 takes
    another for half precision, and the reading would depend on the machine.
    """
    select = torch._C._select_conv_backend
    torch._C._select_conv_backend = lambda *_, **__: torch._C._ConvBackend.Mkldnn  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch._C._select_conv_backend = select


# ------------------------------------------------------------------------------------------------ CUDA's allocator

ROUND, SMALL, SMALL_SEGMENT, MIDDLE, MIDDLE_SEGMENT = 512, MIB, 2 * MIB, 10 * MIB, 20 * MIB
"""Constants of c10/cuda/CUDACachingAllocator: sizes are rounded to 512 B; up to 1 MiB come from segments of 2 MiB, up
to 10 MiB from segments of 20 MiB, larger ones from their own segment of a multiple of 2 MiB."""


def reserved_by(events: Sequence[Event]) -> int:
    """Bytes that torch's caching allocator takes from the driver for these events: best fit, split, merge, keep.

    Segments are never given back here, as on a card where nothing runs out.
    """
    pools: dict[bool, list[tuple[int, int]]] = {True: [], False: []}  # is small -> sorted (size, address) that are free
    free_at: dict[int, tuple[int, bool]] = {}  # address -> size, is small
    free_until: dict[int, int] = {}  # end -> address
    used: dict[int, tuple[int, int, bool]] = {}
    reserved, top = 0, 0

    def put(address: int, size: int, small: bool) -> None:
        insort(pools[small], (size, address))
        free_at[address], free_until[address + size] = (size, small), address

    def take(address: int) -> int:
        size, small = free_at.pop(address)
        del free_until[address + size]
        pools[small].pop(bisect_left(pools[small], (size, address)))
        return size

    for name, change in events:
        if change > 0:
            size = -(-change // ROUND) * ROUND
            small = size <= SMALL
            found = bisect_left(pools[small], (size, 0))
            if found == len(pools[small]):
                own = -(-size // (2 * MIB)) * 2 * MIB
                segment = SMALL_SEGMENT if small else MIDDLE_SEGMENT if size < MIDDLE else own
                reserved += segment
                put(top, segment, small)
                top += segment + ROUND  # a gap: blocks of two segments never merge
                found = bisect_left(pools[small], (size, 0))
            address = pools[small][found][1]
            block = take(address)
            rest = block - size
            if rest >= ROUND if small else rest > SMALL:
                put(address + size, rest, small)
                block = size
            used[name] = (address, block, small)
        elif name in used:
            address, block, small = used.pop(name)
            if address + block in free_at:
                block += take(address + block)
            if address in free_until:
                address = free_until[address]
                block += take(address)
            put(address, block, small)
    return reserved


# ------------------------------------------------------------------------------------------------ the real thing


def real_cpu_peak(configuration: Configuration, precision: str, labelling: Labelling = Labelling()) -> int:
    """Peak bytes that torch's CPU allocator really handed out in one warm step, read from the profiler's events.

    Runs two real steps, so keep the patch small. Independent of `LiveBytes`: it counts what kernels take inside too.
    """
    device = Device(torch.device("cpu"), precision)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step = make_step(configuration, device, labelling)
        step.run()
        with torch.profiler.record_function("warm step"):
            step.run()
    assert profile.profiler is not None
    events = profile.profiler.kineto_results.events()
    begin = next(event.start_ns() for event in events if event.name() == "warm step")
    live = peak = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        live += event.nbytes()
        if event.start_ns() >= begin:
            peak = max(peak, live)
    return peak
