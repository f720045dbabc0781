"""Roll-back to the newest checkpoint, to continue with later data."""

from cmtmae_scale.checkpoint.chunks import load_fragments
from cmtmae_scale.checkpoint.find import find_checkpoint
from cmtmae_scale.checkpoint.layout import read_state
from cmtmae_scale.engine.progress import Progress
from cmtmae_scale.engine.task import Run
from cmtmae_scale.errors import NonFiniteError
from cmtmae_scale.runtime.collectives import on_all_ranks


def roll_back(run: Run, why: str) -> None:
    """Load weights and moments from the newest checkpoint; the data stream is not rewound.

    The checkpoint is written again with the present position of the data, so that a restart does
    not sample the same views again.

    Args:
        run: the run; a collective.
        why: what happened, for the message.

    Raises:
        NonFiniteError: if there is no checkpoint, or ``guard.rollback_limit`` is exceeded.
        SaveError: if the checkpoint cannot be written again.
        LockLostError: if another launch took the run's folder over.
    """
    guard, writer, progress = run.config.guard, run.writer, run.progress
    if guard.skip_limit == 0:
        raise NonFiniteError(why)
    writer.wait()
    writer.require_lock_on_all_ranks()  # the log is truncated below
    folder = find_checkpoint(writer.root, writer.rank, writer.world_size)
    if folder is None:
        raise NonFiniteError(f"{why}; there is no checkpoint yet to roll back to")
    state = on_all_ranks(lambda: read_state(folder))
    saved = Progress.from_dict(state["progress"])
    if not run.skips.may_roll_back(saved.step):
        raise NonFiniteError(
            f"{why}; given up: the run rolled back to step {saved.step} {guard.rollback_limit} "
            "times (guard.rollback_limit) and fails with other data too; lower optimizer.base_lr, "
            "set optimizer.grad_clip, or restore an older checkpoint"
        )
    run.record_incident("rolled back", why, to_step=saved.step, position=progress.position)
    load_fragments(folder, run.backend.fragments())
    run.backend.after_load(run.task.prior_steps + saved.applied)
    run.task.restore(state)
    progress.roll_back(saved, run.plan.global_batch_size)
    run.skips.restore(state["skips"], saved.step)
    run.skips.in_succession = 0
    if run.telemetry is not None:
        run.telemetry.roll_back(progress.step)
        run.telemetry.restore(state.get("log_interval"))
    writer.saved_step = None
    writer.finish(progress.step, run.backend.fragments(), run.state())
