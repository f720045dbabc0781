"""``cmtmae init FOLDER``: write a commented recipe for a folder of images."""

import argparse
import logging
import os
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cmtmae_scale.commands.alone import run_alone
from cmtmae_scale.config.load import config_from_dict
from cmtmae_scale.config.yaml_text import parse_yaml
from cmtmae_scale.errors import EXIT_DONE, EXIT_STOPPED, ConfigError, remedy_for
from cmtmae_scale.runtime.arguments import Parser
from cmtmae_scale.runtime.log import escape_controls, set_up_logging
from cmtmae_scale.runtime.storage import append_whole

if TYPE_CHECKING:
    from cmtmae_scale.tools.init.recipe import Machine

logger = logging.getLogger(__name__)


def init_recipe(arguments: Sequence[str] | None = None) -> int:
    """Write a recipe and print the next command; returns the exit code."""
    options = parse_options(arguments)
    set_up_logging(0, 1)
    try:
        return run_alone(lambda: write_recipe(options.images, options.output))
    except KeyboardInterrupt:
        logger.warning("stopped; nothing was written, and the same command may be repeated")
        return EXIT_STOPPED


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse ``FOLDER [-o FILE]``; a usage error exits with 78."""
    parser = Parser(
        description="Write a commented recipe that fits a folder of images and this machine.",
        allow_abbrev=False,
    )
    parser.add_argument("images", metavar="FOLDER", help="images or tars, as data.path")
    output = "the recipe, a new file; default: the folder's name with .yaml, here"
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help=output)
    return parser.parse_args(arguments)


def write_recipe(images: str, output: Path | None) -> int:
    """Survey the images and write the recipe; returns the exit code.

    Raises:
        ConfigError: if the file exists or cannot be written, or YAML cannot represent the path.
        DataError: no usable image; counts the files that were passed over.
    """
    name = name_run(images)
    output = Path(f"{name}.yaml") if output is None else output
    refuse_existing(output)
    from cmtmae_scale.tools.init.recipe import write_text
    from cmtmae_scale.tools.init.survey import survey_images

    survey = survey_images(images)
    text = write_text(survey, find_machine(), name, output)
    check_text(text, output)
    write_new(output, text)
    command = shlex.join(["cmtmae", "pretrain", "--config", str(output), "--dry-run"])
    shown = f"{output}: a recipe for {survey.images} images; next:\n{command}"
    sys.stdout.write(escape_controls(shown) + "\n")
    return EXIT_DONE


def name_run(images: str) -> str:
    """Return a name for run and recipe: the folder's, in characters that need no quotes."""
    path = Path(images).resolve()
    stem = path.parent.name if re.search(r"[*?{\[]|\.(tar|parquet)$", path.name) else path.name
    return re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-.") or "images"


def find_machine() -> "Machine":
    """Return the cores, whether there is a GPU, and a teacher with weights on this machine."""
    import torch

    from cmtmae_scale.teachers.open_clip import find_cached_tag
    from cmtmae_scale.tools.init.recipe import CLIP_MODEL, CLIP_TAG, DEMO_TEACHER, Machine

    teacher = CLIP_TAG if find_cached_tag(CLIP_MODEL, CLIP_TAG) else None
    if teacher is None and Path(DEMO_TEACHER).is_file():
        teacher = DEMO_TEACHER
    return Machine(len(os.sched_getaffinity(0)), torch.cuda.is_available(), teacher)


def check_text(text: str, output: Path) -> None:
    """Check the recipe as a launch does; a path may have characters that YAML cannot represent.

    Raises:
        ConfigError: names the key.
    """
    try:
        config_from_dict(parse_yaml(text), str(output))
        text.encode()
    except ValueError as error:
        raise ConfigError(
            f"{output}: the path of the images cannot be written in YAML ({error}); rename the "
            "folder, or link to it under another name"
        ) from error


def refuse_existing(output: Path) -> None:
    """Refuse a file that exists, or is below a folder that cannot be searched.

    Raises:
        ConfigError: names the file.
    """
    try:
        is_there = output.exists() or output.is_symlink()
    except OSError as error:
        raise cannot_write(output, error) from error
    if is_there:
        raise ConfigError(f"{output} exists; delete it or give -o OTHER.yaml")


def write_new(output: Path, text: str) -> None:
    """Write a new file; an existing file is never replaced.

    Raises:
        ConfigError: if the file exists or cannot be written.
    """
    try:
        with output.open("xb", buffering=0) as opened:
            try:
                append_whole(opened.fileno(), text.encode())
            except OSError:
                output.unlink()
                raise
    except FileExistsError:
        refuse_existing(output)
    except OSError as error:
        raise cannot_write(output, error) from error


def cannot_write(output: Path, error: OSError) -> ConfigError:
    """Return the error for a recipe that cannot be written."""
    remedy = remedy_for(error, "give -o FILE")
    return ConfigError(f"{output} cannot be written ({error.strerror}); {remedy}")
