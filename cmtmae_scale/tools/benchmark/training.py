"""Timing of the training step: variants of one recipe side by side."""

import copy
import gc
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple, TypeVar

import torch

from cmtmae_scale.config.check import find_problems
from cmtmae_scale.config.load import load_config, read_recipe
from cmtmae_scale.config.schema import Config
from cmtmae_scale.errors import ConfigError
from cmtmae_scale.runtime.determinism import deterministic_kernels, fix_cublas_workspace
from cmtmae_scale.runtime.launch import World
from cmtmae_scale.teachers.base import TeacherSource
from cmtmae_scale.teachers.build import compute_dtype
from cmtmae_scale.tools.benchmark.clock import Spread
from cmtmae_scale.tools.benchmark.peak import peak_flops
from cmtmae_scale.tools.benchmark.rig import SDPA, Rig, StepProfile, Window
from cmtmae_scale.tools.benchmark.timeline import Gap, KernelTime
from cmtmae_scale.tools.estimate import ViewFlops, build_meta_networks, count_flops, memory_bytes

GIB = 2**30

NO_KERNEL = ("No available kernel", "No viable backend")
"""Messages of torch, on a GPU and on a CPU, for an attention kernel that cannot be used."""

T = TypeVar("T")


class Variant(NamedTuple):
    """A configuration and its difference from the first one."""

    label: str
    config: Config
    sdpa: str
    teachers: dict[str, TeacherSource] | None = None
    """Replaces the run's own."""
    before: Callable[[], object] | None = None
    """Called before each window, outside the clock."""


class Protocol(NamedTuple):
    """Number of warm-up steps, windows and steps per window."""

    warm_up: int
    windows: int
    steps: int


@dataclass
class StepResult:
    """Measurements of a variant; rates over all ranks."""

    label: str
    fault: str | None = None
    step_s: Spread | None = None
    windows_s: list[float] = field(default_factory=list)
    """Time per step in each window."""
    loss: float = 0.0
    """Per valid row, at the last step; the same work gives the same loss up to rounding."""
    ready_s: float = 0.0
    """Seconds to build the networks and take the warm-up steps, with compilation."""
    parts_s: dict[str, float] = field(default_factory=dict)
    data_wait_fraction: float = 0.0
    images_s: float = 0.0
    masked_samples_s: float = 0.0
    mfu: dict[str, float] = field(default_factory=dict)
    """Fraction of each peak that student, momentum encoder and teacher use."""
    student_mfu: dict[str, float] = field(default_factory=dict)
    """Fraction of each peak that the student's forward and backward use."""
    communication_s: float = 0.0
    calls: int = 0
    idle_fraction: float = 0.0
    """Fraction of a step in which the GPU runs no kernel: the step's time less the kernels'."""
    kernels: list[KernelTime] = field(default_factory=list)
    gaps: list[Gap] = field(default_factory=list)
    peak_gib: float | None = None
    estimate_gib: float = 0.0


def make_variants(
    path: str, overrides: Sequence[str], sweeps: Sequence[str], accumulation: int, world_size: int
) -> list[Variant]:
    """Return the recipe as given, then one variant per value of each sweep.

    Args:
        path: recipe.
        overrides: ``key=value`` for all variants.
        sweeps: ``key=value,value,...``; the key ``sdpa`` chooses the attention kernel.
        accumulation: micro-steps per step; determines the global batch size.
        world_size: number of ranks.

    Raises:
        ConfigError: a malformed sweep, or a setting that cannot work.
    """
    overrides = [*overrides, *random_weights(path, overrides)]

    def variant(label: str, extra: list[str], sdpa: str) -> Variant:
        config = load_config(path, [*overrides, *extra])
        batch = config.train.micro_batch_size * world_size * accumulation
        extra = [*extra, f"train.global_batch_size={batch}"]
        return Variant(label, load_config(path, [*overrides, *extra]), sdpa)

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


def random_weights(path: str, overrides: Sequence[str]) -> list[str]:
    """Return overrides for teachers whose weights no override names; random weights take as long.

    Raises:
        ConfigError: an override of a key that the recipe does not have.
    """
    draft = read_recipe(Config, find_problems, path).override(overrides)
    names = [entry["name"] for entry in draft.values["teachers"]]
    keys = [f"teachers.{name}.weights" for name in names] or ["teacher.weights"]
    given = {text.partition("=")[0] for text in overrides}
    return [f"{key}=random" for key in keys if key not in given]


def measure_variants(
    variants: Sequence[Variant],
    protocol: Protocol,
    real: bool,
    world: World,
    device: torch.device,
    keep: Callable[[list[StepResult]], object] | None = None,
) -> list[StepResult]:
    """Time all variants; the process group is open.

    ``keep`` is called with the results so far whenever some variants are measured.

    On a CPU all variants are built first and their windows alternate, so that other processes slow
    all variants alike. On a GPU they run one after another, each with the whole memory.
    """
    on_gpu = device.type == "cuda"
    groups = [[v] for v in variants] if on_gpu else [list(variants)]
    if any(variant.config.run.deterministic for variant in variants):
        fix_cublas_workspace()  # before the products that measure the peak
    limits: dict[torch.dtype, dict[str, float]] = {}
    results: list[StepResult] = []
    for group in groups:
        for variant in group:
            dtype = compute_dtype(variant.config)
            limits.setdefault(dtype, peak_flops(device, dtype))
        results += measure_group(group, protocol, real, world, device, limits)
        if keep is not None:
            keep(results)
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
) -> list[StepResult]:
    """Time variants with alternating windows; a variant that cannot run is named and skipped."""
    faults: dict[str, str] = {}
    ready_s: dict[str, float] = {}

    def attempt(variant: Variant, call: Callable[[], T]) -> T | None:
        try:
            return call()
        except RuntimeError as error:  # torch.OutOfMemoryError too
            faults[variant.label] = name_fault(error, variant)
            return None

    def build(variant: Variant) -> Rig:
        began, config = time.perf_counter(), copy.deepcopy(variant.config)
        rig = Rig(config, variant.sdpa, real, world, device, stack, variant.teachers)
        rig.take_steps(protocol.warm_up)
        ready_s[variant.label] = time.perf_counter() - began
        return rig

    with ExitStack() as stack:
        is_deterministic = any(variant.config.run.deterministic for variant in group)
        stack.enter_context(deterministic_kernels(is_deterministic))
        rigs = {v.label: rig for v in group if (rig := attempt(v, partial(build, v))) is not None}
        windows: dict[str, list[Window]] = {label: [] for label in rigs}
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        for _ in range(protocol.windows):
            for variant in [v for v in group if v.label not in faults]:
                if variant.before is not None:
                    variant.before()
                rig = rigs[variant.label]
                window = attempt(variant, partial(rig.time_steps, protocol.steps))
                windows[variant.label] += [] if window is None else [window]
        peak = torch.cuda.max_memory_allocated() / GIB if device.type == "cuda" else None
        profiles = {v.label: rigs[v.label].profile_step() for v in group if v.label not in faults}
    results: list[StepResult] = []
    for variant in group:
        if variant.label in faults:
            results.append(StepResult(variant.label, fault=faults[variant.label]))
            continue
        limit = limits[compute_dtype(variant.config)]
        profile = profiles[variant.label]
        one = summarise_variant(variant, windows[variant.label], profile, peak, world, limit)
        one.loss, one.ready_s = rigs[variant.label].loss, ready_s[variant.label]
        results.append(one)
    return results


def name_fault(error: RuntimeError, variant: Variant) -> str:
    """Return why a variant cannot be measured; other errors are raised again."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    if any(text in str(error) for text in NO_KERNEL):
        return f"no {variant.sdpa} kernel for {variant.config.backend.precision} on this device"
    raise error


def summarise_variant(
    variant: Variant,
    windows: Sequence[Window],
    profile: StepProfile,
    peak_gib: float | None,
    world: World,
    limits: dict[str, float],
) -> StepResult:
    """Return medians over windows, and derived rates."""
    config = variant.config
    flops, memory = count_variant(config, world.world_size, world.local_world_size)
    step_s = Spread.of([window.step_s for window in windows])
    images_s = config.train.global_batch_size / step_s.median
    names = windows[0].parts_s
    per_rank_s = images_s / world.world_size
    return StepResult(
        variant.label,
        step_s=step_s,
        windows_s=[window.step_s for window in windows],
        parts_s={name: Spread.of([w.parts_s[name] for w in windows]).median for name in names},
        data_wait_fraction=Spread.of([w.waited_s for w in windows]).median / step_s.median,
        images_s=images_s,
        masked_samples_s=images_s * config.mask.masks_per_view,
        mfu={name: sum(flops) * per_rank_s / limit for name, limit in limits.items()},
        student_mfu={name: flops.student * per_rank_s / limit for name, limit in limits.items()},
        communication_s=profile.communication_s,
        calls=profile.calls,
        idle_fraction=max(0.0, 1 - profile.busy_s / step_s.median),
        kernels=profile.kernels,
        gaps=profile.gaps,
        peak_gib=peak_gib,
        estimate_gib=memory / GIB,
    )


def count_variant(config: Config, world_size: int, node_size: int = 8) -> tuple[ViewFlops, float]:
    """Return FLOPs per view and the modelled peak memory, as ``--dry-run`` does."""
    networks = build_meta_networks(config)
    memory = memory_bytes(config, world_size, networks, node_size)
    return count_flops(config, networks), sum(memory.values())
