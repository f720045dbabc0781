"""From a config and an encoder to everything that the loop needs; nothing is trained here."""

import logging
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor

from cmtmae_scale import __version__
from cmtmae_scale.backends.build import make_backend
from cmtmae_scale.checkpoint import layout
from cmtmae_scale.checkpoint.chunks import load_fragments
from cmtmae_scale.checkpoint.open import newest_checkpoint, open_writer
from cmtmae_scale.config.derive import batch_plan, total_steps
from cmtmae_scale.config.finetune import Finetune
from cmtmae_scale.config.load import config_to_dict
from cmtmae_scale.engine.progress import Progress, fresh_progress, resumed_progress
from cmtmae_scale.engine.resume import compare
from cmtmae_scale.engine.stop import StopRequest
from cmtmae_scale.engine.telemetry import Telemetry
from cmtmae_scale.errors import ConfigError
from cmtmae_scale.evaluation.images import Sets, open_pair
from cmtmae_scale.finetuning.accuracy import Accuracy
from cmtmae_scale.finetuning.augment import Augmenter, cross_entropy
from cmtmae_scale.finetuning.classifier import (
    Classifier,
    build_classifier,
    layer_scale,
    load_encoder,
)
from cmtmae_scale.finetuning.loop import Parts
from cmtmae_scale.finetuning.start import Start, check_same, start_from_dict
from cmtmae_scale.runtime.launch import World
from dataloading.stream import Stream

logger = logging.getLogger(__name__)

FREE = (
    *("run.name", "run.output_dir", "run.allow_change", "log.", "checkpoint.", "backend."),
    *("train.stop_after", "data.path", "data.test_path", "data.decode", "data.workers"),
    "data.max_bad_fraction",
)
"""Keys, or groups with their point, that may change at a resume. The micro-batch is not among
them: mixup pairs the views of one."""

OpenStart = Callable[[], tuple[Start, dict[str, Tensor]]]
"""Opens the encoder that the command line names. A collective."""


def build_parts(
    config: Finetune,
    words: dict[str, str | None],
    open_start: OpenStart,
    world: World,
    device: torch.device,
    stack: ExitStack,
) -> tuple[Parts, Start, Sets]:
    """Build data, classifier and backend, and resume where there is something to resume.

    Args:
        config: checked settings.
        words: how the command line names the encoder.
        open_start: opens it; not called where a run goes on that named it in the same words.
        world: this process's place; the process group is open.
        device: this rank's device.
        stack: closes what was opened, in reverse order.

    Raises:
        ConfigError: settings that do not fit the data, the number of ranks or the checkpoint.
        DataError: unusable images.
        CheckpointError: checkpoints of which none is intact, or an encoder that is not there.
    """
    run_dir = Path(config.run.output_dir)
    plan = batch_plan(config, world.world_size)
    sets = open_pair(config.data.path, config.data.test_path, run_dir)
    steps = total_steps(config, len(sets.train))
    check_warmup(config, steps, len(sets.train))
    folder = newest_checkpoint(run_dir, world)
    digest = sets.train.index.digest
    if folder is None:
        progress = fresh_progress(steps, config.train.global_batch_size)
        start, weights = open_start()
        classifier = make_classifier(config, start, sets)
        load_encoder(classifier, weights, start.name)
    else:
        state = layout.read_state(folder)
        progress = where_to_go_on(config, state, folder, digest, steps)
        start = start_from_dict(state["start"])
        if words != start.named:
            check_same(start, open_start()[0], config.run.output_dir)
        classifier = make_classifier(config, start, sets)
    encoder = classifier.encoder
    encoder.set_grad_checkpointing(config.backend.activation_checkpointing)
    backend = make_backend(
        config,
        world,
        device,
        classifier,
        None,
        cross_entropy,
        rows=config.train.global_batch_size,
        lr_scale=layer_scale(len(encoder.blocks), config.optimizer.layer_decay),
    )
    stack.callback(backend.close)
    if folder is not None:
        load_fragments(folder, backend.fragments())
        backend.after_load(progress.applied)
        logger.info("resuming %s at step %d", folder, progress.step)
    stream = stack.enter_context(open_stream(config, start, sets, world, device, progress))
    stop = StopRequest(run_dir, config.run.time_limit_s)
    stop.install()
    telemetry = None
    if world.rank == 0:
        telemetry = Telemetry(run_dir, progress.step, progress.end_step, config.log.every)
        stack.callback(telemetry.close)
    saved_step = progress.step if folder is not None and progress.step != progress.step0 else None
    writer = open_writer(run_dir, world, config.checkpoint, saved_step, stack)
    logger.info(
        "%s: batch %s; steps %d to %d",
        *(config.run.name, plan, progress.step + 1, progress.end_step),
    )
    parts = Parts(
        config=config,
        plan=plan,
        device=device,
        stream=stream,
        labels=torch.as_tensor(sets.train.labels, device=device),
        size=start.size,
        augment=Augmenter(
            config.augment,
            seed=config.run.seed,
            classes=len(sets.classes),
            depth=len(encoder.blocks),
            drop_path=config.head.drop_path,
            mean=start.mean,
            std=start.std,
        ),
        backend=backend,
        accuracy=Accuracy(
            make_classifier(config, start, sets), start, sets.test, config, world, device
        ),
        progress=progress,
        writer=writer,
        stop=stop,
        telemetry=telemetry,
        saved_facts=facts(config, start, digest, world),
        run_dir=run_dir,
    )
    return parts, start, sets


def check_warmup(config: Finetune, steps: int, num_images: int) -> None:
    """Refuse a warm-up that a run of so many steps does not end.

    Raises:
        ConfigError: naming both lengths.
    """
    epochs = steps * config.train.global_batch_size / num_images
    if config.optimizer.warmup_epochs >= epochs:
        raise ConfigError(
            f"optimizer.warmup_epochs={config.optimizer.warmup_epochs}: the run has only "
            f"{epochs:.4g} passes over {num_images} images; lower it"
        )


def where_to_go_on(
    config: Finetune, state: dict[str, Any], folder: Path, digest: str, steps: int
) -> Progress:
    """Progress of a checkpoint.

    Raises:
        ConfigError: if it is of another kind of run, or under settings that must not change.
    """
    if "start" not in state:
        raise ConfigError(f"{folder} is of a pre-training; use another run.output_dir")
    changes = compare(
        state["config"],
        config_to_dict(config),
        config.run.allow_change,
        (state["index_digest"], digest),
        FREE,
    )
    for change in changes:
        logger.warning("allowed change: %s", change)
    return resumed_progress(state["progress"], steps, config.train.global_batch_size, bool(changes))


def make_classifier(config: Finetune, start: Start, sets: Sets) -> Classifier:
    """A classifier of the run's shape, the head as it starts."""
    return build_classifier(
        start.arch,
        start.patch_size,
        start.size,
        classes=len(sets.classes),
        pool=config.head.pool,
        seed=config.run.seed,
    )


def open_stream(
    config: Finetune,
    start: Start,
    sets: Sets,
    world: World,
    device: torch.device,
    progress: Progress,
) -> Stream:
    """This rank's part of the global sequence of views, from the run's position on."""
    return Stream(
        sets.train.index,
        seed=config.run.seed,
        micro_batch=config.train.micro_batch_size,
        rank=world.rank,
        world_size=world.world_size,
        sizes=(start.size,),
        scale=config.augment.crop_scale,
        ratio=config.augment.aspect_ratio,
        flip=config.augment.hflip,
        threads=config.data.workers,
        start_position=progress.position,
        decode=config.data.decode,
        device=device,
        quarantine=Path(config.run.output_dir) / "quarantine.jsonl",
    )


def facts(config: Finetune, start: Start, digest: str, world: World) -> dict[str, Any]:
    """What a checkpoint records beside progress."""
    return {
        "config": config_to_dict(config),
        "start": start.to_dict(),
        "index_digest": digest,
        "world_size": world.world_size,
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Versions of what computes."""
    return {
        "cmtmae_scale": __version__,
        "torch": torch.__version__,
        "timm": timm.__version__,
    }
