"""All that manifests and image start exists: programs, options, recipes, keys, versions."""

import re
import tomllib
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from cmtmae_scale.commands import precompute
from cmtmae_scale.commands.pretrain import parse_options
from cmtmae_scale.config.load import load_config

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = {
    "pretrain.py": parse_options,
    "precompute_teacher.py": precompute.parse_precompute_options,
}
IN_THE_BASE = {"torch", "torchvision"}


def commands(node: Any) -> Iterator[list[str]]:
    """Commands of all containers under a node."""
    if isinstance(node, dict):
        if "image" in node and "command" in node:
            yield [re.sub(r"\$\(\w+\)", "0", part) for part in node["command"]]
        for value in node.values():
            yield from commands(value)
    elif isinstance(node, list):
        for value in node:
            yield from commands(value)


FOUND = [
    pytest.param(command, id=f"{path.stem}-{number}")
    for path in sorted((ROOT / "launchers/kubernetes").glob("*.yaml"))
    for number, command in enumerate(commands(list(yaml.safe_load_all(path.read_text()))))
]


def test_there_are_commands() -> None:
    assert len(FOUND) == 5


@pytest.mark.parametrize("command", FOUND)
def test_a_command_fits_our_programs(command: list[str]) -> None:
    (place,) = (n for n, part in enumerate(command) if Path(part).name in PROGRAMS)
    assert (ROOT / command[place]).is_file()
    before = command[:place]
    assert before == ["python"] or before[:2] == ["python", "launchers/supervise.py"]
    options = PROGRAMS[Path(command[place]).name](command[place + 1 :])
    config = load_config(ROOT / options.config, options.overrides)
    where = config.cache.dir if "views.views_per_image=4" in command else config.run.output_dir
    assert Path(str(where)).parts[0] == "runs"  # the one volume that can be written
    assert Path(str(config.data.path)).parts[0] == "datasets"
    if getattr(options, "follow", None) is not None:
        assert str(options.follow) == config.run.output_dir
    if getattr(options, "shard", None) is not None:
        assert options.shard[0] < options.shard[1]


def test_shards_and_pods_agree() -> None:
    documents = list(yaml.safe_load_all((ROOT / "launchers/kubernetes/cache_job.yaml").read_text()))
    (job,) = (one["spec"] for one in documents if one["kind"] == "Job")
    (command,) = commands(job)
    assert f"--shard=0/{job['completions']}" in command
    training = (ROOT / "launchers/kubernetes/train_job.yaml").read_text()
    (pods,) = re.findall(r"completions: (\d+)", training)
    assert f"--nnodes={pods}" in training


def test_the_image_holds_what_the_project_asks_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    asked = [*project["dependencies"], *extras["dali"], *extras["deepspeed"], *extras["hf"]]
    lines = (ROOT / "launchers/docker/requirements.txt").read_text().splitlines()
    pinned = [Requirement(line) for line in lines if line and not line.startswith("#")]
    versions = {canonicalize_name(one.name): str(one.specifier)[2:] for one in pinned}
    for one in map(Requirement, asked):
        name = canonicalize_name(one.name)
        if name not in IN_THE_BASE:
            assert one.specifier.contains(versions.pop(name)), name
    assert set(versions) == {"hatchling"}  # for the editable install


def test_the_image_copies_what_is_there_and_names_its_version() -> None:
    text = (ROOT / "launchers/docker/Dockerfile").read_text()
    for line in re.findall(r"^COPY (.+)$", text, re.MULTILINE):
        assert all((ROOT / source).exists() for source in line.split()[:-1]), line
    named = set(re.findall(r"cmtmae-scale:([\w.]+)", text))
    for path in (ROOT / "launchers/kubernetes").glob("*.yaml"):
        named |= set(re.findall(r"cmtmae-scale:([\w.]+)", path.read_text()))
    assert named == {version("cmtmae-scale")}
