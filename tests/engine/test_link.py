"""A link that fails between two machines, simulated by two network namespaces."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engine.fault_case import incidents
from tests.engine.run_case import write_recipe

ROOT = Path(__file__).parents[2]
NAMES = [f"cmtmae-{os.getpid()}-{number}" for number in range(2)]
LINKS = [f"cm{os.getpid()}n{number}" for number in range(2)]
ADDRESSES = ["10.213.0.1", "10.213.0.2"]


def ip(*arguments: str, inside: int | None = None) -> None:
    where = [] if inside is None else ["-n", NAMES[inside]]
    subprocess.run(["ip", *where, *arguments], check=True, capture_output=True)


@pytest.fixture
def network() -> Iterator[None]:
    """Two namespaces with an address each, and a link between them."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("needs root and iproute2")
    try:
        for name in NAMES:
            ip("netns", "add", name)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespaces here: {error.stderr.decode().strip()}")
    try:
        ip("link", "add", LINKS[0], "type", "veth", "peer", "name", LINKS[1])
        for number, (link, address) in enumerate(zip(LINKS, ADDRESSES, strict=True)):
            ip("link", "set", link, "netns", NAMES[number])
            ip("address", "add", f"{address}/24", "dev", link, inside=number)
            ip("link", "set", link, "up", inside=number)
            ip("link", "set", "lo", "up", inside=number)
        yield
    finally:
        for name in NAMES:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def start(rank: int, recipe: Path) -> subprocess.Popen[bytes]:
    """A rank on a machine of its own; storage is shared."""
    place = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
    place |= {"MASTER_ADDR": ADDRESSES[0], "MASTER_PORT": 29511, "GLOO_SOCKET_IFNAME": LINKS[rank]}
    script = str(ROOT / "launchers" / "pretrain.py")
    own = ["train.steps=100000", "guard.hang_seconds=5", "checkpoint.every=5"]
    return subprocess.Popen(
        ["ip", "netns", "exec", NAMES[rank], sys.executable, script, "--config", str(recipe), *own],
        env=os.environ | {key: str(value) for key, value in place.items()},
        stderr=subprocess.DEVNULL,
    )


@pytest.mark.slow
@pytest.mark.usefixtures("network")
def test_both_ranks_leave_when_the_link_between_them_goes_down(tmp_path: Path) -> None:
    recipe, run_dir = write_recipe(tmp_path), tmp_path / "run"
    ranks = [start(rank, recipe) for rank in range(2)]
    try:
        limit = time.monotonic() + 120
        while not list((run_dir / "checkpoints").glob("step-*/manifest.json")):
            assert [one.poll() for one in ranks] == [None, None] and time.monotonic() < limit
            time.sleep(0.1)
        ip("link", "set", LINKS[1], "down", inside=1)
        assert [one.wait(60) for one in ranks] == [1, 1]
    finally:
        for one in ranks:
            one.kill()
    # The endless run may report its tiny encoder's collapsing tokens before.
    (line,) = [one for one in incidents(run_dir) if one["incident"] != "target tokens collapse"]
    assert line["incident"] == "ended" and "no progress for" in line["why"]
    assert "all ranks are at the same place" in line["why"]
    assert json.loads((run_dir / "exit.json").read_text())["reason"] == line["why"]
    for rank in range(2):
        assert "in train" in (run_dir / "stacks" / f"rank-{rank:05d}.txt").read_text()
