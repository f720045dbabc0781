"""The encoder with a classifier on top: timm's model, with weights under timm's names.

Legend: B views in a micro-batch, C classes, D width, L blocks.
"""

from collections.abc import Callable, Mapping
from typing import Literal, cast

import torch
from timm.models.eva import EvaBlock, EvaBlockPostNorm
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from cmtmae_scale.config.schema import Config
from cmtmae_scale.config.schema import Student as StudentConfig
from cmtmae_scale.errors import ConfigError
from cmtmae_scale.method.build import build_student
from cmtmae_scale.method.initialisation import Values
from cmtmae_scale.method.student import Student, run_block

HEAD_STD = 2e-5
"""Standard deviation of the head's initial weights, as in MAE."""


class DroppingBlock(Block):
    """timm's block, whose branches are dropped for views that the caller names."""

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride] - whole images, no mask
        self, x: Tensor, keep: Tensor | None = None
    ) -> Tensor:
        """Return timm's output for tokens ``[B, P + N, D]``, with weighted branches.

        Args:
            x: tokens.
            keep: factors of the two branches, ``[B, 2]``; 0 drops a branch. ``None``: all 1.
        """
        x = x + weigh(self.ls1(self.attn(self.norm1(x))), keep, 0)
        return x + weigh(self.ls2(self.mlp(self.norm2(x))), keep, 1)


class DroppingEvaBlock(EvaBlock):
    """``DroppingBlock`` for timm's Eva."""

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride] - whole images, no mask
        self, x: Tensor, keep: Tensor | None = None, rope: Tensor | None = None
    ) -> Tensor:
        """See ``DroppingBlock.forward``; ``rope`` as in ``rotate_patches``."""
        attended = self.attn(self.norm1(x), rope)
        x = x + weigh(attended if self.gamma_1 is None else self.gamma_1 * attended, keep, 0)
        grown = self.mlp(self.norm2(x))
        return x + weigh(grown if self.gamma_2 is None else self.gamma_2 * grown, keep, 1)


class DroppingEvaBlockPostNorm(EvaBlockPostNorm):
    """``DroppingBlock`` for an Eva whose branches end with a norm."""

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride] - whole images, no mask
        self, x: Tensor, keep: Tensor | None = None, rope: Tensor | None = None
    ) -> Tensor:
        """See ``DroppingBlock.forward``; ``rope`` as in ``rotate_patches``."""
        x = x + weigh(self.norm1(self.attn(x, rope)), keep, 0)
        return x + weigh(self.norm2(self.mlp(x)), keep, 1)


DROPPING_BLOCKS: dict[type, type] = {
    Block: DroppingBlock,
    EvaBlock: DroppingEvaBlock,
    EvaBlockPostNorm: DroppingEvaBlockPostNorm,
}
"""timm's block -> the block whose branches can be dropped per view."""


def weigh(branch: Tensor, keep: Tensor | None, number: int) -> Tensor:
    """Multiply a branch ``[B, T, D]`` by its factor of each view, column ``number`` of ``keep``."""
    return branch if keep is None else branch * keep[:, number, None, None].to(branch.dtype)


class ClassifyingStudent(Student):
    """timm's VisionTransformer or Eva with its head."""

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride] - whole images, no mask
        self, images: Tensor, keep: Tensor | None = None
    ) -> Tensor:
        """Classify whole images.

        Args:
            images: normalised, ``[B, 3, S, S]``.
            keep: factors of every block's two branches, ``[B, L, 2]``; ``None``: all 1.

        Returns:
            Logits, ``[B, C]``.
        """
        x = self.embed(images)
        for number, (block, rotary) in enumerate(
            zip(self.blocks, self.rotary_tables(), strict=True)
        ):
            own = None if keep is None else keep[:, number]
            x = run_block(block, x, own, *rotary, recompute=self.grad_checkpointing)
        return self.forward_head(self.norm(x))


class Classifier(nn.Module):
    """The fine-tuned model; ``encoder`` is all of it, under the name that checkpoints use."""

    def __init__(self, encoder: ClassifyingStudent) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Tensor, keep: Tensor | None = None) -> Tensor:
        return self.encoder(images, keep)

    def transformer_blocks(self) -> list[nn.Module]:
        """Return the blocks in the order of the forward, for wrapping and compiling."""
        return self.encoder.transformer_blocks()


def build_classifier(
    settings: StudentConfig, size: int, *, classes: int, pool: Literal["mean", "cls"]
) -> Classifier:
    """Put a head on an architecture; ``classifier_values`` returns its weights.

    As in MAE, ``mean`` removes the encoder's last norm and puts a fresh norm behind the mean of the
    patch tokens, and the positional embeddings are trained.

    Args:
        settings: architecture and sizes of the encoder.
        size: side of the images, pixels.
        classes: C.
        pool: input of the head; see ``Head.pool``.

    Returns:
        On the default device, which may be the meta device; the state of the global generator is
        kept. Keys of ``.encoder`` are those of ``timm.create_model(arch, num_classes=C)`` with
        ``global_pool="avg", fc_norm=True``, or with ``"token"``; those of an Eva have
        ``use_fc_norm=True, use_post_transformer_norm=False`` with ``"avg"``, the reverse with
        ``"token"``.

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
        if type(block) not in DROPPING_BLOCKS:
            raise ConfigError(
                f"{arch}: block {number} is a {type(block).__name__}, whose branches cannot be "
                "dropped by view; choose a plain VisionTransformer or an Eva of timm"
            )
        block.__class__ = DROPPING_BLOCKS[type(block)]
    if student.pos_embed is not None:
        student.pos_embed.requires_grad_(True)
    return Classifier(student)


def layer_scale(depth: int, decay: float) -> Callable[[str], float]:
    """Return the learning-rate factor of a parameter of ``Classifier`` as a function of its name.

    Layer 0 is everything before the blocks and rotary frequencies, layer i + 1 is block i, and all
    later parameters are layer L + 1; the factor is ``decay ** (L + 1 - layer)``.

    Args:
        depth: L.
        decay: factor from each layer to the layer below it.

    Source: BEiT (arXiv 2106.08254), as in MAE's ``util/lr_decay.py``.
    """

    def scale(name: str) -> float:
        return decay ** (depth + 1 - layer_of(name.removeprefix("encoder."), depth))

    return scale


BEFORE_BLOCKS = ("cls_token", "reg_token", "pos_embed", "patch_embed.", "norm_pre.", "rope.")


def layer_of(name: str, depth: int) -> int:
    """Return the layer of a parameter, given its name in timm."""
    if name.startswith(BEFORE_BLOCKS):
        return 0
    if name.startswith("blocks."):
        return int(name.split(".")[1]) + 1
    return depth + 1


UNUSED = ("head.", "fc_norm.", "attn_pool.")
"""Prefixes of names in the weights of an encoder that belong to its own classifier."""


def classifier_values(
    classifier: Classifier, state: Mapping[str, Tensor], place: str, seed: int
) -> Values:
    """Return the initial values of every parameter: an encoder's, and those of a fresh head.

    Args:
        classifier: only names and shapes are read, so that it may be on the meta device.
        state: tensors of the encoder, under timm's names; its own head is not used.
        place: name of the encoder, for errors.
        seed: seed of the head's weights.

    Raises:
        ConfigError: if names or shapes differ.
    """
    encoder = classifier.encoder
    fresh = fresh_values(encoder, seed)
    wanted = {name: one.shape for name, one in encoder.named_parameters() if name not in fresh}
    given = {name: value for name, value in state.items() if not name.startswith(UNUSED)}
    if not any(name.startswith("norm.") for name in given):  # its last norm is after the pooling
        given |= {n.removeprefix("fc_"): v for n, v in state.items() if n.startswith("fc_norm.")}
    if isinstance(encoder.norm, nn.Identity):
        given = {name: value for name, value in given.items() if not name.startswith("norm.")}
    if given.keys() != wanted.keys():
        absent, other = sorted(wanted.keys() - given.keys()), sorted(given.keys() - wanted.keys())
        raise ConfigError(
            f"{place} does not fit: absent {absent[:3]}, not expected {other[:3]}; choose the "
            "weights of a plain VisionTransformer or an Eva of timm"
        )
    for name, shape in wanted.items():
        if given[name].shape != shape:
            raise ConfigError(
                f"{place} does not fit: {name} has shape {tuple(given[name].shape)}, expected "
                f"{tuple(shape)}; choose the weights of the same architecture and image size"
            )
    found = fresh | given
    return [(f"encoder.{name}", [found[name].detach().flatten()]) for name in (*wanted, *fresh)]


def fresh_values(encoder: ClassifyingStudent, seed: int) -> dict[str, Tensor]:
    """Return the values of the head, and of the norm before it where it is fresh."""
    head = cast(nn.Linear, encoder.head)
    weight = torch.empty(head.weight.shape, device="cpu")
    nn.init.trunc_normal_(weight, std=HEAD_STD, generator=torch.Generator().manual_seed(seed))
    found = {"head.weight": weight, "head.bias": torch.zeros(head.bias.shape, device="cpu")}
    for name, one in encoder.fc_norm.named_parameters():
        found[f"fc_norm.{name}"] = torch.full(one.shape, float(name == "weight"), device="cpu")
    return found
