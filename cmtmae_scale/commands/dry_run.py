"""``--dry-run``: figures of a run, and everything that a launch checks before it trains.

Networks are counted on meta tensors. Headers of images and local weight files are read as a launch
reads them. Nothing is downloaded, and files are written only to a temporary folder.
"""

import os
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import yaml
from torch import nn

from cmtmae_scale.backends.build import refuse_missing_deepspeed
from cmtmae_scale.backends.fsdp import ranks_per_shard_group
from cmtmae_scale.cache.teacher import open_cache
from cmtmae_scale.checkpoint import layout as checkpoints
from cmtmae_scale.checkpoint.find import describe_loss
from cmtmae_scale.config.batch import batch_plan, explain_batch, find_length_problem, total_steps
from cmtmae_scale.config.derive import peak_lr
from cmtmae_scale.config.images import open_images_read_only
from cmtmae_scale.config.load import config_to_dict
from cmtmae_scale.config.schema import Config
from cmtmae_scale.config.teachers import (
    builds_teacher,
    cache_folder,
    entry_errors,
    reads_cache,
    teacher_configs,
)
from cmtmae_scale.engine.folder import refuse_foreign_folder
from cmtmae_scale.engine.launches import refuse_further_launch
from cmtmae_scale.engine.resume import compare_run, continue_progress
from cmtmae_scale.engine.stop import STOP_FILE
from cmtmae_scale.engine.trackers import refuse_missing_trackers
from cmtmae_scale.errors import EXIT_CONFIG, EXIT_DONE, CheckpointError, CmtMaeError, ConfigError
from cmtmae_scale.evaluation.periodic import RunEvaluation
from cmtmae_scale.pretraining.build import (
    has_begun,
    open_init_weights,
    refuse_bad_index,
    refuse_missing_cls,
)
from cmtmae_scale.pretraining.init_from_run import open_source
from cmtmae_scale.pretraining.task import Pretraining
from cmtmae_scale.runtime.launch import World
from cmtmae_scale.runtime.lock import refuse_living_holder
from cmtmae_scale.runtime.storage import list_names
from cmtmae_scale.teachers.build import build_teacher, build_teacher_skeleton, compute_dtype
from cmtmae_scale.teachers.online import OnlineTeacher
from cmtmae_scale.teachers.weights import is_file_name
from cmtmae_scale.tools.estimate import (
    MetaNetworks,
    build_meta_networks,
    count_flops,
    count_shards,
    list_teachers,
    memory_bytes,
)
from cmtmae_scale.tools.plan.devices import RESERVE
from dataloading.addresses import is_url
from dataloading.errors import DataError
from dataloading.index import Index
from dataloading.shard_patterns import has_files
from dataloading.stream import require_decoder

GIB = 2**30

T = TypeVar("T")


def dry_run(config: Config, world: World) -> tuple[str, int]:
    """Return the text of ``--dry-run``, and its exit code.

    The figures are followed by one line ``would not start: ...`` per reason; with a reason the code
    is 78.
    """
    reasons: list[str] = []
    index, images, origin = count_images(config, reasons)
    networks = attempt(reasons, lambda: build_meta_networks(config))
    saved = attempt(reasons, lambda: find_saved_state(config, index, images))
    check_launch(config, world, index, networks, saved is None, reasons)
    lines = [yaml.safe_dump(config_to_dict(config), sort_keys=False)]
    lines.append(f"images          {images if images is not None else 'unknown'} ({origin})")
    if images is not None or config.train.steps is not None:
        steps = total_steps(config, images or 1) if saved is None else saved.end_step
        lines.append(f"steps           {steps}")
    plan = attempt(reasons, lambda: batch_plan(config, world.world_size))
    lines.append(f"batch           {'none' if plan is None else explain_batch(config, plan)}")
    lines.append(
        f"learning rate   {peak_lr(config):.3g} = {config.optimizer.base_lr:g} base x "
        f"{config.train.global_batch_size} views / 256"
    )
    problem = None if images is None else find_length_problem(config, images)
    if problem is not None:
        lines.append(f"warning         {problem}")
    if networks is not None:
        lines += count_networks(config, world, networks)
    resumed = "nothing: a new run" if saved is None else saved.name
    lines.append(f"would resume    {resumed}")
    stop = Path(config.run.output_dir) / STOP_FILE
    if os.path.exists(stop):
        lines.append(f"would stop      after one step: {stop} exists; delete it")
    unique = list(dict.fromkeys(reasons))
    lines += [f"would not start: {reason}" for reason in unique]
    return "\n".join(lines), EXIT_CONFIG if unique else EXIT_DONE


def attempt(reasons: list[str], call: Callable[[], T]) -> T | None:
    """Return the result of a call; add the error that a launch would end with to ``reasons``."""
    try:
        return call()
    except (CmtMaeError, DataError) as error:
        reasons.append(str(error))
    except OSError as error:
        reasons.append(f"{error.filename}: {error.strerror}")
    return None


def check_launch(
    config: Config,
    world: World,
    index: Index | None,
    networks: MetaNetworks | None,
    is_new: bool,
    reasons: list[str],
) -> None:
    """Append the reasons of refusal other than batch, images and checkpoints; see ``build_run``."""
    run_dir = Path(config.run.output_dir)
    attempt(reasons, lambda: refuse_folder(run_dir))
    attempt(reasons, lambda: refuse_living_holder(run_dir))
    attempt(reasons, lambda: refuse_further_launch(run_dir))
    attempt(reasons, lambda: require_decoder(config.data.decode))
    attempt(reasons, lambda: refuse_missing_trackers(config.log.trackers))
    if config.backend.name == "deepspeed":
        attempt(reasons, refuse_missing_deepspeed)
    else:
        sharding = config.backend.sharding
        attempt(
            reasons,
            lambda: ranks_per_shard_group(sharding, world.world_size, world.local_world_size),
        )
    if networks is None:
        return
    attempt(reasons, lambda: refuse_missing_cls(config, networks.teachers))
    for name, alone in teacher_configs(config).items():
        if builds_teacher(alone) and is_file_name(str(alone.teacher.weights)):
            build = partial(build_teacher, alone, "cpu", compute_dtype(alone))
            attempt(reasons, partial(in_entry, name, build))
        if alone.teacher.mode == "cached" and index is not None:
            attempt(reasons, partial(in_entry, name, partial(check_cache, alone, index)))
    weights = config.student.init_weights
    if weights is not None and is_new:
        attempt(reasons, lambda: open_init_weights(networks.model, weights))
    if config.student.init_from_run is not None and is_new:
        alone = World(0, 1, 0, 1, "none")
        attempt(reasons, lambda: open_source(config, networks.model, alone, hashes=False))
    if config.eval.every is not None:
        attempt(reasons, lambda: check_evaluation(config))


def refuse_folder(run_dir: Path) -> None:
    """Refuse a folder that cannot be created or written, or belongs to another program.

    Raises:
        ConfigError: names the first existing folder above it, or the file.
    """
    folders = (run_dir, *run_dir.absolute().parents)
    nearest = next(folder for folder in folders if os.path.exists(folder))
    if not nearest.is_dir():
        raise ConfigError(f"run.output_dir={run_dir}: {nearest} is not a folder; name another")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ConfigError(
            f"run.output_dir={run_dir} cannot be written (no permission for {nearest}); name "
            "another folder"
        )
    refuse_foreign_folder(run_dir)


def in_entry(name: str, call: Callable[[], T]) -> T:
    """Return the result of a call; errors name the entry of ``teachers``, if ``name`` is one."""
    with entry_errors(name):
        return call()


def check_cache(config: Config, index: Index) -> None:
    """Open the cache of ``teacher.mode=cached``; see ``open_cache`` for the errors."""
    with torch.device("meta"):
        skeleton = build_teacher_skeleton(config).to("meta", compute_dtype(config))
    open_cache(config, skeleton, index)


def check_evaluation(config: Config) -> None:
    """Open the evaluation of the run as a launch does, but keep no index of its images."""
    with tempfile.TemporaryDirectory(prefix="dry-run-") as folder:
        elsewhere = replace(config, run=replace(config.run, output_dir=folder))
        RunEvaluation(elsewhere, World(0, 1, 0, 1, "none"), torch.device("cpu"))


def count_networks(config: Config, world: World, networks: MetaNetworks) -> list[str]:
    """Return the lines about parameters, FLOPs and memory."""
    model = networks.model
    flops = count_flops(config, networks)
    lines = [
        f"encoder         {format_millions(model.encoder)} parameters",
        f"decoder         {format_millions(model.decoder)} parameters",
        f"heads           {format_millions(model.heads)} parameters",
    ]
    for name, alone, teacher in list_teachers(config, networks.teachers):
        lines += count_teacher(name, alone, teacher)
    lines.append(
        f"GFLOP per view  student {format_giga(flops.student)} (forward and backward), momentum "
        f"{format_giga(flops.momentum)}, teacher {format_giga(flops.teacher)} (2 per MAC)"
    )
    ranks, node_size = world.world_size, world.local_world_size
    memory = memory_bytes(config, ranks, networks, node_size)
    lines += [f"memory per GPU  {name:<17}{size / GIB:8.2f} GiB" for name, size in memory.items()]
    shards = count_shards(config, ranks, node_size).states
    lines.append(
        f"memory per GPU  {'at the peak':<17}{sum(memory.values()) / GIB:8.2f} GiB (modelled, "
        f"{shards} shards; states exact, activations of the eager student; beside it {RESERVE:.0%} "
        "of the device, assumed, for CUDA's context, NCCL and fragmentation)"
    )
    return lines


def count_images(config: Config, reasons: list[str]) -> tuple[Index | None, int | None, str]:
    """Return the index, the number of images and the source of that number.

    ``data.expected_images`` replaces the number of absent images, so that a recipe can be tried on
    a machine without them.
    """
    data, expected = config.data, config.data.expected_images
    if expected is not None and is_absent(data.path):
        return None, expected, "data.expected_images; not counted"
    run_dir = Path(config.run.output_dir)
    folder = Path(data.index) if data.index else run_dir / "index"
    recheck_excluded = not has_begun(config, run_dir)
    index = attempt(reasons, lambda: open_images_read_only(data, folder, recheck_excluded))
    if index is None:
        return None, expected, reasons[-1] if expected is None else "data.expected_images"
    attempt(reasons, lambda: refuse_bad_index(config, index))
    return index, len(index), f"counted in {data.path}"


def is_absent(path: str) -> bool:
    """Return whether no file or folder is at a path, and none matches it as a pattern."""
    try:
        return not is_url(path) and not has_files(Path(path))
    except DataError:  # reported when the images are opened
        return False


class Resumed(NamedTuple):
    """A checkpoint that a launch would resume."""

    name: str
    """Folder and step."""
    end_step: int
    """Last step of the run."""


def find_saved_state(config: Config, index: Index | None, images: int | None) -> Resumed | None:
    """Return the checkpoint that a launch would resume; ``None``: a new run.

    Files are compared by size only. ``images`` is the number of images, where it is known.

    Raises:
        CheckpointError: if no checkpoint is intact.
        ConfigError: if the run may not resume it.
    """
    root = Path(config.run.output_dir) / "checkpoints"
    folders = checkpoints.list_checkpoints(root)
    for folder in folders:
        if checkpoints.find_damage(folder, hashes=False) is None:
            state: dict[str, Any] = checkpoints.read_state(folder)
            name = f"{folder} (step {state['progress']['step']})"
            try:
                digest = state["index_digest"] if index is None else index.digest
                keys = Pretraining.name, Pretraining.free_keys
                changes = compare_run(config, *keys, state, digest)
            except CmtMaeError as error:
                raise type(error)(f"{name} would be refused: {error}") from error
            end = continue_progress(config, images or 1, state, bool(changes)).end_step
            return Resumed(name, end)
    if folders:
        raise CheckpointError(
            f"{root}: none of {len(folders)} checkpoints is intact; restore one, or use another "
            "run.output_dir"
        )
    if checkpoints.LATEST in list_names(root):
        raise describe_loss(root)
    return None


def count_teacher(name: str, config: Config, teacher: OnlineTeacher) -> list[str]:
    """Return the lines about the only teacher of a config; ``name`` is empty for a single one."""
    origin = f", read from {cache_folder(config)}" if reads_cache(config) else ""
    origin += "" if builds_teacher(config) else " and not built"
    label = f"teacher {name}".strip()
    lines = [f"{label:<15} {format_millions(teacher.model)} parameters, frozen{origin}"]
    weights = config.teacher.weights or "random"
    if builds_teacher(config) and weights != "random" and not is_file_name(weights):
        lines.append(
            f"                weights {weights}: a launch takes them from the library's cache, "
            "or downloads them; not checked"
        )
    return lines


def format_millions(module: nn.Module) -> str:
    """Format the number of parameters, in millions."""
    return f"{sum(p.numel() for p in module.parameters()) / 1e6:.2f} M"


def format_giga(value: float) -> str:
    """Format a number in units of 1e9: one decimal, or three digits of a small one."""
    giga = value / 1e9
    return f"{giga:.1f}" if giga >= 10 else f"{giga:.3g}"
