"""The training step, timed: variants of one recipe side by side."""

import copy
import gc
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch

from cmtmae_scale.config.derive import needs
from cmtmae_scale.config.load import load_config
from cmtmae_scale.config.schema import Config
from cmtmae_scale.errors import ConfigError
from cmtmae_scale.method.model import CollaborativeMAE
from cmtmae_scale.method.student import MomentumEncoder, build_student
from cmtmae_scale.runtime.launch import World
from cmtmae_scale.teachers.base import TeacherSource
from cmtmae_scale.teachers.build import build_teacher_skeleton, compute_dtype
from cmtmae_scale.tools.benchmark.clock import Spread, spread
from cmtmae_scale.tools.benchmark.peak import peaks
from cmtmae_scale.tools.benchmark.rig import SDPA, Rig, Traffic, Window
from cmtmae_scale.tools.estimate import Work, count_operations, memory_bytes

GIB = 2**30


class Variant(NamedTuple):
    """A configuration and what tells it from the first one."""

    label: str
    config: Config
    sdpa: str
    teacher: TeacherSource | None = None
    """In place of the run's own."""
    before: Callable[[], object] | None = None
    """Called before each window, outside the clock."""


class Protocol(NamedTuple):
    """How long is measured."""

    warm_up: int
    windows: int
    steps: int


@dataclass
class Result:
    """What was measured of a variant; rates are those of all ranks together."""

    label: str
    fault: str | None = None
    step_s: Spread | None = None
    windows_s: list[float] = field(default_factory=list)
    """Time of a step in each window."""
    parts_s: dict[str, float] = field(default_factory=dict)
    waited_share: float = 0.0
    images_s: float = 0.0
    masked_samples_s: float = 0.0
    mfu: dict[str, float] = field(default_factory=dict)
    """Share of each peak that the student, momentum student and teacher use."""
    student_mfu: dict[str, float] = field(default_factory=dict)
    """Share that the student's forward and backward use."""
    communication_s: float = 0.0
    calls: int = 0
    peak_gib: float | None = None
    estimate_gib: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"step_s": self.step_s._asdict() if self.step_s else None}


def make_variants(
    path: str, overrides: Sequence[str], sweeps: Sequence[str], accumulation: int, world_size: int
) -> list[Variant]:
    """The recipe as given, then each value of each sweep in its place.

    Args:
        path: recipe.
        overrides: ``key=value`` for all variants.
        sweeps: ``key=value,value,...``; the key ``sdpa`` chooses attention's kernel.
        accumulation: micro-steps a step; the global batch follows.
        world_size: number of ranks.

    Raises:
        ConfigError: a sweep that is none, or a setting that cannot work.
    """
    if not any(text.startswith("teacher.weights=") for text in overrides):
        overrides = ["teacher.weights=random", *overrides]  # weights do not change the time

    def variant(label: str, extra: list[str], sdpa: str) -> Variant:
        config = load_config(path, [*overrides, *extra])
        batch = config.train.micro_batch_size * world_size * accumulation
        return Variant(
            label,
            load_config(path, [*overrides, *extra, f"train.global_batch_size={batch}"]),
            sdpa,
        )

    found = [variant("as given", [], "auto")]
    for sweep in sweeps:
        key, separator, values = sweep.partition("=")
        if not separator or not values:
            raise ConfigError(f"--sweep {sweep}: expected key=value,value,...")
        for value in values.split(","):
            if key == "sdpa" and value not in SDPA:
                raise ConfigError(f"--sweep {sweep}: {value} is not one of {', '.join(SDPA)}")
            extra = [] if key == "sdpa" else [f"{key}={value}"]
            found.append(variant(f"{key}={value}", extra, value if key == "sdpa" else "auto"))
    return found


def measure(
    variants: Sequence[Variant],
    protocol: Protocol,
    real: bool,
    world: World,
    device: torch.device,
) -> list[Result]:
    """Time all variants; the process group is open.

    On a CPU all are built first and their windows take turns, so that other users of the machine
    slow all of them alike. On a GPU, which is nobody else's, they come one after another and each
    has the memory to itself.
    """
    on_gpu = device.type == "cuda"
    groups = [[v] for v in variants] if on_gpu else [list(variants)]
    limits: dict[torch.dtype, dict[str, float]] = {}
    results: list[Result] = []
    for group in groups:
        for variant in group:
            dtype = compute_dtype(variant.config)
            limits.setdefault(dtype, peaks(device, dtype))
        results += measure_group(group, protocol, real, world, device, limits)
        gc.collect()
        torch.compiler.reset()
        if on_gpu:
            torch.cuda.empty_cache()
    return results


def measure_group(
    group: Sequence[Variant],
    protocol: Protocol,
    real: bool,
    world: World,
    device: torch.device,
    limits: dict[torch.dtype, dict[str, float]],
) -> list[Result]:
    """Time variants whose windows take turns."""
    with ExitStack() as stack:
        try:
            rigs = [
                Rig(copy.deepcopy(v.config), v.sdpa, real, world, device, stack, v.teacher)
                for v in group
            ]
            for rig in rigs:
                rig.take(protocol.warm_up)
            windows: list[list[Window]] = [[] for _ in group]
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            for _ in range(protocol.windows):
                for variant, rig, seen in zip(group, rigs, windows, strict=True):
                    if variant.before is not None:
                        variant.before()
                    seen.append(rig.window(protocol.steps))
            peak = torch.cuda.max_memory_allocated() / GIB if device.type == "cuda" else None
            traffic = [rig.traffic() for rig in rigs]
        except torch.OutOfMemoryError:
            return [Result(v.label, fault="out of memory") for v in group]
    return [
        summarise(v, seen, one, peak, world, limits[compute_dtype(v.config)])
        for v, seen, one in zip(group, windows, traffic, strict=True)
    ]


def summarise(
    variant: Variant,
    windows: Sequence[Window],
    traffic: Traffic,
    peak_gib: float | None,
    world: World,
    limits: dict[str, float],
) -> Result:
    """Medians over windows, and what follows from them."""
    config = variant.config
    work, memory = count(config, world.world_size)
    step_s = spread([window.step_s for window in windows])
    images_s = config.train.global_batch_size / step_s.median
    names = windows[0].parts_s
    per_rank_s = images_s / world.world_size
    return Result(
        variant.label,
        step_s=step_s,
        windows_s=[window.step_s for window in windows],
        parts_s={name: spread([w.parts_s[name] for w in windows]).median for name in names},
        waited_share=spread([w.waited_s for w in windows]).median / step_s.median,
        images_s=images_s,
        masked_samples_s=images_s * config.mask.masks_per_view,
        mfu={name: sum(work) * per_rank_s / limit for name, limit in limits.items()},
        student_mfu={name: work.student * per_rank_s / limit for name, limit in limits.items()},
        communication_s=traffic.communication_s,
        calls=traffic.calls,
        peak_gib=peak_gib,
        estimate_gib=memory / GIB,
    )


def count(config: Config, world_size: int) -> tuple[Work, float]:
    """Operations a view, and the modelled peak of memory, as ``--dry-run`` gives them."""
    with torch.device("meta"):
        teacher = build_teacher_skeleton(config) if needs(config).teacher else None
        model = CollaborativeMAE(config, teacher.width if teacher else None)
        momentum = build_student(config, MomentumEncoder) if needs(config).momentum else None
    work = count_operations(config, model, momentum, teacher)
    return work, sum(memory_bytes(config, world_size, model, momentum, teacher).values())
