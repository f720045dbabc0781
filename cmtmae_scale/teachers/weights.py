"""Local weight files: read without executing code, loaded completely or refused."""

import hashlib
import pickle
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from cmtmae_scale.errors import TeacherError

PICKLED = (".pt", ".pth", ".bin")
WRAPPERS = ("state_dict", "model")
PREFIXES = ("module.", "_orig_mod.")
"""What model wrappers add to every name."""
TEXT_KEYS = ("token_embedding.weight", "text_projection", "transformer.resblocks.0.ln_1.weight")


def is_file_name(weights: str) -> bool:
    """Return whether ``teacher.weights`` names a file and not a tag."""
    return Path(weights).suffix in (".safetensors", *PICKLED) or Path(weights).is_file()


def read_weights(path: str | Path, key: str = "teacher.weights") -> dict[str, Tensor]:
    """Read a state dict on the CPU.

    Args:
        path: ``.safetensors``, or ``.pt``, ``.pth``, ``.bin`` read with ``weights_only=True``. A
            dict under ``state_dict`` or ``model`` is unwrapped, and a prefix ``module.`` or
            ``_orig_mod.`` that all names share is dropped.
        key: the config's key that names the file, for messages.

    Raises:
        TeacherError: for a missing or unreadable file, a TorchScript archive, no tensors in it, or
            values that are not finite.
    """
    path = Path(path)
    where = f"{key}={path}"
    if not path.is_file():
        raise TeacherError(f"{where}: there is no such file; correct the path")
    if path.suffix == ".safetensors":
        try:
            state: object = load_file(path)
        except (SafetensorError, OSError) as error:
            raise TeacherError(
                f"{where}: not a complete safetensors file ({error}); copy it again"
            ) from error
    elif path.suffix in PICKLED:
        state = read_pickled(path, key)
    else:
        raise TeacherError(f"{where}: unknown file type; expected .safetensors or .pt")
    for wrapper in WRAPPERS:
        if isinstance(state, Mapping) and isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
    if not isinstance(state, Mapping) or not state:
        raise TeacherError(f"{where}: contains no state dict; save model.state_dict()")
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise TeacherError(
                f"{where}: {name!r} is a {type(value).__name__}, not a tensor; "
                "save model.state_dict() alone"
            )
    tensors = dict(state)
    for prefix in PREFIXES:
        if all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}
    found = find_non_finite(tensors)
    if found:
        raise TeacherError(f"{where}: {found}; take a sound copy of the file, or other weights")
    return tensors


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


def read_pickled(path: Path, key: str) -> object:
    """Read a torch file whose pickle contains tensors and plain containers only."""
    where = f"{key}={path}"
    if is_torchscript(path):
        raise TeacherError(
            f"{where}: a TorchScript archive, which runs code when loaded; where "
            "you trust it, write its weights once with torch.save(torch.jit.load(FILE, "
            f"map_location='cpu').state_dict(), NEW) and set {key}=NEW"
        )
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, OSError) as error:
        first = str(error).strip().split("\n")[0]
        raise TeacherError(
            f"{where}: cannot be read with torch.load(weights_only=True) ({first}); "
            "copy it again, or save its state dict as .safetensors"
        ) from error


def is_torchscript(path: Path) -> bool:
    """Return whether a file is an archive of ``torch.jit.save``, which contains code."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(Path(name).name == "constants.pkl" for name in archive.namelist())


def keep_blocks(state: dict[str, Tensor], prefix: str, depth: int) -> dict[str, Tensor]:
    """Keep the first ``depth`` blocks, whose names are ``PREFIX.NUMBER.REST``."""

    def kept(name: str) -> bool:
        number = name.removeprefix(prefix + ".").split(".")[0]
        return not (name.startswith(prefix + ".") and number.isdigit() and int(number) >= depth)

    return {name: value for name, value in state.items() if kept(name)}


def load_strictly(
    model: nn.Module, state: Mapping[str, Tensor], path: str | Path, name: str, remedy: str
) -> None:
    """Load a state dict that must match in every name and shape.

    Raises:
        TeacherError: naming the file, the first mismatches and the remedy.
    """
    own = model.state_dict()
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


def summarise_names(names: Sequence[str], count: int = 3) -> str:
    """Return the first names of a list, for a message."""
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")


def sha256(path: str | Path) -> str:
    """Return the SHA-256 digest of a file."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
