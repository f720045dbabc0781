"""What a study file asks for: runs, the commands of each, and which of them are still missing."""

import hashlib
import json
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from cmtmae_scale.cache.format import MANIFEST, missing_shards, read_manifest
from cmtmae_scale.config.derive import needs
from cmtmae_scale.config.load import config_to_dict, load_config
from cmtmae_scale.config.schema import Config
from cmtmae_scale.errors import EXIT_DONE, CacheError, ConfigError
from cmtmae_scale.tools.study.file import Evaluation, Study

SILENT = ("name", "dir", "allow_change")
"""Keys of ``run`` that change nothing that a run computes."""


@dataclass(frozen=True)
class Piece:
    """One command, and how to tell that it need not run again."""

    kind: str
    """``cache``, ``train`` or ``evaluate``."""
    arguments: tuple[str, ...]
    """After ``python``."""
    place: Path
    """Folder or file that it fills; of several pieces with one place only one runs at a time."""
    done: Callable[[], bool]
    """Whether its result is there."""
    gentle: bool
    """Whether it goes on where it was stopped."""

    @property
    def command(self) -> str:
        """As a person would type it."""
        return shlex.join(["python", *self.arguments])


@dataclass(frozen=True)
class Run:
    """One setting with one seed."""

    row: str
    seed: int
    folder: Path
    """Named by the digest of the resolved settings, so that equal runs are one."""
    config: Config
    pieces: tuple[Piece, ...]
    """In order."""
    linear: Path
    """Result of the linear probe."""
    knn: Path
    """Result of k-NN."""
    teacher: Path | None = None
    """Result of the teacher's own probe, where this run is the one that carries it."""

    @property
    def training(self) -> Piece:
        """The training itself."""
        return next(piece for piece in self.pieces if piece.kind == "train")

    def missing(self) -> list[Piece]:
        """Pieces to be run, in order; a run whose results are there needs nothing."""
        if all(piece.done() for piece in self.pieces if piece.kind == "evaluate"):
            return []
        return [piece for piece in self.pieces if not piece.done()]


def plan_runs(study: Study) -> list[Run]:
    """All runs in the order in which they are worth doing.

    Rows come in the order of the file; neighbours with the same seeds go seed by seed, so that a
    study that is cut off has whole comparisons. The first run of the file carries raw pixels and
    random weights in its evaluation, the first with a teacher the teacher's own probe.

    Raises:
        ConfigError: settings that are not a run.
    """
    runs: list[Run] = []
    for _, block in groupby(study.rows, key=study.seeds_of):
        names = list(block)
        for seed in study.seeds_of(names[0]):
            for name in names:
                runs.append(plan_run(study, name, seed, first=not runs))
    for number, run in enumerate(runs):
        if needs(run.config).teacher and run.config.teacher.mode != "none":
            runs[number] = with_teacher(run, study.evaluation)
            break
    return runs


def plan_run(study: Study, name: str, seed: int, first: bool) -> Run:
    """One run; ``first`` adds the baselines to its evaluation."""
    overrides = [*study.settings_of(name), f"run.seed={seed}", f"run.name={name}-{seed}"]
    caches = Path(study.dir) / "caches"
    given = [*overrides, "run.output_dir=none", f"cache.dir={caches / 'none'}"]
    config = load_config(study.recipe, given)
    folder = Path(study.dir) / "runs" / digest_of(settings_that_count(config))
    overrides.append(f"run.output_dir={folder}")
    config.run.output_dir = str(folder)
    pieces: list[Piece] = []
    if config.teacher.mode == "cached":
        cache = caches / digest_of(settings_of_cache(config))
        overrides.append(f"cache.dir={cache}")
        config.cache.dir = str(cache)
        arguments = ("launchers/precompute_teacher.py", "--config", study.recipe, *overrides)
        pieces.append(Piece("cache", arguments, cache, lambda: is_complete(cache), True))
    else:
        config.cache.dir = None
    arguments = ("launchers/pretrain.py", "--config", study.recipe, *overrides)
    pieces.append(Piece("train", arguments, folder, lambda: is_trained(folder), True))
    extra = [] if first else ["--no-baselines"]
    own = ["--weights", study.evaluation.weights]
    linear = evaluation(study.evaluation, folder, "linear", [*own, *extra])
    knn = evaluation(study.evaluation, folder, "knn", [*own, *extra])
    pieces += [piece for piece, _ in (linear, knn)]
    return Run(name, seed, folder, config, tuple(pieces), linear[1], knn[1])


def with_teacher(run: Run, settings: Evaluation) -> Run:
    """The same run with a probe of its teacher at the end."""
    options = ["--weights", "teacher", "--no-baselines"]
    piece, file = evaluation(settings, run.folder, "linear", options)
    return replace(run, pieces=(*run.pieces, piece), teacher=file)


def evaluation(
    settings: Evaluation, folder: Path, method: str, options: Sequence[str]
) -> tuple[Piece, Path]:
    """A probe of a run, and where its result lies: named by the digest of what is asked."""
    asked = [method, *options, "--train", settings.train, "--test", settings.test]
    if method == "linear":
        asked += ["--epochs", str(settings.epochs)]
    file = folder / "evaluation" / f"{method}-{digest_of(asked)}.json"
    places = ["--checkpoint", str(folder), "--out", str(file)]
    arguments = ("launchers/evaluate.py", *asked, *places)
    return Piece("evaluate", arguments, file, file.exists, False), file


def settings_that_count(config: Config) -> dict[str, Any]:
    """Resolved settings without those that only say where, how often or how loudly."""
    tree = config_to_dict(config)
    for group in ("log", "checkpoint"):
        del tree[group]
    del tree["cache"]["dir"]
    for key in SILENT:
        del tree["run"][key]
    return tree


def settings_of_cache(config: Config) -> dict[str, Any]:
    """What the rows of a teacher's cache depend on."""
    tree = config_to_dict(config)
    teacher = {key: value for key, value in tree["teacher"].items() if key != "mode"}
    data = {key: tree["data"][key] for key in ("path", "source", "max_pixels")}
    maps = {key: tree["attention"][key] for key in ("source", "layers")}
    needed = needs(config)
    return {
        "seed": config.run.seed,
        "data": data,
        "views": tree["views"],
        "student": [config.student.arch, config.student.patch_size],
        "teacher": teacher,
        "maps": maps,
        "layers": tree["target"]["teacher"]["layers"],
        "needs": [needed.teacher_attention, needed.teacher_features],
        "codec": config.cache.codec,
        "precision": config.backend.precision,
    }


def digest_of(value: Any) -> str:
    """Twelve hexadecimal digits that stand for a value of JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def is_trained(folder: Path) -> bool:
    """Whether a run has come to its end."""
    try:
        return json.loads((folder / "exit.json").read_text())["code"] == EXIT_DONE
    except FileNotFoundError:
        return False
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{folder / 'exit.json'}: cannot be read ({error}); delete it") from error


def is_complete(cache: Path) -> bool:
    """Whether a teacher's cache has all its shards."""
    if not (cache / MANIFEST).exists():
        return False
    try:
        return not missing_shards(cache, read_manifest(cache))
    except CacheError as error:
        raise ConfigError(f"{error}") from error
