"""``python -m cmtmae_scale COMMAND``: ``cmtmae`` for launchers that take a module."""

from cmtmae_scale.commands.main import run_command

if __name__ == "__main__":
    raise SystemExit(run_command())
