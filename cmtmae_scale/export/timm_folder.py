"""Export of an encoder for ``timm.create_model("local-dir:FOLDER", pretrained=True)``.

``config.json`` has the keys of timm's ``save_config_for_hf``; ``model_args`` build the student's
architecture. timm before 1.0.26 passes safetensors of a folder to ``torch.load``; there the same
file is loaded through ``checkpoint_path``.

Source: ``timm.models._hub`` and ``_factory`` of 1.0.24 to 1.0.31.
"""

import json
from pathlib import Path
from typing import Any, cast

import timm
import torch
from timm.data.config import resolve_data_config
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.torch_version import TorchVersion

from cmtmae_scale.checkpoint.shards import write_encoder
from cmtmae_scale.errors import CheckpointError
from cmtmae_scale.evaluation.encoder_file import FOLDER_WEIGHTS
from cmtmae_scale.export.compare import Agreement, require_agreement
from cmtmae_scale.export.encoder import preprocessing, timm_call
from cmtmae_scale.export.origin import Origin
from cmtmae_scale.method.build import probe_student, timm_options
from cmtmae_scale.method.images import IMAGENET_MEAN, IMAGENET_STD, normalise_images
from cmtmae_scale.runtime.storage import write_atomic

LOCAL_DIR_VERSION = "1.0.26"
"""First timm that reads safetensors from a local folder."""
TRANSFORM = "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))"


def write_timm(draft: Path, origin: Origin) -> None:
    """Write weights and config.

    Raises:
        OSError: if the store refuses.
    """
    write_encoder(origin.folder, draft / FOLDER_WEIGHTS, origin.weights)
    config, options = origin.config, timm_options(origin.config)
    tree = {
        "architecture": config.student.arch.split(".")[0],  # a tag would name other weights
        "num_classes": options.pop("num_classes"),
        "num_features": probe_student(config).num_features,
        "global_pool": options["global_pool"],
        "model_args": options,
        "pretrained_cfg": data_config(config.views.image_size),
    }
    write_atomic(draft / "config.json", json.dumps(tree, indent=2) + "\n")


def data_config(size: int) -> dict[str, Any]:
    """Return timm's ``pretrained_cfg`` of an encoder for images of ``size`` pixels."""
    return preprocessing(size) | {
        "fixed_input_size": True,
        "num_classes": 0,
        "pool_size": None,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }


def load_timm(folder: Path, origin: Origin) -> VisionTransformer | Eva:
    """Load a folder as a user of the installed timm would."""
    if reads_folders():
        model = timm.create_model(f"local-dir:{folder.absolute()}", pretrained=True)
    else:
        arch, options = origin.config.student.arch, timm_options(origin.config)
        model = timm.create_model(arch, **options, checkpoint_path=folder / FOLDER_WEIGHTS)
    return cast(VisionTransformer | Eva, model).eval()


def reads_folders() -> bool:
    """Return whether the installed timm reads safetensors from a local folder."""
    return TorchVersion(timm.__version__) >= LOCAL_DIR_VERSION


def timm_version() -> str:
    """Return the installed timm's version and the way it loads a folder."""
    way = "" if reads_folders() else f" (checkpoint_path={FOLDER_WEIGHTS})"
    return f"timm {timm.__version__}{way}"


@torch.no_grad()
def check_timm(folder: Path, origin: Origin, images: Tensor) -> Agreement:
    """Load a folder with timm alone and compare tokens and pooled features with the run's network.

    Images are uint8, ``[B, S, S, 3]``.

    Raises:
        CheckpointError: if timm reads other settings or computes something else.
    """
    library = timm_version()
    model, ours = load_timm(folder, origin), origin.encoder()
    size = origin.config.views.image_size
    expected = {"input_size": (3, size, size), "mean": IMAGENET_MEAN, "std": IMAGENET_STD}
    if reads_folders():
        data = resolve_data_config({}, pretrained_cfg=model.pretrained_cfg)
        found = {key: tuple(data[key]) for key in expected}
        if found != expected:
            raise CheckpointError(f"{library} reads {found} from {folder}; expected {expected}")
    if model.num_classes or model.num_features != ours.num_features:
        raise CheckpointError(f"{library} builds a head or another width; please report this")
    pixels = normalise_images(images, IMAGENET_MEAN, IMAGENET_STD)
    tokens = ours(pixels)  # [B, P + N, D]
    require_agreement(ours.forward_head(tokens), model(pixels), library)
    return require_agreement(tokens, model.forward_features(pixels), library)


def timm_snippet(origin: Origin, repo: str | None) -> str:
    """Return Python code that loads the folder, also for older versions, or from the hub."""
    if repo is not None:
        lines = [f'model = timm.create_model("hf-hub:{repo}", pretrained=True).eval()', TRANSFORM]
    else:
        older = timm_call(origin.config, checkpoint_path=f"FOLDER/{FOLDER_WEIGHTS}")
        lines = [
            'model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()'
            f"  # timm >= {LOCAL_DIR_VERSION}",
            TRANSFORM,
            f"# timm < {LOCAL_DIR_VERSION}: {older}",
        ]
    return "\n".join(["import timm", *lines]) + "\n"
