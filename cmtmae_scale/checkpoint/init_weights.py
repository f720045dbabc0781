"""Weights of other programs as a student's start: their names to ours, every tensor accounted for.

Known are the names of timm's VisionTransformer, of MAE's public code (timm's, with ``mask_token``
and ``decoder_*``) and of transformers' ViTMAE and ViT, in files and as modules.

Runs once, on the CPU, before a new run's first step.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false
# timm and parts of torch are only partly typed.
import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeVar

import torch
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor

from cmtmae_scale.errors import ConfigError
from cmtmae_scale.method.decoder import FullDecoder
from cmtmae_scale.method.initialisation import sincos_positions
from cmtmae_scale.method.model import CollaborativeMAE

RENAMES = (
    # transformers' names to MAE's
    (r"^vit\.", ""),
    (r"^decoder\.(?=mask_token$|decoder_)", ""),
    (r"^decoder_(?:layers|encoder\.layer)\.", "decoder_blocks."),  # 5.x saves the second
    (r"^(?:layers|encoder\.layer)\.", "blocks."),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.", ""),
    (r"^layernorm\.", "norm."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.attention\.(?:attention\.(?:query|key|value)|[qkv]_proj)\.", ".attn.qkv."),
    (r"\.attention\.(?:output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    # MAE's names to those of CollaborativeMAE
    (r"^decoder_pos_embed$", "decoder.positions"),
    (r"^decoder_pred\.", "heads.pixel."),
    (r"^decoder_", "decoder."),
    (r"^mask_token$", "decoder.mask_token"),
    (r"^(?!decoder\.|heads\.)", "encoder."),
)
"""Applied in this order; names of MAE and timm pass the first part unchanged."""
QKV = (r"\.(?:query|q_proj)\.", r"\.(?:key|k_proj)\.", r"\.(?:value|v_proj)\.")
"""What is three matrices in transformers and one in timm, in timm's order."""
HEAD = re.compile(r"encoder\.(?:head|head_dist|classifier|pooler)\.")
"""What other programs put on top of an encoder."""
PATCHES = "encoder.patch_embed.proj.weight"
POSITIONS = "encoder.pos_embed"
DECODER_POSITIONS = "decoder.positions"
POSITION_TOLERANCE = 5e-3
"""Between a sine-cosine table and a file's, which may be bfloat16."""

T = TypeVar("T")


class Piece(NamedTuple):
    """One tensor for one of ours."""

    value: Tensor
    names: list[str]
    """Where it came from: names in the file."""


class StartReport(NamedTuple):
    """What became of the tensors of a file; the three parts together are all of them."""

    loaded: list[str]
    resampled: dict[str, str]
    """Name, and from which grid to which."""
    passed_over: dict[str, str]
    """Name and reason."""

    def __str__(self) -> str:
        """For the log; blocks are named as ``blocks.*``."""
        reasons: dict[str, dict[str, None]] = {}
        for name, reason in self.passed_over.items():
            reasons.setdefault(reason, {})[re.sub(r"\.\d+\..*", ".*", name)] = None
        passed = "; ".join(f"{', '.join(names)}: {reason}" for reason, names in reasons.items())
        grids = ", ".join(f"{name}: {grids}" for name, grids in self.resampled.items())
        return (
            f"{len(self.loaded)} tensors loaded, "
            f"{len(self.resampled)} resampled{f' ({grids})' if grids else ''}, "
            f"{len(self.passed_over)} passed over{f' ({passed})' if passed else ''}"
        )


@torch.no_grad()
def load_init_weights(
    model: CollaborativeMAE, state: Mapping[str, Tensor], file: str
) -> StartReport:
    """Overwrite the encoder's weights, and MAE's decoder where it is the configured one.

    A position table of another square grid is resampled. The decoder is taken whole or not at all:
    names, shapes and its sine-cosine positions must fit. Numbers of heads and epsilons of norms
    leave no trace in a file and are not compared.

    Args:
        model: on the CPU, already initialised; unchanged where an error is raised.
        state: the file's tensors under the names of timm, MAE or transformers.
        file: its name, for messages.

    Returns:
        What was loaded, resampled and passed over, in the file's names.

    Raises:
        ConfigError: unknown names; a tensor of the encoder that is missing, has another shape or
            has no place; with file, tensor, both shapes and the remedy.
    """
    where = f"student.init_weights={file}"
    pieces = translate(state)
    if PATCHES not in pieces:
        raise ConfigError(
            f"{where}: these are no names of a VisionTransformer of timm, of MAE or of "
            f"transformers' ViTMAE (first: {', '.join(list(state)[:3])}); take a file of one of "
            "them"
        )
    own: dict[str, Tensor] = model.state_dict()
    grids = fit_positions(model, own, pieces)
    found = misfits(part(own, "encoder."), part(pieces, "encoder."))
    if found:
        raise ConfigError(f"{where} does not fit: {first_few(found)}; {remedy(own, pieces)}")
    unfit = decoder_misfit(model, own, pieces)
    report = StartReport([], {}, {})
    for name, piece in pieces.items():
        reason = reason_to_pass(name, own, unfit)
        if reason:
            report.passed_over.update(dict.fromkeys(piece.names, reason))
            continue
        own[name].copy_(piece.value)
        if grids and name == POSITIONS:
            report.resampled.update(dict.fromkeys(piece.names, grids))
        else:
            report.loaded.extend(piece.names)
    return report


def translate(state: Mapping[str, Tensor]) -> dict[str, Piece]:
    """Bring a file's tensors under our names; queries, keys and values become one matrix."""
    sources: dict[str, list[str]] = {}
    for name in sorted(state, key=number_in_qkv):
        ours = name
        for pattern, replacement in RENAMES:
            ours = re.sub(pattern, replacement, ours)
        sources.setdefault(ours, []).append(name)
    return {
        ours: Piece(torch.cat([state[n] for n in names]) if names[1:] else state[names[0]], names)
        for ours, names in sources.items()
    }


def number_in_qkv(name: str) -> int:
    """0 for queries and everything else, 1 for keys, 2 for values."""
    return next((number for number, part in enumerate(QKV) if re.search(part, name)), 0)


def fit_positions(
    model: CollaborativeMAE, own: Mapping[str, Tensor], pieces: dict[str, Piece]
) -> str:
    """Resample the encoder's position table to the student's grid with timm's own function.

    Returns:
        From which grid to which; empty where the table fits or cannot be made to.
    """
    rows, columns = model.encoder.grid
    piece, here = pieces.get(POSITIONS), own[POSITIONS].shape
    if piece is None or piece.value.ndim != 3 or piece.value.shape[::2] != here[::2]:
        return ""
    prefix = here[1] - rows * columns
    side = side_of(piece.value.shape[1] - prefix)
    if not side or (side, side) == (rows, columns):
        return ""
    table = resample_abs_pos_embed(
        piece.value.float(), [rows, columns], [side, side], num_prefix_tokens=prefix
    )
    pieces[POSITIONS] = piece._replace(value=table)
    return f"{side} x {side} to {rows} x {columns} patches"


def side_of(count: int) -> int:
    """Side of a square of ``count`` patches, or 0 if it is none."""
    side = math.isqrt(max(count, 0))
    return side if side * side == count else 0


def part(tensors: Mapping[str, T], *prefixes: str) -> dict[str, T]:
    """What belongs to a part of the model; heads of other programs belong to none."""
    return {
        name: value
        for name, value in tensors.items()
        if name.startswith(prefixes) and not HEAD.match(name)
    }


def misfits(own: Mapping[str, Tensor], pieces: Mapping[str, Piece]) -> list[str]:
    """Why pieces do not fill a part of the model, all of it and with all of them."""
    shapes = [
        f"{' + '.join(piece.names)} is {list(piece.value.shape)}, the configured {name} "
        f"{list(own[name].shape)}"
        for name, piece in pieces.items()
        if name in own and piece.value.shape != own[name].shape
    ]
    missing = [f"no tensor for {name} {list(own[name].shape)}" for name in own.keys() - pieces]
    homeless = [f"{' + '.join(pieces[name].names)} has no place" for name in pieces.keys() - own]
    return sorted(shapes) + sorted(missing) + sorted(homeless)


def remedy(own: Mapping[str, Tensor], pieces: Mapping[str, Piece]) -> str:
    """What to change when an encoder does not fit."""
    here, there = own[PATCHES].shape, pieces[PATCHES].value.shape
    if there[:2] == here[:2] and there != here:
        return f"set student.patch_size={there[-1]}, or take a file of patches of {here[-1]} pixels"
    return "set student.arch to the file's model, or take a whole file of the configured one"


def decoder_misfit(
    model: CollaborativeMAE, own: Mapping[str, Tensor], pieces: Mapping[str, Piece]
) -> str:
    """Why a file's decoder is not the configured one; empty if it is."""
    if not isinstance(model.decoder, FullDecoder):
        return "the configured decoder is not MAE's"
    prefixes = ("decoder.", "heads.pixel.") if model.heads.pixel else ("decoder.",)
    theirs = part(pieces, *prefixes)
    positions = theirs.pop(DECODER_POSITIONS, None)
    found = misfits(part(own, *prefixes), theirs)
    if not found and positions and not is_sincos(positions.value):
        found = [f"{positions.names[0]} is not the sine-cosine table that this decoder adds"]
    return found[0] if found else ""


def is_sincos(table: Tensor) -> bool:
    """Whether ``[1, 1 + N, E]`` is MAE's table of a square grid."""
    side = side_of(table.shape[1] - 1) if table.ndim == 3 else 0
    if not side or table.shape[2] % 4:
        return False
    code = sincos_positions(table.shape[2], (side, side))
    return torch.allclose(table[0, 1:].float(), code, rtol=0, atol=POSITION_TOLERANCE)


def reason_to_pass(name: str, own: Mapping[str, Tensor], unfit: str) -> str:
    """Why a tensor is not taken; ``unfit`` says it of the whole decoder. Empty if it is taken."""
    if HEAD.match(name):
        return "a head on top of the encoder"
    if name.startswith("encoder."):
        return ""
    if unfit:
        return unfit
    if name == DECODER_POSITIONS:
        return "the decoder computes its positions"
    return "" if name in own else "no pixels are predicted"


def first_few(texts: Sequence[str], count: int = 3) -> str:
    """Some of a list, and how many more."""
    rest = len(texts) - count
    return "; ".join(texts[:count]) + (f"; and {rest} more" if rest > 0 else "")
