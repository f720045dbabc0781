"""An encoder as a folder that ``timm.create_model("local-dir:FOLDER", pretrained=True)`` takes.

``config.json`` has what timm's ``save_config_for_hf`` writes; ``model_args`` build the student's
architecture. timm before 1.0.26 hands safetensors of a folder to ``torch.load``; there the same
file is loaded through ``checkpoint_path``.

Source: ``timm.models._hub`` and ``_factory`` of 1.0.24 to 1.0.31.
"""

import json
from pathlib import Path
from typing import cast

import timm
import torch
from timm.data.config import resolve_data_config
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.torch_version import TorchVersion

from cmtmae_scale.checkpoint.shards import write_encoder
from cmtmae_scale.errors import CheckpointError
from cmtmae_scale.export.compare import Agreement, require_agreement
from cmtmae_scale.export.encoder import timm_call, timm_options
from cmtmae_scale.export.origin import Origin
from cmtmae_scale.method.images import IMAGENET_MEAN, IMAGENET_STD, normalise_images
from cmtmae_scale.runtime.storage import write_atomic
from dataloading.one_pass import CENTRE

WEIGHTS = "model.safetensors"
FIRST_LOCAL = "1.0.26"
"""First timm that reads safetensors from a local folder."""


def write_timm(draft: Path, origin: Origin) -> None:
    """Write weights and config.

    Raises:
        OSError: if the store refuses.
    """
    write_encoder(origin.folder, draft / WEIGHTS, origin.weights)
    config, options = origin.config, timm_options(origin.config)
    with torch.device("meta"):
        width = cast(VisionTransformer, timm.create_model(config.student.arch)).num_features
    tree = {
        "architecture": config.student.arch.split(".")[0],  # a tag would name other weights
        "num_classes": options.pop("num_classes"),
        "num_features": width,
        "global_pool": options["global_pool"],
        "model_args": options,
        "pretrained_cfg": {
            "input_size": [3, config.views.image_size, config.views.image_size],
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": CENTRE,
            "crop_mode": "center",
            "mean": IMAGENET_MEAN,
            "std": IMAGENET_STD,
            "num_classes": 0,
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }
    write_atomic(draft / "config.json", json.dumps(tree, indent=2) + "\n")


def load_timm(folder: Path, origin: Origin) -> VisionTransformer:
    """Load a folder as a user of this timm would."""
    if reads_folders():
        call = timm.create_model(f"local-dir:{folder.absolute()}", pretrained=True)
    else:
        arch, options = origin.config.student.arch, timm_options(origin.config)
        call = timm.create_model(arch, **options, checkpoint_path=folder / WEIGHTS)
    return cast(VisionTransformer, call).eval()


def reads_folders() -> bool:
    """Whether this timm reads safetensors from a local folder."""
    return TorchVersion(timm.__version__) >= FIRST_LOCAL


def described() -> str:
    """This timm, and the way in which it loads a folder."""
    way = "" if reads_folders() else f" (checkpoint_path={WEIGHTS})"
    return f"timm {timm.__version__}{way}"


@torch.no_grad()
def check_timm(folder: Path, origin: Origin, images: Tensor) -> Agreement:
    """Load a folder with timm alone and compare tokens and pooled features with the run's network.

    Args:
        folder: the export.
        origin: where it comes from.
        images: uint8, ``[B, S, S, 3]``.

    Raises:
        CheckpointError: if timm reads other settings or computes something else.
    """
    library = described()
    model, ours = load_timm(folder, origin), origin.encoder()
    size = origin.config.views.image_size
    expected = {"input_size": (3, size, size), "mean": IMAGENET_MEAN, "std": IMAGENET_STD}
    if reads_folders():
        data = resolve_data_config({}, pretrained_cfg=model.pretrained_cfg)
        read = {key: tuple(data[key]) for key in expected}
        if read != expected:
            raise CheckpointError(f"{library} reads {read} from {folder}; expected {expected}")
    if model.num_classes or model.num_features != ours.num_features:
        raise CheckpointError(f"{library} builds a head or another width; please report this")
    pictures = normalise_images(images, IMAGENET_MEAN, IMAGENET_STD)
    tokens = ours(pictures)  # [B, P + N, D]
    require_agreement(ours.forward_head(tokens), model(pictures), library)
    return require_agreement(tokens, model.forward_features(pictures), library)


def snippet(origin: Origin) -> str:
    """Three lines that load the folder, and the way of older versions."""
    older = timm_call(origin.config, checkpoint_path=f"FOLDER/{WEIGHTS}")
    return (
        "import timm\n"
        'model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()'
        f"  # timm >= {FIRST_LOCAL}\n"
        "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))\n"
        f"# timm < {FIRST_LOCAL}: {older}\n"
    )
