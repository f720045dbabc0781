"""Checks whether a run may resume a checkpoint under the present config, and where it continues."""

import logging
import math
from typing import Any

from cmtmae_scale.config.batch import BatchPlan, exact, pairs_views, split_batch, total_steps
from cmtmae_scale.config.changes import (
    FREE_KEYS,
    RESHAPING_KEYS,
    compare_configs,
    flatten,
    format_names,
)
from cmtmae_scale.config.load import config_to_dict
from cmtmae_scale.config.schema import Trained
from cmtmae_scale.engine.progress import Progress, fresh_progress, resumed_progress
from cmtmae_scale.engine.task import Task
from cmtmae_scale.errors import CheckpointError, ConfigError
from dataloading.index import Index

logger = logging.getLogger(__name__)


def find_progress(
    config: Trained, task: Task, index: Index, saved: dict[str, Any] | None
) -> tuple[Progress, bool]:
    """Return the progress of a new run, or of the checkpoint that is resumed.

    Args:
        config: checked settings.
        task: what is trained.
        index: the training images.
        saved: state of the checkpoint; ``None``: a new run.

    Returns:
        The progress, and whether ``run.allow_change`` lets a setting differ from the checkpoint's.

    Raises:
        ConfigError: if the checkpoint is of another task, or a setting must not change.
    """
    if saved is None:
        steps = total_steps(config, len(index))
        return fresh_progress(steps, config.train.global_batch_size), False
    changes = compare_run(config, task.name, task.free_keys, saved, index.digest)
    for change in changes:
        logger.warning("allowed change: %s", change)
    return continue_progress(config, len(index), saved, bool(changes)), bool(changes)


def continue_progress(
    config: Trained, num_images: int, saved: dict[str, Any], changed: bool
) -> Progress:
    """Return the progress of a checkpoint that is resumed; see ``resumed_progress``."""
    left = steps_left(config, num_images, saved)
    return resumed_progress(saved["progress"], left, config.train.global_batch_size, changed)


def steps_left(config: Trained, num_images: int, saved: dict[str, Any]) -> int:
    """Return the steps from a checkpoint to the end of the run, under the present config.

    A length in epochs is a number of views: the remaining views take fewer steps of a larger batch.

    Args:
        config: checked settings.
        num_images: number of images in the index.
        saved: state of the checkpoint.
    """
    progress, length = Progress.from_dict(saved["progress"]), config.train
    if length.steps is not None or length.epochs is None:
        return max(total_steps(config, num_images) - progress.step, 0)
    planned, before = exact(length.epochs) * num_images, saved["config"]["train"]
    if before.get("epochs") is None:
        views = planned - progress.position
    else:  # the horizon has moved with every roll-back, and ends with a whole batch
        planned_before = exact(before["epochs"]) * num_images
        beyond = (progress.horizon - planned_before) % before["global_batch_size"]
        views = progress.horizon - beyond - progress.position + planned - planned_before
    return max(math.ceil(views / length.global_batch_size), 0)


def compare_run(
    config: Trained, task: str, free_keys: tuple[str, ...], saved: dict[str, Any], digest: str
) -> list[str]:
    """Compare task, images and settings of a checkpoint with those of this launch.

    Args:
        config: checked settings.
        task: name of the task.
        free_keys: keys of the task, or groups with a trailing dot, that may differ.
        saved: state of the checkpoint.
        digest: of the images' index; the checkpoint's own if the images are not compared.

    Returns:
        Allowed changes outside the free keys, as text.

    Raises:
        ConfigError: if the checkpoint is of another task, or a setting must not change.
    """
    if saved["task"] != task:
        raise ConfigError(
            f"run.output_dir={config.run.output_dir} holds checkpoints of {saved['task']}, and "
            f"this command runs {task}; use another run.output_dir"
        )
    changes = compare_configs(
        saved["config"],
        config_to_dict(config),
        config.run.allow_change,
        (saved["index_digest"], digest),
        FREE_KEYS + free_keys,
    )
    for change in changes:
        if change.partition(":")[0] in RESHAPING_KEYS:
            raise ConfigError(
                f"{change.partition('; from here')[0]}; run.allow_change cannot make the weights "
                "of the checkpoint fit: restore it, or use another run.output_dir"
            )
    return changes


def refuse_other_pairs(config: Trained, plan: BatchPlan, saved: dict[str, Any] | None) -> None:
    """Refuse a split of the batch that pairs other views than the run did, if views are paired.

    Args:
        config: checked settings, already compared with those of the checkpoint.
        plan: split of the batch on the present ranks.
        saved: state of the checkpoint; ``None``: a new run.

    Raises:
        ConfigError: names both micro-batches and a number of ranks that keeps the pairs.
    """
    if saved is None or not pairs_views(config):
        return
    old = flatten(saved["config"])
    total, limit = config.train.global_batch_size, config.train.micro_batch_size
    if (old.get("train.global_batch_size"), old.get("train.micro_batch_size")) != (total, limit):
        return  # an allowed change, which compare_configs has reported
    ranks = saved["world_size"]
    before = split_batch(total, limit, ranks, unit=2).micro_batch_size
    if before != plan.micro_batch_size:
        other = split_batch(total, before, plan.world_size, unit=2).micro_batch_size
        names = format_names([*config.run.allow_change, "train.micro_batch_size"])
        effect = "" if other == before else ", which pairs other views"
        remedy = f", or set train.micro_batch_size={other} and run.allow_change={names}{effect}"
        raise ConfigError(
            f"train.micro_batch_size={limit}: {ranks} ranks had micro-batches of {before} views, "
            f"{plan.world_size} ranks have {plan.micro_batch_size}, and mixup and cutmix pair the "
            f"views of a micro-batch; resume on {ranks} ranks" + (remedy if other != limit else "")
        )


def explain_misfit(error: CheckpointError, allowed: list[str]) -> CheckpointError:
    """Return the error of weights that do not fit, with the permissions that led to it."""
    if not allowed:
        return error
    return CheckpointError(
        f"{error}; run.allow_change={format_names(allowed)} cannot make other tensors fit: restore "
        "the settings of the checkpoint, or use another run.output_dir"
    )
