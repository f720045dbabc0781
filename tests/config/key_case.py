"""What a change of one key does to a tiny run, and whether any code reads it."""

import ast
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

from cmtmae_scale.config.ranges import walk_fields
from cmtmae_scale.errors import CmtMaeError
from dataloading.errors import DataError

TIMES = ("images_s", "data_wait_fraction", "memory_gib")
Run = Callable[..., object]


def observe_run(run: Run, load: Run, run_dir: Path, overrides: list[str]) -> str:
    """Digest of everything that a run writes, or its error; the config must be legal.

    Args:
        run: runs a list of overrides.
        load: loads the config of a list of overrides.
        run_dir: folder of the run.
        overrides: of the recipe.
    """
    overrides = [f"run.output_dir={run_dir}", *overrides]
    load(overrides)
    try:
        run(overrides)
    except (CmtMaeError, DataError, RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    from tests.engine.run_case import tensors

    folders = sorted(path.name for path in (run_dir / "checkpoints").glob("step-*"))
    names = sorted(path.name for path in run_dir.glob("*"))
    digest = hashlib.sha256(repr((folders, names)).encode())
    for key, value in tensors(run_dir, int(folders[-1].removeprefix("step-"))).items():
        digest.update(key.encode() + value.numpy().tobytes())
    for line in (run_dir / "log.jsonl").read_text().splitlines():
        entry = {
            key: value
            for key, value in json.loads(line).items()
            if key not in TIMES and not key.endswith("time_fraction")
        }
        digest.update(json.dumps(entry).encode())
    return digest.hexdigest()


def observe_changes(
    run: Run, load: Run, folder: Path, changes: Mapping[str, tuple[str, ...]]
) -> dict[str, tuple[str, str]]:
    """Observe a run before and after each change; the overrides after the first are in both."""
    os.chdir(folder)
    found: dict[str, tuple[str, str]] = {}
    base = observe_run(run, load, folder / "base", [])
    again = observe_run(run, load, folder / "again", [])
    assert base == again and "Error" not in base, (base, again)
    for number, (key, (change, *context)) in enumerate(changes.items()):
        before = base
        if context:
            before = observe_run(run, load, folder / f"before{number}", context)
        found[key] = (before, observe_run(run, load, folder / f"after{number}", [change, *context]))
    return found


def unread_keys(schema: type) -> list[str]:
    """Keys whose name is no attribute in any code but the schema and its checks.

    Several groups share names such as ``every``: the slow sweep of real runs proves each key.
    """
    root = Path(__file__).resolve().parents[2]
    checks = [root / "cmtmae_scale" / "config" / name for name in ("check.py", "schema.py")]
    read = {
        node.attr
        for package in ("cmtmae_scale", "dataloading")
        for path in (root / package).rglob("*.py")
        if path not in checks
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
    }
    return [key for key, _ in walk_fields(schema) if key.rpartition(".")[2] not in read]


def missing_tests(exceptions: Mapping[str, str]) -> list[str]:
    """Exceptions that do not name a test file that exists."""
    tests = Path(__file__).resolve().parents[1]
    return [
        key
        for key, reason in exceptions.items()
        if not any((tests / word).is_file() for word in reason.split())
    ]
