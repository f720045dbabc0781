"""The batch scripts on a real SLURM of two nodes, with tiny runs on CPUs."""

import json
import signal
import subprocess
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

from cmtmae_scale.checkpoint import layout
from tests.engine.run_case import same
from tests.slurm.cluster import held, users_of, wait_for
from tests.slurm.conftest import ROOT, Desk

pytestmark = pytest.mark.slow

STEPS = 40
STEPS_KEY = f"train.steps={STEPS}"
EVERY = "checkpoint.every=10"


@pytest.fixture(scope="module")
def unbroken(desk: Desk) -> Path:
    """An undisturbed run: srun of two ranks on two nodes."""
    job = desk.train("unbroken", STEPS_KEY, EVERY)
    assert desk.cluster.wait(job) == ("COMPLETED", 0), desk.log(job)
    return desk.folder / "unbroken"


def step_of(run_dir: Path) -> int:
    """The step that the run's log has reached."""
    path = run_dir / "log.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return max((json.loads(line).get("step", 0) for line in lines[-5:]), default=0)


def outcome(run_dir: Path) -> dict[str, object]:
    return json.loads((run_dir / "exit.json").read_text())


def stopped(run_dir: Path) -> bool:
    """Whether the signal ended the run; it may reach either rank first."""
    found = outcome(run_dir)
    return found["code"] == 75 and found["reason"] in {"SIGUSR1", "a request on another rank"}


def restarts(desk: Desk, job: str) -> int:
    return int(desk.cluster.job(job)["Restarts"])


def test_srun_trains_with_two_ranks_on_two_nodes(unbroken: Path) -> None:
    assert outcome(unbroken)["code"] == 0
    state = layout.folder_of(unbroken / "checkpoints", STEPS) / layout.STATE
    assert json.loads(state.read_text())["world_size"] == 2


def test_a_signalled_job_saves_is_queued_again_and_ends_with_the_same_weights(
    desk: Desk, unbroken: Path
) -> None:
    run_dir = desk.folder / "signalled"
    job = desk.train("signalled", STEPS_KEY, EVERY)
    wait_for(lambda: step_of(run_dir) >= 3, 120, "step 3")
    desk.cluster.call("scancel", "--signal=USR1", job)
    wait_for(lambda: (run_dir / "exit.json").exists(), 60, "exit.json")
    assert stopped(run_dir)
    assert desk.cluster.wait(job) == ("COMPLETED", 0), desk.log(job)
    assert restarts(desk, job) == 1
    same(run_dir, unbroken, STEPS)


def test_before_its_time_is_up_a_job_saves_and_is_queued_again(desk: Desk) -> None:
    run_dir = desk.folder / "limited"
    job = desk.train("limited", "train.steps=100000", EVERY, options=("--time=30",))
    wait_for(lambda: step_of(run_dir) >= 3, 120, "step 3")
    hours, minutes, _ = map(int, desk.cluster.job(job)["RunTime"].split(":"))
    limit = 60 * hours + minutes + 3  # in less than the 300 s of train.sbatch
    desk.cluster.call("scontrol", "update", f"JobId={job}", f"TimeLimit={limit}")
    wait_for(lambda: held(desk.cluster.job(job)), 120, "the job in the queue again")
    desk.cluster.call("scancel", job)
    assert stopped(run_dir), desk.log(job)
    newest = layout.list_checkpoints(run_dir / "checkpoints")[0]
    assert layout.step_of(newest) == outcome(run_dir)["step"]
    assert layout.find_damage(newest) is None


def test_after_the_loss_of_its_first_node_a_job_is_queued_again_by_slurm(
    desk: Desk, unbroken: Path
) -> None:
    run_dir = desk.folder / "node_lost"
    job = desk.train("node_lost", STEPS_KEY, EVERY)
    wait_for(lambda: step_of(run_dir) >= 12, 120, "step 12")
    node = desk.cluster.job(job)["BatchHost"]
    desk.cluster.kill_node(node, job)
    wait_for(lambda: restarts(desk, job) == 1, 120, "the job in the queue again")
    assert "exited with code" not in desk.log(job)  # the batch script died with its node
    desk.cluster.start_node(node)
    assert desk.cluster.wait(job) == ("COMPLETED", 0), desk.log(job)
    same(run_dir, unbroken, STEPS)


def test_an_array_computes_a_cache(desk: Desk) -> None:
    settings = ["views.views_per_image=2", "--rows-per-shard=8"]
    cache = desk.folder / "cache"
    options = ["--array=0-1", "--cpus-per-task=1"]
    job = desk.submit("cache.sbatch", options, desk.recipe, cache, *settings)
    for task in range(2):
        assert desk.cluster.wait(f"{job}_{task}") == ("COMPLETED", 0)
    result = subprocess.run(
        [
            desk.cluster.environment["PYTHON"],
            str(ROOT / "launchers/precompute_teacher.py"),
            *(
                "--config",
                str(desk.recipe),
                f"cache.dir={cache}",
                "views.views_per_image=2",
                "--verify",
            ),
        ],
        env=desk.cluster.environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith("verdict: good\n")


def test_a_sidecar_follows_a_run_as_a_job_beside_it(desk: Desk) -> None:
    run_dir = desk.folder / "followed"
    train = desk.train("followed", STEPS_KEY, EVERY, "teacher.mode=sidecar")
    options = [f"--dependency=after:{train}", "--cpus-per-task=1"]
    sidecar = desk.submit("follow.sbatch", options, run_dir, "--rows-per-shard=16")
    assert desk.cluster.wait(train) == ("COMPLETED", 0), desk.log(train)
    assert desk.cluster.wait(sidecar) == ("COMPLETED", 0), desk.log(sidecar)
    assert f"{run_dir} is complete" in desk.log(sidecar)


def test_a_run_is_evaluated(desk: Desk, unbroken: Path) -> None:
    options = ["--nodes=1", "--ntasks-per-node=2", "--gpus-per-node=2", "--cpus-per-task=1"]
    photographs = desk.folder / "photos"
    arguments = ["knn", unbroken, "--train", photographs, "--split", "0.8", "--k", "3"]
    job = desk.submit("evaluate.sbatch", options, *arguments)
    assert desk.cluster.wait(job) == ("COMPLETED", 0), desk.log(job)
    assert list((unbroken / "evaluation").glob("*.json"))


@pytest.mark.parametrize("attempt", range(5))
def test_a_signal_to_srun_saves_on_both_nodes(desk: Desk, attempt: int) -> None:
    """Outside of a batch script: the shell sees the run's own code, and nothing is left."""
    run_dir = desk.folder / f"srun{attempt}"
    with desk.srun(run_dir, "train.steps=100000", EVERY) as child:
        wait_for(lambda: step_of(run_dir) >= 1, 120, "step 1")
        time.sleep(0.13 * attempt)
        child.send_signal(signal.SIGUSR1)
        assert child.wait(60) == 75
    assert stopped(run_dir)
    newest = layout.list_checkpoints(run_dir / "checkpoints")[0]
    assert layout.step_of(newest) == outcome(run_dir)["step"] and layout.find_damage(newest) is None
    wait_for(lambda: not users_of(run_dir), 10, "no process left")


@pytest.mark.deepspeed
@pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
@pytest.mark.skipif(
    not (ROOT / "launchers/supervise.py").exists(), reason="launchers/supervise.py is not there"
)
def test_deepspeed_under_the_supervisor_is_stopped_and_queued_again(desk: Desk) -> None:
    run_dir = desk.folder / "zero"
    size = ["--nodes=2", "--gpus-per-node=1", "--cpus-per-task=1"]
    overrides = ["backend.name=deepspeed", "backend.zero_stage=1", STEPS_KEY, EVERY]
    job = desk.submit("train_deepspeed.sbatch", size, desk.recipe, run_dir, *overrides)
    wait_for(lambda: step_of(run_dir) >= 3, 180, "step 3")
    desk.cluster.call("scancel", "--signal=USR1", job)
    wait_for(lambda: restarts(desk, job) == 1, 60, "the job in the queue again")
    assert outcome(run_dir)["code"] == 75, desk.log(job)
    assert "exited with code 75" in desk.log(job)
    assert desk.cluster.wait(job) == ("COMPLETED", 0), desk.log(job)
