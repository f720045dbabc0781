"""The trained module that a backend wraps: student, decoder and heads in one forward.

Legend: B views in a micro-batch, R rows (masks), P prefix tokens, K visible, Q predicted tokens,
D student width, E decoder width, F teacher width, p patch side in pixels.
"""

from collections.abc import Mapping
from types import MappingProxyType

from torch import Tensor, nn

from cmtmae_scale.config.derive import loss_terms
from cmtmae_scale.config.schema import Config
from cmtmae_scale.config.teachers import teacher_shares
from cmtmae_scale.errors import ConfigError
from cmtmae_scale.method.build import build_student
from cmtmae_scale.method.decoder import Heads, build_decoder
from cmtmae_scale.method.masking import PatchChoice, grid_counts
from cmtmae_scale.method.student import Student
from cmtmae_scale.method.targets import Predictions, TokenLayout


class CollaborativeMAE(nn.Module):
    """Everything that is trained; only what the config's loss weights need is built.

    Args:
        config: checked settings.
        teacher_widths: F of each teacher whose features are a target, by the term of the loss
            (``teacher``, or ``teacher_NAME`` of several); others are ignored.

    Raises:
        ConfigError: if the class token is a prediction target and the student has none.
        ValueError: if a teacher's width is missing.

    All encoder keys have the prefix ``encoder.``; without it they are timm's.
    """

    encoder: Student

    def __init__(
        self, config: Config, teacher_widths: Mapping[str, int] = MappingProxyType({})
    ) -> None:
        super().__init__()
        terms = loss_terms(config)
        absent = [name for name in teacher_shares(config) if name not in teacher_widths]
        if absent:
            raise ValueError(
                f"teacher_widths lacks {', '.join(absent)}, whose features are a target"
            )
        self.encoder = build_student(config)
        rows, columns = self.encoder.grid
        counts = grid_counts(config.mask, rows * columns)
        layout = TokenLayout.from_config(config, *counts)
        if not set(terms) - {"pixel"}:
            layout = layout.without_cls()  # pixels have no class token
        if layout.cls and not self.encoder.has_class_token:
            raise ConfigError(
                f"loss.include_cls=true, but student.arch={config.student.arch} has no class "
                "token; set loss.include_cls=false"
            )
        width = self.encoder.embed_dim
        self.decoder = build_decoder(
            config.decoder, width, self.encoder.grid, self.encoder.num_prefix, layout
        )
        widths = {**teacher_widths, "student": width, "pixel": 3 * self.encoder.patch_side**2}
        self.heads = Heads(
            width if config.decoder.type == "none" else config.decoder.width,
            {name: widths[name] for name in terms},
            layout.cls,
        )

    def forward(self, images: Tensor, choice: PatchChoice) -> Predictions:
        """Predict the targets of masked views.

        Args:
            images: normalised, ``[B, 3, S, S]``.
            choice: masks, R = B * masks_per_view rows; row ``b * k + j`` is mask j of view b.

        Returns:
            Predictions in the order of the config's ``TokenLayout``. No host synchronisation.
        """
        tokens = self.encoder(images, choice.ids_keep)  # [R, P + K, D]
        return self.heads(self.decoder(tokens, choice))

    def transformer_blocks(self) -> list[nn.Module]:
        return self.encoder.transformer_blocks() + self.decoder.transformer_blocks()

    def set_activation_checkpointing(self, enabled: bool) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        self.encoder.set_grad_checkpointing(enabled)
        self.decoder.grad_checkpointing = enabled
