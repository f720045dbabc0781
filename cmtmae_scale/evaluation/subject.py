"""The weights that a command names: a checkpoint's, an exported file's, or a model of timm."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from cmtmae_scale.checkpoint import layout
from cmtmae_scale.checkpoint.chunks import ChunkReader
from cmtmae_scale.checkpoint.find import find_checkpoint
from cmtmae_scale.checkpoint.publish import ENCODERS
from cmtmae_scale.config.derive import needs
from cmtmae_scale.config.load import config_from_dict
from cmtmae_scale.config.schema import Config
from cmtmae_scale.config.schema import Teacher as TeacherConfig
from cmtmae_scale.errors import CheckpointError, ConfigError, TeacherError
from cmtmae_scale.evaluation.encoders import Encoder, of_student, of_tower, weights_digest
from cmtmae_scale.method.initialisation import initialise
from cmtmae_scale.method.student import Student, build_student
from cmtmae_scale.runtime.collectives import barrier
from cmtmae_scale.runtime.launch import World
from cmtmae_scale.teachers.base import Tower
from cmtmae_scale.teachers.build import assemble
from cmtmae_scale.teachers.timm import TimmSource
from cmtmae_scale.teachers.weights import read_weights

Weights = Literal["student", "momentum", "teacher"]
WEIGHTS = get_args(Weights)
RANDOM = "random weights"


@dataclass
class Subject:
    """What is evaluated, and the same architecture with random weights beside it."""

    encoder: Encoder
    random: Encoder | None
    facts: dict[str, Any]
    """What it is, for the result file."""
    run_dir: Path | None = None
    """Run that it belongs to."""
    config: Config | None = None
    """Settings of that run."""


def from_place(
    place: Path, weights: Weights | None, arch: str | None, world: World, device: torch.device
) -> Subject:
    """Open a run, a checkpoint or an exported file.

    Args:
        place: a run's folder (its newest intact checkpoint), a checkpoint's, or a ``.safetensors``
            file.
        weights: whose weights of a checkpoint; ``None``: the moving average where there is one.
        arch: timm's name for a file; ``None``: as ``config.json`` beside it says.
        world: this process's place.
        device: where the networks compute.

    Raises:
        CheckpointError: nothing there, something broken, or without these weights.
        ConfigError: options that do not belong to what is there. A collective.
    """
    if place.suffix == ".safetensors":
        if weights is not None:
            raise ConfigError(f"--weights belongs to a checkpoint; {place} is a file")
        return from_file(place, arch, device)
    if arch is not None:
        raise ConfigError(f"--arch belongs to a .safetensors file; found {place}")
    folder, run_dir = locate(place, world)
    state = layout.read_state(folder)
    if "start" in state:
        raise CheckpointError(
            f"{folder} is of a fine-tuning; its accuracy stands in the run's result.json"
        )
    config = config_from_dict(state["config"], str(folder / layout.STATE))
    weights = weights or ("momentum" if needs(config).momentum else "student")
    step = int(state["progress"]["step"])
    facts: dict[str, Any] = {"checkpoint": str(folder), "step": step, "weights": weights}
    if weights == "teacher":
        return from_teacher(config, facts, run_dir, device)
    if weights == "momentum" and not needs(config).momentum:
        raise CheckpointError(f"{folder}: the run has no momentum student; use --weights student")
    prefix = ENCODERS[weights]
    with ChunkReader(folder) as reader:
        tensors = {
            key.removeprefix(prefix): reader.read_whole(key)
            for key in reader.index
            if key.startswith(prefix)
        }
    name = f"{weights}, step {step}"
    encoder = student_of(config, tensors, name, str(folder), device)
    facts |= {"arch": config.student.arch, "sha256": encoder.digest}
    return Subject(encoder, random_student(config, device), facts, run_dir, config)


def locate(place: Path, world: World) -> tuple[Path, Path | None]:
    """Folder of an intact checkpoint at or under a path, and the run's. A collective.

    Raises:
        CheckpointError: if there is none.
    """
    if (place / "checkpoints").is_dir():
        folder = find_checkpoint(place / "checkpoints", world.rank, world.world_size)
        if folder is None:
            raise CheckpointError(f"{place}: no checkpoint yet; train first")
        return folder, place
    if not (place / layout.MANIFEST).exists():
        raise CheckpointError(
            f"--checkpoint={place} is neither a run (it has no checkpoints/), nor a checkpoint "
            f"(it has no {layout.MANIFEST}), nor a .safetensors file"
        )
    problem = layout.fault(place)
    if problem is not None:
        raise CheckpointError(f"{place} is broken: {problem}; name an older checkpoint or the run")
    return place, place.parent.parent if place.parent.name == "checkpoints" else None


def from_teacher(
    config: Config, facts: dict[str, Any], run_dir: Path | None, device: torch.device
) -> Subject:
    """The frozen teacher of a run: after its last block and norm.

    Raises:
        CheckpointError: if the run has none.
    """
    if not needs(config).teacher or config.teacher.mode == "none":
        raise CheckpointError(f"{facts['checkpoint']}: the run has no teacher")
    teacher = assemble(config, needs(config), load=True)
    name = f"teacher {config.teacher.model}"
    if config.teacher.weights == "random":
        name += " (random)"
    encoder = with_digest(name, teacher.tower, teacher.image_size, device)
    facts |= {"arch": config.teacher.model, "sha256": encoder.digest}
    return Subject(encoder, None, facts, run_dir, config)


def from_file(file: Path, arch: str | None, device: torch.device) -> Subject:
    """An encoder that ``launchers/export.py`` wrote; sides of pictures and patches are in it.

    Raises:
        CheckpointError: no such file, or not an encoder of this architecture.
        ConfigError: if the architecture is not known.
    """
    try:
        tensors = read_weights(file, "--checkpoint")
    except TeacherError as error:
        raise CheckpointError(str(error)) from error
    arch = arch or arch_beside(file)
    if not timm.is_model(arch):
        raise ConfigError(f"--arch={arch} is not a model of timm {timm.__version__}")
    config = Config()
    config.student.arch = arch
    try:
        patch = int(tensors["patch_embed.proj.weight"].shape[-1])
        positions = int(tensors["pos_embed"].shape[1])
    except KeyError as error:
        raise CheckpointError(f"{file}: has no {error}: it is no encoder of export.py") from error
    with torch.device("meta"):
        probe = cast(VisionTransformer, timm.create_model(arch, num_classes=0))
    prefix = 0 if probe.no_embed_class else probe.num_prefix_tokens
    config.student.patch_size = patch
    config.views.image_size = patch * math.isqrt(positions - prefix)
    encoder = student_of(config, tensors, file.name, str(file), device)
    facts = {"file": str(file), "arch": arch, "sha256": encoder.digest}
    return Subject(encoder, random_student(config, device), facts)


def arch_beside(file: Path) -> str:
    """What ``config.json`` beside a file, of timm's kind, says of the architecture.

    Raises:
        ConfigError: if there is none.
    """
    try:
        return str(json.loads(file.with_name("config.json").read_text())["architecture"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{file}: which architecture is it? No config.json beside it says so; give --arch "
            "NAME, as student.arch of the run"
        ) from error


def student_of(
    config: Config, tensors: dict[str, Tensor], name: str, place: str, device: torch.device
) -> Encoder:
    """A config's student with these weights.

    Raises:
        CheckpointError: if names or shapes differ.
    """
    student = build_student(config)
    try:
        student.load_state_dict(tensors, strict=True)
    except RuntimeError as error:
        first = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"{place}: does not fit {config.student.arch} with patches of "
            f"{student.patch_side} at {config.views.image_size} pixels ({first}); give its own "
            "architecture"
        ) from error
    return with_digest(name, student, config.views.image_size, device)


def random_student(config: Config, device: torch.device) -> Encoder:
    """A config's student as a run starts it."""
    student = build_student(config)
    initialise(student, config.run.seed)
    return with_digest(RANDOM, student, config.views.image_size, device)


def from_timm(
    name: str, file: str | None, size: int | None, seed: int, world: World, device: torch.device
) -> Subject:
    """A vision transformer of timm, with weights of a tag or of a file.

    Args:
        name: ``MODEL.TAG``, or ``MODEL`` with ``file``.
        file: local weights.
        size: side of pictures; ``None``: the model's own.
        seed: of the random weights beside it.
        world: this process's place.
        device: where the networks compute.

    Raises:
        ConfigError: no such model, tag or file, or one that cannot be read. A collective.
    """
    model, _, tag = name.partition(".")
    if not tag and file is None:
        raise ConfigError(f"--timm={name}: with which weights? Give {name}.TAG, or --file FILE")
    try:
        source = TimmSource(TeacherConfig("timm", name, file or tag))
        side = size or own_size(source.full_name)
        if side % source.patch:
            raise ConfigError(f"--size={side} is not a multiple of the patch, {source.patch}")
        if world.local_rank == 0:
            source.build(side, seed)  # fetched once on each node
        barrier()
        tower = source.build(side, seed)
        untrained = TimmSource(TeacherConfig("timm", name, "random")).build(side, seed)
    except TeacherError as error:
        text = str(error).replace("teacher.model", "--timm").replace("teacher.weights", "--file")
        raise ConfigError(text) from error
    encoder = with_digest(name, tower, side, device)
    facts = {"timm": name, "file": file, "arch": model, "sha256": encoder.digest}
    return Subject(encoder, with_digest(RANDOM, untrained, side, device), facts)


def with_digest(name: str, model: Student | Tower, size: int, device: torch.device) -> Encoder:
    """A model as an encoder that says which weights it has."""
    if isinstance(model, Student):
        encoder, state = of_student(name, model, size, device), model.state_dict()
    else:
        encoder, state = of_tower(name, model, size, device), model.model.state_dict()
    return encoder._replace(digest=weights_digest(state), network=model)


def own_size(name: str) -> int:
    """Side of the pictures that a model of timm was trained on."""
    settings = timm.get_pretrained_cfg(name)
    return 224 if settings is None else int(settings.input_size[-1])
