"""Back to the newest checkpoint, and on with later data."""

from cmtmae_scale.checkpoint.chunks import load_fragments
from cmtmae_scale.checkpoint.find import find_checkpoint
from cmtmae_scale.checkpoint.layout import read_state
from cmtmae_scale.engine.progress import Progress
from cmtmae_scale.engine.task import Parts
from cmtmae_scale.errors import NonFiniteError


def go_back(parts: Parts, why: str) -> None:
    """Take weights and moments from the newest checkpoint; the data are not taken again.

    The checkpoint is written anew with the position of the data, so that a restart does not meet
    the same stretch again.

    Args:
        parts: the run; a collective.
        why: what happened, for the message.

    Raises:
        NonFiniteError: if there is no checkpoint, or it has been gone back to too often.
        SaveError: if the store refuses the new position.
    """
    settings, writer, progress = parts.config.guard, parts.writer, parts.progress
    if settings.skip_limit == 0:
        raise NonFiniteError(why)
    writer.wait()
    folder = find_checkpoint(writer.root, writer.rank, writer.world_size)
    if folder is None:
        raise NonFiniteError(f"{why}; there is no checkpoint yet to go back to")
    state = read_state(folder)
    saved = Progress.from_dict(state["progress"])
    if not parts.skips.may_go_back(saved.step):
        raise NonFiniteError(
            f"{why}; given up: the run went back to step {saved.step} {settings.rollback_limit} "
            "times (guard.rollback_limit) and fails with other data too; lower optimizer.base_lr, "
            "set optimizer.grad_clip, or restore an older checkpoint"
        )
    parts.incident("gone back to a checkpoint", why, to_step=saved.step, position=progress.position)
    backend = parts.models.backend
    load_fragments(folder, backend.fragments())
    backend.after_load(saved.applied)
    progress.go_back(saved, parts.plan.global_batch_size)
    parts.skips.restore(state.get("skips"))
    parts.skips.in_a_row = 0
    if parts.telemetry is not None:
        parts.telemetry.go_back(progress.step)
    writer.saved_step = None
    writer.finish(progress.step, backend.fragments(), parts.saved_state())
