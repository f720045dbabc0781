"""Errors that the user can fix; each message names the remedy.

Commands print them as one line and exit with ``exit_code``; any other error is a bug and keeps its
traceback.
"""

import errno

EXIT_DONE = 0
EXIT_CRASH = 1
EXIT_NO_PROGRESS = 70
EXIT_STOPPED = 75
EXIT_CONFIG = 78
FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
"""Errors of a store that is full, or over quota."""
STORE_ERRORS = FULL | {errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ESHUTDOWN}
"""Errors of a store that may be temporary: the store is full, fails, or is no longer reachable from
this machine. The last three are those of NFS, FUSE and Lustre."""
AGAIN = "try the same command again"


class CmtMaeError(Exception):
    """Base of the errors that the user can fix."""

    exit_code = EXIT_CONFIG


class ConfigError(CmtMaeError):
    """A key, a value or a combination of values that can never work."""


class StorageError(CmtMaeError):
    """A store that is full or fails; the same command works once the store works again."""

    exit_code = EXIT_STOPPED


class UploadError(CmtMaeError):
    """A hub that cannot be reached or fails; the same command works once the hub works again."""

    exit_code = EXIT_STOPPED


class RunStoppedError(CmtMaeError):
    """A run that stopped on request; the same call resumes it."""

    exit_code = EXIT_STOPPED


class TeacherError(CmtMaeError):
    """The frozen teacher cannot be built as configured."""


class CacheError(CmtMaeError):
    """A teacher cache that is absent, damaged, or computed from other inputs."""


class CheckpointError(CmtMaeError):
    """A checkpoint that is damaged, or that belongs to another run."""


class SaveError(CheckpointError):
    """The last state could not be saved; the next launch resumes from the checkpoint before it."""

    exit_code = EXIT_CRASH


class ReplicaError(CheckpointError):
    """Ranks that replicate tensors hold different bits; nothing is saved."""

    exit_code = EXIT_CRASH


class LockLostError(CmtMaeError):
    """Another launch has taken over the run's folder; this launch saves nothing."""


class RankLostError(CmtMaeError):
    """Another rank of the launch died before the first step, and the launcher ended this rank."""

    exit_code = EXIT_CRASH


class RendezvousError(CmtMaeError):
    """The ranks of a launch did not connect: a port is in use, or a rank did not start."""

    exit_code = EXIT_CRASH


class NoProgressError(CmtMaeError):
    """Consecutive launches that ended without progress."""

    exit_code = EXIT_NO_PROGRESS


class NonFiniteError(CmtMaeError):
    """The loss or the gradient is not finite; nothing was updated."""

    exit_code = EXIT_CRASH


def may_pass(error: BaseException | None) -> bool:
    """Return whether an error is that of a store that is full, over quota or failing."""
    return isinstance(error, OSError) and error.errno in STORE_ERRORS


def exit_code_of(error: Exception) -> int:
    """Return the exit code of an error: 75 instead of 78 if its cause may be temporary."""
    code, cause = int(getattr(error, "exit_code", EXIT_CRASH)), error.__cause__
    if code != EXIT_CONFIG or not isinstance(cause, Exception):
        return code
    return EXIT_STOPPED if may_pass(cause) or exit_code_of(cause) == EXIT_STOPPED else code


def describe_store(error: OSError, where: str = "in run.output_dir") -> StorageError:
    """Return the error for a store that is full or fails; ``where`` is the place to make room.

    The error of a failed write, unlike that of a failed open, does not name the file.
    """
    place = f"{error.filename}: " if error.filename else ""
    return StorageError(f"{place}{error.strerror}; {remedy_for(error, '', where)}")


def remedy_for(error: OSError, otherwise: str, where: str = "there") -> str:
    """Return the remedy for a store that refuses a file; ``otherwise`` if it is not temporary."""
    if not may_pass(error):
        return otherwise
    remedy = f"make room {where}" if error.errno in FULL else "see that the storage works"
    return f"{remedy} and {AGAIN}"
