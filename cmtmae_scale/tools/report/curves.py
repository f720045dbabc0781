"""Charts of a run: which logged values share a chart, with notes and reference levels."""

import math
from collections.abc import Mapping, Sequence
from functools import partial

from cmtmae_scale.config.needs import needs
from cmtmae_scale.config.teachers import teacher_shares
from cmtmae_scale.pretraining.collapse import COLLAPSED_RANK, CONSTANT, RANK
from cmtmae_scale.tools.report.chart import Chart, Line
from cmtmae_scale.tools.report.ranges import expected_range, scheduled_values
from cmtmae_scale.tools.report.run import Run

Level = tuple[float, str]
TERMS = {"loss/teacher": "teacher", "loss/student": "momentum encoder", "loss/pixel": "pixels"}
RANKS = {
    "eval/effective_rank": "patch tokens",
    "eval/effective_rank_centred": "patch tokens, centred",
    "eval/rankme": "images, mean of patches (RankMe)",
    "eval/cls/rankme": "images, class token (RankMe)",
}
EVALUATIONS = {"knn10": "k-NN, k = 10", "knn20": "k-NN, k = 20", "linear": "linear"}


def training_charts(run: Run, others: Sequence[Run]) -> list[Chart]:
    """Return charts of losses, attention, gradient norm and schedules."""
    measured = partial(measured_chart, run, others)
    agreement = {
        "attention/agreement": "teacher and momentum encoder",
        "attention/teacher_agreement": "several teachers, mean over pairs",
    }
    correlation = "Rank correlation of their maps: 1 the same, 0 unrelated."
    mass = {"mask/visible_mass": "fraction of the map"}
    has_momentum = run.config is None or needs(run.config).momentum
    charts = [
        measured("Loss", loss_names(run), loss_note(run), loss_levels(run)),
        measured("Agreement of the two attentions", agreement, correlation),
        measured("Attention that stays visible", mass, "", mass_levels(run)),
        measured("Effective rank of the targets", {RANK: "momentum encoder"}, "", rank_levels(run)),
        measured("Gradient norm", {"grad_norm": "before clipping"}, "", clip_levels(run)),
        scheduled_chart(run, "Learning rate", {"lr": "learning rate"}),
        scheduled_chart(run, "Momentum", {"momentum": "EMA momentum"} if has_momentum else {}),
        scheduled_chart(run, "Teacher's weight", alphas(run)),
    ]
    if run.settings.get("mask.sampler") == "hide_salient_mix":
        title = "Salient fraction of the masked patches"
        charts.append(scheduled_chart(run, title, {"salient_fraction": "fraction"}))
    return [chart for chart in charts if any(not line.planned for line in chart.lines)]


def time_charts(run: Run, others: Sequence[Run]) -> list[Chart]:
    """Return charts of speed, data wait, memory and cache hits."""
    plots = (
        ("Views per second", {"images_s": "all ranks"}, "Without the time of evaluations."),
        ("Waiting for data", {"data_wait_fraction": "fraction of the time"}, "Of rank 0."),
        ("Memory", {"memory_gib": "peak so far, GiB"}, "Of rank 0."),
        ("Teacher read from a cache", {"cache/hit": "fraction of micro-batches"}, ""),
    )
    charts = [measured_chart(run, others, title, names, note) for title, names, note in plots]
    return [chart for chart in charts if chart.lines]


def evaluation_charts(run: Run, others: Sequence[Run]) -> list[Chart]:
    """Return charts of accuracies during a run."""
    levels = [(1 / run.num_classes, "chance")] if run.num_classes else []
    tuned = {"eval/top1": "top-1", "eval/top5": "top-5"}
    top1 = [(level, f"{text} of top-1") for level, text in levels]
    charts = [measured_chart(run, others, "Accuracy, fine-tuned", tuned, "", top1)]
    for prefix, features in (("eval/", "mean of patches"), ("eval/cls/", "class token")):
        names = {prefix + name: label for name, label in EVALUATIONS.items()}
        charts.append(measured_chart(run, others, f"Accuracy, {features}", names, "", levels))
    plots = (
        ("Segmentation", {"eval/segmentation_knn": "mIoU, k-NN, k = 10"}, ""),
        ("Effective rank of the features", RANKS, "Low: few directions hold all the variation."),
        ("Cosine of the patches of an image", {"eval/patch_cosine": "mean over pairs"}, ""),
    )
    charts += [measured_chart(run, others, title, names, note) for title, names, note in plots]
    return [chart for chart in charts if chart.lines]


def measured_chart(
    run: Run,
    others: Sequence[Run],
    title: str,
    names: Mapping[str, str],
    note: str,
    levels: Sequence[Level] = (),
) -> Chart:
    """Return a chart of logged values, with the range of other runs of these settings."""
    chart = Chart(title, [], note, levels=list(levels))
    for name, label in names.items():
        points = run.series(name)
        if points:
            faint, bands = expected_range(others, name)
            chart.lines += [*faint, Line(label, points)]
            chart.bands += bands
    return chart


def scheduled_chart(run: Run, title: str, names: Mapping[str, str]) -> Chart:
    """Return a chart of logged values over their schedule."""
    chart = Chart(title, [])
    for name, label in names.items():
        points = run.series(name)
        if points:
            schedule = Line("schedule", scheduled_values(run, name), True)
            chart.lines += [schedule, Line(label, points)]
    return chart


def loss_names(run: Run) -> dict[str, str]:
    """Return the total and its terms, a single term without total, and the constant's loss."""
    teachers = () if run.config is None else teacher_shares(run.config)
    terms = TERMS | {f"loss/{name}": name.replace("_", " ", 1) for name in teachers}
    used = {k: v for k, v in terms.items() if any(value for _, value in run.series(k))}
    names = used if len(used) == 1 else {"loss/total": "total", **used}
    constant = {CONSTANT: "momentum encoder, by its mean token alone"}
    return names | constant if run.series(CONSTANT) else names


def loss_note(run: Run) -> str:
    """Name the loss function and its tokens."""
    if run.is_tuning:
        return "Cross-entropy on augmented views."
    if run.config is None or not needs(run.config).teacher_features:
        return ""
    kinds = {"cosine": "2 - 2 cosine", "mse": "mean square", "smooth_l1": "smooth L1"}
    return f"Unweighted terms: {kinds[run.config.loss.type]} over {run.config.loss.tokens} tokens."


def loss_levels(run: Run) -> list[Level]:
    """Return the loss of an uninformed prediction, where it is known."""
    if run.config is None:
        return []
    need, loss = needs(run.config), run.config.loss
    features = need.teacher_features or need.student_features
    if features and not need.pixels and loss.type == "cosine":
        return [(2.0, "2: unrelated to the target")]
    if need.pixels and not features and run.config.target.pixel.norm == "patch":
        return [(1.0, "1: the mean of each patch")]
    return []


def mass_levels(run: Run) -> list[Level]:
    """Return the visible mass under a mask that ignores attention."""
    if run.config is None:
        return []
    mask = run.config.mask
    return [(1 - mask.ratio - mask.throw_ratio, "a random mask")]


def rank_levels(run: Run) -> list[Level]:
    """Return the effective rank below which tokens are nearly alike, if the run gets close."""
    least = min((value for _, value in run.series(RANK)), default=math.inf)
    return [(COLLAPSED_RANK, "nearly alike below")] if least < 2 * COLLAPSED_RANK else []


def clip_levels(run: Run) -> list[Level]:
    """Return the clipping threshold, if the gradients get close to it."""
    config = run.config or run.tuning
    clip = None if config is None else config.optimizer.grad_clip
    largest = max((value for _, value in run.series("grad_norm")), default=0.0)
    return [(clip, "clipped above")] if clip is not None and clip < 2 * largest else []


def alphas(run: Run) -> dict[str, str]:
    """Return the mixing weights that the run uses."""
    if run.config is None:
        return {"alpha_attention": "in the attention map", "alpha_target": "in the loss"}
    need = needs(run.config)
    found: dict[str, str] = {}
    if need.teacher_attention and need.student_attention:
        found["alpha_attention"] = "in the attention map"
    if need.teacher_features and need.student_features:
        found["alpha_target"] = "in the loss"
    return found
