"""What a fine-tuning starts from: an encoder, and what must be known to build it again."""

import argparse
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from cmtmae_scale.errors import ConfigError
from cmtmae_scale.evaluation.subject import Subject
from cmtmae_scale.method.images import IMAGENET_MEAN, IMAGENET_STD
from cmtmae_scale.method.student import Student
from cmtmae_scale.teachers.timm import TimmTower

NAMED_BY = ("checkpoint", "weights", "arch", "timm", "file", "size")
"""Options that name the weights."""


@dataclass
class Start:
    """An encoder without its weights; kept with every checkpoint."""

    named: dict[str, str | None]
    """The command line's words for it."""
    name: str
    """For people."""
    arch: str
    """timm's name."""
    patch_size: int
    """Side of a patch, pixels."""
    size: int
    """Side of a picture, pixels."""
    mean: tuple[float, ...]
    """Mean of the input's channels, pixels in [0, 1]."""
    std: tuple[float, ...]
    """Deviation likewise."""
    facts: dict[str, Any]
    """What it is, for the result file; ``sha256`` of its weights among it."""

    def to_dict(self) -> dict[str, Any]:
        """Fields as saved."""
        return asdict(self)


def start_from_dict(saved: dict[str, Any]) -> Start:
    """Rebuild what ``to_dict`` gave."""
    tuples: dict[str, Any] = {key: tuple(saved[key]) for key in ("mean", "std")}
    return Start(**{**saved, **tuples})


def named(options: argparse.Namespace) -> dict[str, str | None]:
    """How the command line names the weights."""
    given = vars(options)
    return {key: None if given[key] is None else str(given[key]) for key in NAMED_BY}


def start_of(subject: Subject, words: dict[str, str | None]) -> tuple[Start, dict[str, Tensor]]:
    """Take an opened encoder as a start, with its weights on the CPU.

    Raises:
        ConfigError: if it is no student and no ViT of timm.
    """
    encoder = subject.encoder
    network = encoder.network
    if isinstance(network, Student):
        patch, mean, std = network.patch_side, IMAGENET_MEAN, IMAGENET_STD
        state = network.state_dict()
    elif isinstance(network, TimmTower):
        patch, mean, std = int(network.vit.patch_embed.patch_size[0]), network.mean, network.std
        state = network.vit.state_dict()
    else:
        raise ConfigError(
            f"{encoder.name} cannot be fine-tuned: it is no student and no ViT of timm; name a "
            "teacher of timm with --timm"
        )
    facts = subject.facts
    start = Start(words, encoder.name, facts["arch"], patch, encoder.size, mean, std, facts)
    return start, {key: value.detach().cpu().clone() for key, value in state.items()}


def check_same(saved: Start, found: Start, run_dir: str) -> None:
    """Refuse to go on with a run that started from other weights.

    Raises:
        ConfigError: naming both.
    """
    if saved.facts["sha256"] != found.facts["sha256"]:
        raise ConfigError(
            f"run.output_dir={run_dir} holds a fine-tuning of {saved.name} "
            f"({saved.facts['sha256'][:12]}), not of {found.name} "
            f"({found.facts['sha256'][:12]}); use another run.output_dir"
        )
