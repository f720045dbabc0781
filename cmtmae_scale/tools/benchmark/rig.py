"""One timed configuration: the loop's own step with timed backend and teacher."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from cmtmae_scale.backends.base import Accept, Backend, Meanwhile, Outcome, Terms, Work
from cmtmae_scale.checkpoint.writer import Writer
from cmtmae_scale.config.batch import batch_plan
from cmtmae_scale.config.schema import Config
from cmtmae_scale.config.teachers import entry_errors, reads_cache, teacher_configs
from cmtmae_scale.engine.loop import take_step
from cmtmae_scale.engine.progress import Progress
from cmtmae_scale.engine.skips import Skips
from cmtmae_scale.engine.stop import StopRequest
from cmtmae_scale.engine.stragglers import Stragglers
from cmtmae_scale.engine.task import Run
from cmtmae_scale.pretraining.build import (
    build_models,
    fetch_teacher,
    open_index,
    open_stream,
    open_teachers,
)
from cmtmae_scale.pretraining.task import Pretraining
from cmtmae_scale.runtime.launch import World
from cmtmae_scale.teachers.base import TeacherSource, TeacherView, view_sizes
from cmtmae_scale.teachers.build import build_teacher_skeleton
from cmtmae_scale.teachers.online import OnlineTeacher
from cmtmae_scale.tools.benchmark.clock import Mark, Stopwatch, elapsed_s
from cmtmae_scale.tools.benchmark.timeline import (
    Gap,
    KernelTime,
    Span,
    busy_and_gaps,
    device_spans,
    longest_kernels,
)
from dataloading.index import Index
from dataloading.stream import Batch

SDPA = {
    "auto": None,
    "math": SDPBackend.MATH,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}
HORIZON = 1_000_000
LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx")


class Window(NamedTuple):
    """Times per step, over several consecutive steps."""

    step_s: float
    parts_s: dict[str, float]
    waited_s: float


class StepProfile(NamedTuple):
    """Profile of one step."""

    communication_s: float
    """Busy time of collectives, in part overlapped with other work."""
    calls: int
    """Kernel launches on a GPU, operators on a CPU."""
    busy_s: float
    """Time in which a GPU runs at least one kernel or copy."""
    gaps: list[Gap]
    """The longest times without a kernel or copy."""
    kernels: list[KernelTime]
    """The kernels that take longest."""


class TimedBackend:
    """A backend with timed calls; hooks separate student and decoder."""

    def __init__(self, inner: Backend, watch: Stopwatch) -> None:
        self.inner = inner
        self.watch = watch
        self.encoded: Mark | None = None
        self.decoded: Mark | None = None
        encoder = cast(nn.Module, cast(Any, inner).model).get_submodule("encoder")
        encoder.register_forward_hook(self.mark_encoded)

    def mark_encoded(self, module: nn.Module, inputs: object, tokens: Tensor) -> None:
        """Mark the end of the encoder; the gradient of its output ends the decoder's backward."""
        self.encoded = self.watch.mark()
        tokens.register_hook(self.mark_decoded)

    def mark_decoded(self, gradient: Tensor) -> None:
        """Mark the end of the decoder's backward."""
        self.decoded = self.watch.mark()

    def micro(self, batch: Work, last: bool) -> Terms:
        start = self.watch.mark()
        losses = self.inner.micro(batch, last)
        end = self.watch.mark()
        if self.encoded is None or self.decoded is None:
            raise RuntimeError("the encoder was not called; please report this")
        self.watch.add("student", start, self.encoded)
        self.watch.add("decoder and loss", self.encoded, self.decoded)
        self.watch.add("student", self.decoded, end)
        return losses

    def step(
        self,
        lr: float,
        report: Tensor,
        accept: Accept | None = None,
        meanwhile: Meanwhile | None = None,
    ) -> Outcome:
        began = [self.watch.mark()]

        def interrupt() -> None:
            self.watch.add("optimizer", began.pop(), self.watch.mark())
            if meanwhile is not None:
                meanwhile()
            began.append(self.watch.mark())

        outcome = self.inner.step(lr, report, accept, interrupt)
        self.watch.add("optimizer", began.pop(), self.watch.mark())
        return outcome

    def momentum_update(self, momentum: float) -> None:
        self.watch.timed("EMA update", lambda: self.inner.momentum_update(momentum))

    def momentum_forward(self, images: Tensor) -> tuple[Tensor | None, Tensor | None]:
        return self.watch.timed("momentum encoder", lambda: self.inner.momentum_forward(images))


class TimedTeacher:
    """A teacher with timed views."""

    def __init__(self, inner: TeacherSource, watch: Stopwatch) -> None:
        self.inner = inner
        self.watch = watch
        self.width, self.has_cls = inner.width, inner.has_cls

    @property
    def image_size(self) -> int | None:
        return self.inner.image_size

    def forward_batch(self, batch: Batch) -> TeacherView:
        return self.watch.timed("teacher", lambda: self.inner.forward_batch(batch))


class SyntheticTeacher:
    """A teacher that returns the same random rows for every batch, as a cache would at no cost."""

    image_size = None

    def __init__(self, like: OnlineTeacher, count: int, device: torch.device) -> None:
        self.width, self.has_cls = like.width, like.has_cls
        patches = like.grid[0] * like.grid[1]
        attention = features = None
        if like.outputs.attention_layers:
            attention = torch.rand(count, patches, device=device).softmax(-1)
        if like.outputs.feature_layers:
            features = torch.randn(count, patches + self.has_cls, self.width, device=device)
        self.view = TeacherView(attention, features, True)

    def forward_batch(self, batch: Batch) -> TeacherView:
        return self.view


def open_synthetic(
    config: Config, count: int, world: World, device: torch.device
) -> dict[str, TeacherSource]:
    """Return the teachers of a run on random images: models, or rows as caches would give them."""
    found: dict[str, TeacherSource] = {}
    for name, alone in teacher_configs(config).items():
        with entry_errors(name):
            if reads_cache(alone):  # its rows belong to real images
                with torch.device("meta"):
                    like = build_teacher_skeleton(alone)
                found[name] = SyntheticTeacher(like, count, device)
            else:
                online = fetch_teacher(alone, world, device)
                found |= {} if online is None else {name: online}
    return found


class SyntheticStream:
    """Endless batches of the same random images on the device, at new positions."""

    def __init__(
        self, config: Config, count: int, sizes: tuple[int, ...], device: torch.device
    ) -> None:
        generator = torch.Generator(device).manual_seed(config.run.seed)
        self.count = count
        shapes = [(self.count, size, size, 3) for size in sizes]
        images = [torch.empty(shape, dtype=torch.uint8, device=device) for shape in shapes]
        self.images = tuple(image.random_(0, 256, generator=generator) for image in images)
        self.position = torch.arange(self.count, device=device)
        self.valid = torch.ones(self.count, dtype=torch.bool, device=device)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        self.position = self.position + self.count
        return Batch(self.images, self.position, self.position, self.position, self.valid)


class Rig:
    """A configuration built for timing.

    Args:
        config: checked settings; ``run.output_dir`` is not used.
        sdpa: kernel of ``scaled_dot_product_attention``, a key of ``SDPA``.
        real: whether to read images of ``data.path``, and the rows of ``teacher.mode=cached``,
            instead of synthetic ones.
        world: this process's rank and world size; the process group is open.
        device: this rank's device.
        stack: closes all resources.
        teachers: replace the run's own.
    """

    def __init__(
        self,
        config: Config,
        sdpa: str,
        real: bool,
        world: World,
        device: torch.device,
        stack: ExitStack,
        teachers: dict[str, TeacherSource] | None = None,
    ) -> None:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="benchmark-")))
        config.run.output_dir = str(folder)
        self.config = config
        self.device = device
        self.backend = SDPA[sdpa]
        self.watch = Stopwatch(device)
        self.loss = float("nan")
        plan = batch_plan(config, world.world_size)
        stop = StopRequest(folder)
        index = open_index(config, folder) if real else None
        if teachers is not None:
            pass
        elif index is not None:
            teachers = open_teachers(config, world, device, index, stop, stack)
        else:
            teachers = open_synthetic(config, plan.micro_batch_size, world, device)
        models = build_models(config, world, device, teachers)
        stack.callback(models.backend.close)
        half, views = HORIZON // 2, plan.global_batch_size
        progress = Progress(half, half * views, 0, 0, half, HORIZON, HORIZON * views)
        if index is not None:
            stream = stack.enter_context(
                open_stream(config, index, world, device, teachers, progress.position)
            )
        else:
            stream = SyntheticStream(
                config, plan.micro_batch_size, view_sizes(config.views.image_size, teachers), device
            )
        config.log.diagnostics_every = None
        task = Pretraining(config, world, device)
        task.view_sizes = view_sizes(config.views.image_size, teachers)
        task.models = replace(
            models,
            teachers={name: TimedTeacher(one, self.watch) for name, one in teachers.items()},
            backend=cast(Backend, TimedBackend(models.backend, self.watch)),
        )
        self.run = Run(
            config=config,
            task=task,
            plan=plan,
            device=device,
            run_dir=folder,
            index=cast(Index, index),
            stream=stream,
            backend=task.models.backend,
            progress=progress,
            writer=Writer(folder, world.rank, world.world_size, 1, False, 0),
            stop=stop,
            telemetry=None,
            progress_file=None,
            skips=Skips(config.guard),
            stragglers=Stragglers(device, HORIZON),
            saved_facts={},
        )

    def kernel(self) -> AbstractContextManager[object]:
        """Return a context with the chosen attention kernel."""
        return nullcontext() if self.backend is None else sdpa_kernel(self.backend)

    def take_steps(self, steps: int) -> float:
        """Take optimizer steps; returns the seconds of data wait."""
        waited_s = 0.0
        with self.kernel():
            for _ in range(steps):
                scalars = self.run.task.scalars(self.run.progress)
                step = take_step(self.run, scalars)
                waited_s += step.waited_s
                self.loss = step.report["loss/total"] / max(step.report["valid_rows"], 1.0)
        return waited_s

    def time_steps(self, steps: int) -> Window:
        """Time steps, with one synchronisation at the end."""
        self.watch.collect()
        start = self.watch.mark()
        waited_s = self.take_steps(steps)
        end = self.watch.mark()
        parts_s = {name: value / steps for name, value in self.watch.collect().items()}
        step_s = elapsed_s(start, end) / steps
        parts_s["masks, targets, rest"] = max(step_s - sum(parts_s.values()), 0.0)
        return Window(step_s, parts_s, waited_s / steps)

    def profile_step(self) -> StepProfile:
        """Profile one step."""
        activities = [ProfilerActivity.CPU]
        if self.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self.watch.collect()
        with profile(activities=activities, acc_events=True) as record:
            self.take_steps(1)
            self.watch.collect()
        spans = device_spans(record.events() or ())
        return read_profile(record.key_averages(), spans, self.device.type == "cuda")


def read_profile(averages: Any, spans: list[Span], on_gpu: bool) -> StepProfile:
    """Sum collectives, count launches, and find where the GPU is busy."""
    busy_us, calls = 0.0, 0
    is_call: Callable[[str], bool] = (
        LAUNCHES.__contains__ if on_gpu else lambda name: name.startswith("aten::")
    )
    for entry in averages:
        if on_gpu and "nccl" in entry.key.lower():
            busy_us += entry.self_device_time_total
        elif not on_gpu and entry.key.startswith("gloo:"):
            busy_us += entry.self_cpu_time_total
        calls += entry.count if is_call(entry.key) else 0
    return StepProfile(busy_us / 1e6, calls, *busy_and_gaps(spans), longest_kernels(spans))
