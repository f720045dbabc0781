"""``cmtmae supervise``: run a launcher as a child, and return the exit code of its ranks.

For containers, as process 1, and for batch scripts. ``deepspeed`` forwards no signals, torchrun
turns every code into 1, and both leave processes behind when they are killed.
"""

import ctypes
import logging
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from cmtmae_scale.errors import EXIT_CONFIG, EXIT_CRASH, EXIT_STOPPED
from cmtmae_scale.runtime.arguments import Parser, not_negative
from cmtmae_scale.runtime.exit_code import SUPERVISOR, common_code, read_reports
from cmtmae_scale.runtime.log import set_up_logging
from cmtmae_scale.runtime.processes import descendants

logger = logging.getLogger(__name__)

FORWARDED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
GRACE_S = 120.0
"""Seconds from a signal until the remaining processes are killed."""
PAUSE_S = 0.2
TOUCH_S = 3600.0
"""Seconds between two touches of the ranks' files, which a cleaner of ``TMPDIR`` would delete."""
SUBREAPER = 36
"""``PR_SET_CHILD_SUBREAPER`` of prctl(2)."""


def supervise(arguments: Sequence[str] | None = None) -> int:
    """Run ``[--grace SECONDS] -- COMMAND ...``.

    Returns:
        The exit code of the ranks; 75 if the launch was stopped before any rank started, or
        ``TMPDIR`` is full; 1 for ranks that ended without a code; without ranks the command's own
        code.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    split = arguments.index("--") if "--" in arguments else len(arguments)
    command = arguments[split + 1 :]
    parser = Parser(
        description="Run a launcher so that its ranks can be stopped and their code is returned.",
        usage="%(prog)s [--grace SECONDS] -- COMMAND ...",
    )
    parser.add_argument(
        "--grace",
        type=not_negative,
        default=GRACE_S,
        metavar="SECONDS",
        help="from a signal until the remaining processes are killed; longer than a save takes",
    )
    options = parser.parse_args(arguments[:split])
    if not command:
        parser.error("no command; give -- torchrun ... -m cmtmae_scale pretrain ...")
    set_up_logging(0, 1)
    try:
        reports = tempfile.TemporaryDirectory(prefix="supervise-")
    except OSError as error:
        text = "no folder for the codes of the ranks (%s); make room in TMPDIR and try again"
        logger.error(text, error.strerror)
        return EXIT_STOPPED
    with reports as folder:
        try:
            supervisor = Supervisor(command, Path(folder), options.grace)
        except OSError as error:
            logger.error("%s: %s; correct the command after --", command[0], error.strerror)
            return EXIT_CONFIG
        return supervisor.run()


class Supervisor:
    """One launch of a command.

    Signals stay blocked and are fetched, so none is lost. For process 1 of a container the kernel
    would otherwise drop signals without a handler.

    Args:
        command: launcher with its arguments.
        folder: an empty folder, to which the ranks write their process ids and codes.
        grace_s: seconds from a signal until the remaining processes are killed.

    Raises:
        OSError: if the command cannot be started.
    """

    def __init__(self, command: list[str], folder: Path, grace_s: float) -> None:
        self.folder = folder
        self.grace_s = grace_s
        self.received: list[int] = []
        self.deadline = float("inf")
        self.next_touch = 0.0
        self.forwarded: set[tuple[int, int]] = set()
        signal.pthread_sigmask(signal.SIG_BLOCK, {*FORWARDED, signal.SIGCHLD})
        # Become the parent of orphaned descendants, as process 1 is anyway.
        ctypes.CDLL(None, use_errno=True).prctl(SUBREAPER, 1, 0, 0, 0)
        self.status: int | None = None
        self.child = os.posix_spawnp(
            command[0],
            command,
            {**os.environ, **torchrun_settings(grace_s), SUPERVISOR: str(folder)},
            setsid=True,
            setsigmask=[],
        )

    def run(self) -> int:
        """Wait until the command and all ranks have ended; returns the exit code."""
        while self.is_working():
            received = signal.sigtimedwait({*FORWARDED, signal.SIGCHLD}, PAUSE_S)
            if received is not None and received.si_signo in FORWARDED:
                self.record_signal(received.si_signo)
            self.reap()
            self.touch_reports()
            self.forward_signals()
            if time.monotonic() > self.deadline:
                text = "processes remain %.0f s after the signal; killing them"
                logger.warning(text, self.grace_s)
                break
        self.kill_remaining()
        return self.exit_code()

    def is_working(self) -> bool:
        """Return whether the command, or a rank that it left behind, is still running."""
        if self.status is None:
            return True
        alive = self.living_ranks()
        if alive and self.deadline == float("inf"):
            logger.warning("the launcher has ended, ranks %s have not; waiting", sorted(alive))
            self.deadline = time.monotonic() + self.grace_s
        return bool(alive)

    def living_ranks(self) -> set[int]:
        """Return the process ids of living ranks."""
        return read_reports(self.folder).keys() & set(descendants(os.getpid()))

    def record_signal(self, number: int) -> None:
        """Record a signal; a second signal of the same kind changes nothing."""
        if number not in self.received:
            logger.info("%s: forwarding it to the ranks", signal.Signals(number).name)
            self.received.append(number)
            self.deadline = min(self.deadline, time.monotonic() + self.grace_s)

    def forward_signals(self) -> None:
        """Send every received signal to each rank once, also to ranks that start later."""
        for pid in self.living_ranks() if self.received else ():
            for number in self.received:
                if (pid, number) not in self.forwarded:
                    self.forwarded.add((pid, number))
                    send_signal(pid, number)

    def touch_reports(self) -> None:
        """Touch the files of the ranks when due: without them no signal would reach a rank."""
        if time.monotonic() < self.next_touch:
            return
        self.next_touch = time.monotonic() + TOUCH_S
        with suppress(OSError):  # such as a draft that was just renamed; the next touch covers it
            for path in (self.folder, *self.folder.iterdir()):
                os.utime(path)

    def reap(self) -> None:
        """Reap every ended process."""
        with suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                if ended[0] == self.child:
                    self.status = os.waitstatus_to_exitcode(ended[1])

    def kill_remaining(self) -> None:
        """Kill the remaining processes and wait until they are gone."""
        while remaining := list(descendants(os.getpid())):
            for pid in remaining:
                send_signal(pid, signal.SIGKILL)
            signal.sigtimedwait({signal.SIGCHLD}, PAUSE_S)
        self.reap()

    def exit_code(self) -> int:
        """Return the exit code of the launch."""
        codes = list(read_reports(self.folder).values())
        if codes:
            return common_code(codes)
        if self.received:
            return EXIT_STOPPED
        return self.status if self.status is not None and self.status >= 0 else EXIT_CRASH


def torchrun_settings(grace_s: float) -> dict[str, str]:
    """Return environment defaults for torchrun, which dies of SIGUSR1 and kills ranks after 30 s.

    Every supported version reads them; options of the command line win. Versions without such a
    time limit ignore it.
    """
    names = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1")
    return {
        "PET_SIGNALS_TO_HANDLE": os.environ.get("PET_SIGNALS_TO_HANDLE", ",".join(names)),
        "PET_SHUTDOWN_TIMEOUT": os.environ.get("PET_SHUTDOWN_TIMEOUT", str(round(grace_s))),
    }


def send_signal(pid: int, number: int) -> None:
    """Send a signal to a process that may have ended."""
    with suppress(ProcessLookupError):
        os.kill(pid, number)
