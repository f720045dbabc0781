"""State dicts of others: what names and values mean, and loading them completely or not at all."""

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor, nn

from cmtmae_scale.errors import TeacherError

logger = logging.getLogger(__name__)

WRAPPERS = ("state_dict", "model", "model_state_dict", "module", "teacher")
"""Keys under which programs save a state dict; of DINO's two networks the teacher is evaluated."""
PREFIXES = ("module.", "_orig_mod.")
"""Prefixes that model wrappers add to every name."""
INNER = re.compile(r"(?:(?<=\.)|^)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""Parts that torch.compile, FSDP and checkpointing add within names."""
CHUNKS = re.compile(r"(?:(?<=\.)|^)blocks\.\d+\.(?=\d+\.)")
"""Blocks of DINOv2's training, in chunks; their numbers count on over the chunks."""
ENCODER = re.compile(r"(.+\.)(?:patch_embed\.proj|visual\.conv1)\.weight")
"""Name of the first layer of an encoder that is a part of a larger model."""
SAVE_FLOATS = "save the weights as floating-point numbers of 16 or 32 bits, not quantised"
TEXT_KEYS = ("token_embedding.weight", "text_projection", "transformer.resblocks.0.ln_1.weight")


def unwrap(state: object, where: str) -> object:
    """Return the state dict within a checkpoint of another program; the log names the others."""
    for _ in range(3):
        if not isinstance(state, Mapping):
            break
        key = next((one for one in WRAPPERS if isinstance(state.get(one), Mapping)), None)
        if key is None:
            break
        others = [str(name) for name in state if name != key and holds_tensors(state[name])]
        if others:  # such as EMA weights, or the other network of a pair
            text = "%s: the tensors under %s are taken, those under %s are not"
            logger.info(text, where, key, summarise_names(others))
        state = state[key]
    return state


def holds_tensors(tree: object) -> bool:
    """Return whether a value is a mapping to tensors, as a state dict is."""
    return isinstance(tree, Mapping) and any(isinstance(one, Tensor) for one in tree.values())


def drop_wrappers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Drop what wrappers of a model add to names, in any order."""
    names = {name: CHUNKS.sub("blocks.", INNER.sub("", name)) for name in tensors}
    while prefix := next(
        (one for one in PREFIXES if all(name.startswith(one) for name in names.values())), None
    ):
        names = {old: name.removeprefix(prefix) for old, name in names.items()}
    if len(set(names.values())) < len(names):  # two wrappers of one network
        return dict(tensors)
    return {names[old]: value for old, value in tensors.items()}


def take_encoder(tensors: dict[str, Tensor], where: str) -> dict[str, Tensor]:
    """Return the encoder of a larger model without its prefix; the log names the other tensors.

    Raises:
        TeacherError: if there are several encoders.
    """
    first = ("patch_embed.proj.weight", "conv1.weight", "visual.conv1.weight")
    found = {match[1] for name in tensors if (match := ENCODER.fullmatch(name))}
    prefixes = sorted({one.split("visual.")[0] for one in found} - {""})
    if not prefixes or any(name in tensors for name in first):
        return tensors
    if len(prefixes) > 1:
        raise TeacherError(
            f"{where}: holds {len(prefixes)} encoders ({summarise_names(prefixes)}); save the "
            "state dict of one of them alone"
        )
    prefix = prefixes[0]
    taken = {
        name.removeprefix(prefix): value
        for name, value in tensors.items()
        if name.startswith(prefix)
    }
    others = [name for name in tensors if not name.startswith(prefix)]
    if others:
        logger.info(
            "%s: the encoder is %s* (%d tensors); %d other tensors are not used (%s)",
            where,
            prefix,
            len(taken),
            len(others),
            summarise_names(others),
        )
    return taken


def keep_blocks(state: dict[str, Tensor], prefix: str, depth: int) -> dict[str, Tensor]:
    """Keep the first ``depth`` blocks, whose names are ``PREFIX.NUMBER.REST``."""

    def kept(name: str) -> bool:
        number = name.removeprefix(prefix + ".").split(".")[0]
        return not (name.startswith(prefix + ".") and number.isdigit() and int(number) >= depth)

    return {name: value for name, value in state.items() if kept(name)}


def image_state(state: dict[str, Tensor], path: str) -> dict[str, Tensor]:
    """Return the image tower's weights from those of a CLIP model or of an image tower.

    Raises:
        TeacherError: for weights of another library or of a text tower only.
    """
    where = f"teacher.weights={path}"
    if any(name.startswith("visual.trunk.") for name in state):
        raise TeacherError(f"{where}: its image tower is timm's; set teacher.library=timm")
    if any(name.startswith("visual.") for name in state):
        return {
            name.removeprefix("visual."): value
            for name, value in state.items()
            if name.startswith("visual.")
        }
    if "class_embedding" in state or "conv1.weight" in state:
        return state
    if "patch_embed.proj.weight" in state:
        raise TeacherError(f"{where}: these are timm's names; set teacher.library=timm")
    if any(name.startswith("vision_model.") for name in state):
        raise TeacherError(
            f"{where}: these are names of the transformers library; use the open_clip file of the "
            "same model"
        )
    kind = "only a text tower" if any(key in state for key in TEXT_KEYS) else "no image tower"
    raise TeacherError(
        f"{where}: contains {kind} (first names: {', '.join(list(state)[:3])}); give the file of a "
        "complete CLIP model or of its image tower"
    )


def find_other_dtype(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> list[str]:
    """Return tensors of a file whose numbers are of another kind than the model's.

    A copy would drop imaginary parts, and take quantised values without their scale. Floating-point
    numbers of 16 bits or more are of one kind; other types must be equal.
    """

    def kind(value: Tensor) -> object:
        return "float" if value.is_floating_point() and value.itemsize > 1 else value.dtype

    return [
        f"{name} is {str(value.dtype).removeprefix('torch.')} instead of "
        f"{str(own[name].dtype).removeprefix('torch.')}"
        for name, value in state.items()
        if name in own and kind(value) != kind(own[name])
    ]


def find_non_finite(tensors: Mapping[str, Tensor]) -> str:
    """Return which tensors hold values that are not finite in float32; empty: none does.

    Additive attention masks, named ``attn_mask``, hold ``-inf`` by design; no model loads them.
    """
    found = [
        (name, value)
        for name, value in tensors.items()
        if value.is_floating_point()
        and not name.endswith("attn_mask")
        and not bool(value.float().isfinite().all())
    ]
    if not found:
        return ""
    name, value = found[0]
    count = int((~value.float().isfinite()).sum())
    more = f", and so do {len(found) - 1} more tensors" if found[1:] else ""
    return f"{name} holds {count} values of {value.numel()} that are not finite{more}"


def load_strictly(
    model: nn.Module, state: Mapping[str, Tensor], path: str | Path, name: str, remedy: str
) -> None:
    """Load a state dict that must match in every name and shape.

    Raises:
        TeacherError: naming the file, the first mismatches and the remedy.
    """
    own = model.state_dict()
    other = find_other_dtype(own, state)
    if other:
        raise TeacherError(f"teacher.weights={path}: {summarise_names(other)}; {SAVE_FLOATS}")
    problems = {
        "missing": [key for key in own if key not in state],
        "unexpected": [key for key in state if key not in own],
        "of another shape": [
            f"{key} {list(state[key].shape)} instead of {list(own[key].shape)}"
            for key in own
            if key in state and state[key].shape != own[key].shape
        ],
    }
    found = [
        f"{len(keys)} {kind} ({summarise_names(keys)})" for kind, keys in problems.items() if keys
    ]
    if found:
        raise TeacherError(
            f"teacher.weights={path} does not fit teacher.model={name}: {', '.join(found)}; "
            f"{remedy}"
        )
    model.load_state_dict(dict(state), strict=True)


def summarise_names(names: Sequence[str]) -> str:
    """Return the first three names of a list, for a message."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
