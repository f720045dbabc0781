import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.engine.run_case import write_recipe
from tests.slurm.cluster import Cluster, lacking, running

ROOT = Path(__file__).resolve().parents[2]


class Desk:
    """A folder to submit from, with a recipe, and the cluster that takes the jobs."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster = cluster
        self.folder = folder
        (folder / "launchers").symlink_to(ROOT / "launchers")
        self.recipe = write_recipe(folder)
        cluster.environment |= {
            "PYTHON": sys.executable,
            "PYTHONPATH": str(ROOT),
            "MASTER_ADDR": "127.0.0.1",  # both nodes are this machine
            "OMP_NUM_THREADS": "1",
        }

    def submit(
        self, script: str, options: list[str], *arguments: str | Path, python: Path | None = None
    ) -> str:
        """Submit one of the batch scripts as it is; returns the job's number."""
        return self.cluster.call(
            "sbatch",
            "--parsable",
            f"--chdir={self.folder}",
            *([f"--export=ALL,PYTHON={python}"] if python else []),
            *options,
            str(ROOT / "launchers/slurm" / script),
            *map(str, arguments),
        )

    def train(self, name: str, *overrides: str, options: tuple[str, ...] = ()) -> str:
        """Submit a training of two ranks on two nodes."""
        size = ["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1"]
        place = self.folder / name
        return self.submit("train.sbatch", [*size, *options], self.recipe, place, *overrides)

    @contextmanager
    def srun(self, run_dir: Path, *overrides: str) -> Iterator[subprocess.Popen[bytes]]:
        """Train by ``srun`` alone, one rank on each of both nodes."""
        line = ["srun", "--nodes=2", "--ntasks-per-node=1", self.cluster.environment["PYTHON"]]
        line += ["launchers/pretrain.py", "--config", str(self.recipe), f"run.output_dir={run_dir}"]
        child = subprocess.Popen(
            [*line, *overrides],
            cwd=self.folder,
            env=self.cluster.environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            yield child
        finally:
            child.kill()
            child.wait()

    def log(self, job: str) -> str:
        """What a job has printed, in all its starts."""
        path = self.folder / f"slurm-{job}.out"
        return path.read_text() if path.exists() else ""


@pytest.fixture(scope="session")
def desk() -> Iterator[Desk]:
    reason = lacking()
    if reason is not None:
        pytest.skip(reason)
    with tempfile.TemporaryDirectory(prefix="slurm-") as place:
        folder = Path(place)
        os.chmod(folder, 0o755)  # munge checks who may write above its socket
        (folder / "cluster").mkdir()
        (folder / "desk").mkdir()
        with running(folder / "cluster") as cluster:
            yield Desk(cluster, folder / "desk")
