"""One launch of a task, from the process group to the exit code."""

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

from cmtmae_scale.config.load import save_config
from cmtmae_scale.config.schema import Trained
from cmtmae_scale.engine.agreement import require_equal_launch, require_shared
from cmtmae_scale.engine.build import build_run
from cmtmae_scale.engine.ending import Ending
from cmtmae_scale.engine.folder import CONFIG_FILE, refuse_foreign_folder
from cmtmae_scale.engine.launches import count_launch, record_launch
from cmtmae_scale.engine.loop import find_reached_stop, train
from cmtmae_scale.engine.summary import log_launch, log_result
from cmtmae_scale.engine.task import Run, SideTask, Task
from cmtmae_scale.engine.watchdog import SLOW_STAGE_FACTOR, Place, watched
from cmtmae_scale.errors import EXIT_DONE, describe_store, may_pass
from cmtmae_scale.runtime.collectives import on_all_ranks, process_group
from cmtmae_scale.runtime.determinism import deterministic_kernels
from cmtmae_scale.runtime.launch import World
from cmtmae_scale.runtime.lock import hold_run
from cmtmae_scale.runtime.log import RunLog
from cmtmae_scale.runtime.storage import optional_write

logger = logging.getLogger(__name__)


def run_task(
    task: Task,
    config: Trained,
    world: World,
    device: torch.device,
    recipe: str,
    overrides: Sequence[str],
    open_side_tasks: Callable[[Run], list[SideTask]] = lambda run: [],
    model_memory: Callable[[], float | None] = lambda: None,
) -> int:
    """Train a task on this rank, from the beginning or from the newest checkpoint.

    Args:
        task: what is trained.
        config: checked settings of the task.
        world: place of this process.
        device: device of this rank.
        recipe: file, as given on the command line.
        overrides: overrides of the recipe, as given.
        open_side_tasks: opens side tasks that the task itself does not have.
        model_memory: returns the modelled bytes per device at the peak, for the log.

    Returns:
        Exit code of the launch, 0 or 75; also written to ``RUN_DIR/exit.json``.

    Raises:
        CmtMaeError, DataError: see ``build_run`` and ``train``.
        StorageError: if the store is full or fails at the launch.
        ConfigError: on every rank, if the ranks differ in settings, code or images, or do not share
            the run's folder.
        LockLostError: another launch took the folder over; nothing was saved.
        LaunchInterrupted: a signal before the first step, on any rank.
        RankLostError: a signal before the first step, after another rank on this machine died.
    """
    run_dir, hang_s = Path(config.run.output_dir), config.guard.hang_seconds
    place = Place()
    run: Run | None = None
    with ExitStack() as stack:
        run_log = stack.enter_context(RunLog()) if world.rank == 0 else None
        if world.rank == 0:
            log_launch(config, world, device, model_memory)
        stack.enter_context(deterministic_kernels(config.run.deterministic))
        stack.enter_context(process_group(world, device, collective_limit_s(hang_s)))
        require_equal_launch(config, world, device)
        on_all_ranks((lambda: refuse_foreign_folder(run_dir)) if world.rank == 0 else lambda: None)
        lock = stack.enter_context(hold_run(run_dir, world.rank))
        if run_log is not None:
            run_log.open(run_dir)
        ending = stack.enter_context(Ending(run_dir, world.rank, lock))

        def record_crash(why: str) -> int:
            if run is not None and ending.owns_folder():
                run.record_incident("ended", why)
            return ending.write_crash(why)

        def record() -> None:
            if lock is not None:
                lock.require()
            with optional_write(run_dir / CONFIG_FILE, at_launch=True):
                save_config(config, run_dir / CONFIG_FILE)
            record_launch(run_dir, ending.step, recipe, overrides, world.world_size, device)

        ending.launch = require_shared(run_dir, world.rank)
        count_launch(run_dir, world.rank)
        ending.is_counted = True
        with watched(run_dir, world.rank, place, hang_s, record_crash) as watchdog:
            ending.find_dead = watchdog.find_dead
            try:
                run = build_run(task, config, world, device, stack, lock, place)
            except OSError as error:
                if not may_pass(error):
                    raise
                raise describe_store(error) from error
            task.side_tasks += open_side_tasks(run)
            ending.progress, ending.first_step = run.progress, run.progress.step
            on_all_ranks(record if world.rank == 0 else lambda: None)
            reached = find_reached_stop(run)
            if reached is not None:
                logger.warning(reached)
                ending.done = reached
                return EXIT_DONE
            ending.stopped = train(run)
            if ending.stopped is None:
                task.conclude(run)
                if world.rank == 0:
                    log_result(config, task.name, run.progress)
    return ending.code


def collective_limit_s(hang_s: float | None) -> float:
    """Return the time limit of collectives: longer than the watchdog takes to name a rank."""
    return max(1800.0, (SLOW_STAGE_FACTOR + 1) * (hang_s or 0.0))
