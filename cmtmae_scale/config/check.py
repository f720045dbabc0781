"""Checks of a config: ranges of single fields, then combinations that can never work.

Each problem is one sentence with the key, the value found and the remedy.
"""

import math
import os
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, cast

from cmtmae_scale.config.deepspeed import extra_keys
from cmtmae_scale.config.needs import extremes, needs
from cmtmae_scale.config.ranges import Range
from cmtmae_scale.config.schema import Backend, Config, Schedule, Student, Teacher, Train
from cmtmae_scale.config.teachers import (
    builds_teacher,
    cache_folder,
    entry_text,
    reads_cache,
    teacher_config,
)
from cmtmae_scale.errors import ConfigError
from dataloading.addresses import find_address_problem, is_url

LARGEST = 2**63
"""Bound of whole numbers, steps and nanoseconds, which are computed in 64 bits."""
LENGTHS = ("epochs", "warmup_epochs", "time_limit_s", "hang_seconds")
"""Fields with fractions that are converted to whole numbers."""
TRACKERS = ("wandb", "mlflow", "trackio")
"""Experiment trackers that ``log.trackers`` may name."""
IMAGE_SETS = ("data.path", "data.test_path", "eval.train_path", "eval.test_path")
"""Keys that may be the address of tars in a store."""
FILE_SYSTEM_KEYS = (
    *("run.output_dir", "data.index", "data.store_cache", "cache.dir", "student.init_weights"),
    *("student.init_from_run", "eval.segmentation_path"),
)
"""Keys that need a file system: object stores have no locks, renames or mapped memory."""
DETERMINISTIC_SAMPLERS = ("hide_salient", "reveal_salient_topk")


def find_problems(config: Config) -> Iterator[str]:
    """Yield every problem of a pre-training config, most basic first."""
    yield from check_ranges(config)
    yield from check_data(config)
    yield from check_length(config.train)
    yield from check_schedules(config)
    yield from check_masks(config)
    yield from check_student(config.student)
    yield from check_start(config)
    yield from check_decoder(config)
    yield from check_losses(config)
    if config.teachers:
        yield from check_teachers(config)
    else:
        yield from check_single_teacher(config)
    yield from check_precision("momentum", config.momentum.precision, config.backend.precision)
    yield from check_backend(config.backend)
    yield from check_log(config.log.trackers, config.log.profile_steps)
    yield from check_evaluation(config)


def check_ranges(group: Any, prefix: str = "") -> Iterator[str]:
    """Check every field against the range in its metadata, for a config of any task."""
    for one in fields(group):
        key, value = f"{prefix}{one.name}", getattr(group, one.name)
        if is_dataclass(value):
            yield from check_ranges(value, f"{key}.")
            continue
        if isinstance(value, list) and any(map(is_dataclass, cast(list[Any], value))):
            for entry in cast(list[Any], value):
                yield from check_ranges(entry, f"{key}.{entry.name}.")
            continue
        if isinstance(value, str) and value.startswith("~/"):
            yield f"{key}={value}: ~ is not expanded; write the full path"
        if isinstance(value, str) and is_url(value):
            problem = find_address_problem(value) if key in IMAGE_SETS else None
            if problem is not None:
                yield f"{key}: {problem}"
            if key in FILE_SYSTEM_KEYS:
                yield (
                    f"{key}={value} is an address; only tars of images are read from "
                    "stores: set a path of a file system, local or shared"
                )
        if "empty" in one.metadata and value is not None and not value:
            yield f"{key} is empty; {one.metadata['empty']}"
        items = cast(list[Any], [*value] if isinstance(value, tuple | list) else [value])
        numbers = [item for item in items if isinstance(item, int | float)]
        legal: Range = one.metadata.get("range", Range())
        if not all(math.isfinite(number) for number in numbers):
            yield f"{key}={value} must be finite"
        elif any(
            abs(number) >= LARGEST
            for number in numbers
            if isinstance(number, int) or one.name in LENGTHS
        ):
            yield f"{key}={value} must be below {LARGEST} (2 to the 63rd)"
        elif not all(legal.allows(number) for number in numbers):
            yield f"{key}={value} {legal}"
        elif legal.ascending and numbers != sorted(numbers):
            yield f"{key}={value} must be in ascending order"


def check_data(config: Config) -> Iterator[str]:
    """Check settings of decoding, order and store that exclude each other."""
    if config.data.store_cache is not None and not is_url(config.data.path):
        yield (
            f"data.store_cache={config.data.store_cache} is for tars of a store, and "
            f"data.path={config.data.path} is a path of a file system: set data.store_cache=null"
        )
    if config.data.resident and config.data.worker_type == "process":
        yield (
            "data.resident=true decodes each image once, in threads; found "
            "data.worker_type=process: set auto or thread"
        )
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


def check_length(train: Train) -> Iterator[str]:
    """Check that exactly one length is given."""
    epochs, steps = train.epochs, train.steps
    if (epochs is None) == (steps is None):
        found = "neither" if epochs is None else f"epochs={epochs} and steps={steps}"
        yield f"train: give epochs or steps, exactly one of them; found {found}"


def check_schedules(config: Config) -> Iterator[str]:
    """Check that each schedule has the fields of its kind."""
    for key, schedule in (
        ("mask.salient_fraction", config.mask.salient_fraction),
        ("collaboration.alpha_attention", config.collaboration.alpha_attention),
        ("collaboration.alpha_target", config.collaboration.alpha_target),
    ):
        if not isinstance(schedule, Schedule):
            continue
        if schedule.kind == "constant":
            if schedule.end is not None:
                yield f"{key}: a constant schedule has no end; use linear, cosine or two_stage"
        elif schedule.end is None:
            yield f"{key}.end must be given for a {schedule.kind} schedule"
        if (schedule.kind == "two_stage") != (schedule.switch is not None):
            yield (
                f"{key}.switch belongs to two_stage schedules, which need it; found {schedule.kind}"
            )
        if schedule.kind in ("constant", "two_stage") and (schedule.u0, schedule.u1) != (0, 1):
            yield (
                f"{key}.u0={schedule.u0} and {key}.u1={schedule.u1} are the ends of linear and "
                f"cosine schedules; found {schedule.kind}"
            )
        if not schedule.u0 < schedule.u1:
            yield f"{key}.u0={schedule.u0} must be below {key}.u1={schedule.u1}"


def check_masks(config: Config) -> Iterator[str]:
    """Check mask fractions, masks per view, and normalisation against the mixing schedule."""
    mask = config.mask
    if mask.ratio + mask.throw_ratio >= 1:
        total = mask.ratio + mask.throw_ratio
        yield f"mask.ratio + mask.throw_ratio = {total} leaves nothing visible"
    if mask.sampler == "random" and (mask.hint_fraction > 0 or mask.prob < 1):
        yield (
            f"mask.hint_fraction={mask.hint_fraction} and mask.prob={mask.prob} follow attention, "
            "mask.sampler=random does not; use 0 and 1, or another sampler"
        )
    visible = 1 - mask.ratio - mask.throw_ratio + 1e-9  # 1 - 0.9 is less than 0.1 in floats
    if mask.hint_fraction > min(mask.hint_pool, visible):
        yield (
            f"mask.hint_fraction={mask.hint_fraction} must not exceed "
            f"mask.hint_pool={mask.hint_pool}, nor the share of patches that stays visible"
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
                f"attention.norm={config.attention.norm} amplifies the untrained momentum encoder; "
                "keep collaboration.alpha_attention at 1 for at least 0.05 of the run "
                f"(found {settled:g}), or use attention.norm=prob"
            )


def alpha_warmup(schedule: Schedule | float) -> float:
    """Return the share of the run, from its beginning, during which a schedule stays at 1."""
    if not isinstance(schedule, Schedule):
        return float(schedule == 1)
    if schedule.start < 1:
        return 0.0
    if schedule.kind == "constant":
        return 1.0
    return schedule.switch or 0.0 if schedule.kind == "two_stage" else schedule.u0


def check_student(student: Student) -> Iterator[str]:
    """Check width against positional embedding; ``method.build`` checks it against the heads."""
    if student.width is not None and student.width % 4:
        yield f"student.width={student.width} must be a multiple of 4 (sine-cosine embedding)"


def check_start(config: Config) -> Iterator[str]:
    """Check that the initial weights have one source, and that it is not the run itself."""
    student, place = config.student, config.student.init_from_run
    if place is None:
        if student.init_optimizer:
            yield (
                "student.init_optimizer=true takes the moments of student.init_from_run, which is "
                "not given; give it, or set student.init_optimizer=false"
            )
        return
    if student.init_weights is not None:
        yield (
            f"student.init_from_run={place} and student.init_weights={student.init_weights} both "
            "give the initial weights; set one of them to null"
        )
    source, own = (Path(os.path.abspath(one)) for one in (place, config.run.output_dir))
    if source == own or source.is_relative_to(own / "checkpoints"):
        yield (
            f"student.init_from_run={place} belongs to run.output_dir={config.run.output_dir}, "
            "which a launch resumes; name another run.output_dir"
        )


def check_decoder(config: Config) -> Iterator[str]:
    """Check the decoder against mask and loss."""
    decoder, loss = config.decoder, config.loss
    if decoder.width % decoder.heads:
        yield f"decoder.width={decoder.width} is not a multiple of decoder.heads={decoder.heads}"
    if decoder.width % 4:
        yield f"decoder.width={decoder.width} must be a multiple of 4 (sine-cosine embedding)"
    if decoder.type == "none" and loss.tokens != "visible":
        yield (
            "decoder.type=none sees visible patches only; set loss.tokens=visible, "
            f"not {loss.tokens}"
        )
    if decoder.type != "none" and loss.tokens == "visible":
        yield "loss.tokens=visible predicts no masked patch; set decoder.type=none"
    if decoder.predict_ratio is not None:
        if decoder.type != "cross":
            yield (
                "decoder.predict_ratio needs decoder.type=cross, whose masked tokens are "
                f"independent; found {decoder.type}"
            )
        if not 0 < decoder.predict_ratio <= config.mask.ratio:
            yield (
                f"decoder.predict_ratio={decoder.predict_ratio} must lie in "
                f"(0, mask.ratio={config.mask.ratio}]"
            )
    if decoder.position_grid is not None and decoder.type == "none":
        yield (
            f"decoder.position_grid={decoder.position_grid}: decoder.type=none has no positions; "
            "set decoder.position_grid=null"
        )
    if decoder.prompt_norm_context and decoder.type != "prompt":
        yield f"decoder.prompt_norm_context belongs to decoder.type=prompt; found {decoder.type}"


def check_losses(config: Config) -> Iterator[str]:
    """Check that there is a weighted target, on a comparable scale."""
    need, loss = needs(config), config.loss
    if not (need.teacher_features or need.student_features or need.pixels):
        yield "no target has a weight; raise loss.teacher, loss.student or loss.pixel"
    if need.student_features:
        yield from check_scale("student", config.target.student.norm, loss.type)
    if config.target.student.layers != [-1] and config.target.student.feature != "block":
        yield "target.student.layers needs target.student.feature=block"


def check_scale(name: str, norm: str, loss_type: str) -> Iterator[str]:
    """Check that a target's norm sets a scale where the loss needs a scale."""
    if loss_type != "cosine" and norm in ("center", "none"):
        yield (
            f"target.{name}.norm={norm} with loss.type={loss_type} has no scale; use ln, l2, "
            "instance or channel"
        )


def check_teachers(config: Config) -> Iterator[str]:
    """Check each of several teachers as a single teacher; each has a weight and its own cache."""
    for one in fields(Teacher):
        value = getattr(config.teacher, one.name)
        if value != one.default:
            yield (
                f"teacher.{one.name}={value} is for a single teacher, and the recipe has teachers; "
                f"set teachers.NAME.{one.name}, NAME one of "
                f"{', '.join(entry.name for entry in config.teachers)}, or teachers=[]"
            )
    _, most = extremes(config.collaboration.alpha_attention)
    if config.mask.sampler != "random" and most > 0 and not any(e.map > 0 for e in config.teachers):
        listed = " and ".join(f"teachers.{entry.name}.map=0" for entry in config.teachers)
        yield (
            f"{listed} leave no map that collaboration.alpha_attention could weigh; raise one, or "
            "set collaboration.alpha_attention=0"
        )
    folders = dict[str, str]()
    for entry in config.teachers:
        key = f"teachers.{entry.name}"
        if not entry.loss and not entry.map:
            yield f"{key}.loss=0 and {key}.map=0 leave no use for it; remove the entry"
        alone = teacher_config(config, entry)
        for problem in check_ranges(alone.cache, "cache."):
            yield entry_text(problem, entry.name)
        for problem in check_single_teacher(alone):
            yield entry_text(problem, entry.name)
        if alone.cache.dir:
            folder = str(cache_folder(alone).absolute())
            if folder in folders:
                yield (
                    f"{key}.cache_dir={alone.cache.dir} is the cache of teachers.{folders[folder]} "
                    "too; give each teacher its own folder"
                )
            folders[folder] = entry.name


def check_single_teacher(config: Config) -> Iterator[str]:
    """Check everything about the only teacher of a config."""
    if needs(config).teacher_features:
        yield from check_scale("teacher", config.target.teacher.norm, config.loss.type)
    if config.target.teacher.layers != [-1] and config.teacher.feature != "block":
        yield "target.teacher.layers needs teacher.feature=block"
    yield from check_teacher(config)
    yield from check_cache(config)
    yield from check_precision("teacher", config.teacher.precision, config.backend.precision)
    yield from check_figures(config)


def check_teacher(config: Config) -> Iterator[str]:
    """Check that a teacher is given where the run uses a teacher."""
    teacher = config.teacher
    if not needs(config).teacher:
        return
    if teacher.mode == "none":
        yield (
            "teacher.mode=none, but the mask or the loss uses the teacher; "
            "set teacher.mode=online, or mask.sampler=random and loss.teacher=0"
        )
        return
    if teacher.library == "python":
        if not teacher.model:
            yield "teacher.model=package.module:factory must be given for teacher.library=python"
    elif not teacher.model or not teacher.weights:
        yield (
            "teacher.model and teacher.weights must be given: the mask or the loss uses the teacher"
        )
    if teacher.library == "open_clip" and teacher.quick_gelu is None:
        yield (
            "teacher.quick_gelu must be given for open_clip: true for OpenAI, DFN and MetaCLIP "
            "weights, false for LAION and DataComp"
        )


def check_cache(config: Config) -> Iterator[str]:
    """Check that a cache has a folder, a use, and a row for every view."""
    mode = config.teacher.mode
    if mode in ("cached", "sidecar") and not needs(config).teacher:
        yield (
            f"teacher.mode={mode}, but neither the mask nor the loss uses the teacher; set "
            "teacher.mode=none"
        )
    if mode == "sidecar" and config.cache.on_miss == "stop":
        yield (
            "teacher.mode=sidecar runs the teacher where a row is missing; set "
            "cache.on_miss=online, or teacher.mode=cached for a run that stops"
        )
    if mode != "cached":
        return
    if not config.cache.dir:
        yield "cache.dir must be given for teacher.mode=cached; name the folder of the cache"
    if config.views.views_per_image is None:
        yield (
            "teacher.mode=cached reads one row per view, but views.views_per_image is not given; "
            "set it to what the cache was built with, or set teacher.mode=online"
        )


def check_backend(backend: Backend) -> Iterator[str]:
    """Check keys of DeepSpeed, and combinations that the backends cannot run."""
    if backend.deepspeed is not None and backend.name != "deepspeed":
        yield f"backend.deepspeed belongs to backend.name=deepspeed; found {backend.name}"
    if not isinstance(backend.deepspeed, str):  # a file is read only at a launch
        try:
            extra_keys(backend.deepspeed)
        except ConfigError as error:
            yield str(error)
    if backend.reduce_every_micro_step and backend.name == "deepspeed":
        yield (
            "backend.reduce_every_micro_step=true belongs to backend.name=fsdp; DeepSpeed reduces "
            "by stage: set backend.zero_stage=2, which reduces at every micro-step"
        )
    elif backend.reduce_every_micro_step and backend.sharding == "replicate":
        yield (
            "backend.reduce_every_micro_step=true: with backend.sharding=replicate every rank "
            "keeps all gradients; set backend.sharding=hybrid or full"
        )
    if backend.compile and backend.name == "deepspeed" and backend.zero_stage == 3:
        yield (
            "backend.compile=true: ZeRO-3 gathers weights between the operations of a block, which "
            "breaks every compiled graph; set backend.compile=false, backend.zero_stage=1 or "
            "backend.name=fsdp"
        )


def check_precision(group: str, precision: str, backend: str) -> Iterator[str]:
    """Check the backend of float8 layers, which take and return bfloat16."""
    if precision == "fp8" and backend != "bf16":
        yield f"{group}.precision=fp8 needs backend.precision=bf16; found {backend}"


def check_log(trackers: list[str], profile_steps: list[int]) -> Iterator[str]:
    """Check that trackers are known and distinct, and that zero or two profiled steps are given."""
    for name in trackers:
        if name not in TRACKERS:
            yield f"log.trackers={trackers}: {name!r} is not one of {', '.join(TRACKERS)}"
    if len({*trackers}) < len(trackers):
        yield f"log.trackers={trackers} names a tracker twice; name it once"
    if len(profile_steps) not in (0, 2):
        yield f"log.profile_steps={profile_steps} must be a first and a last step, such as [10, 13]"


def check_figures(config: Config) -> Iterator[str]:
    """Check that figures have the teacher itself, for images that no cache holds."""
    every = config.log.images_every
    if every is not None and reads_cache(config) and not builds_teacher(config):
        yield (
            f"log.images_every={every} runs the teacher on images that no cache holds, and the run "
            "builds no teacher; set cache.on_miss=online, or log.images_every=null"
        )


def check_evaluation(config: Config) -> Iterator[str]:
    """Check that an evaluation has training and test images."""
    for name in ("train_path", "test_path"):
        if config.eval.every is not None and not getattr(config.eval, name):
            yield (
                f"eval.{name} must be given: eval.every={config.eval.every} evaluates on labelled "
                "images"
            )
