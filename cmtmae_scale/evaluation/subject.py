"""The evaluated weights: of a checkpoint, of an exported file, or of a model of timm."""

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast

import timm
import torch
from safetensors import safe_open
from torch import Tensor

from cmtmae_scale.checkpoint import layout
from cmtmae_scale.checkpoint.chunks import ChunkReader
from cmtmae_scale.checkpoint.find import find_checkpoint, verify_together
from cmtmae_scale.checkpoint.shards import ENCODERS
from cmtmae_scale.config.derive import (
    loaded_start,
    name_student,
    needs,
    pick_teacher,
    replaced_sizes,
)
from cmtmae_scale.config.load import config_from_dict
from cmtmae_scale.config.schema import Config
from cmtmae_scale.config.schema import Student as StudentConfig
from cmtmae_scale.config.schema import Teacher as TeacherConfig
from cmtmae_scale.engine.progress import Progress
from cmtmae_scale.errors import CheckpointError, ConfigError, StorageError, TeacherError
from cmtmae_scale.evaluation.encoders import (
    Encoder,
    encoder_from_student,
    encoder_from_tower,
    weights_digest,
)
from cmtmae_scale.method.build import build_student, probe_arch, probe_student
from cmtmae_scale.method.initialisation import initialise
from cmtmae_scale.method.student import Student
from cmtmae_scale.runtime.collectives import on_all_ranks
from cmtmae_scale.runtime.launch import World
from cmtmae_scale.runtime.storage import read_inside, read_json
from cmtmae_scale.teachers.base import Tower
from cmtmae_scale.teachers.build import assemble_teacher
from cmtmae_scale.teachers.state_dicts import SAVE_FLOATS, find_other_dtype
from cmtmae_scale.teachers.timm import TimmSource
from cmtmae_scale.teachers.weights import read_weights

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
        """The baseline, built when it is first asked for."""
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
    place: Path = options.checkpoint
    if place.suffix == ".safetensors":
        if options.weights is not None:
            raise ConfigError(f"--weights belongs to a checkpoint; {place} is a file")
        return on_all_ranks(lambda: subject_from_file(place, options.arch, device))
    if options.arch is not None:
        raise ConfigError(f"--arch belongs to a .safetensors file; found {place}")
    return subject_from_checkpoint(place, options.weights, world, device)


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
    facts: dict[str, Any] = {"checkpoint": str(folder), "step": step, "weights": weights}
    if weights.partition(":")[0] == "teacher":
        config = pick_teacher(config, weights.partition(":")[2] or None, "--weights teacher:")
        return subject_from_teacher(config, facts, run_dir, device)
    if weights == "random":
        refuse_loaded_start(config, str(folder))
        encoder = random_student(config, device)
        student = config.student
        facts |= {"arch": student.arch, **replaced_sizes(student), "sha256": encoder.digest}
        return Subject(encoder, None, facts, run_dir, config, student)
    if weights == "momentum" and not needs(config).momentum:
        raise CheckpointError(f"{folder}: the run has no momentum encoder; use --weights student")
    check_encoder(folder, config, ENCODERS[weights])
    tensors = read_tensors(folder, ENCODERS[weights])
    encoder = load_student(config, tensors, f"{weights}, step {step}", str(folder), device)
    student = config.student
    facts |= {"arch": student.arch, **replaced_sizes(student), "sha256": encoder.digest}
    fraction = Progress.from_dict(state["progress"]).fraction
    build_random = partial(random_student, config, device)
    return Subject(encoder, build_random, facts, run_dir, config, student, fraction)


def refuse_loaded_start(config: Config, place: str) -> None:
    """Refuse random weights as the initial weights of a run that loaded its initial weights.

    Raises:
        CheckpointError: naming what the run started from.
    """
    loaded = loaded_start(config.student)
    if loaded is None:
        return
    key, start = loaded
    options = f"--timm {config.student.arch} --file {start}"
    if key == "student.init_from_run":
        options = f"--checkpoint {start} --weights student"
    raise CheckpointError(
        f"{place}: the run started from {key}={start}, so random weights are not its initial "
        f"weights; evaluate those with {options}"
    )


def saved_config(folder: Path, state: dict[str, Any]) -> Config:
    """Rebuild the settings of a checkpoint of pre-training.

    Raises:
        CheckpointError: if it is of another task, or this version refuses its settings.
    """
    if state["task"] == "fine-tuning":
        raise CheckpointError(
            f"{folder} is of a fine-tuning run; its accuracy is in the run's result.json, and "
            f"{layout.ENCODER} of the checkpoint has its weights under timm's names"
        )
    try:
        return config_from_dict(state["config"], str(folder / layout.STATE))
    except ConfigError as error:
        raise CheckpointError(str(error)) from error


def locate_checkpoint(
    place: Path, rank: int = 0, world_size: int = 1, key: str = "--checkpoint", hashes: bool = True
) -> Path:
    """Return an intact checkpoint's folder: the path itself, or the newest of the run there.

    A collective where there are several ranks, which read each byte once.

    Args:
        place: folder of a run or of a checkpoint.
        rank: this rank.
        world_size: number of ranks.
        key: option or config key that gives the path, for messages.
        hashes: read all bytes; else sizes and small files alone.

    Raises:
        CheckpointError: if there is none, or the named checkpoint is broken.
        StorageError: if the store fails.
    """
    if on_all_ranks(lambda: is_run_folder(place, key)):
        root = place / "checkpoints"
        folder = find_checkpoint(root, rank, world_size, "name another run", hashes)
        if folder is None:
            raise CheckpointError(f"{place}: no checkpoint yet; train first")
        return folder
    damage, is_unknown = verify_together(place, rank, world_size, hashes)
    if is_unknown:
        raise StorageError(damage)
    if damage:
        raise CheckpointError(f"{place} is broken: {damage}; name an older checkpoint or the run")
    return place.resolve()


def is_run_folder(place: Path, key: str) -> bool:
    """Return whether a path is a run, and not a checkpoint.

    Raises:
        CheckpointError: if it is neither.
    """
    if (place / "checkpoints").is_dir():
        return True
    if not (place / layout.MANIFEST).exists():
        raise CheckpointError(
            f"{key}={place} is neither a run (it has no checkpoints/) nor a checkpoint (it "
            f"has no {layout.MANIFEST}); "
            + (
                "name one of them"
                if place.exists()
                else "there is no such folder: correct the path"
            )
        )
    return False


def run_of_checkpoint(folder: Path) -> Path | None:
    """Return the folder of the run that holds a checkpoint; ``None``: it was moved out of a run."""
    return folder.parent.parent if folder.parent.name == "checkpoints" else None


def read_tensors(folder: Path, prefix: str) -> dict[str, Tensor]:
    """Read a checkpoint's tensors under a prefix, without the prefix; float32 on the CPU."""
    with ChunkReader(folder) as reader:
        return {
            key.removeprefix(prefix): reader.read_tensor(key)
            for key in reader.index
            if key.startswith(prefix)
        }


def check_encoder(folder: Path, config: Config, prefix: str) -> None:
    """Compare names and shapes of a checkpoint's encoder with its config; no tensor is read.

    Raises:
        CheckpointError: if they differ, so that nothing of a wrong size is ever allocated, or if
            timm does not list the architecture.
    """
    with ChunkReader(folder) as reader:
        found = {
            key.removeprefix(prefix): reader.shape(key)
            for key in reader.index
            if key.startswith(prefix)
        }
    try:
        probe = probe_student(config)
    except ConfigError as error:
        raise CheckpointError(f"{folder / layout.STATE}: {error}") from error
    positions = probe.pos_embed
    expected = {} if positions is None else {"pos_embed": tuple(positions.shape)}
    if found.get("pos_embed") == expected.get("pos_embed"):
        with torch.device("meta"):
            state = build_student(config).state_dict()
        expected = {name: tuple(value.shape) for name, value in state.items()}
    wrong = sorted(
        name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)
    )
    if "pos_embed" in wrong:
        wrong = ["pos_embed"]
    if wrong:
        name = wrong[0]
        raise CheckpointError(
            f"{folder}: does not fit its own config, {name_student(config.student)} at "
            f"{config.views.image_size} pixels: {prefix}{name} has shape "
            f"{found.get(name, 'none')}, expected {expected.get(name, 'none')}; copy the "
            "checkpoint again, or name another"
        )


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


def read_file(file: Path) -> dict[str, Tensor]:
    """Read the tensors of an exported encoder.

    Raises:
        CheckpointError: if there is no such file, or it holds no tensors.
    """
    try:
        return read_weights(file, "--checkpoint")
    except TeacherError as error:
        raise CheckpointError(str(error)) from error


def file_config(file: Path, tensors: dict[str, Tensor], arch: str | None) -> Config:
    """Return the settings of an exported encoder; sizes follow from its tensors and metadata.

    ``arch`` is timm's name; ``None``: as the metadata or ``config.json`` beside the file name it.

    Raises:
        CheckpointError: if the tensors are not an encoder's.
        ConfigError: if the architecture is not known.
    """
    config = Config()
    student = config.student = recorded_student(file, tensors)
    student.arch = arch or student.arch or read_arch(file)
    if not timm.is_model(student.arch):
        raise ConfigError(f"--arch={student.arch} is not a model of timm {timm.__version__}")
    probe = probe_arch(student.arch)
    needed = {"patch_embed.proj.weight": 4} | ({} if probe.pos_embed is None else {"pos_embed": 3})
    for name, dims in needed.items():
        if name not in tensors or tensors[name].ndim != dims:
            raise CheckpointError(
                f"{file} has no {name} of {dims} dimensions: not an encoder of cmtmae export"
            )
    student.patch_size = patch = int(tensors["patch_embed.proj.weight"].shape[-1])
    if probe.pos_embed is None:  # rotary positions are in no tensor
        config.views.image_size = recorded_size(file, patch)
        return config
    positions = int(tensors["pos_embed"].shape[1])
    prefix = 0 if probe.no_embed_class else probe.num_prefix_tokens
    config.views.image_size = patch * math.isqrt(max(positions - prefix, 1))
    return config


def recorded_size(file: Path, patch: int) -> int:
    """Return the side of the images in the metadata of an encoder's file, in pixels.

    Raises:
        CheckpointError: if it is absent, or does not fit the patches.
    """
    with safe_open(file, "pt") as opened:  # pyright: ignore[reportUnknownVariableType]
        text = cast(dict[str, str], opened.metadata() or {}).get("image_size", "")
    size = int(text) if text.isdecimal() and len(text) < 6 else 0
    if not size or size % patch:
        raise CheckpointError(
            f"{file}: its metadata has image_size={text[:20] or 'none'}, not a multiple of its "
            f"patches of {patch} pixels; export the encoder again"
        )
    return size


def recorded_student(file: Path, tensors: dict[str, Tensor]) -> StudentConfig:
    """Return architecture and sizes in the metadata of an encoder's file; no name if it has none.

    Raises:
        CheckpointError: if the file's tensors cannot have them.
    """
    with safe_open(file, "pt") as opened:  # pyright: ignore[reportUnknownVariableType]
        text = cast(dict[str, str], opened.metadata() or {}).get("student")
    if text is None:
        return StudentConfig(arch="")
    try:
        student = StudentConfig(**read_json(text.encode()))
    except (ValueError, TypeError):
        student = StudentConfig(width=0)
    most = max([len(tensors), *(side for value in tensors.values() for side in value.shape)])
    sizes = replaced_sizes(student).values()
    if not isinstance(student.arch, str) or not all(
        type(size) is int and 0 < size <= most for size in sizes
    ):
        raise CheckpointError(
            f"{file}: its metadata has student={text[:100]}, which its tensors cannot have; export "
            "the encoder again"
        )
    return student


def read_arch(file: Path) -> str:
    """Read the architecture's name from timm's ``config.json`` beside a file.

    Raises:
        ConfigError: if there is none.
    """
    try:
        content = read_inside(file.parent, file.with_name("config.json"))
        return str(read_json(content)["architecture"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{file}: the architecture is not known, for no config.json beside it names it; give "
            "--arch NAME, as student.arch of the run"
        ) from error


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
    ``None``: the model's own; the seed is of the random weights of the baseline.

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
        text = str(error).replace("teacher.model", "--timm").replace("teacher.weights", "--file")
        raise ConfigError(text) from error
    encoder = wrap_network(name, tower, side, device)
    facts = {"timm": name, "file": file, "arch": model, "sha256": encoder.digest}
    return Subject(
        encoder, lambda: wrap_network(RANDOM, untrained.build(side, seed), side, device), facts
    )


def wrap_network(name: str, model: Student | Tower, size: int, device: torch.device) -> Encoder:
    """Wrap a network as an encoder with the digest of its weights."""
    if isinstance(model, Student):
        encoder, state = encoder_from_student(name, model, size, device), model.state_dict()
    else:
        encoder, state = encoder_from_tower(name, model, size, device), model.model.state_dict()
    return encoder._replace(digest=weights_digest(state), network=model)
