"""Which numbers are drawn together, and what helps to read them."""

from collections.abc import Mapping, Sequence

from cmtmae_scale.config.derive import needs
from cmtmae_scale.config.schema import Config
from cmtmae_scale.tools.report.chart import Chart, Line
from cmtmae_scale.tools.report.ranges import expected, planned
from cmtmae_scale.tools.report.run import Run

Level = tuple[float, str]
TERMS = {"loss/teacher": "teacher", "loss/student": "momentum student", "loss/pixel": "pixels"}
EVALUATIONS = {"knn10": "k-NN, k = 10", "knn20": "k-NN, k = 20", "linear": "linear"}


def training_charts(run: Run, others: Sequence[Run]) -> list[Chart]:
    """Losses, attention, gradient and schedules of a run."""
    charts = [
        measured(run, others, "Loss", loss_names(run), loss_note(run), loss_levels(run)),
        measured(
            run,
            others,
            "Agreement of the two attentions",
            {"attention/agreement": "teacher and momentum student"},
            "Rank correlation of their maps: 1 the same, 0 unrelated.",
        ),
        measured(
            run,
            others,
            "Attention that stays visible",
            {"mask/visible_mass": "share of the map"},
            "",
            mass_levels(run),
        ),
        measured(
            run, others, "Gradient norm", {"grad_norm": "before clipping"}, "", clip_levels(run)
        ),
        scheduled(run, "Learning rate", {"lr": "learning rate"}),
        scheduled(run, "Momentum", {"momentum": "of the moving average"} if averages(run) else {}),
        scheduled(run, "Teacher's weight", alphas(run)),
    ]
    if run.settings.get("mask.sampler") == "hide_salient_mix":
        charts.append(scheduled(run, "Salient share of the hidden", {"salient_frac": "share"}))
    return [chart for chart in charts if any(not line.planned for line in chart.lines)]


def time_charts(run: Run, others: Sequence[Run]) -> list[Chart]:
    """Speed, waiting, memory, and rows read from a cache."""
    plots = (
        ("Views a second", {"images_s": "all ranks"}, "Without the time of evaluations."),
        ("Waiting for data", {"data_wait_share": "share of the time"}, "Of the first rank."),
        ("Memory", {"memory_gib": "peak so far, GiB"}, "Of the first rank."),
        ("Teacher read from a cache", {"cache/hit": "share of micro-batches"}, ""),
    )
    charts = [measured(run, others, title, names, note) for title, names, note in plots]
    return [chart for chart in charts if chart.lines]


def evaluation_charts(run: Run, others: Sequence[Run]) -> list[Chart]:
    """Accuracies during a run."""
    levels = [(1 / run.num_classes, "chance")] if run.num_classes else []
    charts = [
        measured(
            run,
            others,
            f"Accuracy, {features}",
            {prefix + name: label for name, label in EVALUATIONS.items()},
            "",
            levels,
        )
        for prefix, features in (("eval/", "mean of patches"), ("eval/cls/", "class token"))
    ]
    return [chart for chart in charts if chart.lines]


def measured(
    run: Run,
    others: Sequence[Run],
    title: str,
    names: Mapping[str, str],
    note: str,
    levels: Sequence[Level] = (),
) -> Chart:
    """Numbers of the log, with what other runs of these settings make expected."""
    chart = Chart(title, [], note, levels=list(levels))
    for name, label in names.items():
        points = run.series(name)
        if points:
            faint, bands = expected(others, name)
            chart.lines += [*faint, Line(label, points)]
            chart.bands += bands
    return chart


def scheduled(run: Run, title: str, names: Mapping[str, str]) -> Chart:
    """Numbers of the log over what the settings plan."""
    chart = Chart(title, [])
    for name, label in names.items():
        points = run.series(name)
        if points:
            chart.lines += [Line("as planned", planned(run, name), True), Line(label, points)]
    return chart


def loss_names(run: Run) -> dict[str, str]:
    """The total and its terms; a term that is all there is stands alone."""
    used = {k: v for k, v in TERMS.items() if any(value for _, value in run.series(k))}
    return used if len(used) == 1 else {"loss/total": "total", **used}


def loss_note(run: Run) -> str:
    """What the loss is."""
    if run.config is None or not needs(run.config).teacher_features:
        return ""
    kinds = {"cosine": "2 - 2 cosine", "mse": "mean square", "smooth_l1": "smooth L1"}
    return f"Terms without weights: {kinds[run.config.loss.type]} over {tokens(run.config)} tokens."


def tokens(config: Config) -> str:
    """Which tokens count."""
    return "weighted" if config.loss.tokens == "weighted" else config.loss.tokens


def loss_levels(run: Run) -> list[Level]:
    """The loss of a prediction that knows nothing, where that is known."""
    if run.config is None:
        return []
    need, loss = needs(run.config), run.config.loss
    features = need.teacher_features or need.student_features
    if features and not need.pixels and loss.type == "cosine":
        return [(2.0, "2: unrelated to the target")]
    if need.pixels and not features and run.config.target.pixel.norm == "patch":
        return [(1.0, "1: each patch's mean")]
    return []


def mass_levels(run: Run) -> list[Level]:
    """The mass that stays visible under a mask that ignores attention."""
    if run.config is None:
        return []
    mask = run.config.mask
    return [(1 - mask.ratio - mask.throw_ratio, "a random mask")]


def clip_levels(run: Run) -> list[Level]:
    """Where gradients are clipped, if that is within sight."""
    clip = None if run.config is None else run.config.optimizer.grad_clip
    largest = max((value for _, value in run.series("grad_norm")), default=0.0)
    return [(clip, "clipped above")] if clip is not None and clip < 2 * largest else []


def alphas(run: Run) -> dict[str, str]:
    """The mixing weights that the run uses."""
    if run.config is None:
        return {"alpha_attention": "in the map", "alpha_target": "in the loss"}
    need = needs(run.config)
    found: dict[str, str] = {}
    if need.teacher_attention and need.student_attention:
        found["alpha_attention"] = "in the map"
    if need.teacher_features and need.student_features:
        found["alpha_target"] = "in the loss"
    return found


def averages(run: Run) -> bool:
    """Whether there is a moving average."""
    return run.config is None or needs(run.config).momentum
