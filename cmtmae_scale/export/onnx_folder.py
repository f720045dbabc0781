"""Export of an encoder as an ONNX graph, verified in onnxruntime where that is installed.

``model.onnx`` maps ``images``, normalised ``[B, 3, S, S]`` of any B, to ``tokens [B, P + N, D]``
after the last norm and ``pooled [B, D]``. The graph is made by the exporter and for the opset that
the installed torch recommends, ``torch.onnx.export(..., dynamo=True)``.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cmtmae_scale.errors import ConfigError
from cmtmae_scale.export.compare import Agreement, require_agreement
from cmtmae_scale.export.encoder import build_timm
from cmtmae_scale.export.origin import Origin
from cmtmae_scale.method.images import IMAGENET_MEAN, IMAGENET_STD, normalise_images

MODEL = "model.onnx"
INPUTS, OUTPUTS = ("images",), ("tokens", "pooled")
LARGEST_FILE = 2**30
"""Bytes up to which weights are inside ``model.onnx``; protobuf is limited to 2 GiB."""
BATCHES = (1, 3)
"""Batch sizes that are compared besides all images; the graph is traced at another size."""
INSTALL = "pip install 'cmtmae-scale[onnx]'"
UNVERIFIED = f"NOT verified, because onnxruntime is not installed: {INSTALL}, and export again"
SNIPPET = f"""import onnxruntime
session = onnxruntime.InferenceSession("FOLDER/{MODEL}")
tokens, pooled = session.run(None, {{"images": images}})  # float32 [B, 3, S, S], normalised
"""


class TokensAndPooled(nn.Module):
    """The two outputs of a timm model that an ONNX graph has."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.model.forward_features(images)  # [B, P + N, D]
        return tokens, self.model.forward_head(tokens)


def onnx_version() -> str:
    """Return onnxruntime's version, or that it is not installed.

    Raises:
        ConfigError: if a package that writes the graph is not installed.
    """
    missing = [name for name in ("onnx", "onnxscript") if find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"the export needs {' and '.join(missing)}, which is not installed: {INSTALL}"
        )
    if find_spec("onnxruntime") is None:
        return "no onnxruntime"
    import onnxruntime

    return f"onnxruntime {onnxruntime.__version__}"


@torch.no_grad()
def write_onnx(draft: Path, origin: Origin) -> None:
    """Write the graph with its weights.

    Raises:
        OSError: if the store refuses.
    """
    model, _ = build_timm(origin.config)
    model.load_state_dict(origin.encoder().state_dict(), strict=True)
    size = origin.config.views.image_size
    program: Any = torch.onnx.export(
        TokensAndPooled(model).eval(),
        (torch.zeros(2, 3, size, size),),
        input_names=INPUTS,
        output_names=OUTPUTS,
        dynamic_shapes={INPUTS[0]: {0: "batch"}},
        dynamo=True,
        verbose=False,
    )
    for node in program.model.graph:
        node.metadata_props.clear()  # stack traces with paths of this machine
    num_bytes = sum(4 * parameter.numel() for parameter in model.parameters())
    program.save(draft / MODEL, external_data=num_bytes > LARGEST_FILE)


@torch.no_grad()
def check_onnx(folder: Path, origin: Origin, images: Tensor) -> Agreement | None:
    """Compare the graph's outputs in onnxruntime with the run's network, for batches of 1, 3 and B.

    Images are uint8, ``[B, S, S, 3]``; fewer than 3 are repeated.

    Returns:
        The largest difference of the tokens; ``None`` without onnxruntime.

    Raises:
        CheckpointError: if onnxruntime computes something else.
    """
    library = onnx_version()
    if find_spec("onnxruntime") is None:
        return None
    import onnxruntime

    session = onnxruntime.InferenceSession(folder / MODEL, providers=["CPUExecutionProvider"])
    ours = origin.encoder()
    found: list[Agreement] = []
    for count in (*BATCHES, len(images)):
        chosen = images[torch.arange(count) % len(images)]
        pixels = normalise_images(chosen, IMAGENET_MEAN, IMAGENET_STD)
        tokens, pooled = map(torch.as_tensor, session.run(None, {INPUTS[0]: pixels.numpy()}))
        expected = ours(pixels)
        require_agreement(ours.forward_head(expected), pooled, library)
        found.append(require_agreement(expected, tokens, library))
    return max(found, key=lambda one: one.difference)
