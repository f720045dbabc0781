"""Local weight files: read without executing code, loaded completely or refused."""

import argparse
import hashlib
import logging
import pathlib
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from cmtmae_scale.errors import TeacherError
from dataloading.files import open_regular

logger = logging.getLogger(__name__)

PICKLED = (".pt", ".pth", ".bin", ".ckpt", ".tar")
WRAPPERS = ("state_dict", "model", "model_state_dict", "module", "teacher")
"""Keys under which programs save a state dict; of DINO's two networks the teacher is evaluated."""
PREFIXES = ("module.", "_orig_mod.")
"""What model wrappers add to every name."""
INNER = re.compile(r"(?:(?<=\.)|^)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""What torch.compile, FSDP and checkpointing add within names."""
CHUNKS = re.compile(r"(?:(?<=\.)|^)blocks\.\d+\.(?=\d+\.)")
"""Blocks of DINOv2's training, in chunks; their numbers count on over the chunks."""
ENCODER = re.compile(r"(.+\.)(?:patch_embed\.proj|visual\.conv1)\.weight")
"""Name of the first layer of an encoder that is a part of a larger model."""
NOT_WEIGHTS = {
    b"version https://git-lfs": "a Git-LFS pointer; run git lfs pull where you cloned",
    b"version https://hawser": "a Git-LFS pointer; run git lfs pull where you cloned",
    b"/annex/objects": "a git-annex pointer; run git annex get where you cloned",
    b"<": "a web page (HTML or XML); download the file itself",
    b"{": "text (JSON); download the weights themselves",
    b"\x1f\x8b": "compressed (gzip); unpack it",
    b"\xfd7zXZ": "compressed (xz); unpack it",
    b"7z\xbc\xaf": "compressed (7z); unpack it",
    b"\x89HDF": "an HDF5 file of Keras; take the PyTorch file of the model",
}
"""First bytes, after blanks, of what is saved in place of weights."""
EXPANSION = 8
"""Most bytes of all tensors per byte of their file; tied weights are counted twice."""
DTYPE_ERRORS = (ValueError, LookupError, AttributeError, TypeError, RuntimeError)
"""Raised by safetensors for data types that torch lacks."""
SAVE_FLOATS = "save the weights as floating-point numbers of 16 or 32 bits, not quantised"
PLAIN_CLASSES: list[Any] = [
    argparse.Namespace,
    *(
        (kind, f"{module}.{name}")
        for module in ("pathlib", "pathlib._local")  # the second: of Python 3.13
        for name, kind in (
            ("PosixPath", pathlib.PurePosixPath),
            ("WindowsPath", pathlib.PureWindowsPath),
            ("PurePosixPath", pathlib.PurePosixPath),
            ("PureWindowsPath", pathlib.PureWindowsPath),
        )
    ),
]
"""Classes without side effects that pickles may hold: options of a program, and paths."""
DOWNLOADS = "datasets/teachers"
"""Folder in which messages and guides place weights for machines without internet."""
TEXT_KEYS = ("token_embedding.weight", "text_projection", "transformer.resblocks.0.ln_1.weight")


def is_file_name(weights: str) -> bool:
    """Return whether ``teacher.weights`` names a file and not a tag."""
    return Path(weights).suffix in (".safetensors", *PICKLED) or Path(weights).is_file()


def describe_unreachable(
    tag: str,
    error: Exception,
    *,
    repository: str,
    url: str,
    files: Mapping[str, str],
    settings: Sequence[str] = (),
) -> TeacherError:
    """Return what to raise where published weights cannot be downloaded.

    Args:
        tag: ``teacher.weights``.
        error: of the library's download.
        repository: of the Hugging Face hub; empty: none, and ``url`` is the file.
        url: the file's address; empty: none.
        files: keys of the config, and the files of the repository that they are set to.
        settings: other ``key=value`` that a file needs and a tag does not.

    Returns:
        An error with a command for a machine with internet, and the settings that name its files.
    """
    if repository:
        folder = f"{DOWNLOADS}/{repository.rpartition('/')[2]}"
        command = f"hf download {repository} {' '.join(files.values())} --local-dir {folder}"
        settings = [*(f"{key}={folder}/{name}" for key, name in files.items()), *settings]
    elif url:
        command = f"wget --directory-prefix {DOWNLOADS} {url}"
        settings = [f"teacher.weights={DOWNLOADS}/{url.rpartition('/')[2]}", *settings]
    else:
        return TeacherError(
            f"teacher.weights={tag} was not published as a file; set teacher.weights=FILE"
        )
    first = str(error).strip().split("\n")[0]
    return TeacherError(
        f"teacher.weights={tag} cannot be downloaded ({type(error).__name__}: {first}); where "
        f"there is internet, run `{command}`, then set {' '.join(settings)}"
    )


def read_weights(path: str | Path, key: str = "teacher.weights") -> dict[str, Tensor]:
    """Read a state dict on the CPU as ``map_weights``, and refuse values that are not finite.

    Raises:
        TeacherError: see ``map_weights``; also for values that are not finite.
    """
    tensors = map_weights(path, key)
    found = find_non_finite(tensors)
    if found:
        raise TeacherError(
            f"{key}={path}: {found}; take a sound copy of the file, or other weights"
        )
    return tensors


def map_weights(path: str | Path, key: str = "teacher.weights") -> dict[str, Tensor]:
    """Open a state dict on the CPU, whose values are read from the file where they are used.

    Files of torch's format before 1.6 and folders cannot be mapped, and are read.

    Args:
        path: ``.safetensors``, or ``.pt``, ``.pth``, ``.bin``, ``.ckpt``, ``.tar`` read with
            ``weights_only=True``, or a folder of ``torch.distributed.checkpoint``. A dict under one
            of ``WRAPPERS`` is unwrapped, what wrappers add to names is dropped, and of a larger
            model its only encoder is taken (``backbone.*`` of DINO, ``model.*`` of Lightning); the
            log names the other tensors.
        key: the config's key that names the file, for messages.

    Raises:
        TeacherError: for a missing or unreadable file, a TorchScript archive, a pickled model, a
            file of another kind, several encoders, quantised values, or no tensors.
    """
    path = Path(path)
    where = f"{key}={path}"
    if path.is_dir():
        return check_tensors(read_folder(path, where), where)
    if not path.is_file():
        raise TeacherError(f"{where}: there is no such file; correct the path")
    if path.suffix in (".safetensors", *PICKLED):
        refuse_other_kinds(path, where)
    if path.suffix == ".safetensors":
        try:
            state: object = load_file(path)
        except (SafetensorError, OSError, *DTYPE_ERRORS) as error:
            raise TeacherError(
                f"{where}: not a complete safetensors file ({error}); copy it again"
            ) from error
    elif path.suffix in PICKLED:
        state = read_pickled(path, key)
    else:
        raise TeacherError(f"{where}: unknown file type; expected .safetensors or .pt")
    state = unwrap(state)
    if not isinstance(state, Mapping) or not state:
        raise TeacherError(f"{where}: contains no state dict; save model.state_dict()")
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise TeacherError(
                f"{where}: {name!r} is a {type(value).__name__}, not a tensor; "
                "save model.state_dict() alone"
            )
    tensors = dict(state)
    bound_storage(tensors, path, where)
    return check_tensors(tensors, where)


def read_folder(path: Path, where: str) -> dict[str, Tensor]:
    """Read a folder of ``torch.distributed.checkpoint``.

    Raises:
        TeacherError: if the folder is another one, or damaged.
    """
    from cmtmae_scale.teachers.dcp import METADATA, read_dcp  # 0.5 s, and rarely needed

    if not (path / METADATA).exists():
        raise TeacherError(
            f"{where}: is a folder, and none of torch.distributed.checkpoint (it has no "
            f"{METADATA}); name a file of weights in it"
        )
    try:
        tensors = read_dcp(path)
    except Exception as error:  # a pickle of any bytes raises anything; each ends with the remedy
        first = str(error).strip().split("\n")[0] or type(error).__name__
        raise TeacherError(
            f"{where}: cannot be read as a folder of torch.distributed.checkpoint ({first}); copy "
            "it again, or save the state dict as .safetensors"
        ) from error
    if not tensors:
        raise TeacherError(f"{where}: holds no weights; name a folder that does")
    return tensors


def check_tensors(tensors: dict[str, Tensor], where: str) -> dict[str, Tensor]:
    """Return the encoder of tensors that were read, without what wrappers add to names.

    Raises:
        TeacherError: for several encoders, or quantised values.
    """
    tensors = take_encoder(drop_wrappers(tensors), where)
    for name, value in tensors.items():
        if value.is_floating_point() and value.itemsize == 1:
            raise TeacherError(f"{where}: {name} is {value.dtype}; {SAVE_FLOATS}")
    return tensors


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


def refuse_other_kinds(path: Path, where: str) -> None:
    """Refuse files that download in place of weights, by their first bytes.

    Raises:
        TeacherError: naming what the file is and the remedy.
    """
    with open(open_regular(path), "rb") as opened:
        head = opened.read(256)
    if not head:
        raise TeacherError(f"{where}: is empty; copy it again")
    if path.suffix == ".safetensors" and head[8:9] == b"{":  # its first 8 bytes are a length
        return
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    for mark, found in NOT_WEIGHTS.items():
        if start.startswith(mark.lower()):
            raise TeacherError(f"{where}: is no file of weights, but {found}")


def unwrap(state: object) -> object:
    """Return the state dict within a checkpoint of another program."""
    for _ in range(3):
        inner = None
        if isinstance(state, Mapping):
            found = (state.get(wrapper) for wrapper in WRAPPERS)
            inner = next((tree for tree in found if isinstance(tree, Mapping)), None)
        if inner is None:
            break
        state = inner
    return state


def bound_storage(tensors: Mapping[str, Tensor], path: Path, where: str) -> None:
    """Refuse tensors that hold more values than the file, such as those of stride 0.

    Raises:
        TeacherError: naming the tensor.
    """
    left = EXPANSION * path.stat().st_size
    for name, value in tensors.items():
        if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized:
            raise TeacherError(
                f"{where}: {name} is {value.layout} on {value.device}; save dense tensors"
            )
        size = value.numel() * value.element_size()
        left -= size
        if size > value.untyped_storage().nbytes() or left < 0:
            raise TeacherError(
                f"{where}: {name} {list(value.shape)} repeats values, {size} bytes of a file of "
                f"{path.stat().st_size}; save its .contiguous()"
            )
    stored = sum(member.file_size for member in zip_members(path))
    storages = {
        storage.data_ptr(): storage.nbytes()
        for storage in (value.untyped_storage() for value in tensors.values())
    }
    if stored and sum(storages.values()) > stored:
        raise TeacherError(
            f"{where}: its tensors take {sum(storages.values())} bytes, but it holds {stored}; "
            "copy it again"
        )


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


def read_pickled(path: Path, key: str) -> object:
    """Read a torch file whose pickle contains tensors, plain containers and options only.

    ``PLAIN_CLASSES`` are allowed, which training scripts save beside their weights; to build them
    runs no other code.

    Raises:
        TeacherError: naming the class whose object the file holds, or what is wrong with the file.
    """
    where = f"{key}={path}"
    if is_torchscript(path):
        raise TeacherError(
            f"{where}: a TorchScript archive, which runs code when loaded; where "
            "you trust it, write its weights once with torch.save(torch.jit.load(FILE, "
            f"map_location='cpu').state_dict(), NEW) and set {key}=NEW"
        )
    members = zip_members(path)
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        unpacked = sum(member.file_size for member in members)
        raise TeacherError(
            f"{where}: is compressed and unpacks to {unpacked} bytes, which no torch.save writes; "
            "copy it again"
        )
    try:
        with torch.serialization.safe_globals(PLAIN_CLASSES):
            # Of a mapped file no storage reaches beyond the end, whatever size a pickle gives it.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=bool(members))
    except Exception as error:  # a pickle of any bytes raises anything; each ends with the remedy
        refused = re.search(r"GLOBAL ([\w.]+)|(?:class|type|global) ([\w.]+)", str(error))
        if refused:
            raise TeacherError(
                f"{where}: holds an object of {refused[1] or refused[2]}, not only tensors, and "
                "building it would run code, so weights_only=True refuses it; where you trust the "
                "file, write its weights once with torch.save(MODEL.state_dict(), NEW) and set "
                f"{key}=NEW"
            ) from error
        words = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip().split("\n")[0]
        first = "no torch file" if "weights_only" in words else words or type(error).__name__
        raise TeacherError(
            f"{where}: cannot be read with torch.load(weights_only=True) ({first}); "
            "copy it again, or save its state dict as .safetensors"
        ) from error


def is_torchscript(path: Path) -> bool:
    """Return whether a file is an archive of ``torch.jit.save``, which contains code."""
    return any(Path(member.filename).name == "constants.pkl" for member in zip_members(path))


def zip_members(path: Path) -> list[zipfile.ZipInfo]:
    """Return the members of a zip archive; none of another or damaged file."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.infolist()
    # zipfile raises NotImplementedError for features of the format that it does not read.
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return []


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


def summarise_names(names: Sequence[str], count: int = 3) -> str:
    """Return the first names of a list, for a message."""
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")


def sha256(path: str | Path) -> str:
    """Return the SHA-256 digest of a file."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_weights(path: Path) -> str:
    """Return the SHA-256 of a file, or of the names and digests of a folder's files."""
    if not path.is_dir():
        return sha256(path)
    files = sorted(one for one in path.iterdir() if one.is_file())
    return hashlib.sha256(repr([(one.name, sha256(one)) for one in files]).encode()).hexdigest()


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
