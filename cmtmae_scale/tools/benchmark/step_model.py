"""A model of the step: FLOPs, bytes and launches by part, from operations counted on fake tensors.

The functions of the run itself are called with the recipe's sizes, without memory or arithmetic.
Matrix products, convolutions and attention are counted by torch's formulas, 2 FLOPs per
multiply-add. Every other operation reads its inputs and writes its outputs once and is one launch;
views are free. A compiled part is modelled as if each run of operations between two matrix products
were one kernel, which reads the outputs of other kernels and writes the inputs of other kernels.
"""

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import flop_counter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cmtmae_scale.backends.adamw import make_adamw, start_state, trainable
from cmtmae_scale.backends.base import Backend
from cmtmae_scale.config.needs import needs
from cmtmae_scale.config.schema import Config
from cmtmae_scale.config.teachers import online_fraction
from cmtmae_scale.errors import ConfigError
from cmtmae_scale.method.attend import attention_of_a_gpu
from cmtmae_scale.method.masking import grid_counts
from cmtmae_scale.method.momentum import update_momentum
from cmtmae_scale.method.targets import TokenLayout
from cmtmae_scale.pretraining.build import make_objective
from cmtmae_scale.pretraining.channels import open_channels
from cmtmae_scale.pretraining.prepare import MicroBatch, Models, prepare
from cmtmae_scale.pretraining.scalars import scalars_at
from cmtmae_scale.teachers.base import TeacherSource, TeacherView, forward_all, view_sizes
from cmtmae_scale.teachers.build import compute_dtype
from cmtmae_scale.teachers.online import OnlineTeacher
from cmtmae_scale.tools.benchmark.table import markdown_table
from cmtmae_scale.tools.estimate import MetaNetworks, build_meta_networks, list_teachers
from dataloading.stream import Batch

TEACHER, MOMENTUM, PREPARE = "teacher", "momentum encoder", "masks and targets"
STUDENT, DECODER, LOSS = "student", "decoder", "loss"
CASTS, OPTIMIZER, AVERAGE = "casts of weights and gradients", "optimizer", "EMA update"
PARTS = (TEACHER, MOMENTUM, PREPARE, STUDENT, DECODER, LOSS, CASTS, OPTIMIZER, AVERAGE)
"""Parts in the order of a step; each of several teachers is a part, "teacher NAME"."""
NEVER_FUSED = (CASTS, OPTIMIZER, AVERAGE)
"""Parts that already have few launches, over lists of tensors."""
WITHOUT_KERNEL = frozenset({"empty", "empty_like", "empty_strided", "new_empty", "detach"})
ALONE = frozenset({"sort", "topk", "index_put_", "scatter", "scatter_", "scatter_add"})
"""Operations that torch.compile does not fuse with others."""


class Rates(NamedTuple):
    """Assumptions about the machine."""

    flops_s: float
    """FLOP/s of matrix products."""
    bytes_s: float
    """Bytes per second of the device's memory, read plus written."""
    launch_s: float
    """Host seconds per launch."""
    stall_s: float = 0.0
    """Host seconds per step in which the device has nothing queued."""


class Operation(NamedTuple):
    """One operation; tensors are storages, by number, with the bytes used."""

    name: str
    part: str
    flops: int
    reads: dict[int, int]
    writes: dict[int, int]

    @property
    def is_fusible(self) -> bool:
        return self.flops == 0 and self.name not in ALONE


@dataclass
class Work:
    """Work of one part of a step, over the whole micro-batch."""

    part: str
    compiled: bool
    flops: int = 0
    bytes: int = 0
    launches: int = 0
    device_s: float = 0.0
    """Sum over kernels of the longer of arithmetic and memory traffic."""
    host_s: float = 0.0


@dataclass
class ModelledStep:
    """A step of one micro-batch; all times are modelled."""

    views: int
    rates: Rates
    parts: list[Work] = field(default_factory=list)

    @property
    def step_s(self) -> float:
        """Seconds: the longer of device and launches, plus the stall."""
        device_s = sum(one.device_s for one in self.parts)
        return max(device_s, sum(one.host_s for one in self.parts)) + self.rates.stall_s

    @property
    def mfu(self) -> float:
        """Fraction of the matrix products' rate."""
        return sum(one.flops for one in self.parts) / self.step_s / self.rates.flops_s

    def headline(self) -> str:
        """Return the modelled rate in one line."""
        return (
            f"modelled: {1e3 * self.step_s:.0f} ms for {self.views} views, "
            f"{self.views / self.step_s:.0f} views/s, {self.mfu:.0%} of "
            f"{self.rates.flops_s / 1e12:.0f} TFLOP/s"
        )


class Recorder(TorchDispatchMode):
    """Records every operation under the name of the current part."""

    def __init__(self) -> None:
        super().__init__()
        self.part = PREPARE
        self.operations: list[Operation] = []
        self.numbers: dict[int, int] = {}
        self.alive: list[Any] = []

    @contextmanager
    def counting(self, part: str) -> Iterator[None]:
        """Count the operations of the block as a part."""
        before, self.part = self.part, part
        try:
            yield
        finally:
            self.part = before

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Count nothing in the block."""
        before = len(self.operations)
        try:
            yield
        finally:
            del self.operations[before:]

    def enter(self, part: str) -> None:
        """Count the following operations as a part."""
        self.part = part

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._overloadpacket.__name__
        inputs = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        outputs = [one for one in tree_leaves(out) if isinstance(one, Tensor)]
        reads, writes = self.sizes(inputs), self.sizes(outputs)
        changes = func._schema.is_mutable
        if changes:  # an in-place operation writes its changed arguments, often a list
            writes |= self.sizes(changed_arguments(func, args, kwargs or {}))
        is_view = not changes and set(writes) <= set(reads)
        if name not in WITHOUT_KERNEL and not is_view:
            flops = count_flops(func, args, kwargs or {}, out)
            self.operations.append(Operation(name, self.part, flops, reads, writes))
        return out

    def sizes(self, tensors: Sequence[Tensor]) -> dict[int, int]:
        """Return the bytes of each storage that is used, by its number."""
        found: dict[int, int] = {}
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key not in self.numbers:
                self.numbers[key] = len(self.numbers)
                self.alive.append(storage)  # a storage that is kept keeps its key unique
            sides = zip(tensor.shape, tensor.stride(), strict=True)
            distinct = math.prod(side for side, stride in sides if stride or not side)
            used = min(distinct * tensor.itemsize, storage.nbytes())
            number = self.numbers[key]
            found[number] = max(found.get(number, 0), used)
        return found


def changed_arguments(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """Return the tensors among the arguments that an operation writes to."""
    found: list[Tensor] = []
    for number, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[number] if number < len(args) else kwargs.get(argument.name)
            found += [one for one in tree_leaves(value) if isinstance(one, Tensor)]
    return found


def count_flops(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
    """Return the FLOPs of an operation by torch's formulas; 0 without one."""
    packet = func._overloadpacket
    formula = flop_counter.flop_registry.get(packet)
    if formula is None and "for_cpu" in packet.__name__:  # torch 2.11 has none
        shapes = [tuple(one.shape) for one in args if isinstance(one, Tensor)]
        if packet.__name__.endswith("backward"):
            return int(flop_counter.sdpa_backward_flop_count(*shapes[:4]))
        return int(flop_counter.sdpa_flop_count(*shapes[:3]))
    return 0 if formula is None else int(formula(*args, **kwargs, out_val=out))


def model_step(config: Config, rates: Rates, eager: Sequence[str]) -> ModelledStep:
    """Model a step of one micro-batch, in which the optimizer's parts are counted once.

    Args:
        config: checked settings; ``backend.compile`` and the sizes count.
        rates: assumptions about the machine.
        eager: parts that are not compiled although ``backend.compile`` is set.

    Raises:
        ConfigError: for an unknown part.
    """
    for part in eager:
        if part not in PARTS:
            raise ConfigError(f"--eager {part}: the parts are {', '.join(PARTS)}")
    return sum_step(config, record_step(config), rates, eager)


def sum_step(
    config: Config, operations: Sequence[Operation], rates: Rates, eager: Sequence[str]
) -> ModelledStep:
    """Sum recorded operations by part, see ``model_step``."""
    step = ModelledStep(config.train.micro_batch_size, rates)
    for part, compiled, kernels in list_kernels(config, operations, eager):
        step.parts.append(sum_work(part, compiled, kernels, rates))
    return step


def list_kernels(
    config: Config, operations: Sequence[Operation], eager: Sequence[str]
) -> Iterator[tuple[str, bool, Sequence[Operation]]]:
    """Yield each part that has kernels, whether it is compiled, and its kernels in order."""
    last_use = find_last_uses(operations)
    teachers = dict.fromkeys(one.part for one in operations if one.part.startswith(TEACHER))
    for part in (*teachers, *PARTS[1:]):
        kind = TEACHER if part in teachers else part
        compiled = config.backend.compile and kind not in (*eager, *NEVER_FUSED)
        own = [(n, one) for n, one in enumerate(operations) if one.part == part]
        kernels = fuse(own, last_use) if compiled else [one for _, one in own]
        if kernels:
            yield part, compiled, kernels


def sum_work(part: str, compiled: bool, kernels: Sequence[Operation], rates: Rates) -> Work:
    """Sum the kernels of a part."""
    work = Work(part, compiled, launches=len(kernels), host_s=len(kernels) * rates.launch_s)
    for kernel in kernels:
        moved = sum(kernel.reads.values()) + sum(kernel.writes.values())
        work.flops += kernel.flops
        work.bytes += moved
        work.device_s += max(kernel.flops / rates.flops_s, moved / rates.bytes_s)
    return work


def find_last_uses(operations: Sequence[Operation]) -> dict[int, int]:
    """Return the number of the last operation that reads each storage."""
    return {storage: n for n, one in enumerate(operations) for storage in one.reads}


def fuse(operations: Sequence[tuple[int, Operation]], last_use: dict[int, int]) -> list[Operation]:
    """Merge each run of fusible operations, given with their numbers, into one kernel."""
    kernels: list[Operation] = []
    group: list[tuple[int, Operation]] = []
    for number, one in operations:
        if group and not (one.is_fusible and number == group[-1][0] + 1):
            kernels.append(merge(group, last_use))
            group = []
        if one.is_fusible:
            group.append((number, one))
        else:
            kernels.append(one)
    return [*kernels, merge(group, last_use)] if group else kernels


def merge(group: Sequence[tuple[int, Operation]], last_use: dict[int, int]) -> Operation:
    """Return operations as one kernel; tensors used only within it are not read or written."""
    end, reads, writes = group[-1][0], dict[int, int](), dict[int, int]()
    for _, one in group:
        reads |= {k: max(v, reads.get(k, 0)) for k, v in one.reads.items() if k not in writes}
        writes |= {k: max(v, writes.get(k, 0)) for k, v in one.writes.items()}
    kept = {k: v for k, v in writes.items() if last_use.get(k, end + 1) > end}
    return Operation("fused", group[0][1].part, 0, reads, kept)


def record_step(config: Config) -> list[Operation]:
    """Call the functions of a step on fake tensors, and return its operations in order."""
    networks = build_meta_networks(config)
    networks.model.set_activation_checkpointing(config.backend.activation_checkpointing)
    teachers = [one.model for one in networks.teachers.values()]
    modules = [one for one in (networks.model, networks.momentum, *teachers) if one is not None]
    for module in modules:
        module.to(compute_dtype(config))
    # Fake CPU tensors take the fused attention kernel, meta tensors do not.
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake, without_mha_fast_path(), attention_of_a_gpu():
        for module in modules:
            module.to_empty(device="cpu")
        recorder = Recorder()
        with recorder:
            micro_batch = record_prepare(config, networks, recorder)
            record_student(config, networks, micro_batch, recorder)
            record_update(config, networks, recorder)
    return recorder.operations


@contextmanager
def without_mha_fast_path() -> Iterator[None]:
    """Make ``nn.MultiheadAttention`` call operations that have a FLOP formula."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def name_part(name: str) -> str:
    """Return the name of a teacher's part; ``name`` is empty for a single teacher."""
    return f"{TEACHER} {name}" if name else TEACHER


class RecordedTeacher:
    """A teacher, or a reader of its cache, whose rows are existing tensors and not counted."""

    def __init__(self, inner: OnlineTeacher, recorder: Recorder, online: bool, part: str) -> None:
        self.inner, self.recorder, self.online, self.part = inner, recorder, online, part
        self.width, self.has_cls, self.image_size = inner.width, inner.has_cls, inner.image_size

    def forward_batch(self, batch: Batch) -> TeacherView:
        with self.recorder.counting(self.part) if self.online else self.recorder.paused():
            return self.inner(batch.images[-1])


class RecordedBackend:
    """The momentum encoder's forward of a backend."""

    def __init__(self, momentum: nn.Module | None, recorder: Recorder, dtype: torch.dtype) -> None:
        self.momentum, self.recorder, self.dtype = momentum, recorder, dtype

    def momentum_forward(self, images: Tensor) -> tuple[Tensor | None, Tensor | None]:
        if self.momentum is None:
            return None, None
        with self.recorder.counting(MOMENTUM), torch.no_grad():
            return self.momentum(images.to(self.dtype))


def record_prepare(config: Config, networks: MetaNetworks, recorder: Recorder) -> MicroBatch:
    """Record teacher, momentum encoder, masks and targets."""
    teachers: dict[str, TeacherSource] = {
        name: RecordedTeacher(one, recorder, online_fraction(alone) > 0, name_part(name))
        for name, alone, one in list_teachers(config, networks.teachers)
    }
    encoder = networks.model.encoder
    length = encoder.grid[0] * encoder.grid[1]
    counts = grid_counts(config.mask, length)
    models = Models(
        teachers,
        cast(Backend, RecordedBackend(networks.momentum, recorder, compute_dtype(config))),
        TokenLayout.from_config(config, *counts),
        length,
        encoder.patch_side,
        open_channels(config, teachers, encoder, encoder.patch_embed.proj.weight.device),
    )
    views = config.train.micro_batch_size
    sizes = view_sizes(config.views.image_size, teachers)
    images = tuple(torch.empty(views, size, size, 3, dtype=torch.uint8) for size in sizes)
    position = torch.empty(views, dtype=torch.int64)
    batch = Batch(images, position, position, position, torch.empty(views, dtype=torch.bool))
    teacher_views = forward_all(teachers, batch)
    eager = copy.deepcopy(config)
    eager.backend.compile = False  # operations are counted, and fused by rule
    return prepare(eager, models, batch, teacher_views, scalars_at(config, 0.5))[0]


def record_student(
    config: Config, networks: MetaNetworks, batch: MicroBatch, recorder: Recorder
) -> None:
    """Record the student's forward, the loss and the backward; hooks separate the parts."""
    model = networks.model

    def split_encoder(module: nn.Module, inputs: object, tokens: Tensor) -> None:
        recorder.enter(DECODER)
        tokens.register_hook(lambda gradient: recorder.enter(STUDENT))

    model.encoder.register_forward_hook(split_encoder)
    recorder.enter(STUDENT)
    images, *others = batch.inputs
    predictions = model(images.to(compute_dtype(config)), *others)
    recorder.enter(LOSS)
    for one in predictions.values():
        one.register_hook(lambda gradient: recorder.enter(DECODER))
    choice = batch.choice
    counts = (choice.ids_keep.shape[1], choice.ids_hidden.shape[1], choice.ids_thrown.shape[1])
    layout = TokenLayout.from_config(config, *counts)
    eager = replace(config, backend=replace(config.backend, compile=False))
    make_objective(eager, layout)(predictions, batch)["total"].backward()


def record_update(config: Config, networks: MetaNetworks, recorder: Recorder) -> None:
    """Record casts to and from float32, clipping, AdamW and the EMA, unsharded."""
    pairs = list(trainable(networks.model))
    recorder.enter(CASTS)
    masters = [nn.Parameter(torch.empty(one.shape)) for _, one in pairs]
    for master in masters:
        master.grad = torch.empty(master.shape)
    gradients = [cast(Tensor, one.grad) for one in masters]
    if compute_dtype(config) != torch.float32:
        copy_all(gradients, [cast(Tensor, one.grad) for _, one in pairs])
        copy_all([one for _, one in pairs], masters)
    names = [name for name, _ in pairs]
    optimizer = make_adamw(zip(names, masters, strict=True), config.optimizer)
    with recorder.paused():
        start_state(optimizer, masters)
    recorder.enter(OPTIMIZER)
    # torch's own functions take lists on a GPU, but not on the fake CPU.
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))  # pyright: ignore
    if config.optimizer.grad_clip is not None:
        torch._foreach_mul_(gradients, norm)  # pyright: ignore
    optimizer.step()
    if not needs(config).momentum:
        return
    recorder.enter(AVERAGE)
    weights = [w for name, w in zip(names, masters, strict=True) if name.startswith("encoder.")]
    averages = [torch.empty(one.shape) for one in weights]
    update_momentum(averages, weights, 0.999)
    if compute_dtype(config) != torch.float32:
        copy_all([torch.empty_like(one, dtype=compute_dtype(config)) for one in averages], averages)


@torch.no_grad()
def copy_all(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy a list of tensors in one launch, as sharding backends do."""
    torch._foreach_copy_(list(targets), list(sources))  # pyright: ignore


def model_table(step: ModelledStep) -> str:
    """Return the assumptions, the modelled step and its parts, as Markdown."""
    rates, views = step.rates, step.views
    rows = [
        [
            one.part,
            "compiled" if one.compiled else "eager",
            f"{one.flops / views / 1e9:.1f}",
            f"{one.bytes / 1e9:.1f}",
            str(one.launches),
            f"{1e3 * one.device_s:.1f}",
            f"{1e3 * one.host_s:.1f}",
        ]
        for one in step.parts
    ]
    total = ["sum", ""]
    total += [f"{sum(one.flops for one in step.parts) / views / 1e9:.1f}"]
    total += [f"{sum(one.bytes for one in step.parts) / 1e9:.1f}"]
    total += [str(sum(one.launches for one in step.parts))]
    total += [f"{1e3 * sum(one.device_s for one in step.parts):.1f}"]
    total += [f"{1e3 * sum(one.host_s for one in step.parts):.1f}"]
    header = ["part", "", "GFLOP per view", "GB", "launches", "device, ms", "launches, ms"]
    return (
        f"{step.headline()}\n\n"
        f"A lower bound. Assumed: matrix products at {rates.flops_s / 1e12:g} TFLOP/s, memory at "
        f"{rates.bytes_s / 1e12:g} TB/s, a kernel takes the longer of the two; "
        f"{1e6 * rates.launch_s:g} us of host time per launch; the step takes the longer of device "
        f"and launches, plus {1e3 * rates.stall_s:g} ms in which nothing is queued. One rank, one "
        "micro-batch per step, no collectives.\n\n" + markdown_table(header, [*rows, total])
    )
