"""The user's faults, told apart from ours: each carries a message that names the remedy.

``cli.py`` turns them into one line and an exit code; anything else is a bug and keeps its
traceback.
"""

EXIT_DONE = 0
EXIT_CRASH = 1
EXIT_NO_PROGRESS = 70
EXIT_STOPPED = 75
EXIT_CONFIG = 78


class CmtMaeError(Exception):
    """Base of the errors that the person who started the run can mend."""

    exit_code = EXIT_CONFIG


class ConfigError(CmtMaeError):
    """A key, a value or a combination of values that can never work."""


class TeacherError(CmtMaeError):
    """The frozen teacher cannot be built as configured."""


class CacheError(CmtMaeError):
    """A teacher cache that is absent, damaged, or was computed from something else."""


class CheckpointError(CmtMaeError):
    """A checkpoint that is broken, or that belongs to another run."""


class SaveError(CheckpointError):
    """The last state could not be saved; another start repeats the steps since the one before."""

    exit_code = EXIT_CRASH


class ReplicaError(CheckpointError):
    """Ranks that hold the same tensors hold different bits; the checkpoint before stands."""

    exit_code = EXIT_CRASH


class NoProgressError(CmtMaeError):
    """Starts that end without progress, again and again."""

    exit_code = EXIT_NO_PROGRESS


class NonFiniteError(CmtMaeError):
    """The loss or the gradient stopped being finite; nothing was updated."""

    exit_code = EXIT_CRASH
