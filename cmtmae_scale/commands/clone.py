"""The clone of the repository, for commands that use its recipes and launchers."""

from pathlib import Path

from cmtmae_scale.errors import ConfigError


def find_clone() -> Path:
    """Return the folder of the clone that holds this package, or else the working folder.

    Raises:
        ConfigError: if neither is a clone.
    """
    for folder in (Path(__file__).resolve().parents[2], Path.cwd()):
        if (folder / "launchers" / "pretrain.py").is_file():
            return folder
    raise ConfigError("this command uses configs and launchers; run it in a clone of the project")
