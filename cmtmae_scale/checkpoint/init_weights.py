"""Initial weights of the student from files of other programs; every tensor is accounted for.

Supported are the names of timm's VisionTransformer and Eva, of MAE's public code (timm's, with
``mask_token`` and ``decoder_*``) and of transformers' ViTMAE and ViT, in files and as modules; and
those under which DINOv3, DINOv2, PE and CLIP were published, which timm converts.

Runs once, before the first step of a new run.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeVar

import torch
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor

from cmtmae_scale.errors import ConfigError
from cmtmae_scale.method.decoder import FullDecoder
from cmtmae_scale.method.initialisation import Values, sincos_positions, write_range
from cmtmae_scale.method.model import CollaborativeMAE
from cmtmae_scale.method.student import Student
from cmtmae_scale.teachers.original_names import Converted, convert_names
from cmtmae_scale.teachers.state_dicts import SAVE_FLOATS, find_non_finite, find_other_dtype

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
"""Applied in this order; the first group leaves names of MAE and timm unchanged."""
QKV = (r"\.(?:query|q_proj)\.", r"\.(?:key|k_proj)\.", r"\.(?:value|v_proj)\.")
"""Three matrices of transformers that are one in timm, in timm's order."""
HEAD = re.compile(r"encoder\.(?:head|head_dist|classifier|pooler|attn_pool)\.")
"""Heads of other programs on top of an encoder."""
TABLES = re.compile(r"encoder\.rope\.(?!freqs$)")
"""Rotary positions that some files hold and that no setting changes."""
PUBLISHED_PATCHES = ("patch_embed.proj.weight", "visual.conv1.weight", "conv1.weight")
"""Weights of the patch embedding: of DINOv3 and DINOv2, and of PE and CLIP."""
PATCHES = "encoder.patch_embed.proj.weight"
POSITIONS = "encoder.pos_embed"
DECODER_POSITIONS = "decoder.positions"
POSITION_TOLERANCE = 5e-3
"""Between a sine-cosine embedding and that of a file, which may be bfloat16."""

T = TypeVar("T")


class Piece(NamedTuple):
    """The value for one tensor of the model."""

    parts: list[Tensor]
    """Joined in the first dimension."""
    names: list[str]
    """Names in the file that it is made of."""

    @property
    def value(self) -> Tensor:
        """The whole tensor, read into memory if it has several parts."""
        return torch.cat(self.parts) if self.parts[1:] else self.parts[0]

    @property
    def shape(self) -> torch.Size:
        return self._replace(parts=[part.to("meta") for part in self.parts]).value.shape


class InitReport(NamedTuple):
    """Names of a file's tensors: each is loaded, resampled or skipped."""

    loaded: list[str]
    resampled: dict[str, str]
    """Name, and both grids."""
    skipped: dict[str, str]
    """Name and reason."""

    def __str__(self) -> str:
        """Return counts and reasons for the log; blocks are named ``blocks.*``."""
        reasons: dict[str, dict[str, None]] = {}
        for name, reason in self.skipped.items():
            reasons.setdefault(reason, {})[re.sub(r"\.\d+\..*", ".*", name)] = None
        details = "; ".join(f"{', '.join(names)}: {reason}" for reason, names in reasons.items())
        grids = ", ".join(f"{name}: {grids}" for name, grids in self.resampled.items())
        return (
            f"{len(self.loaded)} tensors loaded, "
            f"{len(self.resampled)} resampled{f' ({grids})' if grids else ''}, "
            f"{len(self.skipped)} skipped{f' ({details})' if details else ''}"
        )


@torch.no_grad()
def load_init_weights(
    model: CollaborativeMAE, state: Mapping[str, Tensor], file: str
) -> InitReport:
    """Overwrite the weights of a model that is not sharded with those of ``match_init_weights``.

    The model is unchanged if an error is raised.

    Raises:
        ConfigError: see ``match_init_weights``; also for values that are not finite.
    """
    refuse_non_finite(state, file)
    values, report = match_init_weights(model, state, file)
    own: dict[str, Tensor] = model.state_dict()
    for name, pieces in values:
        write_range(pieces, 0, own[name].view(-1))
    return report


def refuse_non_finite(state: Mapping[str, Tensor], file: str) -> None:
    """Refuse tensors of ``student.init_weights`` that hold values that are not finite.

    Raises:
        ConfigError: names file, tensor and remedy.
    """
    bad = find_non_finite(state)
    if bad:
        raise ConfigError(
            f"student.init_weights={file}: {bad}; take a sound copy of the file, or other weights"
        )


def match_init_weights(
    model: CollaborativeMAE, state: Mapping[str, Tensor], file: str
) -> tuple[Values, InitReport]:
    """Find the values of the encoder, and those of MAE's decoder where it is configured.

    A positional embedding of another square grid is resampled. The decoder is loaded as a whole or
    not at all: names, shapes and its sine-cosine positions must fit. The number of heads and the
    epsilon of norms are not in a file and cannot be compared.

    Args:
        model: only shapes are read.
        state: the file's tensors under the names of timm, MAE, transformers, or the first
            publication of DINOv3, DINOv2, PE or CLIP; may be mapped.
        file: its name, for messages.

    Returns:
        Values by the model's names, as views of the file's tensors, and the names of the file's
        tensors that are loaded, resampled and skipped.

    Raises:
        ConfigError: for unknown names, or a tensor of the encoder that is missing, unexpected or of
            another shape; names file, tensor, both shapes and the remedy. Also for tensors of
            another type, such as quantised weights.
    """
    where = f"student.init_weights={file}"
    own: dict[str, Tensor] = model.state_dict()
    converted, grids = convert_original(model.encoder, own, state, where)
    pieces = {
        ours: piece._replace(names=[one for name in piece.names for one in converted.sources[name]])
        for ours, piece in rename_tensors(converted.tensors).items()
    }
    if PATCHES not in pieces:
        raise ConfigError(
            f"{where}: these are not names of a VisionTransformer of timm, of MAE, of "
            "transformers' ViTMAE, or of DINOv3, DINOv2, PE or CLIP as published (first: "
            f"{', '.join(list(state)[:3])}); take a file of one of them"
        )
    targets = {n: own[ours] for ours, piece in pieces.items() if ours in own for n in piece.names}
    other = find_other_dtype(targets, state)
    if other:
        raise ConfigError(f"{where}: {summarise_texts(other)}; {SAVE_FLOATS}")
    grids = grids or resample_positions(model, own, pieces)
    found = list_mismatches(select_component(own, "encoder."), select_component(pieces, "encoder."))
    if found:
        raise ConfigError(
            f"{where} does not fit: {summarise_texts(found)}; {suggest_fix(own, pieces)}"
        )
    unfit = decoder_mismatch(model, own, pieces)
    values: Values = []
    report = InitReport([], {}, dict(converted.unused))
    for name, piece in pieces.items():
        reason = skip_reason(name, own, unfit)
        if reason:
            report.skipped.update(dict.fromkeys(piece.names, reason))
            continue
        values.append((name, [part.detach().reshape(-1) for part in piece.parts]))
        if grids and name == POSITIONS:
            report.resampled.update(dict.fromkeys(piece.names, grids))
        else:
            report.loaded.extend(piece.names)
    loaded = [name for name in dict.fromkeys(report.loaded) if name not in report.resampled]
    return values, report._replace(loaded=loaded)


def convert_original(
    encoder: Student, own: Mapping[str, Tensor], state: Mapping[str, Tensor], where: str
) -> tuple[Converted, str]:
    """Rename the tensors of DINOv3, DINOv2, PE and CLIP, as published, to timm's names.

    Returns:
        The renamed tensors, or those of other programs under their own names; and both grids as
        text where timm resampled the positional embedding.

    Raises:
        ConfigError: for patches of another side, and where timm cannot convert the file.
    """
    if not has_original_names(state):
        return Converted(dict(state), {name: [name] for name in state}, {}), ""
    for name in PUBLISHED_PATCHES:
        if name in state and state[name].shape != own[PATCHES].shape:  # timm would resample them
            patches = {PATCHES: Piece([state[name]], [name])}
            (found,) = list_mismatches({PATCHES: own[PATCHES]}, patches)
            raise ConfigError(f"{where} does not fit: {found}; {suggest_fix(own, patches)}")
    try:
        converted = convert_names(encoder, state)
    except ValueError as error:
        raise ConfigError(f"{where} does not fit: {error}") from error
    table = converted.tensors.get("pos_embed")
    if table is None or POSITIONS not in own or table.shape != own[POSITIONS].shape:
        return converted, ""
    (name,) = converted.sources["pos_embed"]
    side = square_side(state[name].shape[-2] - ("cls_token" in converted.tensors))
    return converted, describe_grids(side, encoder.grid)


def has_original_names(state: Mapping[str, Tensor]) -> bool:
    """Return whether tensors are named as DINOv3, DINOv2, PE or CLIP were published."""
    token = state.get("mask_token")  # of MAE it has three dimensions
    is_dino = "storage_tokens" in state or (token is not None and token.ndim == 2)
    return is_dino or any(
        {f"{prefix}conv1.weight", f"{prefix}positional_embedding"} <= state.keys()
        for prefix in ("", "visual.")
    )


def describe_grids(side: int, grid: tuple[int, int]) -> str:
    """Return the square grid of a file and the student's as text; empty if they are equal."""
    rows, columns = grid
    same = not side or (side, side) == (rows, columns)
    return "" if same else f"{side} x {side} to {rows} x {columns} patches"


def rename_tensors(state: Mapping[str, Tensor]) -> dict[str, Piece]:
    """Rename a file's tensors to those of the model; queries, keys and values become one matrix."""
    sources: dict[str, list[str]] = {}
    for name in sorted(state, key=number_in_qkv):
        ours = name
        for pattern, replacement in RENAMES:
            ours = re.sub(pattern, replacement, ours)
        sources.setdefault(ours, []).append(name)
    if "encoder.norm.weight" not in sources:  # the norm of a model that pools before it
        for kind in ("weight", "bias"):
            if f"encoder.fc_norm.{kind}" in sources:
                sources[f"encoder.norm.{kind}"] = sources.pop(f"encoder.fc_norm.{kind}")
    return {ours: Piece([state[name] for name in names], names) for ours, names in sources.items()}


def number_in_qkv(name: str) -> int:
    """Return 0 for queries and all other tensors, 1 for keys, 2 for values."""
    return next((number for number, key in enumerate(QKV) if re.search(key, name)), 0)


def resample_positions(
    model: CollaborativeMAE, own: Mapping[str, Tensor], pieces: dict[str, Piece]
) -> str:
    """Resample the encoder's positional embedding to the student's grid with timm's function.

    Returns:
        Both grids as text; empty where the embedding fits or cannot be resampled.
    """
    rows, columns = model.encoder.grid
    if POSITIONS not in own:
        return ""
    piece, here = pieces.get(POSITIONS), own[POSITIONS].shape
    if piece is None or len(piece.shape) != 3 or piece.shape[::2] != here[::2]:
        return ""
    prefix = here[1] - rows * columns
    side = square_side(piece.shape[1] - prefix)
    grids = describe_grids(side, model.encoder.grid)
    if not grids:
        return ""
    table = resample_abs_pos_embed(
        piece.value.float(), [rows, columns], [side, side], num_prefix_tokens=prefix
    )
    pieces[POSITIONS] = piece._replace(parts=[table])
    return grids


def square_side(count: int) -> int:
    """Return the side of a square of ``count`` patches, or 0 if there is none."""
    side = math.isqrt(max(count, 0))
    return side if side * side == count else 0


def select_component(tensors: Mapping[str, T], *prefixes: str) -> dict[str, T]:
    """Return the tensors of one component of the model, without those that are skipped."""
    return {
        name: value
        for name, value in tensors.items()
        if name.startswith(prefixes) and not HEAD.match(name) and not TABLES.match(name)
    }


def list_mismatches(own: Mapping[str, Tensor], pieces: Mapping[str, Piece]) -> list[str]:
    """Return why the pieces and a component of the model do not match one to one."""
    shapes = [
        f"{' + '.join(piece.names)} is {list(piece.shape)}, the configured {name} "
        f"{list(own[name].shape)}"
        for name, piece in pieces.items()
        if name in own and piece.shape != own[name].shape
    ]
    missing = [f"no tensor for {name} {list(own[name].shape)}" for name in own.keys() - pieces]
    unexpected = [f"{' + '.join(pieces[name].names)} is unexpected" for name in pieces.keys() - own]
    return sorted(shapes) + sorted(missing) + sorted(unexpected)


def suggest_fix(own: Mapping[str, Tensor], pieces: Mapping[str, Piece]) -> str:
    """Return what to change when an encoder does not fit."""
    here, there = own[PATCHES].shape, pieces[PATCHES].shape
    if there[:2] == here[:2] and there != here:
        return f"set student.patch_size={there[-1]}, or take a file of patches of {here[-1]} pixels"
    return (
        "set student.arch (or student.width, student.depth and student.heads) to the file's model, "
        "or take a whole file of the configured one"
    )


def decoder_mismatch(
    model: CollaborativeMAE, own: Mapping[str, Tensor], pieces: Mapping[str, Piece]
) -> str:
    """Return why a file's decoder is not the configured one; empty if it is."""
    if not isinstance(model.decoder, FullDecoder):
        return "the configured decoder is not MAE's"
    prefixes = ("decoder.", "heads.pixel.") if "pixel" in model.heads else ("decoder.",)
    theirs = select_component(pieces, *prefixes)
    positions = theirs.pop(DECODER_POSITIONS, None)
    found = list_mismatches(select_component(own, *prefixes), theirs)
    if not found and positions and not is_sincos(positions.value):
        found = [f"{positions.names[0]} is not the sine-cosine embedding that this decoder adds"]
    return found[0] if found else ""


def is_sincos(table: Tensor) -> bool:
    """Return whether ``[1, 1 + N, E]`` is MAE's positional embedding of a square grid."""
    side = square_side(table.shape[1] - 1) if table.ndim == 3 else 0
    if not side or table.shape[2] % 4:
        return False
    code = sincos_positions(table.shape[2], (side, side))
    return torch.allclose(table[0, 1:].float(), code, rtol=0, atol=POSITION_TOLERANCE)


def skip_reason(name: str, own: Mapping[str, Tensor], unfit: str) -> str:
    """Return why a tensor is skipped, ``unfit`` for the whole decoder; empty if it is loaded."""
    if HEAD.match(name):
        return "a head on top of the encoder"
    if TABLES.match(name):
        return "the encoder computes its rotary positions"
    if name.startswith("encoder."):
        return ""
    if unfit:
        return unfit
    if name == DECODER_POSITIONS:
        return "the decoder computes its positions"
    return "" if name in own else "no pixels are predicted"


def summarise_texts(texts: Sequence[str], count: int = 3) -> str:
    """Return the first texts and the number of further ones."""
    rest = len(texts) - count
    return "; ".join(texts[:count]) + (f"; and {rest} more" if rest > 0 else "")
