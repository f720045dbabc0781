"""Build, kill, verify, repair and refuse a cache of the demo's images and teacher, by command."""

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from cmtmae_scale.cache.build import make_builder
from cmtmae_scale.cache.format import SHARDS, read_manifest, shard_path
from cmtmae_scale.commands.precompute import precompute_teacher
from cmtmae_scale.config.load import load_config
from cmtmae_scale.config.needs import needs
from cmtmae_scale.errors import CacheError
from cmtmae_scale.teachers import build as teachers
from dataloading.kept_index import load_or_build

ROOT = Path(__file__).resolve().parents[2]
RECIPE = "configs/demo.yaml"
PHOTOGRAPHS = ROOT / "datasets/demo/photos"
WEIGHTS = ROOT / "datasets/demo/teacher.safetensors"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (PHOTOGRAPHS.exists() and WEIGHTS.exists()), reason="make demo was not run"
    ),
]


def command(*arguments: str, ranks: int = 1) -> list[str]:
    start = [sys.executable]
    if ranks > 1:
        start += ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}"]
    return [*start, "launchers/precompute_teacher.py", "--config", RECIPE, *arguments]


def run(*arguments: str, ranks: int = 1) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments, ranks=ranks), cwd=ROOT, capture_output=True, text=True, timeout=550
    )


def show(capsys: pytest.CaptureFixture[str], text: str) -> None:
    with capsys.disabled():
        sys.stdout.write(text + "\n")


def test_built_by_one_killed_finished_by_two_verified_repaired_and_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    folder, index = tmp_path / "cache", tmp_path / "index"
    own = [f"cache.dir={folder}", f"data.index={index}", f"data.path={PHOTOGRAPHS}"]
    own += ["views.views_per_image=4"]
    one = subprocess.Popen(command(*own, "--rows-per-shard", "64"), cwd=ROOT)
    while len(list(folder.glob(f"{SHARDS}/*/0*.safetensors"))) < 3:
        assert one.poll() is None
        time.sleep(0.05)
    one.send_signal(signal.SIGKILL)
    assert one.wait() == -9
    half = len(list(folder.glob(f"{SHARDS}/*/0*.safetensors")))
    finished = run(*own, "--rows-per-shard", "64", ranks=2)
    assert finished.returncode == 0, finished.stderr
    found = len(list(folder.glob(f"{SHARDS}/*/0*.safetensors")))
    images = len(load_or_build(PHOTOGRAPHS, index))
    assert 3 <= half < found == -(-4 * images // 64)

    verified = run(*own, "--verify", "0.05")
    show(capsys, verified.stdout)
    assert verified.returncode == 0 and "verdict: good" in verified.stdout

    with shard_path(folder, read_manifest(folder), 2).open("r+b") as file:
        file.seek(300_000)
        byte = file.read(1)
        file.seek(300_000)
        file.write(bytes([byte[0] ^ 16]))
    damaged = run(*own, "--verify", "0")
    show(capsys, damaged.stdout)
    assert damaged.returncode == 78
    assert "shard 2: it differs from its SHA-256, at rows " in damaged.stdout
    assert run(*own, "--rows-per-shard", "64", "--repair").returncode == 0
    assert run(*own, "--verify", "0").returncode == 0

    capsys.readouterr()
    state = load_file(WEIGHTS)
    state["blocks.3.mlp.fc1.weight"][0, 0] += 1e-3
    save_file(state, tmp_path / WEIGHTS.name)
    less = shutil.copytree(PHOTOGRAPHS, tmp_path / "photos")
    max(path for path in less.rglob("*") if path.is_file()).unlink()
    for change, reason in (
        ([f"teacher.weights={tmp_path / WEIGHTS.name}"], "teacher.weights_sha256"),
        (["views.crop_scale=[0.3, 1.0]"], "views.crop_scale"),
        ([f"data.path={less}", f"data.index={tmp_path / 'other'}"], "data.digest"),
    ):
        assert (
            precompute_teacher(["--config", RECIPE, *own, *change, "--rows-per-shard", "64"]) == 78
        )
        message = capsys.readouterr().err
        show(capsys, message)
        assert f"{reason}: the cache was built with " in message
    config = load_config(RECIPE, own)
    teacher = teachers.assemble_teacher(config, needs(config), load=True)
    teacher.mean = (0.5, 0.5, 0.5)
    monkeypatch.setattr("cmtmae_scale.cache.build.assemble_teacher", lambda *_, **__: teacher)
    builder = make_builder(config, index, next(teacher.model.parameters()).device)
    with pytest.raises(CacheError, match=r"teacher\.mean: the cache was built with") as refused:
        builder.begin_cache(folder, "int8", 64)
    builder.close()
    show(capsys, str(refused.value))
