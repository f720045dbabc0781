"""Every path that a run can take on a GPU, once, with tiny networks: a traceback where one fails.

A chain is a sequence of commands that depend on one another; chains run side by side.
"""

import logging
import os
import shlex
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from cmtmae_scale.errors import EXIT_DONE, EXIT_STOPPED
from cmtmae_scale.tools.benchmark.jobs import TARS, TINY_TEACHER
from cmtmae_scale.tools.benchmark.limited import run_limited
from cmtmae_scale.tools.benchmark.suite import is_installed

logger = logging.getLogger(__name__)

LIMIT_S = 300.0
"""Seconds for one command."""
CORES_PER_CHAIN = 3
OK, FAILED = "ok", "failed"
RUN = "RUN"
"""Placeholder for a folder of the chain in a command."""


class Check(NamedTuple):
    """One path."""

    name: str
    command: str
    """Of ``cmtmae``, with ``TARS`` and ``RUN``."""
    code: int = EXIT_DONE
    """Exit code that it must end with."""
    needs: tuple[str, ...] = ()
    """Packages without which it is skipped."""


class Checked(NamedTuple):
    """Result of one path."""

    name: str
    state: str
    """ok, failed, or why it was skipped."""
    seconds: float
    tail: str
    """End of the output of a path that failed."""


Keep = Callable[[list[Checked]], object]

TINY = " ".join(
    [
        "views.image_size=64 student.arch=test_vit decoder.depth=1 decoder.width=32",
        "decoder.heads=2 train.global_batch_size=8 train.micro_batch_size=4 train.steps=4",
        f"checkpoint.every=2 log.every=1 data.workers=2 data.path={TARS}",
        f"data.expected_images=null run.output_dir={RUN} backend.compile=false",
        *TINY_TEACHER,
    ]
)
CACHE = f"views.views_per_image=1 cache.dir={RUN}-cache"
TUNE = " ".join(
    [
        f"finetune --config finetune_base --checkpoint {RUN} data.path={TARS}",
        f"data.test_path={TARS} data.workers=2 train.global_batch_size=8 train.steps=2",
        f"train.micro_batch_size=4 optimizer.warmup_epochs=0 run.output_dir={RUN}-tuned",
        "backend.compile=false",
    ]
)


def tiny(command: str, recipe: str, *overrides: str) -> str:
    """Return a command over a recipe with tiny networks; the last override of a key wins."""
    return " ".join([command, "--config", recipe, TINY, *overrides])


ZERO = ("deepspeed",)
CHAINS = (
    (
        Check(
            "FSDP and checkpoint", tiny("pretrain", "vit_base", "train.stop_after=2"), EXIT_STOPPED
        ),
        Check("resume", tiny("pretrain", "vit_base")),
        Check("evaluation", f"evaluate knn --checkpoint {RUN} --train {TARS} --test {TARS} --k 1"),
        Check("fine-tuning", TUNE),
    ),
    *(
        (Check(name, tiny("pretrain", "vit_huge", override), needs=ZERO),)
        for name, override in (
            ("ZeRO-1", "backend.zero_stage=1"),
            ("ZeRO-2", "backend.zero_stage=2"),
            ("ZeRO-3", "backend.zero_stage=3"),
            ("compile under ZeRO-1", "backend.compile=true"),
        )
    ),
    (Check("compile", tiny("pretrain", "vit_base", "backend.compile=true")),),
    (Check("DALI", tiny("pretrain", "vit_base", "data.decode=dali"), needs=("nvidia.dali",)),),
    (
        Check(
            "nvImageCodec",
            tiny("pretrain", "vit_base", "data.decode=torch"),
            needs=("nvidia.nvimgcodec",),
        ),
    ),
    (
        Check("cache, build", tiny("precompute", "vit_base", CACHE)),
        Check("cache, read", tiny("pretrain", "vit_base", "teacher.mode=cached", CACHE)),
    ),
)


def run_checks(
    images: str, place: Path, keep: Keep, chains: Sequence[Sequence[Check]] = CHAINS
) -> list[Checked]:
    """Run all chains, as many side by side as there are cores for.

    Args:
        images: folder of labelled images or of tars.
        place: existing folder for the runs.
        keep: called with the results so far, after every path.
        chains: sequences of paths that depend on one another.
    """
    parallel = max(1, len(os.sched_getaffinity(0)) // CORES_PER_CHAIN)
    found: list[list[Checked]] = [[] for _ in chains]
    lock = threading.Lock()

    def run(number: int) -> None:
        for one in run_chain(chains[number], images, place / str(number)):
            with lock:
                found[number].append(one)
                keep([each for several in found for each in several])

    with ThreadPoolExecutor(parallel, "chain") as pool:
        list(pool.map(run, range(len(chains))))
    return [each for several in found for each in several]


def run_chain(chain: Sequence[Check], images: str, place: Path) -> Iterator[Checked]:
    """Run commands one after another; the commands after a failed command are skipped."""
    broken = ""
    for check in chain:
        missing = [package for package in check.needs if not is_installed(package)]
        if missing or broken:
            reason = f"{', '.join(missing)} is not installed" if missing else f"needs {broken}"
            yield Checked(check.name, f"skipped: {reason}", 0.0, "")
            continue
        words = ["python", "-m", "cmtmae_scale"]
        for word in shlex.split(check.command):
            words.append(word.replace(RUN, str(place)).replace(TARS, images))
        ended = run_limited(words, place.with_suffix(".log"), LIMIT_S)
        passed = ended.code == check.code
        tail = "" if passed else f"exit code {ended.code}, expected {check.code}\n{ended.tail}"
        broken = broken if passed else check.name
        state = OK if passed else FAILED
        logger.info("%s: %s, %.0f s\n%s", check.name, state, ended.seconds, tail)
        yield Checked(check.name, state, ended.seconds, tail)


def smoke_headline(found: Sequence[Checked]) -> str:
    """Return the number of paths that work, and the names of the others."""
    good = sum(one.state == OK for one in found)
    bad = [one.name for one in found if one.state == FAILED]
    rest = [one.name for one in found if one.state not in (OK, FAILED)]
    text = f"{good} of {len(found)} paths work"
    text += f"; failed: {', '.join(bad)}" if bad else ""
    return text + (f"; skipped: {', '.join(rest)}" if rest else "")


def smoke_table(found: Sequence[Checked]) -> str:
    """Return a Markdown table, then the output of each path that failed."""
    lines = ["| path | state | seconds |", "|---|---|---|"]
    lines += [f"| {one.name} | {one.state} | {one.seconds:.0f} |" for one in found]
    lines += [f"\n{one.name}:\n{one.tail}" for one in found if one.tail]
    return "\n".join(lines)
