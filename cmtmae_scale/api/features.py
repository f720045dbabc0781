"""Features of all images of a folder, in memory or streamed into files.

Legend: n images, D width.
"""

import math
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from cmtmae_scale.api.encoders import open_encoder
from cmtmae_scale.config.schema import Config
from cmtmae_scale.errors import ConfigError, remedy_for
from cmtmae_scale.evaluation.encoders import (
    Encoder,
    Tokens,
    inference_autocast,
    split_tokens,
    token_encoder,
)
from cmtmae_scale.evaluation.features import ReadOptions, encode_batches
from cmtmae_scale.evaluation.images import ImageSet
from cmtmae_scale.method.images import IMAGENET_MEAN, IMAGENET_STD, normalise_images
from cmtmae_scale.runtime.collectives import pick_device
from cmtmae_scale.runtime.launch import World
from cmtmae_scale.runtime.storage import atomic_path, sync
from dataloading.errors import DataError
from dataloading.index import Index, build_index

ALONE = World(0, 1, 0, 1, "none")
Allocate = Callable[[tuple[int, ...], Any], NDArray[Any]]
"""Returns a new array of a shape and dtype, as ``numpy.empty`` does."""


class Features(NamedTuple):
    """Features of images, one row each, in the order of the index."""

    patches: NDArray[np.float32]
    """Mean of the patch tokens after the last norm, ``[n, D]``."""
    cls: NDArray[np.float32] | None
    """Class token after the last norm, ``[n, D]``; ``None``: the encoder has none."""
    names: NDArray[np.str_]
    """Path relative to the folder, or the place in a tar, ``[n]``."""
    ids: NDArray[np.int64]
    """Rows of the index, ascending ``[n]``."""
    labels: NDArray[np.int64]
    """Indices into ``classes``, ``[n]``; -1: no label."""
    classes: tuple[str, ...]
    """Names of the labels, sorted."""
    excluded: tuple[str, ...]
    """Images without a row: unusable by their header, or undecodable; the log has the reasons."""


def extract_features(
    encoder: VisionTransformer | Eva | str | Path,
    images: str | Path | Index,
    *,
    batch_size: int = 64,
    threads: int = 4,
    device: torch.device | str | None = None,
) -> Features:
    """Compute features of all images of a folder, in memory.

    Images are prepared as for evaluation: the shorter side is resized to 256/224 of the encoder's
    size, then the centre is cropped. Images are turned upright unless the encoder is the path of a
    run with ``data.exif_orientation=false``. A GPU computes in bfloat16, a CPU in float32.

    Args:
        encoder: of ``load_encoder``, another ViT of timm, or the path of a run or file.
        images: folder of images or tars, as ``data.path``, or their index.
        batch_size: images per forward.
        threads: reader and decoder threads.
        device: ``None``: the GPU where there is one.

    Returns:
        float32 features of about 4 n D bytes per kind.

    Raises:
        CheckpointError, ConfigError: see ``load_encoder``.
        DataError: no usable image, none that can be decoded, or features that are not finite.
        ReadError: storage did not return an image.
    """
    model, index = open_both(encoder, images)
    reading = ReadOptions(batch_size, threads, "auto")
    return fill_arrays(model, index, reading, device, np.empty)


def save_features(
    output: Path,
    encoder: VisionTransformer | Eva | str | Path,
    images: str | Path | Index,
    *,
    batch_size: int = 64,
    threads: int = 4,
) -> Features:
    """Compute features as ``extract_features``, and write them without keeping them in memory.

    Args:
        output: ``FILE.npz``, or a folder of .npy files, which ``numpy.load`` can map. It must not
            exist, and is written whole or not at all. Meanwhile the same amount of space is used
            again beside it.
        encoder: see ``extract_features``.
        images: see ``extract_features``.
        batch_size: see ``extract_features``.
        threads: see ``extract_features``.

    Returns:
        The arrays, mapped from unnamed files.

    Raises:
        ConfigError: if the output exists or cannot be written.
        CheckpointError, DataError, ReadError: see ``extract_features``.
    """
    refuse_output(output)
    model, index = open_both(encoder, images)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        reading, allocate = ReadOptions(batch_size, threads, "auto"), allocate_in(output.parent)
        features = fill_arrays(model, index, reading, None, allocate)
        with atomic_path(output) as draft:
            write_arrays(draft, output.suffix, features)
        sync(output.parent)
    except OSError as error:
        raise cannot_write(output, error) from error
    return features


def refuse_output(output: Path) -> None:
    """Refuse an output that exists, has another suffix, or is below a folder without access.

    Raises:
        ConfigError: names the output.
    """
    try:
        is_there = output.exists() or output.is_symlink()
    except OSError as error:
        raise cannot_write(output, error) from error
    if is_there:
        raise ConfigError(f"--output={output} exists; delete it or name another")
    if output.suffix not in ("", ".npz"):
        raise ConfigError(
            f"--output={output}: {output.suffix} is not a supported format; name FILE.npz, or a "
            "folder for .npy files"
        )


def cannot_write(output: Path, error: OSError) -> ConfigError:
    """Return the error for an output that cannot be written."""
    remedy = remedy_for(error, "name another")
    return ConfigError(f"--output={output} cannot be written ({error}); {remedy}")


def allocate_in(folder: Path) -> Allocate:
    """Return a function that maps new arrays from files in a folder.

    The files are unnamed, because NFS keeps a named file that is deleted while it is mapped, and
    with it the folder.
    """

    def allocate(shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
        kind = np.dtype(dtype)
        with tempfile.TemporaryFile(dir=folder) as opened:
            # A full store fails here, not when a page is written.
            os.posix_fallocate(opened.fileno(), 0, math.prod(shape) * kind.itemsize)
            return np.memmap(opened, kind, "r+", shape=shape)

    return allocate


def write_arrays(draft: Path, suffix: str, features: Features) -> None:
    """Write the arrays under their names; ``classes`` and ``excluded`` are arrays of text."""
    arrays = {key: value for key, value in features._asdict().items() if value is not None}
    arrays |= {key: np.array(arrays[key], dtype=np.str_) for key in ("classes", "excluded")}
    if suffix:
        with draft.open("wb") as opened:
            np.savez(opened, **arrays)
        return
    draft.mkdir()
    for name, values in arrays.items():
        np.save(draft / f"{name}.npy", values)
        sync(draft / f"{name}.npy")


def open_both(
    encoder: VisionTransformer | Eva | str | Path, images: str | Path | Index
) -> tuple[VisionTransformer | Eva, Index]:
    """Load an encoder and list the images, as its run reads them, where paths are given."""
    if isinstance(encoder, nn.Module):
        model, config = encoder, Config()
    else:
        model, config = open_encoder(Path(encoder))
    if not isinstance(images, Index):
        images = build_index(images, exif_orientation=config.data.exif_orientation)
    return model, images


def fill_arrays(
    model: VisionTransformer | Eva,
    index: Index,
    reading: ReadOptions,
    device: torch.device | str | None,
    allocate: Allocate,
) -> Features:
    """Compute features batch by batch into new arrays; no other memory grows with the images.

    Raises:
        DataError: if no image can be decoded, or features are not finite.
    """
    place = pick_device(ALONE) if device is None else torch.device(device)
    rows, everything = len(index), np.arange(len(index), dtype=np.int64)
    images = ImageSet(index, everything, index.entries["label"].astype(np.int64))
    ids = allocate((rows,), np.int64)
    arrays: dict[str, NDArray[np.float32]] = {}
    done = 0
    encoder = wrap_timm(model, place)
    for found, columns in encode_batches(images, [encoder], reading, ALONE, place):
        end = done + len(found)
        ids[done:end] = found.cpu().numpy()
        for (_, kind), values in columns.items():
            if kind not in arrays:
                arrays[kind] = allocate((rows, values.shape[1]), np.float32)
            refuse_non_finite(values, found, index)
            arrays[kind][done:end] = values.cpu().numpy()
        done = end
    if not done:
        raise DataError(f"{index.root}: none of {rows} images could be decoded")
    ids = ids[:done]
    longest = max(len(index.names[row]) for row in range(rows))
    names = allocate((done,), f"<U{longest}")
    for row, sample in enumerate(ids):
        names[row] = index.names[int(sample)]
    missing = np.setdiff1d(everything, ids, assume_unique=True)
    excluded = [name for name, _ in index.unused_images()] + [
        index.names[int(row)] for row in missing
    ]
    return Features(
        arrays["patches"][:done],
        arrays["cls"][:done] if "cls" in arrays else None,
        names,
        ids,
        images.labels[ids],
        tuple(index.labels),
        tuple(excluded),
    )


def refuse_non_finite(values: Tensor, positions: Tensor, index: Index) -> None:
    """Refuse features ``[b, D]`` that are not finite.

    Raises:
        DataError: names the first image with such features.
    """
    bad = ~values.isfinite().all(1)
    if bool(bad.any()):
        name = index.names[int(positions[bad][0])]
        raise DataError(
            f"the features of {name} are not finite; use other weights, or remove the image if it "
            "is always the same"
        )


def wrap_timm(model: VisionTransformer | Eva, device: torch.device) -> Encoder:
    """Wrap a ViT of timm as an encoder; the model moves to the device, in eval mode."""
    settings = cast(dict[str, Any], model.pretrained_cfg or {})
    mean = settings.get("mean") or IMAGENET_MEAN
    std = settings.get("std") or IMAGENET_STD
    height, width = cast(tuple[int, int], model.patch_embed.img_size)
    if height != width:
        raise ConfigError(f"the encoder takes images of {height} x {width}; expected a square")
    network = model.to(device).eval()
    # A model that pools before its last norm returns tokens without it.
    pools_first = isinstance(network.norm, nn.Identity)
    last_norm = cast(nn.Module, network.fc_norm) if pools_first else nn.Identity()

    def encode_tokens(images: Tensor) -> Tokens:
        with inference_autocast(device):
            tokens = last_norm(network.forward_features(normalise_images(images, mean, std)))
        return split_tokens(tokens, network.num_prefix_tokens, network.cls_token is not None)

    return token_encoder("encoder", height, network.patch_embed.grid_size, encode_tokens)
