"""Pre-flight of a recipe: which settings collapse, from short runs of several candidates.

Source: MEDiC (arXiv 2603.29009) reports that the weights of loss terms shift k-NN by up to 17
points; the best weights differ between recipes, so that a table of defaults does not help.
"""

import logging
import shlex
from collections.abc import Sequence

from cmtmae_scale.config.load import load_config
from cmtmae_scale.config.needs import needs
from cmtmae_scale.errors import ConfigError
from cmtmae_scale.pretraining.collapse import COLLAPSED_COSINE, COLLAPSED_RANK
from cmtmae_scale.tools.study.file import Evaluation, RowFile, Study, check_study
from cmtmae_scale.tools.study.run_results import (
    Accuracy,
    RunResult,
    accuracy_of,
    find_row,
    read_result,
    read_run_result,
)
from cmtmae_scale.tools.study.work import Run

logger = logging.getLogger(__name__)

MEASURE = "k-NN k=10"
AS_IT_IS = "as it is"
DEFAULTS = (
    *("collaboration.alpha_target=1", "collaboration.alpha_target=0.3", "loss.pixel=1"),
    "collaboration.alpha_attention=1 collaboration.alpha_target=1 decoder.type=none "
    "loss.tokens=visible",
)
"""Candidates of a recipe that learns from a teacher; the last was the best in docs/study.md."""
OBSERVATIONS = 10
"""Number of diagnostics and log entries per run."""


def preflight_study(
    recipe: str, folder: str, steps: int, settings: Sequence[str], candidates: Sequence[str]
) -> Study:
    """Return the study of a pre-flight: one row per candidate, one seed.

    Args:
        recipe: path.
        folder: of the runs.
        steps: length of each run.
        settings: ``group.key=value`` of every run.
        candidates: ``group.key=value`` of one run each, several separated by spaces; none:
            ``default_candidates``.

    Raises:
        ConfigError: unusable settings, or a recipe without images for the evaluation.
    """
    config = load_config(recipe, settings)
    train, test = config.eval.train_path, config.eval.test_path
    if train is None or test is None:
        raise ConfigError(
            f"{recipe}: the pre-flight evaluates every candidate; give labelled images with "
            "eval.train_path=PATH eval.test_path=PATH"
        )
    candidates = candidates or default_candidates(recipe, settings)
    every = max(1, steps // OBSERVATIONS)
    short = [f"train.steps={steps}", "train.epochs=null", "eval.every=null", "checkpoint.keep=1"]
    short += ["log.images_every=null", f"log.every={every}", f"log.diagnostics_every={every}"]
    study = Study(
        recipe=recipe,
        dir=folder,
        seeds=[config.run.seed],
        settings=[*settings, *short],
        evaluation=Evaluation(train, test),
        rows={AS_IT_IS: RowFile(), **{text: RowFile(split_words(text)) for text in candidates}},
    )
    check_study(study, "preflight")
    return study


def split_words(candidate: str) -> list[str]:
    """Split the settings of a candidate as a shell does.

    Raises:
        ConfigError: if a quotation is left open.
    """
    try:
        return shlex.split(candidate)
    except ValueError as error:
        raise ConfigError(f"--candidate {candidate}: {error}; close it, or drop it") from error


def default_candidates(recipe: str, settings: Sequence[str]) -> list[str]:
    """Return those of ``DEFAULTS`` that fit a recipe and differ from it; none without a teacher.

    The log names those that the recipe's other settings exclude.
    """
    config = load_config(recipe, settings)
    if not needs(config).teacher_features:
        return []
    found: list[str] = []
    for text in DEFAULTS:
        try:
            candidate = load_config(recipe, [*settings, *shlex.split(text)])
        except ConfigError as error:
            logger.warning("no candidate %s: %s", text, error)
            continue
        if candidate != config:
            found.append(text)
    return found


def preflight_table(study: Study, runs: Sequence[Run]) -> str:
    """Return one line per candidate: rank, cosine, k-NN and a verdict."""
    first = runs[0].knn
    if not first.exists():
        return (
            f"no verdict: `{runs[0].row}` has no result yet, and random weights are in its file\n"
        )
    features = study.evaluation.features
    rows = [row for row in read_result(first)["results"] if row["weights"] == "random weights"]
    random = accuracy_of(find_row(rows, MEASURE, features, first))
    lines = [
        f"{runs[0].config.train.steps} steps of {runs[0].config.train.global_batch_size} views; "
        f"{MEASURE}, {features} of the {study.evaluation.weights}; random weights: "
        f"{accuracy_text(random)}",
        "",
        "| candidate | effective rank | pairwise cosine | k-NN, % | verdict |",
        "|---|---|---|---|---|",
    ]
    for run in runs:
        if not (run.linear.exists() and run.knn.exists()):
            lines.append(f"| `{run.row}` | | | | no result |")
            continue
        found = read_run_result(run, features)
        near = found.others[f"{MEASURE} {features}"]
        rank, cosine = (last_value(found, name) for name in ("effective_rank", "pairwise_cosine"))
        cells = ["" if value is None else f"{value:.2f}" for value in (rank, cosine)]
        verdict = judge_candidate(rank, cosine, near, random)
        lines.append(f"| `{run.row}` | {' | '.join(cells)} | {accuracy_text(near)} | {verdict} |")
    return "\n".join([*lines, ""])


def judge_candidate(
    rank: float | None, cosine: float | None, near: Accuracy, random: Accuracy
) -> str:
    """Return the verdict on a candidate.

    Args:
        rank: effective rank of the momentum encoder's target tokens; ``None``: not a target.
        cosine: mean pairwise cosine of these tokens.
        near: accuracy of k-NN.
        random: the same of random weights.
    """
    if rank is not None and rank < COLLAPSED_RANK:
        return f"collapses: effective rank below {COLLAPSED_RANK:g}"
    if cosine is not None and cosine > COLLAPSED_COSINE:
        return f"collapses: patches have a cosine above {COLLAPSED_COSINE:g}"
    if near.interval_95[1] < random.interval_95[0]:
        return "worse than random weights"
    if near.interval_95[0] <= random.interval_95[1]:
        return "not better than random weights; intervals overlap"
    return "learns"


def last_value(found: RunResult, name: str) -> float | None:
    """Return the last diagnostic of a name; ``None`` where there is none."""
    points = found.series.get(f"diagnostics/{name}")
    return points[-1][1] if points else None


def accuracy_text(accuracy: Accuracy) -> str:
    """Format an accuracy with its interval, %."""
    low, high = accuracy.interval_95
    return f"{100 * accuracy.value:.1f} [{100 * low:.1f}, {100 * high:.1f}]"
