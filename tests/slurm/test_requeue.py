"""When a job is queued again, with a stand-in for the command that ends with given codes."""

from pathlib import Path

import pytest

from tests.slurm.cluster import wait_for
from tests.slurm.conftest import Desk

pytestmark = pytest.mark.slow

ONE = ["--nodes=1", "--ntasks=1", "--gpus-per-node=1", "--cpus-per-task=1", "--ntasks-per-node=1"]


def command(folder: Path, codes: list[int]) -> Path:
    """A program that exits with the next code at each start, and then with the last code."""
    folder.mkdir()
    (folder / "codes").write_text("".join(f"{code}\n" for code in codes))
    path = folder / "command"
    path.write_text(
        "#!/bin/bash\n"
        f"cd {folder} && echo x >>starts\n"
        "code=$(head -n1 codes)\n"
        "[ $(wc -l <codes) = 1 ] || sed -i 1d codes\n"
        "exit $code\n"
    )
    path.chmod(0o755)
    return path


def starts(folder: Path) -> int:
    return len((folder / "starts").read_text().split())


def end(desk: Desk, name: str, codes: list[int], stop: bool = False) -> tuple[str, int, int]:
    """State, exit code and number of starts of a job."""
    folder = desk.folder / name
    program = command(folder, codes)
    if stop:
        (folder / "STOP").touch()
    job = desk.submit("train.sbatch", ONE, "recipe.yaml", folder, python=program)
    state, code = desk.cluster.wait(job)
    return state, code, starts(folder)


def test_stops_and_crashes_are_queued_again_until_done(desk: Desk) -> None:
    assert end(desk, "again", [75, 1, 75, 137, 0]) == ("COMPLETED", 0, 5)


@pytest.mark.parametrize("code", [70, 78])
def test_what_will_never_work_is_not_queued_again(desk: Desk, code: int) -> None:
    assert end(desk, f"never{code}", [code]) == ("FAILED", code, 1)


def test_a_stop_file_ends_the_job(desk: Desk) -> None:
    assert end(desk, "stopped", [75], stop=True) == ("FAILED", 75, 1)


def test_crashes_in_a_row_end(desk: Desk) -> None:
    assert end(desk, "crashes", [1, 1, 75, 1]) == ("FAILED", 1, 3 + 6)


def test_a_task_of_an_array_is_queued_again_alone(desk: Desk) -> None:
    folder = desk.folder / "array"
    program = command(folder, [75, 0])
    options = [*ONE, "--array=3"]
    job = desk.submit("cache.sbatch", options, "recipe.yaml", folder, python=program)
    assert desk.cluster.wait(f"{job}_3") == ("COMPLETED", 0)
    assert starts(folder) == 2


def test_a_cancelled_job_may_finish_its_save_and_stays_cancelled(desk: Desk) -> None:
    folder = desk.folder / "cancelled"
    folder.mkdir()
    program = folder / "command"
    program.write_text(
        "#!/bin/bash\n"
        f"cd {folder} && echo x >>starts\n"
        "trap 'sleep 2; touch saved; exit 75' TERM\n"
        "for _ in {1..600}; do sleep 0.1; done\n"
    )
    program.chmod(0o755)
    job = desk.submit("train.sbatch", ONE, "recipe.yaml", folder, python=program)
    wait_for((folder / "starts").exists, 30, "the start")
    desk.cluster.call("scancel", job)
    assert desk.cluster.wait(job)[0] == "CANCELLED"
    wait_for(lambda: not desk.cluster.call("squeue", "--noheader"), 30, "an empty queue")
    assert (folder / "saved").exists()
    assert "not requeued by this script" in desk.log(job)
    assert desk.cluster.job(job)["JobState"] == "CANCELLED"
    assert starts(folder) == 1
