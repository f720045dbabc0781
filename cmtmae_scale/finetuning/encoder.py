"""The encoder that a fine-tuning starts from, and what is needed to build it again."""

import argparse
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import Tensor

from cmtmae_scale.config.schema import Student as StudentConfig
from cmtmae_scale.errors import ConfigError
from cmtmae_scale.evaluation.subject import Subject
from cmtmae_scale.method.images import IMAGENET_MEAN, IMAGENET_STD
from cmtmae_scale.method.student import Student
from cmtmae_scale.teachers.timm import TimmTower

WEIGHT_OPTIONS = ("checkpoint", "weights", "arch", "timm", "file", "size")
"""Command-line options that name the weights."""


@dataclass
class InitialEncoder:
    """An encoder without its weights; every checkpoint of a fine-tuning holds it."""

    options: dict[str, str | None]
    """``WEIGHT_OPTIONS`` as given on the command line."""
    name: str
    """Name for messages and results."""
    student: StudentConfig
    """Architecture and sizes."""
    size: int
    """Side of an image, pixels."""
    mean: tuple[float, ...]
    """Mean of the input's channels, pixels in [0, 1]."""
    std: tuple[float, ...]
    """Standard deviation of the input's channels."""
    facts: dict[str, Any]
    """Provenance for the result file; includes ``sha256`` of the weights."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def encoder_from_dict(saved: dict[str, Any]) -> InitialEncoder:
    """Rebuild what ``to_dict`` returned."""
    values: dict[str, Any] = {**saved}
    if "student" not in values:  # older checkpoints name architecture and patch size alone
        values["student"] = {key: values.pop(key) for key in ("arch", "patch_size")}
    values["student"] = StudentConfig(**values["student"])
    values["mean"], values["std"] = tuple(saved["mean"]), tuple(saved["std"])
    return InitialEncoder(**values)


def weight_options(options: argparse.Namespace) -> dict[str, str | None]:
    """Return the options that name the weights, as text."""
    given = vars(options)
    return {key: None if given[key] is None else str(given[key]) for key in WEIGHT_OPTIONS}


def take_encoder(
    subject: Subject, options: dict[str, str | None]
) -> tuple[InitialEncoder, dict[str, Tensor]]:
    """Return an opened encoder as the start of a fine-tuning, with its weights on the CPU.

    Raises:
        ConfigError: if it is neither a student nor a ViT of timm.
    """
    encoder = subject.encoder
    network = encoder.network
    if subject.student is not None and isinstance(network, Student):
        student = replace(
            subject.student, init_weights=None, init_from_run=None, init_optimizer=False
        )
        mean, std, state = IMAGENET_MEAN, IMAGENET_STD, network.state_dict()
    elif isinstance(network, TimmTower):
        patch = int(network.vit.patch_embed.patch_size[0])
        student = StudentConfig(subject.facts["arch"], patch)
        mean, std, state = network.mean, network.std, network.vit.state_dict()
    else:
        raise ConfigError(
            f"{encoder.name} cannot be fine-tuned: it is neither a student nor a ViT of timm; name "
            "a teacher of timm with --timm"
        )
    initial = InitialEncoder(options, encoder.name, student, encoder.size, mean, std, subject.facts)
    return initial, {key: value.detach().cpu() for key, value in state.items()}


def refuse_other_encoder(saved: InitialEncoder, found: InitialEncoder, run_dir: str) -> None:
    """Refuse to resume a run that started from other weights.

    Raises:
        ConfigError: names both.
    """
    if saved.facts["sha256"] != found.facts["sha256"]:
        raise ConfigError(
            f"run.output_dir={run_dir} holds a fine-tuning of {saved.name} "
            f"({saved.facts['sha256'][:12]}), not of {found.name} "
            f"({found.facts['sha256'][:12]}); use another run.output_dir"
        )
