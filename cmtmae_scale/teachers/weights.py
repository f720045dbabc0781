"""Files of weights: opened by their kind, checked, and named by their digests."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from cmtmae_scale.errors import TeacherError
from cmtmae_scale.teachers.pickles import bound_storage, read_pickled
from cmtmae_scale.teachers.state_dicts import (
    SAVE_FLOATS,
    drop_wrappers,
    find_non_finite,
    take_encoder,
    unwrap,
)
from dataloading.files import open_regular

PICKLED = (".pt", ".pth", ".bin", ".ckpt", ".tar")
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
"""First bytes, after blanks, of files that are saved in place of weights."""
DTYPE_ERRORS = (ValueError, LookupError, AttributeError, TypeError, RuntimeError)
"""Raised by safetensors for data types that torch lacks."""
DOWNLOADS = "datasets/teachers"
"""Folder in which messages and guides place weights for machines without internet."""


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
    """Return the error to raise where published weights cannot be downloaded.

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
    try:
        is_folder, is_file = path.is_dir(), path.is_file()
        if is_file and path.suffix in (".safetensors", *PICKLED):
            refuse_other_kinds(path, where)
    except OSError as error:
        raise TeacherError(
            f"{where}: cannot be read ({error.strerror}); make it readable, or correct the path"
        ) from error
    if is_folder:
        return check_tensors(read_folder(path, where), where)
    if not is_file:
        raise TeacherError(f"{where}: there is no such file; correct the path")
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
    state = unwrap(state, where)
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
        TeacherError: if the folder is of another kind, or damaged.
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


def refuse_other_kinds(path: Path, where: str) -> None:
    """Refuse files that were downloaded in place of weights, by their first bytes.

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
            raise TeacherError(f"{where}: is not a file of weights, but {found}")


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
