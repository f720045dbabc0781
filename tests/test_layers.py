"""Imports go only down the layers of ARCHITECTURE.md, and heavy packages stay where they belong."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# From low to high; a package may import itself and packages of lower layers.
LAYERS = [
    ["cmtmae_scale", "cmtmae_scale.errors", "dataloading"],
    ["cmtmae_scale.config", "cmtmae_scale.runtime"],
    ["cmtmae_scale.method"],
    ["cmtmae_scale.teachers"],
    ["cmtmae_scale.cache"],
    ["cmtmae_scale.backends"],
    ["cmtmae_scale.checkpoint"],
    ["cmtmae_scale.engine"],
    ["cmtmae_scale.evaluation"],
    ["cmtmae_scale.pretraining", "cmtmae_scale.finetuning"],
    ["cmtmae_scale.export", "cmtmae_scale.tools"],
    ["cmtmae_scale.api"],
    ["cmtmae_scale.commands"],
    ["launchers", "cmtmae_scale.__main__"],
]
LAYER = {package: number for number, packages in enumerate(LAYERS) for package in packages}

# Package -> the only modules that may import it.
ONLY_IN = {
    "nvidia.dali": {"dataloading.dali"},
    "nvidia.nvimgcodec": {"dataloading.torch_decode"},
    "deepspeed": {"cmtmae_scale.backends.deepspeed"},
    "torch.distributed.fsdp": {"cmtmae_scale.backends.fsdp"},
    "torch.distributed._composable": set(),
    "obstore": {"dataloading.stores"},
    "pyarrow": {"dataloading.parquet"},
    "open_clip": {"cmtmae_scale.teachers.open_clip"},
}


def module_name(path: Path) -> str:
    names = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(names[:-1] if names[-1] == "__init__" else names)


def find_imports(text: str) -> Iterator[str]:
    """Yield what a module imports, at any depth, as dotted names."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and is_dynamic_import(node):
            yield from (str(arg.value) for arg in node.args[:1] if isinstance(arg, ast.Constant))


def is_dynamic_import(call: ast.Call) -> bool:
    return ast.unparse(call.func).split(".")[-1] in ("import_module", "__import__")


MODULES = {
    module_name(path): list(find_imports(path.read_text()))
    for top in ("cmtmae_scale", "dataloading", "launchers")
    for path in (ROOT / top).rglob("*.py")
}


def package_of(module: str) -> str | None:
    """The package of ``LAYERS`` that holds a module: the longest name that fits."""
    names = module.split(".")
    prefixes = (".".join(names[:length]) for length in range(len(names), 0, -1))
    return next((prefix for prefix in prefixes if prefix in LAYER), None)


def is_within(package: str, name: str) -> bool:
    return name == package or name.startswith(package + ".")


def test_every_module_has_a_layer_and_every_layer_a_module() -> None:
    packages = {module: package_of(module) for module in MODULES}
    assert [m for m, p in packages.items() if p == "cmtmae_scale" != m] == []
    assert set(packages.values()) == set(LAYER)


def test_imports_go_only_down() -> None:
    wrong = []
    for module, imports in MODULES.items():
        own = package_of(module)
        assert own is not None
        for name in imports:
            package = package_of(name)
            if package not in (None, own) and LAYER[package] >= LAYER[own]:
                wrong.append(f"{module} imports {name}")
    assert wrong == []


def test_heavy_packages_are_imported_in_one_place() -> None:
    for package, allowed in ONLY_IN.items():
        users = {m for m, names in MODULES.items() if any(is_within(package, n) for n in names)}
        assert users <= allowed, package


def test_a_stream_without_dali_imports_nothing_that_needs_it() -> None:
    needs_dali = {"dataloading.dali", "dataloading.own_thread"}
    for path in (ROOT / "dataloading").glob("*.py"):
        imports = [
            one for one in ast.parse(path.read_text()).body if isinstance(one, ast.ImportFrom)
        ]
        if module_name(path) not in needs_dali:
            assert needs_dali.isdisjoint(one.module for one in imports), path


def test_no_rank_unpickles_what_another_rank_sends() -> None:
    """torch's collectives on objects are those with ``object`` in their names."""
    for top in ("cmtmae_scale", "dataloading", "launchers"):
        for path in (ROOT / top).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                name = node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")
                assert not re.search(r"(gather|broadcast|scatter|send|recv)_object", name), path


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("import deepspeed.comm as d", ["deepspeed.comm"]),
        ("def f():\n    from torch.distributed import fsdp", ["torch.distributed.fsdp"]),
        ("importlib.import_module('nvidia.dali')", ["nvidia.dali"]),
    ],
)
def test_hidden_imports_are_found(text: str, expected: list[str]) -> None:
    assert list(find_imports(text)) == expected
