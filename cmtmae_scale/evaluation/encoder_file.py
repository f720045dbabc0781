"""An exported encoder: its tensors, and the settings in tensors and metadata."""

import math
from pathlib import Path
from typing import cast

import timm
from safetensors import safe_open
from torch import Tensor

from cmtmae_scale.config.derive import replaced_sizes
from cmtmae_scale.config.schema import Config
from cmtmae_scale.config.schema import Student as StudentConfig
from cmtmae_scale.errors import CheckpointError, ConfigError, TeacherError
from cmtmae_scale.method.build import probe_arch
from cmtmae_scale.runtime.storage import read_inside, read_json
from cmtmae_scale.teachers.weights import read_weights

FOLDER_WEIGHTS = "model.safetensors"
"""File of the weights in a folder of ``cmtmae export timm``, beside timm's ``config.json``."""


def exported_file(place: Path) -> Path | None:
    """Return the file of an exported encoder at a path: the path itself, or within its folder.

    ``None``: there is neither a file of safetensors nor a folder of ``cmtmae export timm``.
    """
    if place.suffix == ".safetensors":
        return place
    file = place / FOLDER_WEIGHTS
    try:
        is_exported = file.is_file() and (place / "config.json").is_file()
    except PermissionError:  # the search for a run reports it
        return None
    return file if is_exported else None


def read_file(file: Path) -> dict[str, Tensor]:
    """Read the tensors of an exported encoder.

    Raises:
        CheckpointError: if there is no such file, or it holds no tensors, or a classifier.
    """
    try:
        tensors = read_weights(file, "--checkpoint")
    except TeacherError as error:
        raise CheckpointError(str(error)) from error
    if "head.weight" in tensors:
        raise CheckpointError(
            f"{file}: holds a classifier of {len(tensors['head.weight'])} classes, such as a "
            "fine-tuning's, and no encoder; load it with timm.create_model(NAME, num_classes=...)"
        )
    return tensors


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
            f"{file}: the architecture is not known, since no config.json is beside it; give "
            "--arch NAME, as student.arch of the run"
        ) from error
