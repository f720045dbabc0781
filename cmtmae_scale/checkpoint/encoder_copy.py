"""Copy the encoder from the shards of a draft to one file, in a process of its own.

The copy needs some Python per chunk, and there are as many chunks as tensors times writers: 200,000
for ViT-H on 512 ranks. A thread of rank 0 would contend with training for the interpreter's lock.
The process imports only the standard library, starts in 50 ms, and uses neither torch nor a GPU.
"""

import json
import os
import resource
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from cmtmae_scale.checkpoint.index import BYTES, INDEX, Located, load_index
from cmtmae_scale.checkpoint.tensor_file import RawEntry, write_raw
from cmtmae_scale.errors import CheckpointError

ROOT = Path(__file__).resolve().parents[2]
"""Folder that the package is imported from."""
CHILD = f"import sys; sys.path.append({str(ROOT)!r}); from {__name__} import main; main()"
SPARE_FILES = 64
"""File descriptors that are not used for shards."""


class ProcessError(Exception):
    """The process could not be started, or ended without an answer."""


def copy_encoder_apart(
    folder: Path, file: Path, prefix: str, metadata: Mapping[str, str]
) -> dict[str, Any]:
    """Write the tensors of a prefix to one file in another process, and wait for its end.

    Args:
        folder: a draft that has its index and its shards, all values finite.
        file: the safetensors file to write.
        prefix: prefix of the tensors' names; it is removed from the names.
        metadata: metadata of the file.

    Returns:
        The file's size and SHA-256.

    Raises:
        OSError: if the store refuses.
        CheckpointError: if a shard has other chunks than the index.
        ProcessError: if the process could not be started, was killed, or failed otherwise.
    """
    words = json.dumps([str(folder), str(file), prefix, dict(metadata)])
    try:
        done = subprocess.run(
            # Neither the user's environment nor site-packages: the standard library alone.
            [sys.executable, "-I", "-S", "-c", CHILD],
            input=words,
            capture_output=True,
            text=True,
            start_new_session=True,  # signals to the ranks' process group do not reach this process
            check=False,
        )
    except OSError as error:
        raise ProcessError(str(error)) from error
    if done.returncode < 0:
        raise ProcessError(f"ended by signal {-done.returncode}")
    if done.returncode:
        raise ProcessError(done.stderr.strip().rpartition("\n")[2])
    found = json.loads(done.stdout)
    if "errno" in found:
        raise OSError(found["errno"], found["error"], found["file"])
    if "error" in found:
        raise CheckpointError(found["error"])
    return found


def main() -> None:
    """Copy what standard input names; write size and SHA-256, or the error, to standard output."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    folder, file, prefix, metadata = json.load(sys.stdin)
    try:
        found = copy_encoder(Path(folder), Path(file), prefix, metadata)
    except OSError as error:
        name = None if error.filename is None else str(error.filename)
        found = {"errno": error.errno, "error": error.strerror or str(error), "file": name}
    except (ValueError, KeyError) as error:
        found = {"error": f"{folder}: {error}"}
    json.dump(found, sys.stdout)


def copy_encoder(folder: Path, file: Path, prefix: str, metadata: dict[str, str]) -> dict[str, Any]:
    """Write the tensors of a prefix to one file, in this process; see ``copy_encoder_apart``.

    Raises:
        OSError: if the store refuses.
        ValueError, KeyError: if a shard has other chunks than the index.
    """
    sizes = {path.name: path.lstat().st_size for path in folder.iterdir()}
    index = load_index(folder, sizes)
    shards = Shards(folder, prefix)
    entries = [
        RawEntry(key.removeprefix(prefix), at.shape, partial(shards.read_chunks, key, at))
        for key, at in index.items()
        if key.startswith(prefix)
    ]
    return write_raw(file, entries, metadata)


class Shards:
    """The shards of a draft; each is opened once while there are file descriptors.

    Args:
        folder: the draft.
        prefix: prefix of the names of the tensors that are read.
    """

    def __init__(self, folder: Path, prefix: str) -> None:
        self.folder = folder
        self.prefix = prefix
        self.ranges: dict[str, dict[str, tuple[int, int]]] = {}
        """By file and chunk: first byte and end."""
        self.opened: dict[str, int] = {}
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        self.limit = sys.maxsize if most == resource.RLIM_INFINITY else most - SPARE_FILES

    def read_chunks(self, key: str, located: Located) -> Iterator[bytes]:
        """Yield the bytes of a tensor, chunk by chunk."""
        for span in located.spans:
            for start, file in span.overlap(span.offset, span.end):
                yield self.read(file, f"{key}@{start}", BYTES * span.length)

    def read(self, file: str, chunk: str, size: int) -> bytes:
        """Read a chunk whole.

        Raises:
            KeyError, ValueError: if the file has no such chunk of that many bytes.
        """
        handle = self.opened.get(file)
        is_kept = handle is not None or len(self.opened) < self.limit
        if handle is None:
            handle = os.open(self.folder / file, os.O_RDONLY)
            if is_kept:
                self.opened[file] = handle
        try:
            if file not in self.ranges:
                self.ranges[file] = read_ranges(handle, self.prefix)
            begin, end = self.ranges[file][chunk]
            if end - begin != size:
                raise ValueError(f"{file}: {chunk} has {end - begin} bytes, {INDEX} names {size}")
            return read_whole(handle, size, begin)
        finally:
            if not is_kept:
                os.close(handle)


def read_ranges(handle: int, prefix: str) -> dict[str, tuple[int, int]]:
    """Return first byte and end of the tensors of a safetensors file that have a prefix."""
    (length,) = struct.unpack("<Q", read_whole(handle, 8, 0))
    header = json.loads(read_whole(handle, length, 8))
    first = 8 + length
    return {
        name: (first + entry["data_offsets"][0], first + entry["data_offsets"][1])
        for name, entry in header.items()
        if name.startswith(prefix)
    }


def read_whole(handle: int, size: int, offset: int) -> bytes:
    """Read ``size`` bytes from an offset; the system may return fewer per call.

    Raises:
        ValueError: if the file ends early.
    """
    pieces: list[bytes] = []
    while size:
        piece = os.pread(handle, size, offset)
        if not piece:
            raise ValueError(f"a shard ends at byte {offset}")
        pieces.append(piece)
        size, offset = size - len(piece), offset + len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)
