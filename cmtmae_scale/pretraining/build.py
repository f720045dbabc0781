"""Builds data, teachers, models and stream of pre-training from a config."""

import hashlib
import logging
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from cmtmae_scale.backends.base import Objective
from cmtmae_scale.backends.build import make_backend
from cmtmae_scale.backends.initial import initialise_backend
from cmtmae_scale.cache.fingerprint import provenance, warn_about_provenance
from cmtmae_scale.cache.format import MANIFEST, manifest_text
from cmtmae_scale.cache.teacher import CachedTeacher, SidecarTeacher, open_cache
from cmtmae_scale.checkpoint.init_weights import match_init_weights, refuse_non_finite
from cmtmae_scale.checkpoint.layout import list_checkpoints
from cmtmae_scale.config.batch import batch_plan
from cmtmae_scale.config.images import request_images, require_expected_images
from cmtmae_scale.config.needs import needs
from cmtmae_scale.config.schema import Config
from cmtmae_scale.config.teachers import (
    builds_teacher,
    cache_folder,
    entry_errors,
    entry_text,
    has_teacher_mean,
    reads_cache,
    teacher_configs,
    teacher_shares,
)
from cmtmae_scale.engine.agreement import require_equal, require_equal_images, require_equal_weights
from cmtmae_scale.engine.stop import StopRequest
from cmtmae_scale.errors import CacheError, ConfigError, TeacherError
from cmtmae_scale.method.build import build_student
from cmtmae_scale.method.float8 import use_float8, warn_about_emulation
from cmtmae_scale.method.initialisation import Values, initial_values
from cmtmae_scale.method.masking import grid_counts
from cmtmae_scale.method.model import CollaborativeMAE
from cmtmae_scale.method.student import MomentumEncoder
from cmtmae_scale.method.targets import (
    Predictions,
    TokenLayout,
    objective,
    term_weights,
    weighted_sum,
)
from cmtmae_scale.pretraining.channels import open_channels
from cmtmae_scale.pretraining.init_from_run import load_source, open_source
from cmtmae_scale.pretraining.prepare import MicroBatch, Models
from cmtmae_scale.runtime.collectives import on_all_ranks
from cmtmae_scale.runtime.compilation import compiled
from cmtmae_scale.runtime.launch import World
from cmtmae_scale.runtime.shared_index import open_on_all_ranks
from cmtmae_scale.teachers.base import Teacher, TeacherSource, feature_widths, view_sizes
from cmtmae_scale.teachers.build import build_teacher, build_teacher_skeleton, compute_dtype
from cmtmae_scale.teachers.weights import digest_weights, map_weights
from dataloading.errors import ReadError
from dataloading.index import Index
from dataloading.mixing import require_mixed
from dataloading.parquet_index import require_small_groups
from dataloading.plan import Plan
from dataloading.stream import Stream

logger = logging.getLogger(__name__)


def build_models(
    config: Config,
    world: World,
    device: torch.device,
    teachers: dict[str, TeacherSource],
    resumed: bool = False,
) -> Models:
    """Build student and momentum encoder, shard them with the backend, and initialise the shards.

    Args:
        config: checked settings.
        world: place of this process.
        device: device of this rank.
        teachers: where each teacher's views are read from, by name.
        resumed: whether a checkpoint will set all weights, so that none are initialised or read.

    Raises:
        ConfigError: settings that the models cannot meet, or an unfit ``student.init_weights`` or
            ``student.init_from_run``.
        CheckpointError: a checkpoint of ``student.init_from_run`` that is absent or broken.
    """
    warn_about_emulation(config, device)
    model, momentum_encoder = build_model(config, teachers)
    source, values = None, None
    if not resumed and config.student.init_from_run is not None:
        source = open_source(config, model, world)
    elif not resumed:
        values = find_initial_values(config, world, model)
    length = grid_length(model)
    counts = grid_counts(config.mask, length)
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
    if values is not None:
        initialise_backend(backend, values)
    channels = open_channels(config, teachers, model.encoder, device)
    prior_steps = 0
    if source is not None:
        prior_steps = load_source(config, model, backend, channels, source)
    patch = model.encoder.patch_side
    return Models(teachers, backend, layout, length, patch, channels, prior_steps)


def open_index(config: Config, run_dir: Path) -> Index:
    """Open the index of ``data.path`` on every rank; see ``open_on_all_ranks``. A collective.

    Raises:
        ConfigError: on every rank, if the images differ between ranks or from the settings.
        DataError: on every rank, if the images cannot be used on a rank.
    """
    data = config.data
    folder = Path(data.index) if data.index else run_dir / "index"
    recheck_excluded = on_all_ranks(lambda: not has_begun(config, run_dir))
    index = open_on_all_ranks(request_images(data), folder, data.verify_index, recheck_excluded)
    require_equal_images(index, data.path)
    refuse_bad_index(config, index)
    return index


def has_begun(config: Config, run_dir: Path) -> bool:
    """Return whether checkpoints, or a cache that the run reads, depend on the kept index."""
    folders = (cache_folder(one) for one in teacher_configs(config).values() if reads_cache(one))
    has_rows = any((folder / MANIFEST).exists() for folder in folders)
    return has_rows or bool(list_checkpoints(run_dir / "checkpoints"))


def refuse_bad_index(config: Config, index: Index) -> None:
    """Compare an index with the config's settings of the images.

    Raises:
        ConfigError: another number of images than ``data.expected_images``.
        DataError: images that ``data.shuffle`` refuses.
    """
    require_expected_images(config.data, index)
    require_small_groups(config.data.path, index.row_group, config.data.shuffle)
    if config.data.shuffle == "window":
        require_mixed(index, config.data.window_on_sorted)


def open_teachers(
    config: Config,
    world: World,
    device: torch.device,
    index: Index,
    stop: StopRequest,
    stack: ExitStack,
) -> dict[str, TeacherSource]:
    """Build the teachers that a run uses, or open their caches, by name.

    ``stop`` records the failure if a run without an online teacher lacks a row; the other
    arguments, and the errors, are those of ``open_one_teacher``, which opens each. A collective.
    """
    sources: dict[str, TeacherSource] = {}
    for name, alone in teacher_configs(config).items():
        if name:
            logger.info("teachers.%s: %s", name, alone.teacher.model)
        with entry_errors(name):
            fail = partial(record_entry_failure, stop, name)
            source = open_one_teacher(alone, world, device, index, fail, stack)
        if source is not None:
            sources[name] = source
    return sources


def record_entry_failure(stop: StopRequest, name: str, error: CacheError | ReadError) -> None:
    """Record a failure with the keys of an entry of ``teachers``, see ``entry_text``."""
    stop.record_failure(type(error)(entry_text(str(error), name)) if name else error)


def open_one_teacher(
    config: Config,
    world: World,
    device: torch.device,
    index: Index,
    fail: Callable[[CacheError | ReadError], None],
    stack: ExitStack,
) -> TeacherSource | None:
    """Build the only teacher of a config, or open its cache; ``None`` where it is not used.

    Args:
        config: checked settings.
        world: place of this process.
        device: device of this rank.
        index: the images.
        fail: called with the failure if a run without an online teacher lacks a row.
        stack: closes the cache.

    Raises:
        TeacherError: a teacher that cannot be built.
        CacheError: on every rank, if the cache cannot be used on a rank. A collective.
    """
    online = fetch_teacher(config, world, device) if builds_teacher(config) else None
    if not reads_cache(config):
        return online
    with torch.device("meta"):
        skeleton = build_teacher_skeleton(config).to("meta", compute_dtype(config))
    found: dict[str, str] = {}

    def open_rows() -> CachedTeacher | SidecarTeacher:
        if config.teacher.mode == "sidecar" and online is not None:
            rows = SidecarTeacher(config, skeleton, online, index, device, fail)
        else:
            opened = open_cache(config, skeleton, index)
            digest = hashlib.sha256(manifest_text(opened[0]).encode()).hexdigest()[:12]
            found["codec of the cache"], found["digest of its manifest"] = opened[0].codec, digest
            if world.rank == 0:
                here = provenance(config, device)
                warn_about_provenance(opened[0], here, str(config.cache.dir))
            rows = CachedTeacher(config, *opened, skeleton, online, device, fail)
        stack.callback(rows.close)
        return rows

    teacher = on_all_ranks(open_rows)
    require_equal(
        found, f"cache.dir={cache_folder(config)} must hold the same cache on every machine"
    )
    logger.info(
        "teacher.mode=%s, %s; cache.on_miss=%s",
        config.teacher.mode,
        cache_folder(config),
        config.cache.on_miss,
    )
    return teacher


def fetch_teacher(config: Config, world: World, device: torch.device) -> Teacher | None:
    """Build the teacher; a tag's weights are fetched by local rank 0 while the others wait.

    Raises:
        TeacherError, CmtMaeError: on every rank, if a rank cannot build it. A collective.
    """
    dtype = compute_dtype(config)
    fetches = world.local_rank == 0
    first = on_all_ranks(lambda: build_teacher(config, device, dtype) if fetches else None)
    teacher = on_all_ranks(lambda: first if fetches else build_teacher(config, device, dtype))
    if teacher is not None:
        if config.backend.compile and config.teacher.mode != "cached":
            teacher.compile()  # with a complete cache it runs for spot checks only
        facts = teacher.fingerprint
        require_equal_weights(lambda: {f"teacher: {name}": fact for name, fact in facts().items()})
    return teacher


def build_model(
    config: Config, teachers: Mapping[str, TeacherSource]
) -> tuple[CollaborativeMAE, MomentumEncoder | None]:
    """Build student and decoder, and the momentum encoder, on the meta device."""
    refuse_missing_cls(config, teachers)
    with torch.device("meta"):
        model = CollaborativeMAE(config, feature_widths(teachers))
        momentum_encoder = (
            build_student(config, MomentumEncoder) if needs(config).momentum else None
        )
    model.set_activation_checkpointing(config.backend.activation_checkpointing)
    if momentum_encoder is not None and config.momentum.precision == "fp8":
        for block in momentum_encoder.transformer_blocks():
            use_float8(block, "momentum.precision")
    return model, momentum_encoder


def refuse_missing_cls(config: Config, teachers: Mapping[str, TeacherSource]) -> None:
    """Refuse class tokens as targets if a teacher has none.

    Raises:
        ConfigError: names ``loss.include_cls``.
    """
    configs = teacher_configs(config)
    for name, source in teachers.items():
        alone = configs[name]
        loss = alone.loss
        targets = loss.include_cls and loss.tokens != "masked" and needs(alone).teacher_features
        if targets and not source.has_cls:
            with entry_errors(name):
                raise ConfigError(
                    f"loss.include_cls=true, but teacher.model={alone.teacher.model} has no class "
                    "token; set loss.include_cls=false"
                )


def find_initial_values(config: Config, world: World, model: CollaborativeMAE) -> Values:
    """Return the seed's values of every parameter, then those of ``student.init_weights``.

    A collective.

    Raises:
        ConfigError: on every rank, if the file cannot be used on a rank, or differs between ranks.
    """
    values = initial_values(model, config.run.seed)
    if config.student.init_weights is not None:
        file = Path(config.student.init_weights)
        values += on_all_ranks(
            lambda: open_init_weights(model, str(file), world.rank, world.world_size)
        )
        require_equal_weights(lambda: {"digest of student.init_weights": digest_weights(file)[:12]})
    return values


def open_init_weights(
    model: CollaborativeMAE, file: str, rank: int = 0, world_size: int = 1
) -> Values:
    """Map ``student.init_weights``, and log which of its tensors are used.

    Each of ``world_size`` ranks verifies its share of the tensors, so that no rank reads the whole
    file into memory.

    Raises:
        ConfigError: a file that is absent, broken, of unknown names or of another architecture.
    """
    try:
        state = map_weights(file, "student.init_weights")
    except TeacherError as error:
        raise ConfigError(str(error)) from error.__cause__  # an error of the store may be transient
    refuse_non_finite(dict(list(state.items())[rank::world_size]), file)
    values, report = match_init_weights(model, state, file)
    logger.info("student.init_weights=%s: %s", file, report)
    return values


def make_objective(config: Config, layout: TokenLayout) -> Objective:
    """Return the run's loss as a function of predictions and a micro-batch."""
    score = compiled(compute_losses, config.backend.compile)

    def compute(predictions: Predictions, batch: MicroBatch) -> dict[str, Tensor]:
        alpha = batch.alpha_target
        losses = score(config, layout, predictions, batch.targets, batch.valid, alpha)
        if batch.only_term is None:
            return losses
        weights = term_weights(config, alpha)
        alone = {name: weight * float(name == batch.only_term) for name, weight in weights.items()}
        return losses | {"total": weighted_sum(losses, alone)}

    return compute


def compute_losses(
    config: Config,
    layout: TokenLayout,
    predictions: Predictions,
    targets: Predictions,
    valid: Tensor,
    alpha_target: Tensor,
) -> dict[str, Tensor]:
    """Return the losses of ``objective``; with several teachers also their mean, ``teacher``.

    Arguments and errors are those of ``objective``.
    """
    weights = term_weights(config, alpha_target)
    losses = objective(predictions, targets, valid, layout, config.loss, weights)
    if not has_teacher_mean(config):
        return losses
    mean = weighted_sum(losses, teacher_shares(config))
    return {"total": losses["total"], "teacher": mean, **losses}


def open_stream(
    config: Config,
    index: Index,
    world: World,
    device: torch.device,
    teachers: Mapping[str, TeacherSource],
    position: int,
) -> Stream:
    """Open this rank's views of the global stream from a global sample index on."""
    watches = [
        one.submit for one in teachers.values() if isinstance(one, CachedTeacher | SidecarTeacher)
    ]

    def submit_to_all(plan: Plan) -> None:
        for submit in watches:
            submit(plan)

    return Stream(
        index,
        seed=config.run.seed,
        micro_batch=batch_plan(config, world.world_size).micro_batch_size,
        rank=world.rank,
        world_size=world.world_size,
        sizes=view_sizes(config.views.image_size, teachers),
        scale=config.views.crop_scale,
        ratio=config.views.aspect_ratio,
        flip=config.views.hflip,
        count=config.views.views_per_image,
        shuffle=config.data.shuffle,
        threads=config.data.workers,
        worker_type=config.data.worker_type,
        start_position=position,
        decode=config.data.decode,
        resident=config.data.resident,
        device=device,
        quarantine=Path(config.run.output_dir) / "quarantine.jsonl",
        store_cache=None if config.data.store_cache is None else Path(config.data.store_cache),
        watch=submit_to_all if watches else None,
    )


def grid_length(model: CollaborativeMAE) -> int:
    """Return the number of patches, N."""
    height, width = model.encoder.grid
    return height * width
