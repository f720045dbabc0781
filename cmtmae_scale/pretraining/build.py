"""From a config to everything that the loop needs; nothing is trained here."""

import copy
import logging
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch

from cmtmae_scale import __version__
from cmtmae_scale.backends.base import MicroBatch, Objective
from cmtmae_scale.backends.build import make_backend
from cmtmae_scale.cache.followed import SidecarTeacher
from cmtmae_scale.cache.identity import provenance, warn_of_provenance
from cmtmae_scale.cache.teacher import CachedTeacher, open_cache
from cmtmae_scale.checkpoint import layout as checkpoints
from cmtmae_scale.checkpoint.chunks import load_fragments
from cmtmae_scale.checkpoint.init_weights import load_init_weights
from cmtmae_scale.checkpoint.open import newest_checkpoint, open_writer
from cmtmae_scale.config.derive import (
    batch_plan,
    builds_teacher,
    cache_folder,
    needs,
    reads_cache,
    total_steps,
)
from cmtmae_scale.config.load import config_to_dict
from cmtmae_scale.config.schema import Config
from cmtmae_scale.engine.progress import Progress, fresh_progress, resumed_progress
from cmtmae_scale.engine.resume import compare
from cmtmae_scale.engine.skips import Skips
from cmtmae_scale.engine.stop import StopRequest
from cmtmae_scale.engine.stragglers import Stragglers
from cmtmae_scale.engine.task import Parts
from cmtmae_scale.engine.telemetry import Telemetry
from cmtmae_scale.errors import CacheError, ConfigError, TeacherError
from cmtmae_scale.method.initialisation import initialise
from cmtmae_scale.method.masking import token_counts
from cmtmae_scale.method.model import CollaborativeMAE
from cmtmae_scale.method.student import MomentumEncoder, build_student
from cmtmae_scale.method.targets import Losses, Predictions, TokenLayout, objective
from cmtmae_scale.pretraining.prepare import Models
from cmtmae_scale.runtime.collectives import barrier, texts_of_all
from cmtmae_scale.runtime.launch import World
from cmtmae_scale.runtime.progress_file import ProgressFile
from cmtmae_scale.teachers.base import Teacher, TeacherSource, view_sizes
from cmtmae_scale.teachers.build import build_teacher, build_teacher_skeleton, compute_dtype
from cmtmae_scale.teachers.weights import read_weights
from dataloading.index import Index, load_or_build
from dataloading.mixing import require_mixed
from dataloading.stream import Stream

logger = logging.getLogger(__name__)


def build_parts(config: Config, world: World, device: torch.device, stack: ExitStack) -> Parts:
    """Build data, teacher, student and backend, and resume where there is something to resume.

    Args:
        config: checked settings.
        world: this process's place; the process group is open.
        device: this rank's device.
        stack: closes what was opened, in reverse order.

    Raises:
        ConfigError: settings that do not fit the data, the number of ranks or the checkpoint.
        DataError: unusable images.
        TeacherError: a teacher that cannot be built.
        CacheError: a teacher cache that the run cannot use.
        CheckpointError: checkpoints of which none is intact.
    """
    run_dir = Path(config.run.output_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    stop = StopRequest(run_dir, config.run.time_limit_s)
    plan = batch_plan(config, world.world_size)
    index = open_index(config, run_dir, world)
    steps = total_steps(config, len(index))
    folder = newest_checkpoint(run_dir, world)
    progress = where_to_start(config, folder, index.digest, steps)
    teacher = open_teacher(config, world, device, index, stop, stack)
    models = build_models(config, world, device, teacher, resumed=folder is not None)
    skips = Skips(config.guard)
    if folder is not None:
        skips.restore(checkpoints.read_state(folder).get("skips"))
        load_fragments(folder, models.backend.fragments())
        models.backend.after_load(progress.applied)
        logger.info("resuming %s at step %d", folder, progress.step)
    stream = stack.enter_context(open_stream(config, index, world, device, teacher, progress))
    barrier()  # from here on no rank ends alone at a signal
    stop.install()
    telemetry = standing = None
    if world.rank == 0:
        standing = ProgressFile(run_dir)
        telemetry = Telemetry(run_dir, progress.step, progress.end_step, config.log.every)
        stack.callback(telemetry.close)
    saved_step = progress.step if folder is not None and progress.step != progress.step0 else None
    writer = open_writer(run_dir, world, config.checkpoint, saved_step, stack)
    logger.info(
        "%s: batch %s; steps %d to %d",
        config.run.name,
        plan,
        progress.step + 1,
        progress.end_step,
    )
    return Parts(
        config=config,
        plan=plan,
        device=device,
        stream=stream,
        models=models,
        progress=progress,
        writer=writer,
        stop=stop,
        telemetry=telemetry,
        standing=standing,
        saved_facts=facts(config, index.digest, world),
        run_dir=run_dir,
        skips=skips,
        stragglers=Stragglers(device, config.log.every),
        index=index,
    )


def build_models(
    config: Config,
    world: World,
    device: torch.device,
    teacher: TeacherSource | None,
    resumed: bool = False,
) -> Models:
    """Build student and momentum student, and hand them to the backend.

    Args:
        config: checked settings.
        world: this process's place.
        device: this rank's device.
        teacher: where the teacher's views come from.
        resumed: a checkpoint will overwrite all weights, so that ``student.init_weights`` is not read.

    Raises:
        ConfigError: settings that the models cannot meet, or an unfit ``student.init_weights``.
    """
    model, momentum_encoder = build_model(config, teacher, resumed)
    length = grid_length(model)
    counts = token_counts(length, config.mask.ratio, config.mask.throw_ratio)
    layout = TokenLayout.from_config(config, *counts)
    backend = make_backend(
        config,
        world,
        device,
        model,
        momentum_encoder,
        make_objective(config, layout),
        rows=config.train.global_batch_size * config.mask.masks_per_view,
    )
    return Models(teacher, backend, layout, length, model.encoder.patch_side)


def open_index(config: Config, run_dir: Path, world: World) -> Index:
    """Let rank 0 build or check the index, then open it on every rank."""
    folder = Path(config.data.index) if config.data.index else run_dir / "index"
    build = partial(
        load_or_build,
        config.data.path,
        folder,
        source=config.data.source,
        max_pixels=config.data.max_pixels,
    )
    index = build() if world.rank == 0 else None
    barrier()
    index = index if index is not None else build()
    expected = config.data.expected_images
    if expected is not None and expected != len(index):
        raise ConfigError(
            f"data.path={config.data.path} has {len(index)} usable images, "
            f"data.expected_images={expected}; correct one of them"
        )
    if config.data.shuffle == "window":
        require_mixed(index, config.data.window_on_sorted)
    return index


def where_to_start(config: Config, folder: Path | None, digest: str, steps: int) -> Progress:
    """Progress of the checkpoint that is resumed, or of a new run."""
    if folder is None:
        return fresh_progress(steps, config.train.global_batch_size)
    state = checkpoints.read_state(folder)
    changes = compare(
        state["config"],
        config_to_dict(config),
        config.run.allow_change,
        (state["index_digest"], digest),
    )
    for change in changes:
        logger.warning("allowed change: %s", change)
    return resumed_progress(state["progress"], steps, config.train.global_batch_size, bool(changes))


def open_teacher(
    config: Config,
    world: World,
    device: torch.device,
    index: Index,
    stop: StopRequest,
    stack: ExitStack,
) -> TeacherSource | None:
    """Build the teacher, or open its cache; ``None`` where the run uses neither.

    Args:
        config: checked settings.
        world: this process's place.
        device: this rank's device.
        index: the images.
        stop: told of rows that a run without a live teacher lacks.
        stack: closes the cache.

    Raises:
        TeacherError: a teacher that cannot be built.
        CacheError: on every rank, if the cache cannot be used on one. A collective.
    """
    live = fetch_teacher(config, world, device) if builds_teacher(config) else None
    if not reads_cache(config):
        return live
    with torch.device("meta"):
        described = build_teacher_skeleton(config).to("meta", compute_dtype(config))
    teacher, problem = None, ""
    try:
        if config.teacher.mode == "sidecar" and live is not None:
            teacher = SidecarTeacher(config, described, live, index, device, stop.fail)
        else:
            opened = open_cache(config, described, index)
            if world.rank == 0:
                here = provenance(config, device)
                warn_of_provenance(opened[0], here, str(config.cache.dir))
            teacher = CachedTeacher(config, *opened, described, live, device, stop.fail)
        stack.callback(teacher.close)
    except CacheError as error:
        problem = str(error)
    problems = list(filter(None, texts_of_all(problem)))
    if problems:
        raise CacheError(problems[0])
    logger.info(
        "teacher.mode=%s, %s; cache.on_miss=%s",
        config.teacher.mode,
        cache_folder(config),
        config.cache.on_miss,
    )
    return teacher


def fetch_teacher(config: Config, world: World, device: torch.device) -> Teacher | None:
    """Build the teacher; a tag's weights are fetched by local rank 0 while the others wait."""
    dtype = compute_dtype(config)
    teacher = build_teacher(config, device, dtype) if world.local_rank == 0 else None
    barrier()
    return teacher if world.local_rank == 0 else build_teacher(config, device, dtype)


def build_model(
    config: Config, teacher: TeacherSource | None, resumed: bool = False
) -> tuple[CollaborativeMAE, MomentumEncoder | None]:
    """Student with decoder on the CPU, the same weights on every rank, and its moving average."""
    if (
        config.loss.include_cls
        and needs(config).teacher_features
        and teacher
        and not teacher.has_cls
    ):
        raise ConfigError(
            f"loss.include_cls=true, but teacher.model={config.teacher.model} has no class token; "
            "set loss.include_cls=false"
        )
    model = CollaborativeMAE(config, teacher.width if teacher else None)
    initialise(model, config.run.seed)
    if config.student.init_weights is not None and not resumed:
        start_from(model, config.student.init_weights)
    model.set_activation_checkpointing(config.backend.activation_checkpointing)
    if not needs(config).momentum:
        return model, None
    momentum_encoder = build_student(config, MomentumEncoder)
    momentum_encoder.load_state_dict(copy.deepcopy(model.encoder.state_dict()))
    momentum_encoder.requires_grad_(False).eval()
    return model, momentum_encoder


def start_from(model: CollaborativeMAE, file: str) -> None:
    """Load ``student.init_weights`` on every rank, and tell what became of each of its tensors.

    Raises:
        ConfigError: a file that is absent, broken, of unknown names or of another architecture.
    """
    try:
        state = read_weights(file, "student.init_weights")
    except TeacherError as error:
        raise ConfigError(str(error)) from error
    logger.info("student.init_weights=%s: %s", file, load_init_weights(model, state, file))


def make_objective(config: Config, layout: TokenLayout) -> Objective:
    """The run's loss as a function of predictions and a micro-batch."""

    def compute(predictions: Predictions, batch: MicroBatch) -> Losses:
        return objective(
            predictions, batch.targets, batch.valid, layout, config.loss, batch.alpha_target
        )

    return compute


def open_stream(
    config: Config,
    index: Index,
    world: World,
    device: torch.device,
    teacher: TeacherSource | None,
    progress: Progress,
) -> Stream:
    """This rank's part of the global sequence of views, from the run's position on."""
    return Stream(
        index,
        seed=config.run.seed,
        micro_batch=config.train.micro_batch_size,
        rank=world.rank,
        world_size=world.world_size,
        sizes=view_sizes(config.views.image_size, teacher),
        scale=config.views.crop_scale,
        ratio=config.views.aspect_ratio,
        flip=config.views.hflip,
        count=config.views.views_per_image,
        shuffle=config.data.shuffle,
        threads=config.data.workers,
        start_position=progress.position,
        decode=config.data.decode,
        resident=config.data.resident,
        device=device,
        quarantine=Path(config.run.output_dir) / "quarantine.jsonl",
        watch=teacher.submit if isinstance(teacher, CachedTeacher | SidecarTeacher) else None,
    )


def grid_length(model: CollaborativeMAE) -> int:
    """Number of patches N."""
    height, width = model.encoder.grid
    return height * width


def facts(config: Config, digest: str, world: World) -> dict[str, Any]:
    """What a checkpoint records beside progress; run controls are as given."""
    return {
        "config": config_to_dict(config),
        "index_digest": digest,
        "world_size": world.world_size,
        "versions": {"cmtmae_scale": __version__, "torch": torch.__version__},
    }
