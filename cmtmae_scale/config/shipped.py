"""Recipes, studies and templates that are shipped with the package.

A wheel holds them inside the package, a clone at its top; the paths below are the same.
"""

import difflib
import os
from pathlib import Path

from cmtmae_scale.errors import ConfigError

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

    A file of that path wins over a name. A name stands for ``configs/NAME.yaml``: that of the
    working folder, where ``cmtmae copy`` puts it to be edited, else the shipped one.

    Args:
        text: a path, or a name of ``shipped_names``.
        folder: ``RECIPES`` or ``STUDIES``.

    Raises:
        ConfigError: there is neither such a file nor such a name; the message lists the names.
    """
    given, what = Path(text), "study" if folder == STUDIES else "recipe"
    if os.path.exists(given) and not os.path.isdir(given):
        return given
    names = shipped_names(folder)
    if str(text) in names:
        copied = Path(folder, f"{text}.yaml")
        return copied if copied.is_file() else shipped_root() / copied
    near = difflib.get_close_matches(given.stem, names, 1)
    hint = f"did you mean the shipped {what} {near[0]}? " if near else ""
    problem = "no such file" if given.suffix in ENDINGS else f"neither a file nor a shipped {what}"
    raise ConfigError(
        f"{text}: {problem}; {hint}Give a path, or one of: {', '.join(names) or 'none'}"
    )
