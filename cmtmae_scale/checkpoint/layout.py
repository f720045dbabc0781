"""Folders of a run's checkpoints, and how a checkpoint is verified before it is used.

``RUN_DIR/checkpoints/step-00000020/`` holds one safetensors file per writing rank, the encoder's
weights under timm's names, ``index.json``, ``state.json`` and ``manifest.json``. The manifest is
written last and holds size and SHA-256 of every file and of its own content. A folder counts only
if its manifest verifies; files that the manifest does not name are never opened.
"""

import hashlib
import json
import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, cast

from cmtmae_scale.checkpoint.index import INDEX, load_index
from cmtmae_scale.checkpoint.index import rank_file as rank_file
from cmtmae_scale.errors import CheckpointError, describe_store, may_pass
from cmtmae_scale.runtime.log import progress_bar
from cmtmae_scale.runtime.storage import (
    digest,
    list_names,
    read_inside,
    read_json,
    require_inside,
    sync,
)

MANIFEST = "manifest.json"
STATE = "state.json"
ENCODER = "encoder.safetensors"
LATEST = "latest"
FORMAT = 2
"""Format of the state file; 1, which had no number, used other config keys."""
MIB = 2**20
TASKS = ("pre-training", "fine-tuning")
COUNTS = {
    "progress": ("step", "position", "step0", "position0", "applied", "end_step", "horizon"),
    "skips": ("in_succession",),
}
"""Whole numbers of a state, by group."""
JSON_NAMES = {dict: "an object", str: "a text"}
REMEDY = "copy the checkpoint again, or name another"


def folder_of(root: Path, step: int) -> Path:
    """Return the folder of a step's checkpoint."""
    return root / f"step-{step:08d}"


def step_of(folder: Path) -> int | None:
    """Return the step of a checkpoint's folder; ``None`` for any other name."""
    digits = re.fullmatch(r"step-(\d{8,})", folder.name)
    if digits is None or folder_of(folder.parent, int(digits[1])) != folder:
        return None
    return int(digits[1])


def list_checkpoints(root: Path) -> list[Path]:
    """Return checkpoint folders, highest step first.

    Raises:
        OSError: if the store fails.
    """
    found = [(step_of(root / name), root / name) for name in list_names(root)]
    numbered = [(step, path) for step, path in found if step is not None and path.is_dir()]
    return [path for _, path in sorted(numbered, reverse=True)]


def format_manifest(files: dict[str, Any]) -> str:
    """Return a manifest's text from size and SHA-256 by name; any other text counts as damaged."""
    own = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
    return json.dumps({"files": files, "sha256": own}, indent=1, sort_keys=True) + "\n"


class Block(NamedTuple):
    """A range of a file's bytes that has a digest of its own."""

    name: str
    """Name of the file."""
    offset: int
    size: int
    """In bytes."""
    sha256: str


def list_blocks(files: Mapping[str, Any]) -> Iterator[Block]:
    """Yield every block of the files of a manifest; each byte is in one block."""
    for name, facts in sorted(files.items()):
        size, digests = facts["size"], facts["sha256"]
        if isinstance(digests, str):
            yield Block(name, 0, size, digests)
            continue
        step = facts["block_bytes"]
        for number, sha256 in enumerate(digests):
            yield Block(name, step * number, min(step, size - step * number), sha256)


def share_blocks(files: Mapping[str, Any], rank: int, world_size: int) -> list[Block]:
    """Return the blocks that a rank verifies; the bytes per rank are equal to within a block."""
    blocks = list(list_blocks(files))
    total = max(1, sum(block.size for block in blocks))
    mine: list[Block] = []
    before = 0
    for block in blocks:
        middle = 2 * before + block.size  # in half bytes
        if min(world_size - 1, middle * world_size // (2 * total)) == rank:
            mine.append(block)
        before += block.size
    return mine


def find_damage(folder: Path, hashes: bool = True) -> str | None:
    """Verify a checkpoint; return what is damaged, or ``None``.

    Args:
        folder: the checkpoint.
        hashes: read all files and compare their digests; otherwise only compare sizes and read
            small files.

    Raises:
        StorageError: if the store fails, so that it is unknown whether the checkpoint is damaged.
    """
    try:
        files = load_manifest(folder)
        for name, facts in sorted(files.items()):
            path = folder / name
            require_inside(folder, path)
            if path.stat().st_size != facts["size"]:
                return (
                    f"{name} has {path.stat().st_size} bytes, but {facts['size']} in its manifest"
                )
        altered = find_altered(folder, list(list_blocks(files))) if hashes else None
        if altered is not None:
            return altered
        load_index(folder, {name: facts["size"] for name, facts in files.items()})
        if not isinstance(read_json(read_inside(folder, folder / STATE)), dict):
            return f"{STATE} is not a JSON object"
        return find_renaming(folder)
    except (OSError, ValueError, RecursionError) as error:
        return describe_unreadable(error)


def find_altered(folder: Path, blocks: Sequence[Block]) -> str | None:
    """Return the first file with a block that differs from its SHA-256 or cannot be read.

    Return ``None`` if there is none. Progress is shown in MiB, since a rank's file may have many
    GB.

    Raises:
        StorageError: see ``find_damage``.
    """
    if not blocks:
        return None
    num_read = 0

    def count(num_bytes: int) -> None:
        nonlocal num_read
        num_read += num_bytes
        report_done(-(-num_read // MIB))

    try:
        total = sum(block.size for block in blocks)
        with progress_bar(f"verifying {folder.name}", -(-total // MIB), "MiB") as report_done:
            for name, offset, size, sha256 in blocks:
                if digest(folder / name, offset, size, count) != sha256:
                    return f"{name} differs from its SHA-256"
    except OSError as error:
        return describe_unreadable(error)
    return None


def describe_unreadable(error: Exception) -> str:
    """Return a file's damage as text, from the error that reading it caused.

    Raises:
        StorageError: if the store failed.
    """
    if isinstance(error, FileNotFoundError):
        return f"{Path(error.filename).name} is absent"
    if isinstance(error, OSError) and may_pass(error):
        raise describe_store(error) from error
    return f"cannot be read ({error})"


def find_renaming(folder: Path) -> str | None:
    """Compare the step in a checkpoint's name with the step that it holds.

    Returns:
        The difference; ``None`` if the step is the same, the folder has another kind of name, or
        the state is not a run's.

    Raises:
        OSError, ValueError, TypeError, AttributeError: if the state cannot be read.
    """
    named = step_of(folder)
    progress = read_json(read_inside(folder, folder / STATE)).get("progress")
    if named is None or not isinstance(progress, dict) or not {"step", "position"} <= set(progress):
        return None
    held = cast(dict[str, Any], progress)["step"]
    if not is_count(held):
        return f"{STATE}: progress.step={shorten(held)} is not a count"
    if held == named:
        return None
    own = folder_of(folder.parent, held).name
    return f"holds step {held}: it is a renamed copy; delete it, or give it its own name, {own}"


def load_manifest(folder: Path) -> dict[str, Any]:
    """Return size and SHA-256 of every file of a checkpoint.

    Raises:
        OSError: if the manifest cannot be read.
        ValueError: if the manifest is damaged.
    """
    text = read_inside(folder, folder / MANIFEST)
    try:
        files = read_json(text)["files"]
        if not isinstance(files, dict):
            raise TypeError("files is not an object")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{MANIFEST} is not a manifest: {error}") from error
    files = cast(dict[str, Any], files)
    if format_manifest(files).encode() != text:
        raise ValueError(f"{MANIFEST} differs from its own SHA-256")
    if not files.keys() >= {INDEX, STATE, ENCODER} or not all(map(is_file_name, files)):
        raise ValueError(f"{MANIFEST} does not name the files of a checkpoint")
    for name, facts in files.items():
        if not (isinstance(facts, dict) and is_count(facts.get("size")) and has_digests(facts)):
            raise ValueError(f"{MANIFEST} does not give size and SHA-256 of {name}")
    return files


def has_digests(facts: Mapping[str, Any]) -> bool:
    """Return whether a file has one SHA-256, or one per block."""
    digests, step = facts.get("sha256"), facts.get("block_bytes")
    if not isinstance(digests, list):
        return isinstance(digests, str)
    return (
        type(step) is int
        and step > 0
        and len(digests) == -(-facts["size"] // step)
        and all(isinstance(sha256, str) for sha256 in digests)
    )


def is_file_name(name: str) -> bool:
    """Return whether a name is that of a file directly in its folder."""
    return Path(name).name == name and name not in (".", "..") and name.isprintable()


def read_state(folder: Path) -> dict[str, Any]:
    """Return step, position, config and versions of a verified checkpoint.

    Raises:
        CheckpointError: if another version of the package wrote the checkpoint in another format,
            or a value has another type than this version writes.
    """
    try:
        state = read_json(read_inside(folder, folder / STATE))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / STATE}: cannot be read ({error})") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{folder / STATE}: is not a JSON object; {REMEDY}")
    state = cast(dict[str, Any], state)
    if state.get("format") != FORMAT:
        versions = state.get("versions")
        named = versions.get("cmtmae_scale") if isinstance(versions, dict) else None
        version = named or "of an unknown version"
        raise CheckpointError(
            f"{folder} was written by cmtmae_scale {version}, whose checkpoints this version does "
            "not read; finish the run with that version, or export its encoder with that version "
            "and start a new run with student.init_weights=FILE"
        )
    for problem in find_type_problems(state):
        raise CheckpointError(f"{folder / STATE}: {problem}; {REMEDY}")
    return state


def find_type_problems(state: dict[str, Any]) -> Iterator[str]:
    """Yield the values of a state that this version does not write."""
    if state.get("task") not in TASKS:
        yield f"task={shorten(state.get('task'))} is not one of {', '.join(TASKS)}"
    for key, kind in (("config", dict), ("index_digest", str), ("versions", dict)):
        if not isinstance(state.get(key), kind):
            yield f"{key}={shorten(state.get(key))} is not {JSON_NAMES[kind]}"
    if isinstance(state.get("versions"), dict):
        for name, version in state["versions"].items():
            if not isinstance(version, str):
                yield f"versions.{name}={shorten(version)} is not {JSON_NAMES[str]}"
    if not is_count(state.get("world_size")) or not state["world_size"]:
        yield f"world_size={shorten(state.get('world_size'))} is not a count"
    if not is_count(state.get("prior_steps", 0)):
        yield f"prior_steps={shorten(state['prior_steps'])} is not a count"
    classes = state.get("classes", [])  # of a fine-tuning, but not of an older one
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        yield f"classes={shorten(classes)} is not a list of texts"
    if not isinstance(state.get("labels_digest", ""), str):
        yield f"labels_digest={shorten(state['labels_digest'])} is not {JSON_NAMES[str]}"
    weights = state.get("teacher_weights", {})  # of pre-training, but not of an older one
    if not isinstance(weights, dict) or not all(isinstance(one, str) for one in weights.values()):
        yield f"teacher_weights={shorten(weights)} is not texts by name"
    for group, counts in COUNTS.items():
        tree = state.get(group)
        if not isinstance(tree, dict):
            yield f"{group}={shorten(tree)} is not {JSON_NAMES[dict]}"
            continue
        for name in counts:
            if not is_count(tree.get(name)):
                yield f"{group}.{name}={shorten(tree.get(name))} is not a count"
        for name in ("losses", "scheduled") if group == "skips" else ():
            values = tree.get(name)
            if not isinstance(values, list) or not all(map(is_finite, values)):
                yield f"{group}.{name}={shorten(values)} is not a list of finite numbers"
    interval = state.get("log_interval", {"sums": {}, "counts": {}})  # earlier versions had none
    if not is_interval(interval):
        yield f"log_interval={shorten(interval)} is not sums and counts by name"


def is_interval(value: object) -> bool:
    """Return whether a JSON value has finite sums, and as many counts of 1 or more."""
    if not isinstance(value, dict):
        return False
    sums, counts = value.get("sums"), value.get("counts")
    if not isinstance(sums, dict) or not isinstance(counts, dict) or sums.keys() != counts.keys():
        return False
    return all(map(is_finite, sums.values())) and all(
        is_count(count) and count for count in counts.values()
    )


def is_count(value: object) -> bool:
    """Return whether a JSON value is a whole number that a tensor of int64 holds, 0 or more."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def is_finite(value: object) -> bool:
    """Return whether a JSON value is a finite number."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return abs(value) <= sys.float_info.max


def shorten(value: object) -> str:
    """Return a value for a message, of at most 60 characters."""
    try:
        text = repr(value)
    except RecursionError:
        text = "(nested too deeply)"
    return text if len(text) <= 60 else text[:57] + "..."


def replace_checkpoint(draft: Path, target: Path) -> None:
    """Rename a complete draft to ``target``; a folder of that name is deleted only afterwards.

    Raises:
        OSError: if the store refuses; the earlier folder gets its name back.
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
    """Delete old checkpoints except for the newest ``keep`` up to ``step``.

    Later checkpoints are not counted: a run that skipped broken folders writes before them.
    """
    past = [path for path in list_checkpoints(root) if (step_of(path) or 0) <= step]
    for old in past[keep:]:
        doomed = old.with_name(f".old-{old.name}")
        old.rename(doomed)
        remove(doomed)


def sweep(root: Path, spare: Path | None = None) -> None:
    """Delete drafts and half-deleted folders of killed processes; restore what they moved aside.

    ``spare`` is a draft that is being written.
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
    """Delete a folder, a link or a file; ignore errors of the store."""
    with suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()
