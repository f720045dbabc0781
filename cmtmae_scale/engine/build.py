"""Builds a run from a task: data, models, checkpoint, stream and logs; nothing is trained here."""

import logging
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from cmtmae_scale import __version__
from cmtmae_scale.checkpoint.chunks import load_fragments
from cmtmae_scale.checkpoint.find import find_resume_checkpoint
from cmtmae_scale.checkpoint.layout import read_state
from cmtmae_scale.checkpoint.writer import open_writer
from cmtmae_scale.config.batch import batch_plan, explain_batch
from cmtmae_scale.config.load import config_to_dict
from cmtmae_scale.config.schema import Trained
from cmtmae_scale.engine.profile import StepProfile
from cmtmae_scale.engine.progress import Progress
from cmtmae_scale.engine.resume import explain_misfit, find_progress, refuse_other_pairs
from cmtmae_scale.engine.skips import Skips
from cmtmae_scale.engine.stop import StopRequest
from cmtmae_scale.engine.stragglers import Stragglers
from cmtmae_scale.engine.task import Run, Task
from cmtmae_scale.engine.telemetry import Telemetry
from cmtmae_scale.engine.trackers import open_trackers
from cmtmae_scale.engine.watchdog import Place
from cmtmae_scale.errors import CheckpointError
from cmtmae_scale.runtime.collectives import barrier, on_all_ranks
from cmtmae_scale.runtime.launch import World
from cmtmae_scale.runtime.lock import RunLock
from cmtmae_scale.runtime.progress_file import ProgressFile

logger = logging.getLogger(__name__)


def build_run(
    task: Task,
    config: Trained,
    world: World,
    device: torch.device,
    stack: ExitStack,
    lock: RunLock | None,
    place: Place | None = None,
) -> Run:
    """Build a run, and load the newest checkpoint if there is one. A collective.

    Args:
        task: what is trained.
        config: checked settings.
        world: place of this process; the process group is open.
        device: device of this rank.
        stack: closes what is opened, in reverse order.
        lock: the run's lock; rank 0 has it.
        place: where in the build, and then in the loop, this rank is; for the watchdog.

    Raises:
        ConfigError: settings that do not fit the data, the number of ranks or the checkpoint, or a
            tracker that is not installed.
        DataError: unusable images.
        TeacherError: a teacher that cannot be built.
        CacheError: a teacher cache that the run cannot use.
        CheckpointError: checkpoints none of which is intact.
        StorageError: on every rank, if the store of the logs is full or fails.
    """
    run_dir, place = Path(config.run.output_dir), place or Place()
    run_dir.mkdir(parents=True, exist_ok=True)
    stop = StopRequest(run_dir, config.run.time_limit_s, watches_file=world.local_rank == 0)
    plan = batch_plan(config, world.world_size)
    place.enter("index", 0)
    index = task.open_index(run_dir)
    place.enter("checkpoint", 0)
    folder = find_resume_checkpoint(run_dir, world, lock)
    saved = None if folder is None else on_all_ranks(lambda: read_state(folder))
    progress, is_changed = find_progress(config, task, index, saved)
    refuse_other_pairs(config, plan, saved)
    place.enter("models", 0)
    backend = task.build(saved, stop, stack)
    stack.callback(backend.close)
    skips = Skips(config.guard)
    saved_step = None
    if folder is not None and saved is not None:
        skips.changed_step = progress.step if is_changed else -1
        skips.restore(saved["skips"], progress.step)
        try:
            load_fragments(folder, backend.fragments())
        except CheckpointError as error:
            raise explain_misfit(error, config.run.allow_change) from error
        backend.after_load(task.prior_steps + progress.applied)
        task.restore(saved)
        saved_step = progress.step if progress.step != progress.step0 else None
        logger.info("resuming %s at step %d", folder, progress.step)
    place.enter("stream", 0)
    stream = stack.enter_context(on_all_ranks(lambda: task.open_stream(progress.position)))
    barrier()  # from here on a signal does not end a single rank
    stop.install()
    progress_file = None
    settings = (run_dir, progress.step, progress.end_step, config.log.every, progress.position)

    def open_telemetry() -> Telemetry | None:
        if lock is not None:
            lock.require()  # the log is truncated, and may belong to another launch by now
        return Telemetry(*settings, open_trackers(config)) if world.rank == 0 else None

    telemetry, profile = on_all_ranks(open_telemetry), None
    if world.rank == 0 and config.log.profile_steps:
        profile = StepProfile(run_dir, config.log.profile_steps, device)
        stack.callback(profile.close)
    if telemetry is not None and saved is not None:
        telemetry.restore(saved.get("log_interval"))
    if telemetry is not None:
        progress_file = ProgressFile(run_dir)
        stack.callback(telemetry.close)
    writer = open_writer(
        run_dir, world, config.checkpoint, backend.fragments(), saved_step, stack, lock
    )
    logger.info(
        "%s: batch %s; %s", config.run.name, explain_batch(config, plan), describe_steps(progress)
    )
    return Run(
        config=config,
        task=task,
        plan=plan,
        device=device,
        run_dir=run_dir,
        index=index,
        stream=stream,
        backend=backend,
        progress=progress,
        writer=writer,
        stop=stop,
        telemetry=telemetry,
        progress_file=progress_file,
        skips=skips,
        stragglers=Stragglers(device, config.log.every, world.rank),
        saved_facts=record_facts(config, index.digest, world),
        profile=profile,
        place=place,
    )


def describe_steps(progress: Progress) -> str:
    """Return the steps of this launch as text."""
    if progress.step < progress.end_step:
        return f"steps {progress.step + 1} to {progress.end_step}"
    return (
        f"all {progress.end_step} steps are done; to train longer, raise train.epochs or "
        "train.steps and name it in run.allow_change"
    )


def record_facts(config: Trained, digest: str, world: World) -> dict[str, Any]:
    """Return what every checkpoint records about its run."""
    return {
        "config": config_to_dict(config),
        "index_digest": digest,
        "world_size": world.world_size,
        "versions": {"cmtmae_scale": __version__, "torch": torch.__version__},
    }
