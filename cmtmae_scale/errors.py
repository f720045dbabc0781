"""Errors that the user can fix; each message names the remedy.

Commands print them as one line and exit with ``exit_code``; any other error is a bug and keeps its
traceback.
"""

EXIT_DONE = 0
EXIT_CRASH = 1
EXIT_NO_PROGRESS = 70
EXIT_STOPPED = 75
EXIT_CONFIG = 78


class CmtMaeError(Exception):
    """Base of the errors that the user can fix."""

    exit_code = EXIT_CONFIG


class ConfigError(CmtMaeError):
    """A key, a value or a combination of values that can never work."""


class TeacherError(CmtMaeError):
    """The frozen teacher cannot be built as configured."""


class CacheError(CmtMaeError):
    """A teacher cache that is absent, damaged, or computed from something else."""


class CheckpointError(CmtMaeError):
    """A checkpoint that is damaged, or that belongs to another run."""


class SaveError(CheckpointError):
    """The last state could not be saved; the next launch resumes from the checkpoint before it."""

    exit_code = EXIT_CRASH


class ReplicaError(CheckpointError):
    """Ranks that replicate tensors hold different bits; nothing is saved."""

    exit_code = EXIT_CRASH


class LockLostError(CmtMaeError):
    """Another launch has taken the run's folder over; this launch saves nothing."""


class NoProgressError(CmtMaeError):
    """Consecutive launches that ended without progress."""

    exit_code = EXIT_NO_PROGRESS


class NonFiniteError(CmtMaeError):
    """The loss or the gradient is not finite; nothing was updated."""

    exit_code = EXIT_CRASH
