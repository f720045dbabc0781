"""Content of a run's folder; files may be absent, damaged or growing.

An unreadable file becomes a sentence in ``Run.problems``, never an error. Only regular files within
the folder are opened: no pipe, no device, and no link to a file outside.
"""

import errno
from array import array
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from itertools import islice
from operator import itemgetter, le
from pathlib import Path
from typing import Any, TypeGuard, cast

from cmtmae_scale.config.changes import flatten
from cmtmae_scale.config.finetune import Finetune, find_finetune_problems
from cmtmae_scale.config.load import config_from_dict, recipe_from_dict
from cmtmae_scale.config.schema import Config
from cmtmae_scale.config.yaml_text import parse_yaml, read_yaml
from cmtmae_scale.errors import EXIT_DONE, ConfigError
from cmtmae_scale.runtime.storage import read_inside, read_json, require_inside
from cmtmae_scale.tools.report.chart import Point

LARGEST = 1e30
"""Larger numbers are not drawn; logged values are far smaller."""
FIGURE_BYTES = 2**26
"""Largest figure that a page holds: 64 MiB."""
FILES = ("config.yaml", "log.jsonl", "exit.json", "starts.jsonl", "checkpoints")
"""Any of these files identifies a run's folder."""
RESULT = "result.json"
"""File in a run's folder with the accuracy of a fine-tuning."""
TUNING_GROUP = "augment"
"""Group that only the settings of a fine-tuning have."""


@dataclass
class Run:
    """One run as its files record it."""

    dir: Path
    label: str
    """Name in the report, unique on the page."""
    row: str | None = None
    """Row of a study's results, where the run is read from their file; ``None``: from a folder."""
    is_tuning: bool = False
    """Whether the run is a fine-tuning, not a pre-training."""
    config: Config | None = None
    """Settings of a pre-training; ``None``: another task, or settings of another version."""
    tuning: Finetune | None = None
    """Settings of a fine-tuning; ``None`` likewise."""
    settings: dict[str, Any] = field(default_factory=dict[str, Any])
    """Resolved settings by full key."""
    logged: dict[str, list[Point]] = field(default_factory=dict[str, list[Point]])
    """Steps and finite values of each name in the log, by step; ``step`` is one of the names."""
    incidents: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    exit: dict[str, Any] | None = None
    launches: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    bad_files: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    figures: list[tuple[int, Path]] = field(default_factory=list[tuple[int, Path]])
    """Step and file."""
    results: list[tuple[str, dict[str, Any]]] = field(
        default_factory=list[tuple[str, dict[str, Any]]]
    )
    """Name and content of the result of a fine-tuning and of each file of ``cmtmae evaluate``."""
    result: dict[str, Any] = field(default_factory=dict[str, Any])
    """Result of a fine-tuning, which is among ``results`` too; empty before its end."""
    state: dict[str, Any] = field(default_factory=dict[str, Any])
    """Of the newest checkpoint."""
    num_images: int | None = None
    num_classes: int | None = None
    """Of the evaluation during the run, or of a fine-tuning."""
    digests: dict[str, Any] = field(default_factory=dict[str, Any])
    """Of the same images, ``train`` and ``test``, where they are known."""
    problems: list[str] = field(default_factory=list[str])
    """Files that could not be read."""

    @property
    def last_step(self) -> int:
        """Step of the last log entry; 0 before the first."""
        return int(self.last("step") or 0)

    @property
    def end_step(self) -> int | None:
        """Planned last step, where it is known."""
        planned = self.progress.get("end_step")
        if isinstance(planned, int) and planned > 0:
            return planned
        config = self.config or self.tuning
        return config.train.steps if config is not None else None

    @property
    def is_complete(self) -> bool:
        """Whether the run ended as complete.

        A launch that has already reached ``train.stop_after`` also exits with 0, before the end.
        """
        found, end = self.exit or {}, self.end_step
        step = found.get("step")
        ended_early = end is not None and isinstance(step, int) and step < end
        return found.get("code") == EXIT_DONE and not ended_early

    @property
    def progress(self) -> dict[str, Any]:
        """Progress of the newest checkpoint; empty where it is unknown."""
        return as_object(self.state.get("progress"))

    @property
    def encoder(self) -> str | None:
        """Name and digest of the weights that a fine-tuning started from, where they are known."""
        start = as_object(self.state.get("encoder"))
        known = [(start.get("name"), as_object(start.get("facts")).get("sha256"))]
        known += as_object(self.result.get("weights_sha256")).items()
        names = [f"{name} (sha256 {str(digest)[:12]})" for name, digest in known if digest]
        return names[0] if self.is_tuning and names else None

    @property
    def inputs(self) -> dict[str, Any]:
        """Settings, and the encoder of a fine-tuning, which the command line names."""
        return self.settings | ({"encoder": self.encoder} if self.encoder else {})

    def series(self, name: str) -> list[Point]:
        """Return steps and values of one logged name."""
        return self.logged.get(name, [])

    def last(self, name: str) -> float | None:
        """Return the newest value of one logged name."""
        points = self.series(name)
        return points[-1][1] if points else None


def read_run(folder: Path) -> Run:
    """Read a run.

    Raises:
        ConfigError: if the folder is not a run's.
    """
    run = open_run(folder)
    read_records(run)
    return run


def open_run(folder: Path) -> Run:
    """Read a run's settings and outcome, without its log.

    Raises:
        ConfigError: if the folder is not a run's.
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder; name the folder of run.output_dir")
    if not any((folder / name).exists() for name in FILES):
        raise ConfigError(
            f"{folder}: is not a run's folder, it has none of {', '.join(FILES)}; name "
            "the folder of run.output_dir"
        )
    run = Run(folder, folder.resolve().name)
    run.exit = read_object(run, folder / "exit.json")
    states = sorted((folder / "checkpoints").glob("step-*/state.json"))
    run.state = (read_object(run, states[-1]) if states else None) or {}
    result = read_object(run, folder / RESULT) or {}
    run.is_tuning = run.state.get("task") == "fine-tuning" or result.get("method") == "finetune"
    read_settings(run)
    if run.is_tuning and result:
        run.result = result
        run.results.append((RESULT, result))
    return run


def read_records(run: Run) -> None:
    """Read the log and the other records of a run that ``open_run`` returned."""
    folder = run.dir
    read_log(run)
    run.launches = [valid_launch(launch) for launch in json_lines(run, "starts.jsonl")]
    run.bad_files = list(json_lines(run, "quarantine.jsonl"))
    run.figures = find_figures(run)
    for path in sorted((folder / "evaluation").glob("*.json")):
        found = read_object(run, path)
        if found is not None:
            run.results.append((path.name, found))
            if not isinstance(found.get("results"), list):
                run.problems.append(f"evaluation/{path.name} holds no result and is not shown")
    labelled = folder if run.is_tuning else folder / "evaluation"
    train, test = (
        read_object(run, labelled / f"{part}-index" / "index.json") for part in ("train", "test")
    )
    trained = train if run.is_tuning else read_object(run, folder / "index" / "index.json")
    run.num_images = count_images(trained)
    run.num_classes = list_length(train, "labels")
    for part, index in (("train", train), ("test", test)):
        if index is not None and "digest" in index:
            run.digests[part] = index["digest"]


def read_log(run: Run) -> None:
    """Read the values and the incidents in the log.

    Entries with the same names form a table of steps and rows of numbers: an object per entry and
    value would cost as much as parsing the log.
    """
    tables: dict[tuple[str, ...], tuple[list[float], array[float]]] = {}
    for line in json_lines(run, "log.jsonl"):
        step = line.get("step")
        if not is_drawable(step):
            run.problems.append("log.jsonl has an entry without a step; the entry is ignored")
        elif "incident" in line:
            run.incidents.append(line)
        else:
            if not are_drawable(line.values()):
                line = {key: value for key, value in line.items() if is_drawable(value)}
            names = tuple(line)
            if names not in tables:
                tables[names] = [], array("d")
            steps, values = tables[names]
            steps.append(step)
            values.extend(line.values())
    for names, (steps, values) in tables.items():
        is_sorted = all(map(le, steps, islice(steps, 1, None)))
        for k, name in enumerate(names):
            known = run.logged.setdefault(name, [])
            to_sort = bool(known) or not is_sorted
            known.extend(zip(steps, values[k :: len(names)], strict=True))
            if to_sort:
                known.sort(key=itemgetter(0))


def read_settings(run: Run) -> None:
    """Read ``config.yaml``: as a config if it is this version's, else as a plain mapping."""
    path = run.dir / "config.yaml"
    if not path.exists():
        return
    tree: Any = None
    try:
        require_inside(run.dir, path)
        tree = read_yaml(path)
        run.is_tuning = run.is_tuning or TUNING_GROUP in tree
        if run.is_tuning:
            run.tuning = recipe_from_dict(Finetune, find_finetune_problems, tree, str(path))
        else:
            run.config = config_from_dict(tree, str(path))
    except OSError as error:
        run.problems.append(f"config.yaml cannot be read ({error.strerror})")
        return
    except ConfigError as error:
        run.problems.append(f"config.yaml is not this version's: {error}")
    try:
        if tree is None:
            tree = parse_yaml(read_inside(run.dir, path).decode(errors="replace"))
    except (OSError, ValueError):
        return
    if isinstance(tree, dict):
        run.settings = flatten(cast(dict[str, Any], tree))
        run.label = str(run.settings.get("run.name") or run.label)


def json_lines(run: Run, name: str) -> Iterator[dict[str, Any]]:
    """Yield the objects of a JSON lines file; other lines are reported as a problem."""
    path = run.dir / name
    try:
        text = read_inside(run.dir, path).decode(errors="replace") if exists(path) else ""
    except OSError as error:
        run.problems.append(f"{name} cannot be read ({error.strerror})")
        return
    broken: list[int] = []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            found = read_json(line)
        except ValueError:
            found = None
        if isinstance(found, dict):
            yield cast(dict[str, Any], found)
        elif line.strip():
            broken.append(number)
    if broken:
        what = "line" if len(broken) == 1 else "lines"
        shown = ", ".join(map(str, broken[:5])) + (" ..." if len(broken) > 5 else "")
        run.problems.append(f"{name}: {what} {shown} cannot be read; the rest is used")


def exists(path: Path) -> bool:
    """Return whether a path exists; a broken link exists too."""
    return path.exists() or path.is_symlink()


def read_object(run: Run, path: Path) -> dict[str, Any] | None:
    """Read a JSON object; ``None`` where there is none."""
    if not exists(path):
        return None
    try:
        found = read_json(read_inside(run.dir, path))
    except (OSError, ValueError):
        found = None
    if isinstance(found, dict):
        return cast(dict[str, Any], found)
    run.problems.append(f"{path.relative_to(run.dir)} cannot be read")
    return None


def valid_launch(launch: dict[str, Any]) -> dict[str, Any]:
    """Return an entry of ``starts.jsonl`` without values of a wrong type."""
    kinds = {"overrides": list, "versions": dict}
    return {
        key: value for key, value in launch.items() if isinstance(value, kinds.get(key, object))
    }


def find_figures(run: Run) -> list[tuple[int, Path]]:
    """Return figure sheets by step; anything but a regular file in the run is a problem."""
    found: list[tuple[int, Path]] = []
    for path in (run.dir / "figures").glob("step-*.png"):
        number = path.stem.removeprefix("step-")
        if not (number.isascii() and number.isdecimal() and len(number) < 20):
            continue
        try:
            require_inside(run.dir, path)
            if path.stat().st_size > FIGURE_BYTES:
                raise OSError(errno.EFBIG, f"more than {FIGURE_BYTES} bytes")
        except OSError as error:
            run.problems.append(f"figures/{path.name} is not shown ({error.strerror})")
            continue
        found.append((int(number), path))
    return sorted(found)


def as_object(value: Any) -> dict[str, Any]:
    """Return a JSON object; an empty one for any other value."""
    return cast(dict[str, Any], value) if isinstance(value, dict) else {}


def is_drawable(value: Any) -> TypeGuard[int | float]:
    """Return whether a log value is a finite number that a chart can place."""
    return isinstance(value, (int, float)) and -LARGEST <= value <= LARGEST


def are_drawable(values: Collection[Any]) -> bool:
    """Return whether all values are drawable for certain, in a fifth of the time of single checks.

    The result is also ``False`` where large values are drawable, but their sum is not.
    """
    try:
        return sum(map(abs, values)) <= LARGEST
    except (TypeError, OverflowError):
        return False


def count_images(index: dict[str, Any] | None) -> int | None:
    """Return the number of images of a kept index; of format 3 that of its names."""
    number = None if index is None else index.get("images")
    return number if type(number) is int and number > 0 else list_length(index, "names") or None


def list_length(found: dict[str, Any] | None, key: str) -> int | None:
    """Return the length of a list in a JSON object."""
    value = None if found is None else found.get(key)
    return len(cast(list[Any], value)) if isinstance(value, list) else None
