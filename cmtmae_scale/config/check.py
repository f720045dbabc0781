"""Cross-field checks: combinations that can never work, each with its remedy."""

from collections.abc import Iterator

from cmtmae_scale.config.deepspeed import extra_keys
from cmtmae_scale.config.derive import builds_teacher, extremes, needs, reads_cache
from cmtmae_scale.config.schema import Backend, Config, Schedule
from cmtmae_scale.errors import ConfigError

DETERMINISTIC_SAMPLERS = ("hide_salient", "reveal_salient_topk")
POSITIVE = (
    "views.image_size",
    "train.global_batch_size",
    "train.micro_batch_size",
    "data.workers",
    "data.max_pixels",
    "decoder.depth",
    "decoder.width",
    "decoder.heads",
    "mask.masks_per_view",
    "mask.temperature",
    "mask.floor",
    "attention.temperature",
    "loss.beta",
    "checkpoint.every",
    "checkpoint.keep",
    "log.every",
)
UNIT = (
    "data.max_bad_fraction",
    "mask.throw_ratio",
    "mask.hint_fraction",
    "mask.hint_pool",
    "mask.prob",
    "momentum.start",
    "momentum.end",
    "attention.clip_quantile",
    "cache.spot_check",
)
NOT_NEGATIVE = (
    "optimizer.base_lr",
    "optimizer.weight_decay",
    "loss.visible_weight",
    "loss.teacher",
    "loss.student",
    "loss.pixel",
    "guard.skip_limit",
    "guard.rollback_limit",
)
POSITIVE_OR_OFF = (
    "views.views_per_image",
    "student.patch_size",
    "teacher.image_size",
    "teacher.depth",
    "optimizer.grad_clip",
    "train.epochs",
    "train.steps",
    "train.stop_after",
    "run.time_limit_s",
    "guard.spike_factor",
    "guard.hang_seconds",
    "data.expected_images",
    "log.images_every",
    "eval.every",
)


def check_config(config: Config) -> None:
    """Refuse what can never work.

    Raises:
        ConfigError: with the first problem: key, value found, what is allowed or what to change.
    """
    for problem in problems(config):
        raise ConfigError(problem)


def problems(config: Config) -> Iterator[str]:
    """Yield every problem of a config, most basic first."""
    yield from check_ranges(config)
    yield from check_order(config)
    yield from check_length(config)
    yield from check_schedules(config)
    yield from check_masks(config)
    yield from check_decoder(config)
    yield from check_losses(config)
    yield from check_teacher(config)
    yield from check_cache(config)
    yield from check_backend(config.backend)
    yield from check_pictures(config)
    yield from check_eval(config)


def value_of(config: Config, key: str) -> float | None:
    """Read ``group.key``."""
    group, name = key.split(".")
    return getattr(getattr(config, group), name)


def check_ranges(config: Config) -> Iterator[str]:
    """Numbers within their range."""
    for key in POSITIVE + POSITIVE_OR_OFF:
        value = value_of(config, key)
        if value is None:
            continue
        if not value > 0:
            yield f"{key}={value} must be above 0"
    for key in UNIT:
        value = value_of(config, key)
        if value is not None and not 0 <= value <= 1:
            yield f"{key}={value} must lie in [0, 1]"
    for key in NOT_NEGATIVE:
        value = value_of(config, key)
        if value is not None and not value >= 0:
            yield f"{key}={value} must not be negative"
    low, high = config.views.crop_scale
    if not 0 < low <= high <= 1:
        yield f"views.crop_scale={config.views.crop_scale} must satisfy 0 < low <= high <= 1"
    low, high = config.views.aspect_ratio
    if not 0 < low <= high:
        yield f"views.aspect_ratio={config.views.aspect_ratio} must satisfy 0 < low <= high"
    if not all(0 <= beta < 1 for beta in config.optimizer.betas):
        yield f"optimizer.betas={config.optimizer.betas} must lie in [0, 1)"
    if not 0 <= config.optimizer.warmup_fraction < 1:
        yield (
            f"optimizer.warmup_fraction={config.optimizer.warmup_fraction} must lie in [0, 1): "
            "it is a share of the run"
        )
    if not config.attention.layers:
        yield "attention.layers is empty; give at least one block, such as [-1]"
    for name in ("teacher", "student"):
        if not getattr(config.target, name).layers:
            yield f"target.{name}.layers is empty; give at least one block, such as [-1]"
    if not config.run.output_dir:
        yield "run.output_dir is empty; name a folder"


def check_order(config: Config) -> Iterator[str]:
    """Nothing forced that is not asked for."""
    if config.data.resident and config.data.decode == "dali":
        yield (
            "data.resident=true decodes each image once, on the CPU; found data.decode=dali: set "
            "auto or torch"
        )
    if config.data.window_on_sorted and config.data.shuffle != "window":
        yield (
            "data.window_on_sorted=true belongs to data.shuffle=window; "
            f"found {config.data.shuffle}"
        )


def check_length(config: Config) -> Iterator[str]:
    """Exactly one length."""
    epochs, steps = config.train.epochs, config.train.steps
    if (epochs is None) == (steps is None):
        found = "neither" if epochs is None else f"epochs={epochs} and steps={steps}"
        yield f"train: give epochs or steps, exactly one of them; found {found}"


def check_schedules(config: Config) -> Iterator[str]:
    """Schedules complete and within [0, 1]."""
    for key in (
        "mask.salient_fraction",
        "collaboration.alpha_attention",
        "collaboration.alpha_target",
    ):
        group, name = key.split(".")
        schedule: Schedule | float = getattr(getattr(config, group), name)
        low, high = extremes(schedule)
        if low < 0 or high > 1:
            yield f"{key}: its values {low} to {high} must lie in [0, 1]"
        if not isinstance(schedule, Schedule):
            continue
        if schedule.kind == "constant":
            if schedule.end is not None:
                yield f"{key}: a constant schedule has no end; use linear, cosine or two_stage"
        elif schedule.end is None:
            yield f"{key}.end must be given for a {schedule.kind} schedule"
        if (schedule.kind == "two_stage") != (schedule.switch is not None):
            yield (
                f"{key}.switch belongs to two_stage schedules, and they need it; "
                f"found {schedule.kind}"
            )
        if schedule.switch is not None and not 0 <= schedule.switch <= 1:
            yield f"{key}.switch={schedule.switch} must lie in [0, 1]"
        if not 0 <= schedule.u0 < schedule.u1 <= 1:
            yield f"{key}: u0={schedule.u0}, u1={schedule.u1} must satisfy 0 <= u0 < u1 <= 1"


def check_masks(config: Config) -> Iterator[str]:
    """Mask shares, samplers against masks a view, normalisations against the mixing schedule."""
    mask = config.mask
    if not 0 < mask.ratio < 1:
        yield f"mask.ratio={mask.ratio} must lie in (0, 1)"
    if mask.ratio + mask.throw_ratio >= 1:
        total = mask.ratio + mask.throw_ratio
        yield f"mask.ratio + mask.throw_ratio = {total} leaves nothing visible"
    if mask.sampler == "random" and (mask.hint_fraction > 0 or mask.prob < 1):
        yield (
            f"mask.hint_fraction={mask.hint_fraction} and mask.prob={mask.prob} steer by attention, "
            "mask.sampler=random does not; use 0 and 1, or another sampler"
        )
    if mask.hint_fraction > min(mask.hint_pool, 1 - mask.ratio - mask.throw_ratio):
        yield (
            f"mask.hint_fraction={mask.hint_fraction} must not exceed mask.hint_pool={mask.hint_pool}, nor "
            "the share that stays visible"
        )
    low, high = extremes(mask.salient_fraction)
    constant = mask.sampler in DETERMINISTIC_SAMPLERS or (
        mask.sampler == "hide_salient_mix" and low == high == 1
    )
    if mask.masks_per_view > 1 and constant:
        yield (
            f"mask.masks_per_view={mask.masks_per_view}: {mask.sampler} gives the same mask every "
            "time; use masks_per_view=1 or a sampler with noise"
        )
    if config.attention.norm != "prob" and needs(config).student_attention:
        settled = alpha_warmup(config.collaboration.alpha_attention)
        if settled < 0.05:
            yield (
                f"attention.norm={config.attention.norm} amplifies the untrained momentum student; "
                "keep collaboration.alpha_attention at 1 for at least 0.05 of the run "
                f"(found {settled:g}), or use attention.norm=prob"
            )


def alpha_warmup(schedule: Schedule | float) -> float:
    """Share of the run at whose beginning a schedule stays at 1."""
    if not isinstance(schedule, Schedule):
        return float(schedule == 1)
    if schedule.start < 1:
        return 0.0
    if schedule.kind == "constant":
        return 1.0
    return schedule.switch or 0.0 if schedule.kind == "two_stage" else schedule.u0


def check_decoder(config: Config) -> Iterator[str]:
    """Decoder against mask and loss."""
    decoder, loss = config.decoder, config.loss
    if decoder.width % decoder.heads:
        yield f"decoder.width={decoder.width} is not a multiple of decoder.heads={decoder.heads}"
    if decoder.width % 4:
        yield f"decoder.width={decoder.width} must be a multiple of 4 (sine-cosine positions)"
    if decoder.type == "none" and loss.tokens != "visible":
        yield (
            "decoder.type=none sees visible patches only; set loss.tokens=visible, "
            f"not {loss.tokens}"
        )
    if decoder.type != "none" and loss.tokens == "visible":
        yield "loss.tokens=visible predicts no hidden patch; set decoder.type=none"
    if decoder.predict_ratio is not None:
        if decoder.type != "cross":
            yield (
                "decoder.predict_ratio needs decoder.type=cross, whose hidden tokens are "
                "independent; "
                f"found {decoder.type}"
            )
        if not 0 < decoder.predict_ratio <= config.mask.ratio:
            yield (
                f"decoder.predict_ratio={decoder.predict_ratio} must lie in "
                f"(0, mask.ratio={config.mask.ratio}]"
            )
    if decoder.prompt_norm_context and decoder.type != "prompt":
        yield f"decoder.prompt_norm_context belongs to decoder.type=prompt; found {decoder.type}"


def check_losses(config: Config) -> Iterator[str]:
    """Something to learn, on comparable scales."""
    need, loss = needs(config), config.loss
    if not (need.teacher_features or need.student_features or need.pixels):
        yield "no target has a weight; raise loss.teacher, loss.student or loss.pixel"
    for name, used in (("teacher", need.teacher_features), ("student", need.student_features)):
        if used and loss.type != "cosine" and getattr(config.target, name).norm == "none":
            yield f"target.{name}.norm=none with loss.type={loss.type} has no scale; use ln or l2"
    if config.target.teacher.layers != [-1] and config.teacher.feature != "block":
        yield "target.teacher.layers needs teacher.feature=block"
    if config.target.student.layers != [-1] and config.target.student.feature != "block":
        yield "target.student.layers needs target.student.feature=block"


def check_teacher(config: Config) -> Iterator[str]:
    """A teacher where one is needed."""
    teacher = config.teacher
    if not needs(config).teacher:
        return
    if teacher.mode == "none":
        yield (
            "teacher.mode=none, but the mask or the loss uses the teacher; "
            "set teacher.mode=online, or "
            "mask.sampler=random and loss.teacher=0"
        )
        return
    if not teacher.model or not teacher.weights:
        yield (
            "teacher.model and teacher.weights must be given: the mask or the loss uses the teacher"
        )
    if teacher.library == "open_clip" and teacher.quick_gelu is None:
        yield (
            "teacher.quick_gelu must be given for open_clip: true for OpenAI, DFN and MetaCLIP "
            "weights, false for LAION and DataComp"
        )


def check_cache(config: Config) -> Iterator[str]:
    """A cache has a place, a use, and a row for every view."""
    mode = config.teacher.mode
    if mode in ("cached", "sidecar") and not needs(config).teacher:
        yield (
            f"teacher.mode={mode}, but neither the mask nor the loss uses the teacher; set "
            "teacher.mode=none"
        )
    if mode == "sidecar" and config.cache.on_miss == "stop":
        yield (
            "teacher.mode=sidecar runs the teacher where no row is there; set cache.on_miss=online, "
            "or teacher.mode=cached for a run that stops"
        )
    if mode != "cached":
        return
    if not config.cache.dir:
        yield "cache.dir must be given for teacher.mode=cached; name the folder of the cache"
    if config.views.views_per_image is None:
        yield (
            "teacher.mode=cached reads a row for each of views.views_per_image views an image, but views.views_per_image"
            " is not given; set it to what the cache was built with, or set teacher.mode=online"
        )


def check_backend(backend: Backend) -> Iterator[str]:
    """Keys of DeepSpeed, and what ZeRO's stage 3 cannot do."""
    if backend.deepspeed is not None and backend.name != "deepspeed":
        yield f"backend.deepspeed belongs to backend.name=deepspeed; found {backend.name}"
    try:
        extra_keys(backend.deepspeed)
    except ConfigError as error:
        yield str(error)
    if backend.compile and backend.name == "deepspeed" and backend.zero_stage == 3:
        yield (
            "backend.compile=true: ZeRO-3 gathers weights between the operations of a block, which "
            "breaks every compiled graph; set backend.compile=false, backend.zero_stage=1 or "
            "backend.name=fsdp"
        )


def check_pictures(config: Config) -> Iterator[str]:
    """Pictures have a teacher to ask where the run has one."""
    every = config.log.images_every
    if every is not None and reads_cache(config) and not builds_teacher(config):
        yield (
            f"log.images_every={every} asks the teacher of images that no cache has, and the run "
            "builds none; set cache.on_miss=online, or log.images_every=null"
        )


def check_eval(config: Config) -> Iterator[str]:
    """An evaluation has images to learn from and to test on."""
    for key in ("eval.train_path", "eval.test_path"):
        if config.eval.every is not None and not value_of(config, key):
            yield (
                f"{key} must be given: eval.every={config.eval.every} evaluates on labelled images"
            )
