"""``cmtmae demo``: prepare, train the recipe ``demo`` in a process of its own, show."""

import argparse
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from cmtmae_scale.commands.alone import run_alone
from cmtmae_scale.commands.report import write_page
from cmtmae_scale.config.hints import key_hint
from cmtmae_scale.config.load import load_config
from cmtmae_scale.config.schema import Config
from cmtmae_scale.errors import EXIT_CONFIG
from cmtmae_scale.runtime.arguments import Parser, at_least_one

RECIPE = "demo"
MASKS = "datasets/demo/masks"
"""Images with masks; the recipe's ``eval.segmentation_path`` is inside."""
RANDOM = "random teacher"
ROWS = 8
COLUMNS = ("loss/total", "loss/teacher", "loss/student", "images_s")


def run_demo(arguments: Sequence[str] | None = None) -> int:
    """Run the demo in the working folder; returns 0, or the exit code of the training."""
    options = parse_options(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    return run_alone(lambda: show_demo(options), print_line)


def show_demo(options: argparse.Namespace) -> int:
    """Prepare, train and show; returns the exit code."""
    config = load_config(RECIPE, options.overrides)
    from cmtmae_scale.tools.demo.cached import train_from_cache
    from cmtmae_scale.tools.demo.masks import prepare_masks
    from cmtmae_scale.tools.demo.photos import EVALUATION, prepare_photos
    from cmtmae_scale.tools.demo.teacher import prepare_teacher

    print_line("images and teacher ...")
    images = prepare_photos(Path(config.data.path))
    prepare_photos(Path(str(config.eval.test_path)), EVALUATION)
    prepare_masks(Path(MASKS))
    teacher = prepare_teacher(Path(str(config.teacher.weights)))
    overrides = derive_overrides(config, teacher is None, options)
    config = load_config(RECIPE, overrides)
    run_dir = Path(config.run.output_dir)
    if options.fresh:
        delete_run(run_dir)
    label = RANDOM if teacher is None else f"teacher {config.teacher.model}"
    print_line(f"{images} images in {config.data.path}; {label}; training in {run_dir}")
    command = [sys.executable, "-m", "cmtmae_scale", "pretrain", "--config", RECIPE, *overrides]
    code = subprocess.run(command, stdin=subprocess.DEVNULL).returncode
    if code:
        hint = "; --fresh starts it anew" if code == EXIT_CONFIG else ""
        print_line(f"the run ended with exit code {code}{hint}")
        return code
    code = train_from_cache(RECIPE, overrides, run_dir, int(config.train.steps or 0), print_line)
    if code:
        return code
    print_line(loss_table(read_losses(run_dir / "log.jsonl"), label))
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
    parser.add_argument("--fresh", action="store_true", help="delete an earlier run of the demo")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of the recipe")
    return parser.parse_intermixed_args(arguments)


def derive_overrides(config: Config, is_random: bool, options: argparse.Namespace) -> list[str]:
    """Return overrides of the recipe; another length or a random teacher gets its own folder."""
    overrides: list[str] = []
    folder = config.run.output_dir
    if options.steps is not None:
        every = min(config.log.every, max(1, options.steps // ROWS))
        overrides += [f"train.steps={options.steps}", f"log.every={every}"]
        folder += f"-{options.steps}-steps"
    if is_random:
        overrides += ["teacher.weights=random", f"run.name={config.run.name} ({RANDOM})"]
        folder += "-random-teacher"
    return [*overrides, f"run.output_dir={folder}", *options.overrides]


def delete_run(run_dir: Path) -> None:
    """Delete a folder if it is a run's."""
    if (run_dir / "config.yaml").is_file() or (run_dir / "exit.json").is_file():
        shutil.rmtree(run_dir)


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
    hiding = "run.output_dir=runs/demo-hide mask.sampler=hide_salient mask.masks_per_view=1"
    return f"""
report       {report}  (curves, figures, time, accuracy: one page for any browser)
figures      {run_dir / "figures"}  (attention of teacher, student and both, masks, features)
curves       {tensorboard} --logdir {run_dir}
checkpoints  {run_dir / "checkpoints"}

try next
  {cmtmae} evaluate knn --checkpoint {run_dir}
  {cmtmae} evaluate segmentation --checkpoint {run_dir}
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
