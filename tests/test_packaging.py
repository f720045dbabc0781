"""What a clone and an installed copy must hold."""

import ast
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

from cmtmae_scale.config.check import TRACKERS

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def project_files() -> list[Path]:
    """Files of the project: what git knows or would add; without git, the source folders."""
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
    )
    if listing.returncode == 0:
        paths = [ROOT / name for name in listing.stdout.decode().split("\0") if name]
    else:
        tops = ("cmtmae_scale", "dataloading", "launchers", "tests", "configs", "docs")
        paths = [path for top in tops for path in (ROOT / top).rglob("*")]
    return [path for path in paths if path.is_file()]


FILES = project_files()


def test_both_packages_are_found_with_all_their_folders() -> None:
    setuptools = pytest.importorskip("setuptools", reason="setuptools is not installed")
    settings = PROJECT["tool"]["setuptools"]["packages"]["find"]
    found = set(setuptools.find_packages(str(ROOT), include=settings["include"]))
    folders = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for top in ("cmtmae_scale", "dataloading")
        for path in (ROOT / top).rglob("*.py")
    }
    assert found == folders
    assert {"cmtmae_scale", "dataloading"} <= found


@pytest.mark.parametrize("package", ["cmtmae_scale", "dataloading"])
def test_packages_say_that_they_are_typed(package: str) -> None:
    assert (ROOT / package / "py.typed").is_file()
    assert "py.typed" in PROJECT["tool"]["setuptools"]["package-data"][package]


def test_command_points_at_a_function() -> None:
    for target in PROJECT["project"]["scripts"].values():
        module, function = target.split(":")
        tree = ast.parse((ROOT / (module.replace(".", "/") + ".py")).read_text())
        assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_setup_installs_every_extra_but_cuda_12_and_trackers() -> None:
    extras = set(PROJECT["project"]["optional-dependencies"])
    line = next(x for x in (ROOT / "Makefile").read_text().splitlines() if x.startswith("EXTRAS"))
    assert set(line.split("=")[1].strip().split(",")) == extras - {"dali12", *TRACKERS}


def test_no_file_names_a_place_on_one_machine() -> None:
    pattern = re.compile(r"(?<![\w.\-$}])/(work|root|home/\w+|opt/(wheels|pypi))/")
    found = []
    for path in FILES:
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue  # a picture
        hits = [line for line in text.splitlines() if pattern.search(line)]
        found += [f"{path.relative_to(ROOT)}: {line.strip()}" for line in hits]
    assert not found


def test_sources_are_ascii() -> None:
    odd = [
        str(path.relative_to(ROOT))
        for path in FILES
        if path.suffix in (".py", ".yaml", ".toml") and not path.read_text().isascii()
    ]
    assert not odd
