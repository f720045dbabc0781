"""What every training does with its checkpoints before the first step."""

from contextlib import ExitStack
from pathlib import Path

import torch

from cmtmae_scale.checkpoint import layout
from cmtmae_scale.checkpoint.find import find_checkpoint
from cmtmae_scale.checkpoint.writer import Writer
from cmtmae_scale.config.schema import Checkpoint
from cmtmae_scale.runtime.collectives import barrier, from_first
from cmtmae_scale.runtime.launch import World


def newest_checkpoint(run_dir: Path, world: World) -> Path | None:
    """Sweep what earlier starts left unfinished, and find the one to continue from; a collective.

    Args:
        run_dir: the run's folder.
        world: this process's place.

    Raises:
        CheckpointError: if there are some, or were, but none is intact.
    """
    root = run_dir / "checkpoints"
    root.mkdir(exist_ok=True)
    if world.rank == 0:
        layout.sweep(root)
    barrier()
    return find_checkpoint(root, world.rank, world.world_size)


def open_writer(
    run_dir: Path, world: World, settings: Checkpoint, saved_step: int | None, stack: ExitStack
) -> Writer:
    """Open the writer of this rank's parts; a collective.

    Args:
        run_dir: the run's folder.
        world: this process's place.
        settings: how many are kept, and whether they are written in the background.
        saved_step: step that is on storage already, if it need not be saved again.
        stack: closes it.
    """
    token = from_first(int(torch.randint(2**62, (), dtype=torch.int64).item()))
    writer = Writer(
        run_dir / "checkpoints",
        world.rank,
        world.world_size,
        settings.keep,
        settings.background,
        token,
    )
    writer.saved_step = saved_step
    stack.callback(writer.close)
    return writer
