"""The evaluated weights: of a checkpoint, of an exported file, or of a model of timm."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor

from cmtmae_scale.checkpoint import layout
from cmtmae_scale.checkpoint.shards import ENCODERS
from cmtmae_scale.config.derive import name_student, replaced_sizes
from cmtmae_scale.config.needs import needs
from cmtmae_scale.config.schema import Config
from cmtmae_scale.config.schema import Student as StudentConfig
from cmtmae_scale.config.schema import Teacher as TeacherConfig
from cmtmae_scale.config.teachers import pick_teacher
from cmtmae_scale.engine.progress import Progress
from cmtmae_scale.errors import CheckpointError, ConfigError, TeacherError
from cmtmae_scale.evaluation.encoder_file import exported_file, file_config, read_file
from cmtmae_scale.evaluation.encoders import (
    Encoder,
    encoder_from_student,
    encoder_from_tower,
    weights_digest,
)
from cmtmae_scale.evaluation.saved import (
    check_encoder,
    locate_checkpoint,
    read_tensors,
    refuse_loaded_start,
    run_of_checkpoint,
    saved_config,
)
from cmtmae_scale.method.build import build_student
from cmtmae_scale.method.initialisation import initialise
from cmtmae_scale.method.student import Student
from cmtmae_scale.runtime.collectives import on_all_ranks
from cmtmae_scale.runtime.launch import World
from cmtmae_scale.teachers.base import Tower
from cmtmae_scale.teachers.build import assemble_teacher
from cmtmae_scale.teachers.state_dicts import SAVE_FLOATS, find_other_dtype
from cmtmae_scale.teachers.timm import TimmSource

RANDOM = "random weights"


@dataclass
class Subject:
    """The evaluated encoder, and its architecture with random weights as a baseline."""

    encoder: Encoder
    build_random: Callable[[], Encoder] | None
    """Builds the baseline; ``None``: there is none."""
    facts: dict[str, Any]
    """Identity of the weights, for the result file."""
    run_dir: Path | None = None
    """Folder of the run that the weights belong to."""
    config: Config | None = None
    """Settings of that run."""
    student: StudentConfig | None = None
    """Settings that build the encoder; ``None``: it is not a student."""
    fraction: float = 1.0
    """Progress of that run at the checkpoint, u = position / horizon."""

    @cached_property
    def random(self) -> Encoder | None:
        """Return the baseline, built on first access."""
        return None if self.build_random is None else self.build_random()


def open_subject(options: argparse.Namespace, world: World, device: torch.device) -> Subject:
    """Open the weights that the options name. A collective.

    The options are ``checkpoint``, ``weights``, ``arch``, ``timm``, ``file``, ``size`` and ``seed``
    of the random baseline of a timm model; see ``commands/evaluate.py``.

    Raises:
        CheckpointError: no checkpoint, a broken checkpoint, or one without these weights.
        ConfigError: options that do not fit what the path holds.
    """
    if options.timm is not None:
        return subject_from_timm(
            options.timm, options.file, options.size, options.seed, world, device
        )
    file = on_all_ranks(lambda: find_file(options))
    if file is not None:
        return on_all_ranks(lambda: subject_from_file(file, options.arch, device))
    return subject_from_checkpoint(options.checkpoint, options.weights, world, device)


def find_file(options: argparse.Namespace) -> Path | None:
    """Return the file of an exported encoder that ``checkpoint`` names; ``None``: it names none.

    Raises:
        ConfigError: options that do not fit what the path holds.
    """
    place: Path = options.checkpoint
    file = exported_file(place)
    if file is not None and options.weights is not None:
        raise ConfigError(f"--weights belongs to a checkpoint; {file} is a file")
    if file is None and options.arch is not None:
        raise ConfigError(f"--arch belongs to a .safetensors file; found {place}")
    return file


def subject_from_checkpoint(
    place: Path, weights: str | None, world: World, device: torch.device
) -> Subject:
    """Open an encoder of a run's newest intact checkpoint, or of a named checkpoint.

    ``weights``: ``student``, ``momentum``, ``teacher``, or ``random`` for the initial weights of
    the student, where its seed gave them; ``None``: momentum where the run has it.

    Raises:
        CheckpointError: no checkpoint, a broken checkpoint, or one without these weights.
    """
    folder = locate_checkpoint(place, world.rank, world.world_size)
    return on_all_ranks(lambda: open_encoder(folder, weights, device))


def open_encoder(folder: Path, weights: str | None, device: torch.device) -> Subject:
    """Open an encoder of an intact checkpoint; see ``subject_from_checkpoint``."""
    run_dir = run_of_checkpoint(folder)
    state = layout.read_state(folder)
    config = saved_config(folder, state)
    weights = weights or ("momentum" if needs(config).momentum else "student")
    step = int(state["progress"]["step"])
    fraction = Progress.from_dict(state["progress"]).fraction
    facts: dict[str, Any] = {"checkpoint": str(folder), "step": step, "weights": weights}
    if weights.partition(":")[0] == "teacher":
        config = pick_teacher(config, weights.partition(":")[2] or None, "--weights teacher:")
        return subject_from_teacher(config, facts, run_dir, device)
    if weights == "random":
        refuse_loaded_start(config, str(folder))
        encoder = random_student(config, device)
        student = config.student
        facts |= {"arch": student.arch, **replaced_sizes(student), "sha256": encoder.digest}
        return Subject(encoder, None, facts, run_dir, config, student, fraction)
    if weights == "momentum" and not needs(config).momentum:
        raise CheckpointError(f"{folder}: the run has no momentum encoder; use --weights student")
    check_encoder(folder, config, ENCODERS[weights])
    tensors = read_tensors(folder, ENCODERS[weights])
    encoder = load_student(config, tensors, f"{weights}, step {step}", str(folder), device)
    student = config.student
    facts |= {"arch": student.arch, **replaced_sizes(student), "sha256": encoder.digest}
    build_random = partial(random_student, config, device)
    return Subject(encoder, build_random, facts, run_dir, config, student, fraction)


def subject_from_teacher(
    config: Config, facts: dict[str, Any], run_dir: Path | None, device: torch.device
) -> Subject:
    """Open the frozen teacher of a run; features after its last block and norm.

    Raises:
        CheckpointError: if the run has no teacher.
    """
    if not needs(config).teacher or config.teacher.mode == "none":
        raise CheckpointError(f"{facts['checkpoint']}: the run has no teacher")
    teacher = assemble_teacher(config, needs(config), load=True)
    name = f"teacher {config.teacher.model}"
    if config.teacher.weights == "random":
        name += " (random)"
    encoder = wrap_network(name, teacher.tower, teacher.image_size, device)
    facts |= {"arch": config.teacher.model, "sha256": encoder.digest}
    return Subject(encoder, None, facts, run_dir, config)


def subject_from_file(file: Path, arch: str | None, device: torch.device) -> Subject:
    """Open an encoder that ``cmtmae export`` wrote; sizes follow from the tensors.

    ``arch`` is timm's name; ``None``: as ``config.json`` beside the file names it.

    Raises:
        CheckpointError: no such file, or not an encoder of this architecture.
        ConfigError: if the architecture is not known.
    """
    tensors = read_file(file)
    config = file_config(file, tensors, arch)
    encoder = load_student(config, tensors, file.name, str(file), device)
    sizes = {"arch": config.student.arch, **replaced_sizes(config.student)}
    facts = {"file": str(file), **sizes, "sha256": encoder.digest}
    build_random = partial(random_student, config, device)
    return Subject(encoder, build_random, facts, student=config.student)


def load_student(
    config: Config, tensors: dict[str, Tensor], name: str, place: str, device: torch.device
) -> Encoder:
    """Build a config's student and load these weights strictly.

    Raises:
        CheckpointError: if names or shapes differ.
    """
    student = build_student(config)
    other = find_other_dtype(student.state_dict(), tensors)
    if other:
        raise CheckpointError(f"{place}: {other[0]}; {SAVE_FLOATS}")
    try:
        student.load_state_dict(tensors, strict=True)
    except RuntimeError as error:
        first = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"{place}: does not fit {name_student(config.student)} with patches of "
            f"{student.patch_side} at {config.views.image_size} pixels ({first}); give its own "
            "architecture"
        ) from error
    return wrap_network(name, student, config.views.image_size, device)


def random_student(config: Config, device: torch.device) -> Encoder:
    """Build a config's student with weights drawn at random from the seed of the run."""
    student = build_student(config)
    initialise(student, config.run.seed)
    return wrap_network(RANDOM, student, config.views.image_size, device)


def subject_from_timm(
    name: str, file: str | None, size: int | None, seed: int, world: World, device: torch.device
) -> Subject:
    """Open a network of timm, with weights of a tag or of a file.

    ``name`` is ``MODEL.TAG``, or ``MODEL`` with a local file; ``size`` is the side of the images,
    ``None``: the model's own; the seed is that of the random weights of the baseline.

    Raises:
        ConfigError: no such model, tag or file, or one that cannot be read. A collective.
    """
    model, _, tag = name.partition(".")
    if not tag and file is None:
        raise ConfigError(f"--timm={name} names no weights; give {name}.TAG, or --file FILE")
    try:
        source = on_all_ranks(lambda: TimmSource(TeacherConfig("timm", name, file or tag)))
        settings = timm.get_pretrained_cfg(source.full_name)
        side = size or (224 if settings is None else int(settings.input_size[-1]))
        if side % source.patch:
            raise ConfigError(f"--size={side} is not a multiple of the patch, {source.patch}")
        fetches = world.local_rank == 0
        first = on_all_ranks(lambda: source.build(side, seed) if fetches else None)  # per node
        tower = on_all_ranks(lambda: first or source.build(side, seed))
        untrained = TimmSource(TeacherConfig("timm", name, "random"))
    except TeacherError as error:
        raise ConfigError(name_options(str(error), model)) from error
    encoder = wrap_network(name, tower, side, device)
    facts = {"timm": name, "file": file, "arch": model, "sha256": encoder.digest}
    return Subject(
        encoder, lambda: wrap_network(RANDOM, untrained.build(side, seed), side, device), facts
    )


def name_options(text: str, model: str) -> str:
    """Return a teacher's error with options of the command in place of keys of the config."""
    for key, option in {
        "teacher.model": "--timm",
        "teacher.weights": "--file",
        ", or set teacher.quick_gelu=false to keep GELU": "",
        "set teacher.quick_gelu=false": f"name the tag, --timm={model}.TAG,",
    }.items():
        text = text.replace(key, option)
    return text


def wrap_network(name: str, model: Student | Tower, size: int, device: torch.device) -> Encoder:
    """Wrap a network as an encoder with the digest of its weights."""
    if isinstance(model, Student):
        encoder, state = encoder_from_student(name, model, size, device), model.state_dict()
    else:
        encoder, state = encoder_from_tower(name, model, size, device), model.model.state_dict()
    return encoder._replace(digest=weights_digest(state), network=model)
