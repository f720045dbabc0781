"""``cmtmae copy NAME ...``: copy recipes, studies and templates of the package, to edit them."""

import argparse
import shutil
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from cmtmae_scale.commands.alone import run_alone
from cmtmae_scale.config.shipped import RECIPES, STUDIES, shipped_names, shipped_root
from cmtmae_scale.errors import EXIT_DONE, ConfigError, may_pass
from cmtmae_scale.runtime.arguments import Parser

TEMPLATES = ("docker", "kubernetes", "slurm")


def copy_shipped(arguments: Sequence[str] | None = None) -> int:
    """Copy the named files to the paths that they have in a clone, or list the names.

    Returns:
        Exit code: 0 done; 75 the store is full; 78 an unknown name, or a file that exists.
    """
    names = parse_options(arguments).names

    def copy() -> int:
        targets = [shipped_path(name) for name in names]
        for target in targets:
            copy_one(target)
        sys.stdout.write("".join(f"{target}\n" for target in targets) if names else list_names())
        return EXIT_DONE

    return run_alone(copy, lambda text: sys.stderr.write(f"{text}\n"))


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse ``[NAME ...]``; a usage error exits with 78."""
    parser = Parser(description="Copy files of the package here, to edit them.", allow_abbrev=False)
    parser.add_argument("names", nargs="*", metavar="NAME", help="without names: list them")
    return parser.parse_args(arguments)


def list_names() -> str:
    """Return all names, by kind."""
    kinds = {
        "recipes": shipped_names(RECIPES),
        "studies": shipped_names(STUDIES),
        "templates": TEMPLATES,
    }
    return "".join(f"{kind:<11}{' '.join(names)}\n" for kind, names in kinds.items())


def shipped_path(name: str) -> Path:
    """Return the path of a name, relative to the root of the shipped files.

    Raises:
        ConfigError: there is no such name.
    """
    for folder in (RECIPES, STUDIES):
        if name in shipped_names(folder):
            return Path(folder, f"{name}.yaml")
    if name in TEMPLATES:
        return Path("launchers", name)
    raise ConfigError(f"{name}: no recipe, study or template of that name; cmtmae copy lists all")


def copy_one(target: Path) -> None:
    """Copy a file or a folder, whole or not at all, to its path below the working folder.

    Raises:
        ConfigError: the target exists, or cannot be written.
        OSError: if the store is full or fails.
    """
    source, draft = shipped_root() / target, target.with_name(f".{target.name}.draft")
    if target.exists():
        raise ConfigError(f"{target} exists; move it away, or work in another folder")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.rmtree(draft, ignore_errors=True)  # of a copy that was interrupted
            copy_folder(source, draft)
        else:
            shutil.copyfile(source, draft)
        draft.rename(target)
    except OSError as error:
        if may_pass(error):
            raise
        raise ConfigError(f"{target}: {error.strerror}; work in another folder") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
        with suppress(OSError):
            draft.unlink()


def copy_folder(source: Path, draft: Path) -> None:
    """Copy a folder; the first error is raised as it is, unlike by ``shutil.copytree``.

    Raises:
        OSError: if the store refuses.
    """
    draft.mkdir()
    for path in sorted(source.rglob("*")):
        place = draft / path.relative_to(source)
        if path.is_dir():
            place.mkdir()
        else:
            shutil.copy(path, place)
