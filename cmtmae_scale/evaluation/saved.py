"""Checkpoints of pre-training, as evaluations, exports and later runs read them."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cmtmae_scale.checkpoint import layout
from cmtmae_scale.checkpoint.chunks import ChunkReader
from cmtmae_scale.checkpoint.find import find_checkpoint, verify_together
from cmtmae_scale.config.derive import loaded_start, name_student
from cmtmae_scale.config.load import config_from_dict
from cmtmae_scale.config.schema import Config
from cmtmae_scale.errors import CheckpointError, ConfigError, StorageError
from cmtmae_scale.method.build import build_student, probe_student
from cmtmae_scale.runtime.collectives import on_all_ranks

CHECKPOINTS = "checkpoints"
"""Folder of a run's checkpoints."""


def refuse_loaded_start(config: Config, place: str) -> None:
    """Refuse random weights as the initial weights of a run that loaded its initial weights.

    Raises:
        CheckpointError: naming what the run started from.
    """
    loaded = loaded_start(config.student)
    if loaded is None:
        return
    key, start = loaded
    options = f"--timm {config.student.arch} --file {start}"
    if key == "student.init_from_run":
        options = f"--checkpoint {start} --weights student"
    raise CheckpointError(
        f"{place}: the run started from {key}={start}, so random weights are not its initial "
        f"weights; evaluate those with {options}"
    )


def saved_config(folder: Path, state: dict[str, Any]) -> Config:
    """Rebuild the settings of a checkpoint of pre-training.

    Raises:
        CheckpointError: if it is of another task, or this version refuses its settings.
    """
    if state["task"] == "fine-tuning":
        raise CheckpointError(
            f"{folder} is of a fine-tuning run; its accuracy is in the run's result.json, and "
            f"{layout.ENCODER} of the checkpoint has its weights under timm's names"
        )
    try:
        return config_from_dict(state["config"], str(folder / layout.STATE))
    except ConfigError as error:
        raise CheckpointError(str(error)) from error


def locate_checkpoint(
    place: Path, rank: int = 0, world_size: int = 1, key: str = "--checkpoint", hashes: bool = True
) -> Path:
    """Return an intact checkpoint's folder: the path itself, or the newest of the run there.

    A collective where there are several ranks, which read each byte once.

    Args:
        place: folder of a run or of a checkpoint.
        rank: this rank.
        world_size: number of ranks.
        key: option or config key that gives the path, for messages.
        hashes: read all bytes; else only sizes and small files.

    Raises:
        CheckpointError: if there is none, or the named checkpoint is broken.
        StorageError: if the store fails.
    """
    if on_all_ranks(lambda: is_run_folder(place, key)):
        root = place / CHECKPOINTS
        folder = find_checkpoint(root, rank, world_size, "name another run", hashes)
        if folder is None:
            raise CheckpointError(f"{place}: no checkpoint yet; train first")
        return folder
    damage, is_unknown = verify_together(place, rank, world_size, hashes)
    if is_unknown:
        raise StorageError(damage)
    if damage:
        raise CheckpointError(f"{place} is broken: {damage}; name an older checkpoint or the run")
    # checkpoints/ may be a link to other storage, where no run is around it.
    return place if place.parent.name == CHECKPOINTS else place.resolve()


def is_run_folder(place: Path, key: str) -> bool:
    """Return whether a path is a run, and not a checkpoint.

    Raises:
        CheckpointError: if it is neither, or is below a folder that cannot be searched.
    """
    try:
        is_run = (place / CHECKPOINTS).is_dir()
        is_checkpoint = (place / layout.MANIFEST).exists()
    except PermissionError as error:
        raise CheckpointError(
            f"{key}={place}: cannot be accessed ({error.strerror}); make it readable, or "
            "name another"
        ) from error
    if not is_run and not is_checkpoint:
        raise CheckpointError(
            f"{key}={place} is neither a run (it has no checkpoints/) nor a checkpoint (it "
            f"has no {layout.MANIFEST}); "
            + (
                "name one of them"
                if place.exists()
                else "there is no such folder: correct the path"
            )
        )
    return is_run


def run_of_checkpoint(folder: Path) -> Path | None:
    """Return the folder of the run that holds a checkpoint; ``None``: it was moved out of a run."""
    return folder.parent.parent if folder.parent.name == CHECKPOINTS else None


def read_tensors(folder: Path, prefix: str) -> dict[str, Tensor]:
    """Read a checkpoint's tensors under a prefix, without the prefix; float32 on the CPU."""
    with ChunkReader(folder) as reader:
        return {
            key.removeprefix(prefix): reader.read_tensor(key)
            for key in reader.index
            if key.startswith(prefix)
        }


def check_encoder(folder: Path, config: Config, prefix: str) -> None:
    """Compare names and shapes of a checkpoint's encoder with its config; no tensor is read.

    Raises:
        CheckpointError: if they differ, so that nothing of a wrong size is ever allocated, or if
            timm does not list the architecture.
    """
    with ChunkReader(folder) as reader:
        found = {
            key.removeprefix(prefix): reader.shape(key)
            for key in reader.index
            if key.startswith(prefix)
        }
    try:
        probe = probe_student(config)
    except ConfigError as error:
        raise CheckpointError(f"{folder / layout.STATE}: {error}") from error
    positions = probe.pos_embed
    expected = {} if positions is None else {"pos_embed": tuple(positions.shape)}
    if found.get("pos_embed") == expected.get("pos_embed"):
        with torch.device("meta"):
            state = build_student(config).state_dict()
        expected = {name: tuple(value.shape) for name, value in state.items()}
    wrong = sorted(
        name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)
    )
    if "pos_embed" in wrong:
        wrong = ["pos_embed"]
    if wrong:
        name = wrong[0]
        raise CheckpointError(
            f"{folder}: does not fit its own config, {name_student(config.student)} at "
            f"{config.views.image_size} pixels: {prefix}{name} has shape "
            f"{found.get(name, 'none')}, expected {expected.get(name, 'none')}; copy the "
            "checkpoint again, or name another"
        )
