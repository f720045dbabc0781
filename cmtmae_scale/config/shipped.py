"""Recipes, studies and templates that are shipped with the package.

A wheel holds them inside the package, a clone at its root; the relative paths are the same.
"""

import difflib
import os
import shlex
import stat
from contextlib import suppress
from pathlib import Path

from cmtmae_scale.errors import ConfigError, may_pass, remedy_for

PACKAGE = Path(__file__).resolve().parents[1]
RECIPES, STUDIES = "configs", "configs/studies"
ENDINGS = (".yaml", ".yml")


def shipped_root() -> Path:
    """Return the folder that holds ``configs`` and ``launchers``."""
    packaged = PACKAGE / "shipped"
    return packaged if packaged.is_dir() else PACKAGE.parent


def shipped_names(folder: str = RECIPES) -> list[str]:
    """Return the names of the recipes, or of the studies, sorted."""
    return sorted(path.stem for path in (shipped_root() / folder).glob("*.yaml"))


def find_recipe(text: str | Path, folder: str = RECIPES) -> Path:
    """Return the file of a recipe or study that is given by its path or its shipped name.

    A file at that path takes precedence over a name. A name means ``configs/NAME.yaml``: the copy
    in the working folder that ``cmtmae copy`` writes for editing, else the shipped file.

    Args:
        text: a path, or a name of ``shipped_names``.
        folder: ``RECIPES`` or ``STUDIES``.

    Raises:
        ConfigError: there is neither such a file nor such a name, and the message lists the names;
            or the store fails, perhaps temporarily.
    """
    given, what = Path(text), "study" if folder == STUDIES else "recipe"
    try:
        if not stat.S_ISDIR(given.stat().st_mode):
            return given
    except (OSError, ValueError) as error:  # no file, or a path that no file can have
        if isinstance(error, OSError) and may_pass(error):
            raise ConfigError(f"{text}: cannot be read; {remedy_for(error, '')}") from error
    names = shipped_names(folder)
    if str(text) in names:
        copied = Path(folder, f"{text}.yaml")
        return copied if copied.is_file() else shipped_root() / copied
    is_folder = os.path.isdir(given)
    problem = "no such file" if given.suffix in ENDINGS else f"neither a file nor a shipped {what}"
    problem = "is a folder" if is_folder else problem
    beside = list_beside(given)
    near = difflib.get_close_matches(given.stem, names, 1)
    if beside:
        hint = f"did you mean {beside[0]}? Give"
    elif is_folder and what == "recipe":
        hint = (
            f"if it holds images, cmtmae init {shlex.quote(str(text))} writes a recipe; else give"
        )
    else:
        hint = f"did you mean the shipped {what} {near[0]}? Give" if near else "give"
    raise ConfigError(f"{text}: {problem}; {hint} a path, or one of: {', '.join(names) or 'none'}")


def list_beside(given: Path) -> list[Path]:
    """Return the YAML files in the folder of a path whose names are like the path's, best first."""
    with suppress(OSError, ValueError):  # a path that no file can have
        files = [one for one in given.parent.iterdir() if one.suffix in ENDINGS]
        stems = difflib.get_close_matches(given.stem, [one.stem for one in files])
        return [one for stem in stems for one in files if one.stem == stem]
    return []
