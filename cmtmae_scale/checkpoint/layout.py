"""Folders of a run's checkpoints: published whole or not at all, verified before use.

``RUN_DIR/checkpoints/step-00000020/`` holds one safetensors file a writing rank, ``encoder``
weights in timm's names, ``index.json``, ``state.json`` and, last of all, ``manifest.json`` with
size and SHA-256 of every file. A folder counts only if its manifest verifies.
"""

import hashlib
import json
import logging
import os
import shutil
import time
from pathlib import Path
from typing import Any, cast

from safetensors.torch import save_file

from cmtmae_scale.checkpoint.chunks import INDEX, ChunkReader, build_index
from cmtmae_scale.errors import CheckpointError

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
STATE = "state.json"
ENCODER = "encoder.safetensors"
LATEST = "latest"


def folder_of(root: Path, step: int) -> Path:
    """Folder of a step's checkpoint."""
    return root / f"step-{step:08d}"


def rank_file(rank: int) -> str:
    """Name of a rank's chunks."""
    return f"rank-{rank:05d}.safetensors"


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Force a file or folder to storage."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Write a small file, whole or not at all."""
    draft = path.with_name(path.name + ".tmp")
    draft.write_text(text)
    sync(draft)
    draft.replace(path)


def seal_part(folder: Path, rank: int) -> None:
    """Tell rank 0 that a rank's chunks lie on storage."""
    path = folder / rank_file(rank)
    sync(path)
    facts = {"size": path.stat().st_size, "sha256": digest(path)}
    write_text(folder / f"{rank_file(rank)}.done", json.dumps(facts))


def publish(
    draft: Path, target: Path, world_size: int, state: dict[str, Any], timeout_s: float
) -> None:
    """Wait for every rank's part, add index, state, encoder and manifest, and rename.

    Runs on rank 0, in the background; talks to the other ranks through files only.

    Raises:
        CheckpointError: if a part does not arrive in time.
        OSError: if the store refuses; the older checkpoints stand.
    """
    parts = {rank_file(rank): {} for rank in range(world_size)}
    limit = time.monotonic() + timeout_s
    for name in parts:
        mark = draft / f"{name}.done"
        while not mark.exists():
            if time.monotonic() > limit:
                raise CheckpointError(f"{draft}: {name} did not arrive within {timeout_s:.0f} s")
            time.sleep(0.02)
        parts[name] = json.loads(mark.read_text())
        mark.unlink()
    index = build_index(draft, parts)
    write_text(draft / INDEX, json.dumps(index))
    write_text(draft / STATE, json.dumps(state, indent=1))
    write_encoder(draft)
    for name in (INDEX, STATE, ENCODER):
        path = draft / name
        parts[name] = {"size": path.stat().st_size, "sha256": digest(path)}
    write_text(draft / MANIFEST, json.dumps({"files": parts}, indent=1))
    sync(draft)
    if target.exists():
        shutil.rmtree(target)
    draft.rename(target)
    sync(target.parent)
    write_text(target.parent / LATEST, target.name)


def write_encoder(folder: Path) -> None:
    """Write the student's encoder under timm's names, one tensor at a time in memory."""
    reader = ChunkReader(folder)
    prefix = "model.encoder."
    names = [key for key in reader.index if key.startswith(prefix)]
    tensors = {name.removeprefix(prefix): reader.read_whole(name) for name in names}
    save_file(tensors, folder / ENCODER, metadata={"format": "pt"})
    sync(folder / ENCODER)


def fault(folder: Path, share: tuple[int, int] = (0, 1)) -> str | None:
    """Say what is wrong with a checkpoint, or ``None``.

    Args:
        folder: the checkpoint.
        share: (i, n): read every n-th file's digest from the i-th on; sizes are always compared.
    """
    try:
        files = cast(dict[str, Any], json.loads((folder / MANIFEST).read_text())["files"])
        entries = sorted(files.items())
        for number, (name, facts) in enumerate(entries):
            path = folder / name
            if path.stat().st_size != facts["size"]:
                return f"{name} has {path.stat().st_size} bytes, its manifest says {facts['size']}"
            if number % share[1] == share[0] and digest(path) != facts["sha256"]:
                return f"{name} differs from its SHA-256"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is absent"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} cannot be read ({error})"
    return None


def candidates(root: Path) -> list[Path]:
    """Checkpoint folders, newest first."""
    return sorted((path for path in root.glob("step-*") if path.is_dir()), reverse=True)


def read_state(folder: Path) -> dict[str, Any]:
    """Step, position, config and versions of a checkpoint."""
    return cast(dict[str, Any], json.loads((folder / STATE).read_text()))


def prune(root: Path, keep: int) -> None:
    """Delete all but the newest checkpoints."""
    for old in candidates(root)[keep:]:
        doomed = old.with_name(f".old-{old.name}")
        old.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def sweep(root: Path) -> None:
    """Remove what interrupted saves and deletions left behind."""
    for left in [*root.glob(".draft-*"), *root.glob(".old-*")]:
        shutil.rmtree(left, ignore_errors=True)
