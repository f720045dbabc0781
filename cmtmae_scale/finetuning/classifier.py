"""The encoder with a classifier on it: timm's model, weights in timm's names.

Legend: B views in a micro-batch, C classes, D width, L blocks.
"""

from collections.abc import Callable
from typing import Any, Literal, cast

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from cmtmae_scale.config.schema import Config
from cmtmae_scale.config.schema import Student as StudentConfig
from cmtmae_scale.errors import ConfigError
from cmtmae_scale.method.student import Student, build_student, run_block

HEAD_STD = 2e-5
"""Deviation of the head's start values, MAE's."""


class DroppingBlock(Block):
    """timm's block whose branches are left out for views that the caller names."""

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride] - whole pictures, no mask
        self, x: Tensor, keep: Tensor | None = None
    ) -> Tensor:
        """From ``[B, P + N, D]`` to timm's own output.

        Args:
            x: tokens.
            keep: factors of the two branches, ``[B, 2]``; 0 leaves one out. ``None``: all 1.
        """
        attended = self.ls1(self.attn(self.norm1(x)))
        x = x + (attended if keep is None else attended * factors(keep, 0, x))
        grown = self.ls2(self.mlp(self.norm2(x)))
        return x + (grown if keep is None else grown * factors(keep, 1, x))


def factors(keep: Tensor, branch: int, like: Tensor) -> Tensor:
    """Factors of a branch for each view, ``[B, 1, 1]``, of the tokens' type."""
    return keep[:, branch, None, None].to(like.dtype)


class ClassifyingStudent(Student):
    """timm's VisionTransformer with its head."""

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride] - whole pictures
        self, images: Tensor, keep: Tensor | None = None
    ) -> Tensor:
        """Classify whole pictures.

        Args:
            images: normalised, ``[B, 3, S, S]``.
            keep: factors of every block's two branches, ``[B, L, 2]``; ``None``: all 1.

        Returns:
            Logits, ``[B, C]``.
        """
        x = self.embed(images)
        for number, block in enumerate(self.blocks):
            inputs = (x,) if keep is None else (x, keep[:, number])
            x = run_block(block, *inputs, recompute=self.grad_checkpointing)
        return self.forward_head(self.norm(x))


class Classifier(nn.Module):
    """What is fine-tuned; its ``encoder`` is the whole of it, as checkpoints name it."""

    def __init__(self, encoder: ClassifyingStudent) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Tensor, keep: Tensor | None = None) -> Tensor:
        return self.encoder(images, keep)

    def transformer_blocks(self) -> list[nn.Module]:
        """Blocks in the order of the forward, for wrapping and compiling."""
        return self.encoder.transformer_blocks()


def build_classifier(
    settings: StudentConfig, size: int, *, classes: int, pool: Literal["mean", "cls"], seed: int
) -> Classifier:
    """Put a fresh head on an architecture; the encoder's own weights are to be loaded.

    As in MAE, ``mean`` takes away the encoder's last norm and puts a fresh one behind the mean of
    the patch tokens, and the positions are trained.

    Args:
        settings: architecture and sizes of the encoder.
        size: side of the pictures, pixels.
        classes: C.
        pool: what the head sees; see ``Head.pool``.
        seed: of the head's weights; the global generator is not moved.

    Returns:
        On the CPU; keys of ``.encoder`` are those of ``timm.create_model(arch, num_classes=C)``
        with ``global_pool="avg", fc_norm=True``, or with ``"token"``.

    Raises:
        ConfigError: an architecture that cannot be trained here.

    Source: MAE's public code, ``models_vit.py`` and ``main_finetune.py``.
    """
    config = Config()
    config.student, config.views.image_size, arch = settings, size, settings.arch
    with torch.random.fork_rng(devices=[]):
        student = build_student(config, ClassifyingStudent)
        if pool == "cls" and not student.has_class_token:
            raise ConfigError(f"head.pool=cls: {arch} has no class token; set head.pool=mean")
        student.reset_classifier(classes, "avg" if pool == "mean" else "token")
    if pool == "mean":
        student.fc_norm, student.norm = student.norm, nn.Identity()
    for number, block in enumerate(student.blocks):
        if type(block) is not Block:
            raise ConfigError(
                f"{arch}: block {number} is a {type(block).__name__}, not timm's plain one; choose "
                "a plain VisionTransformer"
            )
        block.__class__ = DroppingBlock
    head = cast(nn.Linear, student.head)
    nn.init.trunc_normal_(head.weight, std=HEAD_STD, generator=torch.Generator().manual_seed(seed))
    nn.init.zeros_(head.bias)
    cast(nn.Parameter, student.pos_embed).requires_grad_(True)
    return Classifier(student)


def layer_scale(depth: int, decay: float) -> Callable[[str], float]:
    """Factor of the learning rate of a parameter of ``Classifier``, by its name.

    Layer 0 is everything before the blocks, layer i + 1 is block i, and what comes after them is
    layer L + 1; the factor is ``decay ** (L + 1 - layer)``.

    Args:
        depth: L.
        decay: from each layer to the one below it.

    Source: BEiT (arXiv 2106.08254), as in MAE's ``util/lr_decay.py``.
    """

    def scale(name: str) -> float:
        return decay ** (depth + 1 - layer_of(name.removeprefix("encoder."), depth))

    return scale


BEFORE_BLOCKS = ("cls_token", "reg_token", "pos_embed", "patch_embed.", "norm_pre.")


def layer_of(name: str, depth: int) -> int:
    """Layer of a parameter in timm's names."""
    if name.startswith(BEFORE_BLOCKS):
        return 0
    if name.startswith("blocks."):
        return int(name.split(".")[1]) + 1
    return depth + 1


def load_encoder(classifier: Classifier, state: dict[str, Any], place: str) -> None:
    """Fill everything but the fresh head from an encoder without one.

    Raises:
        ConfigError: if names or shapes differ.
    """
    encoder = classifier.encoder
    fresh = ("head.",) if isinstance(encoder.fc_norm, nn.Identity) else ("head.", "fc_norm.")
    own = encoder.state_dict()
    wanted = {key for key in own if not key.startswith(fresh)}
    given = {
        key: value
        for key, value in state.items()
        if not key.startswith(("head.", "fc_norm.", "attn_pool."))
        and not (key.startswith("norm.") and isinstance(encoder.norm, nn.Identity))
    }
    if given.keys() != wanted:
        raise ConfigError(
            f"{place} does not fit: absent {sorted(wanted - given.keys())[:3]}, not expected "
            f"{sorted(given.keys() - wanted)[:3]}; choose the weights of a plain VisionTransformer"
        )
    try:
        encoder.load_state_dict(given, strict=False)
    except RuntimeError as error:
        raise ConfigError(f"{place} does not fit: {' '.join(str(error).split())[:300]}") from error
