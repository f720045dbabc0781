"""A stand-in for a rank: registers with the supervisor, and exits as its arguments specify.

rank_case.py FILE BEHAVIOUR; FILE receives a line for each event.
"""

import os
import signal
import sys
import time
from pathlib import Path

from cmtmae_scale.runtime.exit_code import report_exit

FILE = Path(sys.argv[1])
BEHAVIOUR = sys.argv[2]


def note(text: str) -> None:
    with FILE.open("a") as opened:
        opened.write(f"{os.getpid()} {text}\n")


def stop(number: int, frame: object) -> None:
    note(signal.Signals(number).name)
    if BEHAVIOUR == "deaf":
        return
    raise SystemExit(75)


def main() -> int:
    if BEHAVIOUR == "nothing":
        return 3
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, stop)
    with report_exit() as report:
        note("here")
        if BEHAVIOUR == "crash":
            os._exit(9)
        if BEHAVIOUR.isdigit():
            report.leave(int(BEHAVIOUR))
            return 0  # as a launcher would have it
        while True:
            time.sleep(0.02)


if __name__ == "__main__":
    sys.exit(main())
