"""What the batch scripts set before they start ranks; no SLURM is needed."""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("given", [{"SLURM_CPUS_PER_TASK": "12"}, {}])
def test_srun_gets_the_cores_of_a_task_where_the_job_has_them(given: dict[str, str]) -> None:
    """It refuses an empty number: a job with --cpus-per-gpu would crash at each launch."""
    script = "source launchers/slurm/site.sh || exit 78; env"
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": "python", **given}
    found = subprocess.run(
        ["bash", "-c", script],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    passed = [line for line in found.stdout.splitlines() if line.startswith("SRUN_")]
    assert passed == [f"SRUN_CPUS_PER_TASK={cores}" for cores in given.values()]
