"""Runs of a study, the jobs of each run, and the jobs that are still missing."""

import hashlib
import json
import logging
import re
import shlex
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

from cmtmae_scale.cache.format import MANIFEST, missing_shards, read_manifest
from cmtmae_scale.config.changes import FINETUNING_FREE_KEYS, FREE_KEYS, flatten, is_listed
from cmtmae_scale.config.check import find_problems
from cmtmae_scale.config.derive import loaded_start
from cmtmae_scale.config.finetune import load_finetune
from cmtmae_scale.config.load import Draft, config_to_dict, load_config, read_recipe
from cmtmae_scale.config.needs import needs
from cmtmae_scale.config.schema import Config
from cmtmae_scale.config.teachers import teacher_configs
from cmtmae_scale.errors import EXIT_DONE, CacheError, ConfigError, may_pass
from cmtmae_scale.runtime.storage import read_json
from cmtmae_scale.tools.study.file import Evaluation, Study

CMTMAE = ("-m", "cmtmae_scale")
logger = logging.getLogger(__name__)

Record = dict[str, Any]
"""Results of a run in the study's record, as ``record.run_record`` writes them."""

SILENT = ("name", "output_dir", "allow_change")
"""Keys of ``run`` without an effect on results."""
ADDED = (
    *(("backend", "reduce_every_micro_step"), ("data", "store_cache"), ("data", "verify_index")),
    *(("student", "init_from_run"), ("student", "init_optimizer"), ("decoder", "position_grid")),
)
"""Keys that later versions added. At their default they are excluded from the digest, so that the
folders of earlier runs keep their names."""


@dataclass(frozen=True)
class Job:
    """One command, and a test whether it is done."""

    kind: str
    """``cache``, ``train`` or ``evaluate``."""
    arguments: tuple[str, ...]
    """Arguments after ``python``."""
    output: Path
    """Folder or file that the command writes; jobs with one output run one at a time."""
    done: Callable[[], bool]
    """Return whether the result exists."""
    resumable: bool
    """Whether the command resumes after a stop."""
    twin: str | None = None
    """Name of the same evaluation without baselines, or with them."""

    def is_among(self, names: Collection[str]) -> bool:
        """Return whether an evaluation among ``names`` has the same results of the weights."""
        return self.output.stem in names or self.twin in names

    @property
    def command(self) -> str:
        """Shell command."""
        return shlex.join(["python", *self.arguments])


@dataclass(frozen=True)
class Run:
    """One row with one seed."""

    row: str
    seed: int
    folder: Path
    """Named by the digest of the resolved settings, so that equal runs share it."""
    config: Config
    jobs: tuple[Job, ...]
    """In order."""
    linear: Path
    """Result file of the linear probe."""
    knn: Path
    """Result file of k-NN."""
    segmentation: Path | None = None
    """Result file of the segmentation, where the study has one."""
    tuned: Path | None = None
    """Result file of the fine-tuning, where the study has one."""
    teacher: tuple[Path, ...] = ()
    """Result files of the teacher, for the run that includes it: linear probe, segmentation."""
    recorded: Record | None = None
    """Earlier results of a run whose folder is gone."""

    def missing(self, known: dict[Path, bool] | None = None) -> list[Job]:
        """Return the jobs to run, in order: none where all results exist, no cache once trained.

        A run whose results are recorded has none.

        Args:
            known: whether the job of an output is done, to which this adds; runs that share a cache
                then count its shards once.
        """
        if self.recorded is not None:
            return []
        known = {} if known is None else known

        def is_done(job: Job) -> bool:
            if job.output not in known:
                known[job.output] = job.done()
            return known[job.output]

        if all(is_done(job) for job in self.jobs if job.kind == "evaluate"):
            return []
        has_weights = any(job.kind == "train" and is_done(job) for job in self.jobs)
        unneeded = "cache" if has_weights else None
        return [job for job in self.jobs if job.kind != unneeded and not is_done(job)]


def plan_runs(study: Study, with_teacher: bool = True) -> list[Run]:
    """Return all runs, most important first.

    Rows are in the order of the file; adjacent rows with the same seeds alternate seed by seed, so
    that an interrupted study has whole comparisons. The first run also evaluates raw pixels and
    random weights, the first run with a teacher also the teacher, unless
    ``with_teacher`` is false.

    Raises:
        ConfigError: settings that do not form a run, or do not have the evaluated weights.
    """
    runs: list[Run] = []
    trained = read_trained(Path(study.dir) / "runs")
    drafts = read_rows(study)
    tuning = None if study.evaluation.finetune is None else tuning_settings(study.evaluation)
    for _, block in groupby(study.rows, key=study.seeds_of):
        names = list(block)
        for seed in study.seeds_of(names[0]):
            for name in names:
                run = plan_run(study, name, seed, drafts[name], trained, tuning, first=not runs)
                runs.append(run)
    for number, run in enumerate(runs):
        has_one = needs(run.config).teacher and not run.config.teachers
        if with_teacher and has_one and run.config.teacher.mode != "none":
            runs[number] = add_teacher_jobs(run, study.evaluation)
            break
    return runs


def read_rows(study: Study) -> dict[str, Draft[Config]]:
    """Return the settings of each row: the recipe's, the study's, those of ``like`` and its own.

    The recipe is read once, and a row adds to the settings of the row above.
    """
    common = read_recipe(Config, find_problems, study.recipe).override(study.settings)
    drafts: dict[str, Draft[Config]] = {}
    for name, row in study.rows.items():
        inherited = common if row.like is None else drafts[row.like]
        drafts[name] = inherited.override(row.settings)
    return drafts


def read_trained(folder: Path) -> dict[str, Path]:
    """Return the folders of runs by the digest of their settings, as this version reads them.

    A key that was added since a run began has its default there, so that the run is found again
    although its settings have another digest now.
    """
    found: dict[str, Path] = {}
    for file in sorted(folder.glob("*/config.yaml")):
        try:
            settings = effective_settings(load_config(file))
            found.setdefault(short_digest(settings), file.parent)
        except ConfigError as error:
            logger.warning("%s: not a run of this version, and not used (%s)", file.parent, error)
    return found


def plan_run(
    study: Study,
    name: str,
    seed: int,
    draft: Draft[Config],
    trained: Mapping[str, Path],
    tuning: Mapping[str, Any] | None,
    first: bool,
) -> Run:
    """Return one run.

    Args:
        study: the study.
        name: row.
        seed: value of ``run.seed``.
        draft: settings of the row.
        trained: see ``read_trained``.
        tuning: see ``tuning_settings``; ``None``: no fine-tuning.
        first: whether the baselines belong to its evaluation.
    """
    title = re.sub(r"[^\w.=-]+", "_", name)  # a candidate of a pre-flight may have any characters
    own = [f"run.seed={seed}", f"run.name={title}-{seed}"]
    overrides = [*draft.overrides, *own]
    caches = Path(study.dir) / "caches"
    places = ["run.output_dir=none", f"cache.dir={caches / 'none'}"]
    config = draft.override([*own, *places]).build()
    if config.train.stop_after is not None:
        raise ConfigError(
            f"{study.recipe}: train.stop_after={config.train.stop_after}: the runs of a study "
            "train to their end; remove the key from the recipe"
        )
    evaluated = study.rows[name].weights or study.evaluation.weights
    loaded = loaded_start(config.student)
    if evaluated == "random" and loaded is not None:
        raise ConfigError(
            f"rows.{name}: weights=random are the initial weights of a run that loads none, and "
            f"its run has {'='.join(loaded)}; set {loaded[0]}=null, or evaluate other weights"
        )
    if evaluated == "momentum" and not needs(config).momentum:
        raise ConfigError(
            f"rows.{name}: weights=momentum are evaluated, and its run has no momentum encoder; "
            "give the row weights: student"
        )
    digest = short_digest(effective_settings(config))
    folder = trained.get(digest, Path(study.dir) / "runs" / digest)
    overrides.append(f"run.output_dir={folder}")
    config.run.output_dir = str(folder)
    jobs: list[Job] = []
    cached = {
        teacher: caches / short_digest(cache_settings(alone))
        for teacher, alone in teacher_configs(config).items()
        if alone.teacher.mode == "cached"
    }
    config.cache.dir = str(cached[""]) if "" in cached else None
    for entry in config.teachers:
        entry.cache_dir = str(cached[entry.name]) if entry.name in cached else None
    overrides += [
        f"teachers.{teacher}.cache_dir={cache}" if teacher else f"cache.dir={cache}"
        for teacher, cache in cached.items()
    ]
    for teacher, cache in cached.items():
        chosen = ("--teacher", teacher) if teacher else ()
        arguments = (*CMTMAE, "precompute", "--config", study.recipe, *chosen, *overrides)
        jobs.append(Job("cache", arguments, cache, partial(is_complete, cache), True))
    arguments = (*CMTMAE, "pretrain", "--config", study.recipe, *overrides)
    jobs.append(Job("train", arguments, folder, lambda: is_trained(folder), True))
    weights = ["--weights", evaluated]
    linear = evaluation_job(study.evaluation, folder, "linear", weights, first)
    knn = evaluation_job(study.evaluation, folder, "knn", weights, first)
    run = Run(name, seed, folder, config, (*jobs, linear, knn), linear.output, knn.output)
    if study.evaluation.segmentation is not None:
        job = segmentation_job(study.evaluation.segmentation, folder, weights, first)
        run = replace(run, jobs=(*run.jobs, job), segmentation=job.output)
    return run if tuning is None else add_finetuning(run, study.evaluation, weights, tuning)


def add_teacher_jobs(run: Run, settings: Evaluation) -> Run:
    """Return the run with the evaluation of its teacher at the end."""
    weights = ["--weights", "teacher"]
    jobs = [evaluation_job(settings, run.folder, "linear", weights, False)]
    if settings.segmentation is not None:
        jobs.append(segmentation_job(settings.segmentation, run.folder, weights, False))
    return replace(run, jobs=(*run.jobs, *jobs), teacher=tuple(job.output for job in jobs))


def add_finetuning(
    run: Run, settings: Evaluation, weights: Sequence[str], tuning: Mapping[str, Any]
) -> Run:
    """Return the run with a fine-tuning of its weights at the end, in a folder of its own.

    ``tuning`` are the recipe's settings: the folder is named by the recipe's name alone.
    """
    images = tuning_images(settings)
    words = ["--config", str(settings.finetune), *weights, *images, f"run.seed={run.seed}"]
    folder = run.folder / "evaluation" / f"finetune-{short_digest(words)}"
    places = ["--checkpoint", str(run.folder), f"run.output_dir={folder}"]
    result = folder / "result.json"
    arguments = (*CMTMAE, "finetune", *words, *places)
    done = partial(is_tuned, result, str(settings.finetune), tuning)
    job = Job("evaluate", arguments, folder, done, True)
    return replace(run, jobs=(*run.jobs, job), tuned=result)


def tuning_images(settings: Evaluation) -> list[str]:
    """Return the overrides that name the images of a fine-tuning."""
    return [f"data.path={settings.train}", f"data.test_path={settings.test}"]


def tuning_settings(settings: Evaluation) -> dict[str, Any]:
    """Return the settings of the fine-tuning's recipe that affect its results, by full key.

    Raises:
        ConfigError: names the recipe and the problem.
    """
    config = load_finetune(
        str(settings.finetune), [*tuning_images(settings), "run.output_dir=none"]
    )
    free = ("run.", *FREE_KEYS, *FINETUNING_FREE_KEYS)
    found = flatten(config_to_dict(config))
    return {key: value for key, value in found.items() if not is_listed(key, free)}


def evaluation_job(
    settings: Evaluation, folder: Path, method: str, weights: Sequence[str], baselines: bool
) -> Job:
    """Return a probe of a run."""
    images = ["--train", settings.train, "--test", settings.test]
    epochs = ["--epochs", str(settings.epochs)] if method == "linear" else []
    return evaluate_job(folder, [method, *weights], [*images, *epochs], baselines)


def segmentation_job(masks: str, folder: Path, weights: Sequence[str], baselines: bool) -> Job:
    """Return the segmentation on frozen features of a run."""
    return evaluate_job(folder, ["segmentation", *weights], ["--train", masks], baselines)


def evaluate_job(
    folder: Path, subject: Sequence[str], images: Sequence[str], baselines: bool
) -> Job:
    """Return an evaluation of a run; the digest of its options names the result file."""
    without, whole = [*subject, "--no-baselines", *images], [*subject, *images]
    words, other = (whole, without) if baselines else (without, whole)
    name, twin = (f"{subject[0]}-{short_digest(options)}" for options in (words, other))
    file = folder / "evaluation" / f"{name}.json"
    places = ["--checkpoint", str(folder), "--out", str(file)]
    arguments = (*CMTMAE, "evaluate", *words, *places)
    return Job("evaluate", arguments, file, file.exists, False, twin)


def effective_settings(config: Config) -> dict[str, Any]:
    """Return the resolved settings that affect the results of a run."""
    tree = config_to_dict(config)
    for group in ("log", "checkpoint"):
        del tree[group]
    del tree["cache"]["dir"]
    for key in SILENT:
        del tree["run"][key]
    defaults = config_to_dict(Config())
    for group, key in ADDED:
        if tree[group][key] == defaults[group][key]:
            del tree[group][key]
    for entry in tree["teachers"]:
        del entry["cache_dir"]
    if not tree["teachers"]:
        del tree["teachers"]
    return tree


def cache_settings(config: Config) -> dict[str, Any]:
    """Return the settings that affect the rows of a teacher cache.

    Keys of teacher and views at their default are excluded, so that a key that a later version adds
    does not change the names of caches. A run refuses a cache of other rows by its manifest.
    """
    tree, defaults = config_to_dict(config), config_to_dict(Config())
    groups = {
        name: {k: v for k, v in tree[name].items() if k != "mode" and v != defaults[name][k]}
        for name in ("teacher", "views")
    }
    data = {key: tree["data"][key] for key in ("path", "source", "max_pixels", "exif_orientation")}
    maps = {key: tree["attention"][key] for key in ("source", "layers")}
    needed = needs(config)
    return {
        "seed": config.run.seed,
        "data": data,
        **groups,
        "student": [config.student.arch, config.student.patch_size],
        "maps": maps,
        "layers": tree["target"]["teacher"]["layers"],
        "needs": [needed.teacher_attention, needed.teacher_features],
        "codec": config.cache.codec,
        "precision": config.backend.precision,
    }


def short_digest(value: Any) -> str:
    """Return twelve hexadecimal digits of the digest of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def is_trained(folder: Path) -> bool:
    """Return whether a run is complete."""
    try:
        return read_json((folder / "exit.json").read_bytes())["code"] == EXIT_DONE
    except FileNotFoundError:
        return False
    except (OSError, ValueError, KeyError, TypeError) as error:
        if may_pass(error):
            raise
        raise ConfigError(f"{folder / 'exit.json'}: cannot be read ({error}); delete it") from error


def is_complete(cache: Path) -> bool:
    """Return whether a teacher cache has all its shards."""
    if not (cache / MANIFEST).exists():
        return False
    try:
        return not missing_shards(cache, read_manifest(cache))
    except CacheError as error:
        raise ConfigError(f"{error}") from error


def is_tuned(result: Path, recipe: str, tuning: Mapping[str, Any]) -> bool:
    """Return whether a fine-tuning is complete.

    Args:
        result: its result file.
        recipe: its recipe, for the message.
        tuning: see ``tuning_settings``.

    Raises:
        ConfigError: if the recipe had another value then: results of two recipes are not compared.
    """
    try:
        found = flatten(read_json(result.read_bytes())["settings"])
    except FileNotFoundError:
        return False
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        if may_pass(error):
            raise
        raise ConfigError(f"{result}: cannot be read ({error}); delete its folder") from error
    for key, value in tuning.items():
        if found.get(key, value) != value:  # versions without the key record no value
            raise ConfigError(
                f"{result} has {key}={found[key]}, and {recipe} has {value}; restore the recipe, "
                "give the changed one another name, or delete the result's folder to fine-tune "
                "again"
            )
    return True
