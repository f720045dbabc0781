"""``cmtmae demo``: prepare, train the recipe ``demo`` from a teacher cache, evaluate, show."""

import argparse
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from cmtmae_scale.commands.alone import run_alone
from cmtmae_scale.commands.report import write_page
from cmtmae_scale.config.hints import key_hint
from cmtmae_scale.config.load import load_config
from cmtmae_scale.config.schema import Config
from cmtmae_scale.errors import EXIT_CONFIG, ConfigError, may_pass
from cmtmae_scale.runtime.arguments import Parser, at_least_one

RECIPE = "demo"
PHOTOS, EVALUATION, MASKS, TEACHER, CACHE = (
    Path("datasets/demo", name)
    for name in ("photos", "evaluation", "masks", "teacher.safetensors", "cache")
)
"""Paths that the demo writes, as in the recipe; ``eval.segmentation_path`` is inside ``MASKS``."""
RUN = Path("runs/demo")
RANDOM = "random teacher"
ROWS = 8
COLUMNS = ("loss/total", "loss/teacher", "loss/student", "images_s")


def run_demo(arguments: Sequence[str] | None = None) -> int:
    """Run the demo in the working folder; returns 0, or the exit code of the training."""
    options = parse_options(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    return run_alone(lambda: show_demo(options), print_line)


def show_demo(options: argparse.Namespace) -> int:
    """Prepare, cache the teacher, train, evaluate and show; returns the exit code."""
    config = load_config(RECIPE, options.overrides)
    from cmtmae_scale.tools.demo.learned import METHODS, learned_table

    print_line("images and teacher ...")
    with explain_refusal():
        images, is_random = prepare_inputs(config)
        suffix = folder_suffix(is_random, options)
        overrides = derive_overrides(config, images, suffix, options)
        config = load_config(RECIPE, overrides)
        run_dir = Path(config.run.output_dir)
        if options.fresh:
            delete_earlier(config, suffix)
    label = RANDOM if is_random else f"teacher {config.teacher.model}"
    count = "" if images is None else f"{images} "
    print_line(f"{count}images in {config.data.path}; {label}; training in {run_dir}")
    results = {name: run_dir / "evaluation" / f"demo-{name}.json" for name in METHODS}
    commands = [[name, "--config", RECIPE, *overrides] for name in ("precompute", "pretrain")]
    if config.teacher.mode != "cached":
        del commands[0]
    for name, file in results.items():
        given = ["--checkpoint", str(run_dir), "--weights", "student", "--out", str(file)]
        commands.append(["evaluate", name, *given])
    for command in commands:
        words = [sys.executable, "-m", "cmtmae_scale", *command]
        code = subprocess.run(words, stdin=subprocess.DEVNULL).returncode
        if code:
            hint = "; --fresh restarts the demo" if code == EXIT_CONFIG else ""
            print_line(f"cmtmae {command[0]} ended with exit code {code}{hint}")
            return code
    print_line(loss_table(read_losses(run_dir / "log.jsonl"), label))
    print_line(learned_table(results))
    print_line(next_steps(run_dir, write_page([run_dir])))
    return 0


def print_line(text: str) -> None:
    """Print a line at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse ``[--steps N] [--fresh] [key=value ...]``; a usage error exits with 78."""
    parser = Parser(description="Show CMT-MAE at work.", allow_abbrev=False, hint=key_hint)
    parser.add_argument(
        "--steps", type=at_least_one, help="a shorter or longer run, in its own folder"
    )
    parser.add_argument(
        "--fresh",
        action="store_true",
        help="delete an earlier run of the demo and its teacher cache, in the demo's own folders",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of the recipe")
    return parser.parse_intermixed_args(arguments)


def prepare_inputs(config: Config) -> tuple[int | None, bool]:
    """Write the demo's own images, masks and teacher; paths that the user sets are not touched.

    Returns:
        Number of training images, ``None`` for the user's, and whether the teacher is random.

    Raises:
        ConfigError, DataError: see ``prepare_photos``, ``prepare_masks`` and ``prepare_teacher``.
    """
    from cmtmae_scale.tools.demo import photos
    from cmtmae_scale.tools.demo.masks import prepare_masks
    from cmtmae_scale.tools.demo.teacher import prepare_teacher

    groups = config.data.path, config.eval.train_path, config.eval.test_path
    used = [Path(str(path)) for path in groups]
    images = photos.prepare_photos(PHOTOS) if PHOTOS in used else None
    if EVALUATION in used:
        photos.prepare_photos(EVALUATION, photos.EVALUATION)
    prepare_masks(MASKS)
    weights = config.teacher.weights
    is_own = weights is not None and Path(weights) == TEACHER
    is_random = prepare_teacher(TEACHER) is None if is_own else weights == "random"
    return images if used[0] == PHOTOS else None, is_random


@contextmanager
def explain_refusal() -> Iterator[None]:
    """Turn an ``OSError`` that is not temporary into a ``ConfigError`` with a remedy."""
    try:
        yield
    except OSError as error:
        if may_pass(error):
            raise
        raise ConfigError(
            f"{Path.cwd()}: the demo cannot write here ({error}); run it in a folder with write "
            "permission"
        ) from error


def folder_suffix(is_random: bool, options: argparse.Namespace) -> str:
    """Return the suffix of run and cache for another length or a random teacher."""
    length = "" if options.steps is None else f"-{options.steps}-steps"
    return length + ("-random-teacher" if is_random else "")


def derive_overrides(
    config: Config, images: int | None, suffix: str, options: argparse.Namespace
) -> list[str]:
    """Return overrides of the recipe; with a suffix, run and teacher cache get their own folders.

    A run that is too short to train on all views of the images gets a cache with fewer views.
    """
    overrides: list[str] = []
    if options.steps is not None:
        every = min(config.log.every, max(1, options.steps // ROWS))
        overrides += [f"train.steps={options.steps}", f"log.every={every}"]
        if images is not None:
            epochs = options.steps * config.train.global_batch_size // max(images, 1)
            views = max(1, min(config.views.views_per_image or 1, epochs))
            overrides.append(f"views.views_per_image={views}")
    if suffix.endswith("-random-teacher"):
        overrides += ["teacher.weights=random", f"run.name={config.run.name} ({RANDOM})"]
    if suffix:
        overrides.append(f"cache.dir={config.cache.dir}{suffix}")
    return [*overrides, f"run.output_dir={config.run.output_dir}{suffix}", *options.overrides]


def delete_earlier(config: Config, suffix: str) -> None:
    """Delete an earlier run of the demo and its teacher cache.

    A cache that the user names is kept: the run reads it only if it fits.

    Raises:
        ConfigError: if the user names the folder of the run.
    """
    run_dir, own = Path(config.run.output_dir), Path(f"{RUN}{suffix}")
    is_run = any((run_dir / name).is_file() for name in ("config.yaml", "exit.json"))
    if is_run and run_dir != own:
        raise ConfigError(
            f"run.output_dir={run_dir}: --fresh deletes only the demo's own folder, {own}; delete "
            "it yourself, or name another"
        )
    cache = Path(f"{CACHE}{suffix}")
    is_cache = Path(str(config.cache.dir)) == cache and (cache / "manifest.json").is_file()
    for folder in [own] * is_run + [cache] * is_cache:
        shutil.rmtree(folder)


def read_losses(file: Path) -> list[dict[str, float]]:
    """Return the entries of ``log.jsonl`` with a loss; lines that cannot be read are skipped."""
    from cmtmae_scale.engine.summary import read_entries  # which imports torch

    return [entry for entry in read_entries(file) if "loss/total" in entry]


def loss_table(entries: Sequence[dict[str, float]], label: str) -> str:
    """Return a table of entries from the first to the last, and the change of the loss."""
    if not entries:
        return "no log entry was written"
    count = min(ROWS, len(entries))
    chosen = [entries[round(i * (len(entries) - 1) / max(count - 1, 1))] for i in range(count)]
    columns = [name for name in COLUMNS if any(name in entry for entry in entries)]
    lines = ["", f"loss ({label})", "step".rjust(6) + "".join(name.rjust(14) for name in columns)]
    for entry in chosen:
        cells = (f"{entry[name]:.4g}" if name in entry else "-" for name in columns)
        lines.append(f"{entry['step']:6d}" + "".join(cell.rjust(14) for cell in cells))
    first, last = entries[0]["loss/total"], entries[-1]["loss/total"]
    change = "fell" if last < first else "did NOT fall"
    if len(entries) > 1:
        lines.append(f"loss/total {change}: {first:.4g} -> {last:.4g}")
    return "\n".join(lines)


def next_steps(run_dir: Path, report: Path) -> str:
    """Return the places of the results, and commands to try next."""
    cmtmae, tensorboard, torchrun = map(find_program, ("cmtmae", "tensorboard", "torchrun"))
    pretrain = f"pretrain --config {RECIPE}"
    hiding = "run.output_dir=runs/demo-hide mask.sampler=hide_salient"
    return f"""
report       {report}  (curves, figures, time, accuracy: one page for any browser)
figures      {run_dir / "figures"}  (attention of teacher, student and both, masks, features)
curves       {tensorboard} --logdir {run_dir}
segmentation {run_dir / "evaluation" / "demo-segmentation.png"}  (images, masks, predictions)
checkpoints  {run_dir / "checkpoints"}

try next
  {cmtmae} evaluate knn --checkpoint {run_dir}
  {cmtmae} evaluate segmentation --checkpoint {run_dir} --weights teacher
  {cmtmae} evaluate representation --checkpoint {run_dir} --masks {MASKS}/objects
  {cmtmae} evaluate propagation --checkpoint {run_dir} --clips {MASKS}/clips
  {cmtmae} {pretrain} --dry-run
  {cmtmae} {pretrain} {hiding}
  {cmtmae} report {run_dir} runs/demo-hide
  {torchrun} --nproc-per-node=2 -m cmtmae_scale {pretrain} run.output_dir=runs/demo-2"""


def find_program(name: str) -> str:
    """Return how a program of this environment is called from the working folder."""
    path = Path(shutil.which(name, path=str(Path(sys.executable).parent)) or name)
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)
