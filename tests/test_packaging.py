"""What a clone and an installed copy must hold."""

import ast
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from itertools import chain
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from PIL import Image

from cmtmae_scale import __version__
from cmtmae_scale.commands.copy import TEMPLATES
from cmtmae_scale.config.check import TRACKERS
from cmtmae_scale.engine.agreement import DECODING_PACKAGES
from cmtmae_scale.errors import EXIT_CONFIG, EXIT_DONE
from tests.test_layers import MODULES

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

LOCK = (ROOT / "requirements/lock.txt").read_text()


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


def test_a_wheel_is_told_of_both_packages_and_of_what_is_shipped() -> None:
    settings = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert settings["packages"] == ["cmtmae_scale", "dataloading"]
    assert all((ROOT / package / "py.typed").is_file() for package in settings["packages"])
    shipped = settings["force-include"]
    assert all(target == f"cmtmae_scale/shipped/{source}" for source, target in shipped.items())
    folders = {path.name for path in (ROOT / "launchers").iterdir() if path.is_dir()}
    templates = {Path(source).name for source in shipped if source.startswith("launchers/")}
    assert templates == {*TEMPLATES} == folders - {"__pycache__"}


def test_errors_that_name_an_extra_give_its_command() -> None:
    code = [path for top in ("cmtmae_scale", "dataloading") for path in (ROOT / top).rglob("*.py")]
    named = 0
    for path in code:
        text = re.sub(r'"\s+f?"', "", path.read_text())  # strings over several lines
        for extra in re.findall(r"install the extra (\w+)", text):
            assert f"pip install 'cmtmae-scale[{extra}]'" in text, f"{path}: {extra}"
            named += 1
        for extra in re.findall(r"cmtmae-scale\[(\w+)\]", text):
            assert extra in PROJECT["project"]["optional-dependencies"], f"{path}: {extra}"
    assert named >= 4


PACKAGES = {
    "PIL": "pillow",
    "nvidia.dali": "nvidia-dali-cuda130",
    "nvidia.nvimgcodec": "nvidia-nvimgcodec-cu13",
    "open_clip": "open_clip_torch",
    "yaml": "PyYAML",
}
"""Module -> its distribution, where the names differ."""


def test_what_is_imported_is_declared() -> None:
    declared = {name_of(line) for line in PROJECT["project"]["dependencies"]}
    extras = {
        name_of(line)
        for extra, lines in PROJECT["project"]["optional-dependencies"].items()
        for line in lines
        if extra != "dev"
    }
    imported: set[str] = set()
    for module, names in MODULES.items():
        for name in names:
            parts = name.split(".")
            if parts[0] in sys.stdlib_module_names or parts[0] in ("cmtmae_scale", "dataloading"):
                continue
            top = ".".join(parts[: 2 if parts[0] == "nvidia" else 1])
            package = PACKAGES.get(top, top)
            assert package in declared | extras, f"{module} imports {name}"
            imported.add(package)
    assert declared <= imported


def test_ranks_compare_every_decoder_that_an_extra_installs() -> None:
    extras = PROJECT["project"]["optional-dependencies"]
    decoders = {name_of(line) for extra in ("dali", "dali12") for line in extras[extra]}
    assert len(decoders) == 4 and decoders <= {*DECODING_PACKAGES}


def name_of(requirement: str) -> str:
    return re.split(r"[\s<>=!~\[;]", requirement)[0]


def test_messages_name_commands_that_every_user_has() -> None:
    """A wheel has no ``launchers/*.py``; the suite's jobs run in a clone."""
    for top in ("cmtmae_scale", "dataloading"):
        for path in (ROOT / top).rglob("*.py"):
            if path.parent.name != "benchmark" or path.stem not in ("jobs", "suite"):
                assert "launchers/" not in path.read_text(), path


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("hatchling", reason="hatchling is not installed")
    folder = tmp_path_factory.mktemp("dist")
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(ROOT))
    (built,) = folder.glob("*.whl")
    return built


def pip(*arguments: str) -> None:
    line = [sys.executable, "-m", "pip", "--no-input", "--disable-pip-version-check"]
    done = subprocess.run([*line, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_wheel_holds_the_packages_and_what_is_shipped(wheel: Path) -> None:
    expected = {}
    for path in FILES:
        name = str(path.relative_to(ROOT))
        if name.startswith(("cmtmae_scale/", "dataloading/")):
            expected[name] = path.read_bytes()
        elif name.startswith(("configs/", *(f"launchers/{one}/" for one in TEMPLATES))):
            expected[f"cmtmae_scale/shipped/{name}"] = path.read_bytes()
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if ".dist-info/" not in name]
        found = {name: archive.read(name) for name in names}
    assert found == expected


@pytest.mark.slow
def test_a_wheel_works_outside_the_clone(wheel: Path, tmp_path: Path) -> None:
    site, work = tmp_path / "site", tmp_path / "work"
    pip("install", "--no-deps", "--quiet", "--target", str(site), str(wheel))
    work.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}

    def run(*line: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(line, cwd=work, env=environment, capture_output=True, text=True)

    module = (sys.executable, "-m", "cmtmae_scale")
    place = run(sys.executable, "-c", "import cmtmae_scale as c; print(c.__file__)").stdout
    assert Path(place).is_relative_to(site)
    version = run(str(site / "bin" / "cmtmae"), "--version").stdout
    assert version == run(*module, "--version").stdout == f"cmtmae {__version__}\n"
    assert run(*module, "copy", "mae_base", "slurm").returncode == EXIT_DONE
    assert (work / "configs/mae_base.yaml").is_file() and (work / "launchers/slurm").is_dir()
    wrong = run(*module, "pretrain", "--config", "vit_basse", "data.path=images")
    assert wrong.returncode == EXIT_CONFIG and "shipped recipe vit_base?" in wrong.stderr
    make_images(work / "images", 8)
    words = ["--config", "mae_base", "data.path=images", *TINY]
    done = run(*module, "pretrain", *words)
    assert done.returncode == EXIT_DONE, done.stderr
    assert (work / "runs/mae_base/checkpoints/step-00000002").is_dir()
    assert "next: cmtmae report runs/mae_base" in done.stderr
    assert run(*module, "report", "runs/mae_base").returncode == EXIT_DONE


TINY = (
    *("data.expected_images=null", "data.workers=1", "views.image_size=64"),
    *("student.arch=test_vit", "decoder.depth=1", "decoder.width=32", "decoder.heads=2"),
    *("train.steps=2", "train.global_batch_size=8", "train.micro_batch_size=8", "log.every=1"),
    *("backend.precision=fp32", "backend.compile=false", "eval.every=null"),
)


def make_images(folder: Path, count: int) -> None:
    folder.mkdir()
    for number in range(count):
        Image.effect_noise((80, 80), 40 + number).convert("RGB").save(folder / f"{number}.jpg")


def test_command_points_at_a_function() -> None:
    for target in PROJECT["project"]["scripts"].values():
        module, function = target.split(":")
        tree = ast.parse((ROOT / (module.replace(".", "/") + ".py")).read_text())
        assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_setup_installs_every_extra_but_cuda_12_and_trackers() -> None:
    extras = set(PROJECT["project"]["optional-dependencies"])
    assert setup_extras() == extras - {"dali12", *TRACKERS}


def setup_extras() -> set[str]:
    line = next(x for x in (ROOT / "Makefile").read_text().splitlines() if x.startswith("EXTRAS"))
    return set(line.split("=")[1].strip().split(","))


def test_the_lock_file_has_what_make_installs() -> None:
    """``make lock`` refreshes it after a change of dependencies."""
    locked: dict[str, list[str]] = {}
    for name, version in re.findall(r"^([\w.-]+)==(\S+)", LOCK, re.MULTILINE):
        locked.setdefault(canonicalize_name(name), []).append(version)
    extras = PROJECT["project"]["optional-dependencies"]
    groups = [
        PROJECT["project"]["dependencies"],
        *PROJECT["dependency-groups"].values(),
        *(extras[name] for name in setup_extras()),
    ]
    for requirement in map(Requirement, chain.from_iterable(groups)):
        versions = locked.get(canonicalize_name(requirement.name), [])
        assert versions, f"{requirement} is not locked; run make lock"
        assert all(map(requirement.specifier.contains, versions)), f"{requirement}: {versions}"
    assert "://" not in LOCK and LOCK.count("--hash=sha256:") > len(locked)


def test_no_file_names_a_place_on_one_machine() -> None:
    pattern = re.compile(r"(?<![\w.\-$}])/(work|root|home/\w+|opt/(wheels|pypi))/")
    found = []
    for path in FILES:
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue  # an image
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
