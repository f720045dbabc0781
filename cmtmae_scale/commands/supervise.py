"""``cmtmae supervise``: the parent of a launcher, which returns the exit code of its ranks.

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
from collections.abc import Iterator, Sequence
from pathlib import Path

from cmtmae_scale.errors import EXIT_CONFIG, EXIT_CRASH, EXIT_STOPPED
from cmtmae_scale.runtime.arguments import Parser
from cmtmae_scale.runtime.exit_code import SUPERVISOR, common_code, read_reports
from cmtmae_scale.runtime.log import set_up_logging
from cmtmae_scale.runtime.processes import descendants

logger = logging.getLogger(__name__)

PASSED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
GRACE_S = 120.0
"""Seconds from a signal until what is left is killed."""
PAUSE_S = 0.2
SUBREAPER = 36
"""``PR_SET_CHILD_SUBREAPER`` of prctl(2)."""


def supervise(arguments: Sequence[str] | None = None) -> int:
    """Run ``[--grace SECONDS] -- COMMAND ...``.

    Returns:
        The code that the ranks left with, 75 if the start was stopped before there were any, 1
        for ranks that ended without a code, and without ranks the command's own code.
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
        type=float,
        default=GRACE_S,
        metavar="SECONDS",
        help="from a signal until what is left is killed; longer than a save takes",
    )
    options = parser.parse_args(arguments[:split])
    if not command:
        parser.error("no command; give -- torchrun ... launchers/pretrain.py --config ...")
    set_up_logging(0, 1)
    with tempfile.TemporaryDirectory(prefix="supervise-") as folder:
        try:
            supervisor = Supervisor(command, Path(folder), options.grace)
        except OSError as error:
            logger.error("%s: %s; correct the command after --", command[0], error.strerror)
            return EXIT_CONFIG
        return supervisor.run()


class Supervisor:
    """One start of a command.

    Signals stay blocked and are fetched, so that none is lost, whatever this process is doing; as
    process 1 of a container the kernel would otherwise drop those that have no handler.

    Args:
        command: launcher with its arguments.
        folder: an empty folder, in which the ranks leave their process ids and codes.
        grace_s: seconds from a signal until what is left is killed.

    Raises:
        OSError: if the command cannot be started.
    """

    def __init__(self, command: list[str], folder: Path, grace_s: float) -> None:
        self.folder = folder
        self.grace_s = grace_s
        self.received: list[int] = []
        self.deadline = float("inf")
        self.passed: set[tuple[int, int]] = set()
        signal.pthread_sigmask(signal.SIG_BLOCK, {*PASSED, signal.SIGCHLD})
        adopt_orphans()
        self.status: int | None = None
        self.child = os.posix_spawnp(
            command[0],
            command,
            {**os.environ, **torchrun_settings(grace_s), SUPERVISOR: str(folder)},
            setsid=True,
            setsigmask=[],
        )

    def run(self) -> int:
        """Wait until the command and all ranks are gone; returns the exit code."""
        while self.is_working():
            received = signal.sigtimedwait({*PASSED, signal.SIGCHLD}, PAUSE_S)
            if received is not None and received.si_signo in PASSED:
                self.note(received.si_signo)
            self.reap()
            self.pass_on()
            if time.monotonic() > self.deadline:
                logger.warning("not gone %.0f s after the signal; killing", self.grace_s)
                break
        self.clear()
        return self.code()

    def is_working(self) -> bool:
        """Whether the command runs; or, when it has ended, ranks that it left behind."""
        if self.status is None:
            return True
        left = self.ranks_left()
        if left and self.deadline == float("inf"):
            logger.warning("the launcher is gone, but not ranks %s; waiting", sorted(left))
            self.deadline = time.monotonic() + self.grace_s
        return bool(left)

    def ranks_left(self) -> set[int]:
        """Processes of ranks that are alive."""
        return read_reports(self.folder).keys() & set(descendants(os.getpid()))

    def note(self, number: int) -> None:
        """Take a signal; a second one of the same kind changes nothing."""
        if number not in self.received:
            logger.info("%s: passing it to the ranks", signal.Signals(number).name)
            self.received.append(number)
            self.deadline = min(self.deadline, time.monotonic() + self.grace_s)

    def pass_on(self) -> None:
        """Send what was received to the ranks, each once, those that come later too."""
        for pid in self.ranks_left() if self.received else ():
            for number in self.received:
                if (pid, number) not in self.passed:
                    self.passed.add((pid, number))
                    send(pid, number)

    def reap(self) -> None:
        """Take the exit status of every process that has ended."""
        for pid, status in ended_children():
            if pid == self.child:
                self.status = os.waitstatus_to_exitcode(status)

    def clear(self) -> None:
        """Kill what is left and wait until it is gone."""
        while left := list(descendants(os.getpid())):
            for pid in left:
                send(pid, signal.SIGKILL)
            signal.sigtimedwait({signal.SIGCHLD}, PAUSE_S)
        self.reap()

    def code(self) -> int:
        """The exit code of the whole."""
        codes = list(read_reports(self.folder).values())
        if codes:
            return common_code(codes)
        if self.received:
            return EXIT_STOPPED
        return self.status if self.status is not None and self.status >= 0 else EXIT_CRASH


def torchrun_settings(grace_s: float) -> dict[str, str]:
    """Defaults for torchrun, which by itself dies of SIGUSR1 and kills ranks after 30 s.

    They are read from the environment by every supported version; options of the command line
    come first. Versions without such a time limit ignore it.
    """
    names = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1")
    return {
        "PET_SIGNALS_TO_HANDLE": os.environ.get("PET_SIGNALS_TO_HANDLE", ",".join(names)),
        "PET_SHUTDOWN_TIMEOUT": os.environ.get("PET_SHUTDOWN_TIMEOUT", str(round(grace_s))),
    }


def adopt_orphans() -> None:
    """Become the parent of descendants whose own parent dies, as process 1 is anyway."""
    ctypes.CDLL(None, use_errno=True).prctl(SUBREAPER, 1, 0, 0, 0)


def ended_children() -> Iterator[tuple[int, int]]:
    """Process id and wait status of children that have ended."""
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if not pid:
            return
        yield pid, status


def send(pid: int, number: int) -> None:
    """Send a signal to a process that may be gone."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return
