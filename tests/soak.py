"""Ten minutes of random faults, beside a run without faults: both must end with equal weights.

    python tests/soak.py --minutes 10 [--seed 1]

Two ranks run the whole command, with a sidecar. Every few seconds a process is killed or stopped,
or a file is damaged or moved away; the same command launches again what has ended. At the end
weights, moments and sampled views must equal those of the run without faults, bit for bit.
"""

import argparse
import json
import os
import random
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from cmtmae_scale.cache.format import ENDLESS, SHARDS, read_manifest
from cmtmae_scale.checkpoint import layout
from cmtmae_scale.runtime.progress_file import read_published_progress
from tests.engine.run_case import BASE, make_photographs, same
from tests.processes import CONTEXT

RANKS = 2
STEPS_PER_MINUTE = 320
PAUSE_S = (8.0, 20.0)
SPOILT = 3
"""An image that is damaged from the beginning, in both runs."""
NOT_FINITE = (320, 800)
"""First position at which the loss is not finite, and the period, in both runs."""


def main() -> int:
    """Run twice and compare; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    steps = max(20, round(options.minutes * STEPS_PER_MINUTE))
    with tempfile.TemporaryDirectory(prefix="soak-") as place:
        folder = Path(place)
        recipe = write_recipe(folder, steps)
        print_line(f"{steps} steps without faults ...")
        clean = Job(recipe, folder / "clean", sidecar=False)
        clean.start()
        if clean.wait() != [0] * RANKS:
            print_line("the clean run failed")
            return 1
        print_line(f"the same with faults, for {options.minutes:g} minutes ...")
        job = Job(recipe, folder / "soak", sidecar=True)
        faults = Faults(job, random.Random(options.seed))
        faults.inject(60 * options.minutes)
        same(folder / "clean", folder / "soak", steps)
        drawn = [samples_of(folder / name) for name in ("clean", "soak")]
        assert drawn[0] == drawn[1] and len(drawn[0]) == steps * 8
        skipped = [skipped_steps(folder / name) for name in ("clean", "soak")]
        assert skipped[0] == skipped[1] and skipped[0]
    print_line(
        f"{faults.report()}; {len(skipped[0])} steps skipped in both runs; weights, moments and "
        f"{len(drawn[0])} drawn samples are equal"
    )
    return 0


def print_line(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def write_recipe(folder: Path, steps: int) -> Path:
    """A tiny run with a sidecar and one damaged image."""
    images = make_photographs(folder / "photos", 20)
    spoilt = sorted(images.rglob("*.jpg"))[SPOILT]
    spoilt.write_bytes(spoilt.read_bytes()[:700])
    tree = BASE | {
        "data": BASE["data"] | {"path": str(images), "max_bad_fraction": 0.5},
        "teacher": BASE["teacher"] | {"mode": "sidecar"},
        "cache": {"codec": "bf16"},
        "train": {"global_batch_size": 8, "micro_batch_size": 4, "steps": steps},
        "checkpoint": {"every": 10, "keep": 3},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def rank_main(rank: int, port: int, recipe: Path, run_dir: Path) -> None:
    """Run the whole command as one rank, and record the samples that it draws."""
    import torch

    from cmtmae_scale.commands.pretrain import pretrain
    from cmtmae_scale.pretraining import task

    torch.set_num_threads(1)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS, "LOCAL_WORLD_SIZE": RANKS}
    os.environ |= {key: str(value) for key, value in place.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    redirect(run_dir / f"rank{rank}.err")
    prepare = task.prepare

    def record_samples(config: Any, models: Any, batch: Any, *others: Any) -> Any:
        with (run_dir / f"drawn{rank}.jsonl").open("a") as file:
            pairs = zip(batch.position.tolist(), batch.sample_id.tolist(), strict=True)
            file.write(json.dumps(list(pairs)) + "\n")
        work, observed = prepare(config, models, batch, *others)
        first, period = NOT_FINITE
        if int(batch.position[0]) % period == first:
            work = work._replace(alpha_target=torch.full_like(work.alpha_target, float("nan")))
        return work, observed

    task.prepare = record_samples
    code = pretrain(["--config", str(recipe), f"run.output_dir={run_dir}"])
    os._exit(code)


def redirect(file: Path) -> None:
    """Redirect standard error to a file, also that of native libraries."""
    with file.open("a") as opened:
        os.dup2(opened.fileno(), sys.stderr.fileno())


def sidecar_main(run_dir: Path) -> None:
    """Run the whole command of the sidecar."""
    import torch

    from cmtmae_scale.commands import precompute

    torch.set_num_threads(1)
    redirect(run_dir / "sidecar.err")
    arguments = ["--follow", str(run_dir), "--rows-per-shard", "8", "--ahead", "6"]
    os._exit(precompute.precompute_teacher(arguments))


def samples_of(run_dir: Path) -> dict[int, int]:
    """Sample drawn at each position; every draw of a position must give the same sample."""
    found: dict[int, int] = {}
    for file in run_dir.glob("drawn*.jsonl"):
        for line in file.read_text().splitlines():
            try:
                pairs = json.loads(line)
            except ValueError:  # cut short by a kill
                continue
            for position, sample in pairs:
                assert found.setdefault(position, sample) == sample, position
    return found


def skipped_steps(run_dir: Path) -> set[int]:
    """Steps that the log reports as skipped."""
    entries = map(json.loads, (run_dir / "log.jsonl").read_text().splitlines())
    return {one["step"] for one in entries if one.get("incident") == "step skipped"}


class Job:
    """The ranks of a run and its sidecar."""

    def __init__(self, recipe: Path, run_dir: Path, sidecar: bool) -> None:
        self.recipe, self.run_dir = recipe, run_dir
        self.has_sidecar = sidecar
        self.ranks: list[Any] = []
        self.sidecar: Any = None
        run_dir.mkdir()

    def start(self) -> None:
        """Start processes that are not running."""
        if not any(one.is_alive() for one in self.ranks):
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
            own = (port, self.recipe, self.run_dir)
            self.ranks = [CONTEXT.Process(target=rank_main, args=(r, *own)) for r in range(RANKS)]
            for one in self.ranks:
                one.start()
        if self.has_sidecar and (self.sidecar is None or not self.sidecar.is_alive()):
            self.sidecar = CONTEXT.Process(target=sidecar_main, args=(self.run_dir,))
            self.sidecar.start()

    def wait(self, limit_s: float = 1800) -> list[int | None]:
        """Wait for the ranks; return their exit codes."""
        for one in self.ranks:
            one.join(limit_s)
        return [one.exitcode for one in self.ranks]

    def end(self, number: int) -> None:
        """Send a signal to every rank."""
        for one in self.ranks:
            if one.is_alive():
                os.kill(one.pid, number)


class Faults:
    """Injects random faults, starts ended processes again, and counts."""

    def __init__(self, job: Job, chance: random.Random) -> None:
        self.job, self.chance = job, chance
        self.counts: Counter[str] = Counter()
        self.kinds: dict[str, Callable[[], None]] = {
            "a rank is killed": self.kill_one,
            "all ranks are killed": lambda: self.job.end(signal.SIGKILL),
            "SIGTERM to all": lambda: self.job.end(signal.SIGTERM),
            "SIGUSR1 to one rank": self.signal_one,
            "the file STOP": self.stop_file,
            "a rank is suspended": self.suspend_one,
            "the newest checkpoint is damaged": self.flip_bit,
            "checkpoints cannot be written": self.refuse_saves,
            "the images are moved away": self.hide_images,
            "a part of the cache is damaged": self.damage_part,
            "the sidecar is killed": self.kill_sidecar,
        }

    def inject(self, seconds: float) -> None:
        """Inject faults for a time, then wait for the end of the run."""
        limit = time.monotonic() + seconds
        deck: list[str] = []
        self.job.start()
        while not self.done():
            self.rest(self.chance.uniform(*PAUSE_S))
            if self.done():
                break
            if time.monotonic() < limit:
                deck = deck or self.chance.sample(sorted(self.kinds), len(self.kinds))
                kind = deck.pop()
                self.counts[kind] += 1
                progress = read_published_progress(self.job.run_dir)
                print_line(f"  step {progress.position // 8 if progress else 0}: {kind}")
                self.kinds[kind]()
        if self.job.sidecar is not None:
            self.job.sidecar.join(30)
            assert self.job.sidecar.exitcode == 0, self.job.sidecar.exitcode

    def done(self) -> bool:
        """Return whether the run is complete."""
        codes = [one.exitcode for one in self.job.ranks]
        return codes == [0] * RANKS

    def rest(self, seconds: float) -> None:
        """Wait, and start ended processes again."""
        until = time.monotonic() + seconds
        while time.monotonic() < until and not self.done():
            codes = [one.exitcode for one in self.job.ranks]
            assert 78 not in codes and 70 not in codes, self.errors()
            if any(code is not None for code in codes):
                self.job.wait(60)  # the others must exit by themselves
                assert not any(one.is_alive() for one in self.job.ranks), self.errors()
            if not self.done():
                self.job.start()
            time.sleep(0.2)

    def errors(self) -> str:
        """Return the ranks' last log lines."""
        return "\n".join(
            "".join(file.read_text()[-2000:]) for file in self.job.run_dir.glob("rank*.err")
        )

    def report(self) -> str:
        """Return the number of faults of each kind."""
        kinds = ", ".join(f"{count} x {kind}" for kind, count in sorted(self.counts.items()))
        return f"{sum(self.counts.values())} faults: {kinds}"

    def kill_one(self) -> None:
        one = self.chance.choice(self.job.ranks)
        if one.is_alive():
            os.kill(one.pid, signal.SIGKILL)

    def signal_one(self) -> None:
        one = self.chance.choice(self.job.ranks)
        if one.is_alive():
            os.kill(one.pid, signal.SIGUSR1)

    def stop_file(self) -> None:
        file = self.job.run_dir / "STOP"
        file.touch()
        self.job.wait(60)
        file.unlink()

    def suspend_one(self) -> None:
        one = self.chance.choice(self.job.ranks)
        if one.is_alive():
            os.kill(one.pid, signal.SIGSTOP)
            time.sleep(3)
            os.kill(one.pid, signal.SIGCONT)

    def flip_bit(self) -> None:
        """Damage the newest of several checkpoints after killing all ranks."""
        folders = layout.list_checkpoints(self.job.run_dir / "checkpoints")
        if len(folders) < 2:
            return
        self.job.end(signal.SIGKILL)
        self.job.wait()
        newest = layout.list_checkpoints(self.job.run_dir / "checkpoints")[0]
        with (newest / "rank-00000.safetensors").open("r+b") as file:
            at = self.chance.randrange(os.fstat(file.fileno()).st_size)
            file.seek(at)
            byte = file.read(1)[0]
            file.seek(at)
            file.write(bytes([byte ^ 1 << self.chance.randrange(8)]))

    def refuse_saves(self) -> None:
        """Replace the folder of checkpoints by a file, like a store that refuses writes."""
        root = self.job.run_dir / "checkpoints"
        away = root.with_name("checkpoints-away")
        if root.is_dir():
            root.rename(away)
            root.write_text("")
            time.sleep(2)
            root.unlink()
            away.rename(root)

    def hide_images(self) -> None:
        place = self.job.recipe.parent / "photos"
        place.rename(place.with_name("photos-away"))
        time.sleep(3)
        place.with_name("photos-away").rename(place)

    def damage_part(self) -> None:
        cache = self.job.run_dir / "cache"
        parts = sorted((cache / SHARDS).rglob("0*.safetensors"))
        if not parts or read_manifest(cache).num_rows != ENDLESS:
            return
        try:
            with self.chance.choice(parts).open("r+b") as file:
                file.seek(-self.chance.randrange(1, 3000), os.SEEK_END)
                byte = file.read(1)[0]
                file.seek(-1, os.SEEK_CUR)
                file.write(bytes([byte ^ 255]))
        except OSError:  # deleted by the sidecar in between
            return

    def kill_sidecar(self) -> None:
        if self.job.sidecar is not None and self.job.sidecar.is_alive():
            self.job.sidecar.kill()
            self.job.sidecar.join()


if __name__ == "__main__":
    sys.exit(main())
