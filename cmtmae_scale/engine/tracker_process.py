"""The process of one experiment tracker: reads JSON lines, and answers each with a JSON line.

The library of a tracker starts threads, replaces ``sys.exit``, prints, and may wait for a network
for minutes. In a process of its own it can neither delay nor end a run. Only the standard library
and the tracker are imported, and the file is run by its path.
"""

import importlib
import json
import os
import re
import signal
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, Protocol

PROJECT = "cmtmae-scale"
"""Project or experiment if the library's environment variable names none."""
LAST_WORK_S = 60
"""Seconds in which to finish after the run has ended without closing the tracker."""
MLFLOW_TEXT, MLFLOW_BATCH = 5000, 100
"""Maximum length of a tag or parameter, and maximum number of parameters per request."""


class Client(Protocol):
    """One run of a tracker; every call may fail or take long."""

    place: str
    """Where a person finds the run."""

    def add_scalars(self, step: int, values: dict[str, float]) -> None:
        """Add one point to each curve."""
        ...

    def add_figure(self, step: int, name: str, file: str) -> None:
        """Add a PNG file."""
        ...

    def add_incident(self, step: int, text: str, why: str) -> None:
        """Add a title and a text about a fault."""
        ...

    def close(self, is_complete: bool) -> None:
        """Send everything that is pending, and end the run."""
        ...


class Wandb:
    """Weights & Biases. Curves are drawn over ``step``; its own counter of calls only grows."""

    def __init__(self, wandb: Any, settings: dict[str, Any]) -> None:
        self.wandb = wandb
        folder = None if os.environ.get("WANDB_DIR") else settings["folder"]
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            id=settings["id"],
            name=settings["name"],
            config=settings["config"],
            dir=folder,
            resume="allow",
            allow_val_change=True,
            settings=wandb.Settings(console="off"),
        )
        self.run.define_metric("step", hidden=True)
        self.run.define_metric("*", step_metric="step")
        self.place = self.run.url or f"{self.run.settings.sync_dir} (offline)"

    def add_scalars(self, step: int, values: dict[str, float]) -> None:
        self.run.log({**values, "step": step})

    def add_figure(self, step: int, name: str, file: str) -> None:
        self.run.log({name: self.wandb.Image(file), "step": step})

    def add_incident(self, step: int, text: str, why: str) -> None:
        self.run.alert(title=text, text=why, level=self.wandb.AlertLevel.WARN)

    def close(self, is_complete: bool) -> None:
        self.run.finish(exit_code=0 if is_complete else 1)


class Mlflow:
    """MLflow: parameters of the first launch, the config of each launch as an artifact."""

    def __init__(self, mlflow: Any, settings: dict[str, Any]) -> None:
        folder = settings["folder"]
        given = os.environ.get("MLFLOW_TRACKING_URI")
        uri = given or f"sqlite:///{folder}/mlflow.db"
        self.client = mlflow.MlflowClient(tracking_uri=uri)
        self.metric, param = mlflow.entities.Metric, mlflow.entities.Param
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        found = self.client.get_experiment_by_name(name)
        artifacts = None if given else f"{folder}/mlflow"
        experiment = (
            found.experiment_id if found else self.client.create_experiment(name, artifacts)
        )
        tag = {"cmtmae_scale.run": settings["id"]}
        runs = self.client.search_runs(
            [experiment], f"tags.`cmtmae_scale.run` = '{settings['id']}'"
        )
        if runs:
            self.run_id = runs[0].info.run_id
            self.client.update_run(self.run_id, status="RUNNING")
        else:
            self.run_id = self.client.create_run(
                experiment, tags=tag, run_name=settings["name"]
            ).info.run_id
            given_params = flatten(settings["config"]).items()
            params = [param(key, value[:MLFLOW_TEXT]) for key, value in given_params]
            for at in range(0, len(params), MLFLOW_BATCH):
                self.client.log_batch(self.run_id, params=params[at : at + MLFLOW_BATCH])
        self.client.log_dict(self.run_id, settings["config"], "config.yaml")
        self.place = f"run {self.run_id} in {uri}"

    def add_scalars(self, step: int, values: dict[str, float]) -> None:
        now = int(time.time() * 1000)
        metrics = [self.metric(name, value, now, step) for name, value in values.items()]
        self.client.log_batch(self.run_id, metrics=metrics)

    def add_figure(self, step: int, name: str, file: str) -> None:
        from PIL import Image

        with Image.open(file) as image:
            self.client.log_image(self.run_id, image, key=name, step=step)

    def add_incident(self, step: int, text: str, why: str) -> None:
        key = f"incident.{step:08d}.{time.time_ns()}"
        self.client.set_tag(self.run_id, key, f"{text}: {why}"[:MLFLOW_TEXT])

    def close(self, is_complete: bool) -> None:
        self.client.set_terminated(self.run_id, "FINISHED" if is_complete else "KILLED")


class Trackio:
    """trackio; a run continues under its name."""

    def __init__(self, trackio: Any, settings: dict[str, Any]) -> None:
        self.trackio = trackio
        project = os.environ.get("TRACKIO_PROJECT", PROJECT)
        name = f"{settings['name']}-{settings['id']}"
        trackio.init(
            project=project, name=name, config=settings["config"], resume="allow", embed=False
        )
        self.place = f"run {name} of project {project} in TRACKIO_DIR={os.environ['TRACKIO_DIR']}"

    def add_scalars(self, step: int, values: dict[str, float]) -> None:
        self.trackio.log(values, step=step)

    def add_figure(self, step: int, name: str, file: str) -> None:
        self.trackio.log({name: self.trackio.Image(file)}, step=step)

    def add_incident(self, step: int, text: str, why: str) -> None:
        self.trackio.alert(title=text, text=why)

    def close(self, is_complete: bool) -> None:
        self.trackio.finish()


CLIENTS: dict[str, Callable[[Any, dict[str, Any]], Client]] = {
    "wandb": Wandb,
    "mlflow": Mlflow,
    "trackio": Trackio,
}


def flatten(config: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Return ``group.key`` with the value as text."""
    found: dict[str, str] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            found |= flatten(value, f"{prefix}{key}.")
        else:
            found[re.sub(r"[^\w./ -]", "_", prefix + str(key))] = str(value)
    return found


def attempt(work: Callable[[], Any], counts_warnings: bool) -> str | None:
    """Return why work failed; ``None``: it did not.

    Args:
        work: calls the library.
        counts_warnings: whether a warning is a failure; trackio warns instead of raising.
    """
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            work()
    except Exception as error:  # whatever a library raises costs entries, not the run
        return f"{type(error).__name__}: {error}"
    failures = [str(one.message) for one in caught if one.category is UserWarning]
    return failures[0] if failures and counts_warnings else None


def serve(name: str) -> None:
    """Answer the run until it closes the tracker, or ends."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the run decides when it ends
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # the library's prints must not be read as answers

    def answer(**values: Any) -> None:
        answers.write(json.dumps(values) + "\n")
        answers.flush()

    settings = json.loads(sys.stdin.readline())
    if name == "trackio":  # read at import
        os.environ.setdefault("TRACKIO_DIR", f"{settings['folder']}/trackio")
    libraries: list[Any] = []
    clients: list[Client] = []

    def import_library() -> None:
        libraries.append(importlib.import_module(name))

    def pass_on(entry: dict[str, Any]) -> None:
        arguments = dict(entry)
        method = arguments.pop("call")
        if not clients and method != "close":
            clients.append(CLIENTS[name](libraries[0], settings))
        for client in clients:
            getattr(client, method)(**arguments)

    with suppress(BrokenPipeError):  # the run has ended, as at the end of the input
        answer(error=attempt(import_library, counts_warnings=False), place=None)
        for line in sys.stdin:
            entry, known = json.loads(line), len(clients)
            error = attempt(partial(pass_on, entry), counts_warnings=name == "trackio")
            answer(error=error, place=clients[0].place if len(clients) > known else None)
            if entry["call"] == "close":
                os._exit(0)  # exit hooks of libraries wait for networks
    signal.alarm(LAST_WORK_S)
    for client in clients:
        attempt(partial(client.close, False), counts_warnings=False)
    os._exit(1)


if __name__ == "__main__":
    serve(sys.argv[1])
