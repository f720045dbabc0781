"""Folders of a run's checkpoints, and how one is verified before it is used.

``RUN_DIR/checkpoints/step-00000020/`` holds one safetensors file a writing rank, ``encoder``
weights in timm's names, ``index.json``, ``state.json`` and, last of all, ``manifest.json`` with
size and SHA-256 of every file and of its own content. A folder counts only if its manifest
verifies; files that the manifest does not name are never opened.
"""

import hashlib
import json
import re
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

from cmtmae_scale.checkpoint.chunks import INDEX
from cmtmae_scale.runtime.storage import digest, sync

MANIFEST = "manifest.json"
STATE = "state.json"
ENCODER = "encoder.safetensors"
LATEST = "latest"


def folder_of(root: Path, step: int) -> Path:
    """Folder of a step's checkpoint."""
    return root / f"step-{step:08d}"


def step_of(folder: Path) -> int | None:
    """Step of a checkpoint's folder; ``None`` for any other name."""
    digits = re.fullmatch(r"step-(\d{8,})", folder.name)
    if digits is None or folder_of(folder.parent, int(digits[1])) != folder:
        return None
    return int(digits[1])


def candidates(root: Path) -> list[Path]:
    """Checkpoint folders, newest (highest step) first."""
    found = [(step_of(path), path) for path in root.glob("step-*") if path.is_dir()]
    numbered = [(step, path) for step, path in found if step is not None]
    return [path for _, path in sorted(numbered, reverse=True)]


def rank_file(rank: int) -> str:
    """Name of a rank's chunks."""
    return f"rank-{rank:05d}.safetensors"


def manifest_text(files: dict[str, Any]) -> str:
    """The one spelling of a manifest; any other is damage.

    Args:
        files: size and SHA-256 by name.
    """
    own = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
    return json.dumps({"files": files, "sha256": own}, indent=1, sort_keys=True) + "\n"


def fault(folder: Path, share: tuple[int, int] = (0, 1)) -> str | None:
    """Say what is wrong with a checkpoint, or ``None``.

    Args:
        folder: the checkpoint.
        share: (i, n): read every n-th file's digest from the i-th on; sizes are always compared.
    """
    try:
        files = read_manifest(folder)
        for number, (name, facts) in enumerate(sorted(files.items())):
            path = folder / name
            if path.stat().st_size != facts["size"]:
                return f"{name} has {path.stat().st_size} bytes, its manifest says {facts['size']}"
            if number % share[1] == share[0] and digest(path) != facts["sha256"]:
                return f"{name} differs from its SHA-256"
        for name in (INDEX, STATE):
            if not isinstance(json.loads((folder / name).read_text()), dict):
                return f"{name} is not a JSON object"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is absent"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"cannot be read ({error})"
    return None


def read_manifest(folder: Path) -> dict[str, Any]:
    """Size and SHA-256 of every file of a checkpoint.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is damaged or is not a manifest.
    """
    text = (folder / MANIFEST).read_bytes()
    try:
        files = cast(dict[str, Any], json.loads(text)["files"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{MANIFEST} is not a manifest: {error}") from error
    if manifest_text(files).encode() != text:
        raise ValueError(f"{MANIFEST} differs from its own SHA-256")
    if not files.keys() >= {INDEX, STATE, ENCODER} or any(Path(f).name != f for f in files):
        raise ValueError(f"{MANIFEST} does not name the files of a checkpoint")
    return files


def read_state(folder: Path) -> dict[str, Any]:
    """Step, position, config and versions of a checkpoint."""
    return cast(dict[str, Any], json.loads((folder / STATE).read_text()))


def put_in_place(draft: Path, target: Path) -> None:
    """Give a complete draft its name; what had it before is deleted only afterwards.

    Raises:
        OSError: if the store refuses; what had the name has it again.
    """
    aside = target.with_name(f".replaced-{target.name}")
    if target.exists():
        remove(aside)
        target.rename(aside)
    try:
        draft.rename(target)
    except OSError:
        if aside.exists():
            aside.rename(target)
        raise
    sync(target.parent)
    remove(aside)


def prune(root: Path, keep: int, step: int) -> None:
    """Delete checkpoints before ``step``'s so that ``keep`` up to it are left.

    Later ones are not counted: a run that fell back past broken folders writes before them.
    """
    past = [path for path in candidates(root) if (step_of(path) or 0) <= step]
    for old in past[keep:]:
        doomed = old.with_name(f".old-{old.name}")
        old.rename(doomed)
        remove(doomed)


def sweep(root: Path, spare: Path | None = None) -> None:
    """Remove what interrupted saves and deletions left behind, and put back what they moved.

    Args:
        root: folder of the checkpoints.
        spare: a draft that is being written.
    """
    for aside in root.glob(".replaced-*"):
        target = aside.with_name(aside.name.removeprefix(".replaced-"))
        if target.exists():
            remove(aside)
        else:
            aside.rename(target)
    for pattern in (".draft-*", ".old-*", f".{LATEST}.*.tmp"):
        for left in root.glob(pattern):
            if left != spare:
                remove(left)


def remove(path: Path) -> None:
    """Delete a folder, a link or a file; ignore what the store refuses."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()
