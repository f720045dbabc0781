"""Imports go only down the layers of ARCHITECTURE.md, and heavy packages stay where they belong."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Height of every part; a part may import itself and what lies strictly below.
HEIGHT = {
    "cmtmae_scale.errors": 0,
    "dataloading": 0,
    "cmtmae_scale": 0,
    "cmtmae_scale.config": 1,
    "cmtmae_scale.runtime": 1,
    "cmtmae_scale.method": 2,
    "cmtmae_scale.teachers": 3,
    "cmtmae_scale.cache": 4,
    "cmtmae_scale.backends": 5,
    "cmtmae_scale.checkpoint": 6,
    "cmtmae_scale.engine": 7,
    "cmtmae_scale.evaluation": 8,
    "cmtmae_scale.pretraining": 9,
    "cmtmae_scale.finetuning": 9,
    "cmtmae_scale.export": 10,
    "cmtmae_scale.tools": 10,
    "cmtmae_scale.commands": 11,
    "launchers": 12,
}

# Package -> the only modules that may import it.
ONLY_IN = {
    "nvidia.dali": {"dataloading.dali"},
    "nvidia.nvimgcodec": {"dataloading.torch_decode"},
    "deepspeed": {"cmtmae_scale.backends.deepspeed"},
    "torch.distributed.fsdp": {"cmtmae_scale.backends.fsdp"},
    "torch.distributed._composable": set(),
    "open_clip": {"cmtmae_scale.teachers.open_clip"},
}

TOPS = ("cmtmae_scale", "dataloading", "launchers")
FILES = sorted(path for top in TOPS for path in (ROOT / top).rglob("*.py"))


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in FILES}


def imports(path: Path) -> Iterator[str]:
    """Modules that a file imports, wherever in the file; the finest name that is a module."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and is_dynamic(node):
            yield from (str(arg.value) for arg in node.args[:1] if isinstance(arg, ast.Constant))


def is_dynamic(call: ast.Call) -> bool:
    return ast.unparse(call.func).split(".")[-1] in ("import_module", "__import__")


def part_of(module: str) -> str | None:
    """The part of HEIGHT that a module belongs to: the longest that fits."""
    names = module.split(".")
    fitting = (".".join(names[:n]) for n in range(len(names), 0, -1))
    return next((name for name in fitting if name in HEIGHT), None)


def is_below(package: str, name: str) -> bool:
    return name == package or name.startswith(package + ".")


def test_every_module_has_a_layer() -> None:
    homeless = [
        module
        for module in MODULES
        if part_of(module) == "cmtmae_scale" and module != "cmtmae_scale"
    ]
    assert not homeless, f"give these a height in HEIGHT: {homeless}"


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_only_down(module: str) -> None:
    own = part_of(module)
    assert own is not None
    for name in imports(MODULES[module]):
        part = part_of(name)
        if part is None or part == own:
            continue
        assert HEIGHT[part] < HEIGHT[own], f"{module} imports {name}: not below {own}"
    if own == "launchers":
        return
    assert not any(is_below("launchers", name) for name in imports(MODULES[module]))


def test_dataloading_imports_nothing_of_cmtmae_scale() -> None:
    for module, path in MODULES.items():
        if is_below("dataloading", module):
            found = [name for name in imports(path) if is_below("cmtmae_scale", name)]
            assert not found, f"{module} imports {found}"


@pytest.mark.parametrize("package", ONLY_IN)
def test_heavy_packages_are_imported_in_one_place(package: str) -> None:
    users = {m for m, path in MODULES.items() if any(is_below(package, n) for n in imports(path))}
    assert users <= ONLY_IN[package]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("import deepspeed.comm as d", ["deepspeed.comm"]),
        ("def f():\n    from torch.distributed import fsdp", ["torch.distributed.fsdp"]),
        ("importlib.import_module('nvidia.dali')", ["nvidia.dali"]),
    ],
)
def test_hidden_imports_are_found(text: str, expected: list[str], tmp_path: Path) -> None:
    file = tmp_path / "case.py"
    file.write_text(text)
    assert list(imports(file)) == expected
