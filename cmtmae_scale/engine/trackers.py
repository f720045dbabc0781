"""Experiment trackers as sinks: a queue and a process each, so that none delays or ends a run."""

import importlib.util
import json
import logging
import os
import queue
import re
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cmtmae_scale.config.load import config_to_dict
from cmtmae_scale.config.schema import Trained
from cmtmae_scale.engine import tracker_process
from cmtmae_scale.errors import ConfigError, may_pass
from cmtmae_scale.runtime.storage import optional_write, write_atomic
from dataloading.addresses import hide_secrets

logger = logging.getLogger(__name__)

ID_FILE = "tracker_id"
FAILED, LOST = "tracker failed", "tracker entries lost"
"""Kinds of incidents."""
QUEUED = 1000
"""Maximum number of entries that wait for a tracker; further entries are lost."""
FAILURES = 3
"""Consecutive entries that fail before a tracker is dropped until the next launch."""
IMPORT_S = 120.0
"""Seconds in which a library must be imported at the launch."""
SLOW_S = 60.0
"""Seconds without an answer that count as a failure."""
CLOSE_S = 20.0
"""Seconds in which all trackers together must finish at the end of a launch."""
SECRET_KEY = re.compile(r"(^|_)(key|token|secret|password|passwd|credentials?)$", re.IGNORECASE)
SECRET_VARIABLE = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL", re.IGNORECASE)
REMOVED = "(removed)"


class Tracker:
    """A sink that hands entries to the process of a tracker; no call waits for it.

    Args:
        name: library, one of ``tracker_process.CLIENTS``.
        settings: identity, config and folder of the run; see ``run_settings``.
    """

    def __init__(self, name: str, settings: dict[str, Any]) -> None:
        self.name = name
        self.entries: queue.Queue[dict[str, Any]] = queue.Queue(QUEUED)
        self.import_error: str | None = None
        self.is_imported = threading.Event()
        self.is_over = False
        self.asked_at: float | None = None
        """When the entry that has no answer yet was sent, ``time.monotonic()``."""
        self.lock = threading.Lock()
        self.lost_entries = 0
        self.problem: str | None = None
        self.is_reported = False
        self.process = subprocess.Popen(
            [sys.executable, "-P", tracker_process.__file__, name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # a Ctrl-C in the terminal is meant for the run
            text=True,
        )
        self.thread = threading.Thread(
            target=self.work, args=(settings,), name=f"tracker {name}", daemon=True
        )
        self.thread.start()

    def work(self, settings: dict[str, Any]) -> None:
        """Send entries one by one until the last, or until too many fail; runs in a thread."""
        failures = 0
        try:
            self.import_error = self.ask(settings)["error"]
            self.is_imported.set()
            if self.import_error is not None:
                self.problem = redact(self.import_error)
                return
            while failures < FAILURES:
                entry = self.entries.get()
                found = self.ask(entry)
                if found.get("place"):
                    logger.info("%s: %s", self.name, redact(found["place"]))
                failures = failures + 1 if found["error"] else 0
                if found["error"]:
                    self.fail(found["error"])
                if entry["call"] == "close":
                    return
        except (OSError, ValueError):  # no pipe, no answer
            self.fail(f"its process ended with code {self.process.wait()}")
        finally:
            self.is_over = True
            self.is_imported.set()

    def ask(self, entry: dict[str, Any]) -> dict[str, Any]:
        """Send a line and wait for the answer.

        Raises:
            OSError, ValueError: the process has ended.
        """
        stdin, stdout = self.process.stdin, self.process.stdout
        if stdin is None or stdout is None:
            raise ValueError("the process has no pipes")
        self.asked_at = time.monotonic()
        stdin.write(json.dumps(entry) + "\n")
        stdin.flush()
        answer = json.loads(stdout.readline())
        self.asked_at = None
        return answer

    def fail(self, why: str) -> None:
        """Count an entry that is lost; the first reason is reported."""
        with self.lock:
            self.lost_entries += 1
            self.problem = self.problem or redact(why)

    def put(self, **entry: Any) -> None:
        """Queue an entry, or count it as lost."""
        asked_at = self.asked_at
        if asked_at is not None and time.monotonic() - asked_at > SLOW_S and not self.problem:
            self.problem = f"no answer for {SLOW_S:.0f} s; up to {QUEUED} entries wait for it"
        if self.is_over:
            self.fail("it has ended")
            return
        try:
            self.entries.put_nowait(entry)
        except queue.Full:
            self.fail(f"more than {QUEUED} entries wait for it")

    def take_problem(self) -> str | None:
        """Return the first failure, once."""
        if self.problem is None or self.is_reported:
            return None
        self.is_reported = True
        return f"{self.name}: {self.problem}; the run continues, and lost entries are counted"

    def add_scalars(self, step: int, values: dict[str, float]) -> None:
        self.put(call="add_scalars", step=step, values=values)

    def add_figure(self, step: int, name: str, pixels: NDArray[np.uint8], file: Path) -> None:
        self.put(call="add_figure", step=step, name=name, file=str(file.absolute()))

    def add_incident(self, step: int, kind: str, why: str, facts: dict[str, Any]) -> None:
        self.put(call="add_incident", step=step, text=f"step {step}: {kind}", why=redact(why))

    def roll_back(self, step: int) -> None:
        """Do nothing: trackers keep the records after a step, besides those of its repetition."""

    def request_end(self, is_complete: bool) -> None:
        """Queue the last entry; if the queue is full, it replaces another entry, which is lost."""
        while not self.is_over:
            try:
                return self.entries.put_nowait({"call": "close", "is_complete": is_complete})
            except queue.Full:
                with suppress(queue.Empty):
                    self.entries.get_nowait()
                    self.fail(f"more than {QUEUED} entries wait for it")

    def end(self, deadline: float) -> None:
        """Wait for the last entry until a deadline; a process that has not ended by then is killed.

        What W&B or trackio have written to their local folder by then stays there.
        """
        self.thread.join(max(deadline - time.monotonic(), 0.0))
        if self.thread.is_alive():
            self.problem = self.problem or f"it did not finish within {CLOSE_S:.0f} s"
            self.process.kill()
        try:
            self.process.wait(0.5)  # it exits by itself after the answer to the last entry
        except subprocess.TimeoutExpired:
            self.process.kill()
        self.process.wait()
        self.thread.join()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()
        self.lost_entries += sum(entry["call"] != "close" for entry in self.entries.queue)


def open_trackers(config: Trained) -> list[Tracker]:
    """Start the trackers of a run.

    Raises:
        ConfigError: if a library is absent or cannot be imported.
        OSError: if the store of the run is full or fails.
    """
    names: Sequence[str] = config.log.trackers
    refuse_missing_trackers(names)
    if not names:
        return []
    settings = run_settings(config)
    trackers = [Tracker(name, settings) for name in names]
    deadline = time.monotonic() + IMPORT_S
    for tracker in trackers:
        tracker.is_imported.wait(max(deadline - time.monotonic(), 0.0))
    broken = {one.name: one.import_error for one in trackers if one.import_error}
    if broken:
        close_trackers(trackers, is_complete=False)
        name, why = next(iter(broken.items()))
        raise ConfigError(missing_text(name, f"cannot be imported ({redact(why)})"))
    return trackers


def close_trackers(trackers: Sequence[Tracker], is_complete: bool) -> None:
    """Let all trackers finish at the same time; kill those that need longer than ``CLOSE_S``."""
    deadline = time.monotonic() + CLOSE_S
    for tracker in trackers:
        tracker.request_end(is_complete)
    for tracker in trackers:
        tracker.end(deadline)


def refuse_missing_trackers(names: Sequence[str]) -> None:
    """Refuse trackers whose library is not installed; nothing is imported.

    Raises:
        ConfigError: names the command that installs the library.
    """
    for name in names:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:  # a folder wandb/ is not a package
            raise ConfigError(missing_text(name, "is not installed"))


def missing_text(name: str, what: str) -> str:
    """Return the message about a library that cannot be used."""
    return (
        f"log.trackers: {name} {what}; install it with pip install 'cmtmae-scale[{name}]', or "
        "remove it from log.trackers"
    )


def run_settings(config: Trained) -> dict[str, Any]:
    """Return what a tracker needs to know about the run; create its id at the first launch.

    Raises:
        OSError: if the store of the run is full or fails.
    """
    folder = Path(config.run.output_dir).absolute()
    return {
        "id": find_id(folder / ID_FILE),
        "name": config.run.name,
        "folder": str(folder),
        "config": remove_secrets(config_to_dict(config)),
    }


def find_id(file: Path) -> str:
    """Return the id under which trackers know a run; the run's folder holds it.

    Raises:
        OSError: if the store is full or fails: a new id would split the run in two.
    """
    try:
        found = file.read_text().strip()
    except (OSError, ValueError) as error:
        if may_pass(error):
            raise
        found = ""
    if re.fullmatch(r"[0-9a-f]{8}", found):
        return found
    new = secrets.token_hex(4)
    with optional_write(file, at_launch=True):
        write_atomic(file, new + "\n")
    return new


def remove_secrets(value: Any) -> Any:
    """Return a config without the values of keys that name secrets, and with redacted texts."""
    if isinstance(value, Mapping):
        return {
            key: REMOVED if SECRET_KEY.search(str(key)) else remove_secrets(one)
            for key, one in value.items()
        }
    if isinstance(value, list):
        return [remove_secrets(one) for one in value]
    return redact(value) if isinstance(value, str) else value


def redact(text: str, environment: Mapping[str, str] = os.environ) -> str:
    """Return a text without what ``hide_secrets`` hides and without values of secret variables."""
    text = hide_secrets(text)
    for name, value in environment.items():
        if SECRET_VARIABLE.search(name) and len(value) >= 8:
            text = text.replace(value, REMOVED)
    return text
