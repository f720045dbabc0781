"""Torch files of others: read without executing code, and no more values than they hold."""

import argparse
import pathlib
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cmtmae_scale.errors import TeacherError

EXPANSION = 8
"""Most bytes of all tensors per byte of their file; tied weights are counted twice."""
PLAIN_CLASSES: list[Any] = [
    argparse.Namespace,
    *(
        (kind, f"{module}.{name}")
        for module in ("pathlib", "pathlib._local")  # the second: of Python 3.13
        for name, kind in (
            ("PosixPath", pathlib.PurePosixPath),
            ("WindowsPath", pathlib.PureWindowsPath),
            ("PurePosixPath", pathlib.PurePosixPath),
            ("PureWindowsPath", pathlib.PureWindowsPath),
        )
    ),
]
"""Classes without side effects that pickles may hold: options of a program, and paths."""


def read_pickled(path: Path, key: str) -> object:
    """Read a torch file whose pickle contains tensors, plain containers and options only.

    ``PLAIN_CLASSES`` are allowed, which training scripts save beside their weights; building them
    runs no other code.

    Raises:
        TeacherError: naming the class whose object the file holds, or what is wrong with the file.
    """
    where = f"{key}={path}"
    if is_torchscript(path):
        raise TeacherError(
            f"{where}: a TorchScript archive, which runs code when loaded; where "
            "you trust it, write its weights once with torch.save(torch.jit.load(FILE, "
            f"map_location='cpu').state_dict(), NEW) and set {key}=NEW"
        )
    members = zip_members(path)
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        unpacked = sum(member.file_size for member in members)
        raise TeacherError(
            f"{where}: is compressed and unpacks to {unpacked} bytes, which no torch.save writes; "
            "copy it again"
        )
    try:
        with torch.serialization.safe_globals(PLAIN_CLASSES):
            # Of a mapped file no storage reaches beyond the end, whatever size a pickle gives it.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=bool(members))
    except Exception as error:  # a pickle of any bytes raises anything; each ends with the remedy
        refused = re.search(r"GLOBAL ([\w.]+)|(?:class|type|global) ([\w.]+)", str(error))
        if refused:
            raise TeacherError(
                f"{where}: holds an object of {refused[1] or refused[2]}, not only tensors, and "
                "building it would run code, so weights_only=True refuses it; where you trust the "
                "file, write its weights once with torch.save(MODEL.state_dict(), NEW) and set "
                f"{key}=NEW"
            ) from error
        words = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip().split("\n")[0]
        first = "no torch file" if "weights_only" in words else words or type(error).__name__
        raise TeacherError(
            f"{where}: cannot be read with torch.load(weights_only=True) ({first}); "
            "copy it again, or save its state dict as .safetensors"
        ) from error


def bound_storage(tensors: Mapping[str, Tensor], path: Path, where: str) -> None:
    """Refuse tensors that hold more values than the file, such as those of stride 0.

    Raises:
        TeacherError: naming the tensor.
    """
    left = EXPANSION * path.stat().st_size
    for name, value in tensors.items():
        if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized:
            raise TeacherError(
                f"{where}: {name} is {value.layout} on {value.device}; save dense tensors"
            )
        size = value.numel() * value.element_size()
        left -= size
        if size > value.untyped_storage().nbytes() or left < 0:
            raise TeacherError(
                f"{where}: {name} {list(value.shape)} repeats values, {size} bytes of a file of "
                f"{path.stat().st_size}; save its .contiguous()"
            )
    stored = sum(member.file_size for member in zip_members(path))
    storages = {
        storage.data_ptr(): storage.nbytes()
        for storage in (value.untyped_storage() for value in tensors.values())
    }
    if stored and sum(storages.values()) > stored:
        raise TeacherError(
            f"{where}: its tensors take {sum(storages.values())} bytes, but it holds {stored}; "
            "copy it again"
        )


def is_torchscript(path: Path) -> bool:
    """Return whether a file is an archive of ``torch.jit.save``, which contains code."""
    return any(Path(member.filename).name == "constants.pkl" for member in zip_members(path))


def zip_members(path: Path) -> list[zipfile.ZipInfo]:
    """Return the members of a zip archive; none of another or damaged file."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.infolist()
    # zipfile raises NotImplementedError for features of the format that it does not read.
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return []
