"""Launches whose second rank differs from the first."""

import errno
import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from cmtmae_scale.config.load import load_config
from cmtmae_scale.engine import agreement, launches
from cmtmae_scale.engine.ending import Ending
from cmtmae_scale.errors import CmtMaeError, ConfigError, TeacherError, exit_code_of
from cmtmae_scale.pretraining import build, task
from cmtmae_scale.runtime import shared_index
from cmtmae_scale.runtime.collectives import broadcast_bytes, gather_bytes, on_all_ranks
from cmtmae_scale.runtime.launch import World
from dataloading.data_set import Request
from dataloading.errors import DataError, ReadError
from tests.checkpoint.save_case import Lines
from tests.engine.fault_case import command_on_ranks


def launch_each(recipe: Path, cases: list[tuple[str, Any]]) -> list[tuple[int, str]]:
    """Launch once per case, (kind, value) of what rank 1 has; exit codes and last log lines."""
    log = Lines()
    found = []
    for kind, value in cases:
        log.lines.clear()
        overrides: list[str] = []
        with ExitStack() as stack:
            if dist.get_rank() == 1 and kind != "initial weights":
                if kind == "overrides":
                    overrides += value
                else:
                    stack.enter_context(change(kind, value))
            stack.enter_context(mock.patch.object(agreement, "SHARED_WAIT_S", 0.3))
            if kind == "initial weights":
                overrides.append("student.init_weights=s.safetensors")
                load = mock.Mock(side_effect=TeacherError(value) if dist.get_rank() else None)
                stack.enter_context(mock.patch.object(build, "open_init_weights", load))
            if kind == "folder":
                overrides.append("run.output_dir=relative")
            code = command_on_ranks(recipe, overrides)
        found.append((code, log.lines[-1] if log.lines else ""))
    return found


def change(kind: str, value: Any) -> Any:
    """Return a context in which this rank differs."""
    if kind == "variable":
        return mock.patch.dict(os.environ, {"NVIDIA_TF32_OVERRIDE": value})
    if kind == "versions":
        stack = ExitStack()
        stack.enter_context(mock.patch("cmtmae_scale.runtime.versions.__version__", value[0]))
        stack.enter_context(mock.patch("platform.python_version", lambda: value[1]))
        return stack
    if kind == "teacher":
        return mock.patch.object(build, "build_teacher", mock.Mock(side_effect=TeacherError(value)))
    if kind == "stream":
        return mock.patch.object(task, "open_stream", mock.Mock(side_effect=DataError(value)))
    if kind == "folder":
        stack = ExitStack()
        stack.callback(os.chdir, os.getcwd())
        os.chdir(value)
        return stack
    usual = shared_index.require_files

    def elsewhere(request: Request, contents: str) -> None:
        usual(request._replace(path=Path(value)), contents)

    stack = ExitStack()
    stack.enter_context(mock.patch.object(shared_index, "require_files", elsewhere))
    stack.enter_context(mock.patch.object(shared_index, "identify_place", lambda path: "elsewhere"))
    return stack


def exchange() -> list[Any]:
    """Small agreements between three ranks."""
    rank = dist.get_rank()

    def fails() -> int:
        if rank == 1:
            raise DataError("gone")
        return rank

    found: list[Any] = [
        gather_bytes(b"\0" * rank),
        gather_bytes(b""),
        broadcast_bytes(b"\x80\0x" if rank == 0 else b""),
        on_all_ranks(lambda: rank),
    ]

    def crashes() -> None:
        if rank == 2:
            raise TypeError("no such thing")

    def waits() -> None:
        if rank == 0:
            raise ReadError("not now")

    own = {fails: DataError, crashes: (CmtMaeError, TypeError), waits: ReadError}
    for action, expected in own.items():
        try:
            on_all_ranks(action)
        except expected as error:
            found.append((exit_code_of(error), str(error)))
    agreement.require_equal_weights(lambda: {"digest": "abc"})
    try:
        agreement.require_equal_weights(lambda: {"digest": "other" if rank == 2 else "abc"})
    except CmtMaeError as error:
        found.append(str(error))
    return found


def launch_on_a_failing_store(folder: Path) -> list[str]:
    """What a launch does before it is watched, on a store that fails for rank 0 alone."""
    fails = mock.Mock(side_effect=OSError(errno.EIO, "Input/output error"))
    with ExitStack() as stack:
        if dist.get_rank() == 0:
            for owner, name in ((Path, "unlink"), (Path, "glob"), (launches, "list_checkpoints")):
                stack.enter_context(mock.patch.object(owner, name, fails))
        ending = stack.enter_context(Ending(folder, dist.get_rank()))
        found = [str(len(agreement.require_shared(folder, dist.get_rank())))]
        try:
            launches.count_launch(folder, dist.get_rank())
        except CmtMaeError as error:
            found.append(f"{exit_code_of(error)} {error}")
        ending.stopped = "a test"
    return found


def open_closed_images(folder: Path, kept: Path) -> tuple[int, str]:
    """Open images whose folder rank 1 may not enter; exit code and message."""
    usual = os.stat

    def refuse(path: Any, *arguments: Any, **options: Any) -> os.stat_result:
        if dist.get_rank() == 1 and path == folder:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return usual(path, *arguments, **options)

    with mock.patch.object(os, "stat", refuse):
        try:
            shared_index.open_on_all_ranks(Request(folder), kept, "changed")
        except DataError as error:
            return exit_code_of(error), str(error)
    return 0, ""


def launch_on_nodes(recipe: Path, sharding: str, places: list[tuple[int, int]]) -> str:
    """Compare the launches of ranks, each with its local rank and the number of ranks on its node.

    Returns:
        Why they must not continue; empty: they may.
    """
    config = load_config(recipe, ["backend.name=fsdp", f"backend.sharding={sharding}"])
    rank = dist.get_rank()
    world = World(rank, len(places), *places[rank], "srun")
    try:
        agreement.require_equal_launch(config, world, torch.device("cpu"))
    except ConfigError as error:
        return str(error)
    return ""
