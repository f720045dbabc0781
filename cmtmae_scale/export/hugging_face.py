"""Export of an encoder as a ``ViTModel`` of transformers; written without transformers.

A student of timm's ``Eva`` is a ``DINOv3ViTModel``: ``dinov3_vit.py``. Tensor names are those of
transformers 4 and 5. Without ``add_pooling_layer=False`` transformers adds an untrained pooling
layer to a ``ViTModel``, whose output is meaningless.

Source: ``transformers.models.vit`` of 4.57 and 5.24.
"""

import json
from collections.abc import Iterator
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from timm.layers.attention import Attention
from timm.layers.mlp import Mlp
from timm.models.eva import Eva
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from cmtmae_scale.checkpoint.chunks import ChunkReader
from cmtmae_scale.checkpoint.shards import ENCODERS
from cmtmae_scale.checkpoint.tensor_file import Entry, write_tensors
from cmtmae_scale.config.schema import Config
from cmtmae_scale.errors import CheckpointError, ConfigError
from cmtmae_scale.export import dinov3_vit
from cmtmae_scale.export.compare import Agreement, require_agreement
from cmtmae_scale.export.encoder import build_timm
from cmtmae_scale.export.origin import Origin
from cmtmae_scale.method.build import build_student
from cmtmae_scale.method.images import IMAGENET_MEAN, IMAGENET_STD, normalise_images
from cmtmae_scale.method.student import BlockAttention, Student
from cmtmae_scale.runtime.storage import write_atomic
from dataloading.one_pass import CENTRE

WEIGHTS = "model.safetensors"
NAMES = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
QKV = ("query", "key", "value")
WITHOUT_POOLER = {"vit": {"add_pooling_layer": False}}
"""Arguments of ``from_pretrained`` by ``model_type``."""


def require_transformers() -> ModuleType:
    """Import transformers, which loads the export before it is published.

    Raises:
        ConfigError: if it is not installed.
    """
    try:
        return import_module("transformers")
    except ImportError as error:
        raise ConfigError(
            "the export is verified by loading it with transformers, which is not installed: "
            "pip install 'cmtmae-scale[hf]'"
        ) from error


def model_config(config: Config) -> dict[str, Any]:
    """Return ``config.json`` of the model of transformers that computes a config's student.

    Raises:
        ConfigError: naming the parts of the student that it lacks.
    """
    arch = config.student.arch
    with torch.device("meta"):
        model, _ = build_timm(config)
        if not isinstance(model, Eva):
            return vit_config(build_student(config), arch)
    require_parts(arch, "DINOv3ViTModel", dinov3_vit.unsupported_parts(model))
    return dinov3_vit.model_config(model, config.views.image_size)


def require_parts(arch: str, model: str, unsupported: Iterator[str]) -> None:
    """Refuse a student with parts that a model of transformers lacks.

    Raises:
        ConfigError: naming them.
    """
    found = ", ".join(unsupported)
    if found:
        raise ConfigError(
            f"student.arch={arch} is not a {model} of transformers: it has {found}; export it with "
            "cmtmae export timm"
        )


def vit_config(student: Student, arch: str) -> dict[str, Any]:
    """Return ``config.json`` of a ``ViTModel`` that computes the same as a student.

    Raises:
        ConfigError: naming the parts of the student that a ``ViTModel`` lacks.
    """
    require_parts(arch, "ViTModel", unsupported_parts(student))
    first: Any = student.blocks[0]
    rows, _ = student.grid
    return {
        "architectures": ["ViTModel"],
        "model_type": "vit",
        "hidden_size": student.embed_dim,
        "num_hidden_layers": len(student.blocks),
        "num_attention_heads": first.attn.num_heads,
        "intermediate_size": first.mlp.fc1.out_features,
        "hidden_act": dinov3_vit.ACTIVATIONS[first.mlp.act.approximate],
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": first.norm1.eps,
        "image_size": rows * student.patch_side,
        "patch_size": student.patch_side,
        "num_channels": 3,
        "qkv_bias": first.attn.qkv.bias is not None,
        "encoder_stride": student.patch_side,
    }


def unsupported_parts(student: Student) -> Iterator[str]:
    """Yield the parts that a ``ViTModel`` cannot compute."""
    if not student.has_class_token:
        yield "no class token"
    if student.num_reg_tokens:
        yield f"{student.num_reg_tokens} registers"
    if student.has_class_token and student.no_embed_class:
        yield "a class token without positional embedding"
    if student.patch_embed.proj.bias is None:
        yield "a patch embedding without bias"
    for name, what in (("norm_pre", "a norm before the blocks"), ("norm", "no final norm")):
        if isinstance(getattr(student, name), nn.Identity) != (name == "norm_pre"):
            yield what
    if not isinstance(student.patch_embed.norm, nn.Identity):
        yield "a norm of the patches"
    blocks: list[Any] = list(student.blocks)
    strange = {type(block).__name__ for block in blocks if type(block) is not Block}
    if strange:
        yield f"blocks of another kind ({', '.join(sorted(strange))})"
        return
    yield from dict.fromkeys(what for block in blocks for what in unsupported_block_parts(block))
    yield from dinov3_vit.unsupported_norms(student)


def unsupported_block_parts(block: Any) -> Iterator[str]:
    """Yield the parts of a block that a ``ViTLayer`` cannot compute."""
    if not (isinstance(block.ls1, nn.Identity) and isinstance(block.ls2, nn.Identity)):
        yield "layer scale"
    if not isinstance(block.attn, BlockAttention) or not isinstance(block.attn, Attention):
        yield f"attention of another kind ({type(block.attn).__name__})"
    else:
        attn = block.attn
        if not isinstance(attn.q_norm, nn.Identity) or not isinstance(attn.k_norm, nn.Identity):
            yield "norms of queries and keys"
        if not isinstance(attn.norm, nn.Identity):
            yield "a norm after the attention"
        if attn.proj.bias is None:
            yield "attention without output bias"
    if type(block.mlp) is not Mlp:
        yield f"an MLP of another kind ({type(block.mlp).__name__})"
        return
    if not isinstance(block.mlp.norm, nn.Identity):
        yield "a norm within the MLP"
    if block.mlp.fc1.bias is None or block.mlp.fc2.bias is None:
        yield "an MLP without bias"
    if type(block.mlp.act) is not nn.GELU:
        yield f"an activation other than GELU ({type(block.mlp.act).__name__})"


def processor_config(size: int) -> dict[str, Any]:
    """Return ``preprocessor_config.json``: the centre crop of timm's export and of evaluation."""
    return {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": int(size / CENTRE)},
        "resample": 3,  # bicubic
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": IMAGENET_MEAN,
        "image_std": IMAGENET_STD,
    }


def renamed_entries(reader: ChunkReader, prefix: str) -> Iterator[Entry]:
    """Yield an encoder's tensors under transformers' names; data is read later."""
    for key in reader.index:
        if not key.startswith(prefix):
            continue
        module, shape = key.removeprefix(prefix), reader.shape(key)
        module, _, kind = module.rpartition(".") if module not in NAMES else (module, "", "")
        layer = ""
        if module.startswith("blocks."):
            _, number, module = module.split(".", 2)
            layer = f"encoder.layer.{number}."
        if module == "attn.qkv":
            part = (shape[0] // 3, *shape[1:])
            length = torch.Size(part).numel()
            for place, name in enumerate(QKV):
                full = f"{layer}attention.attention.{name}.{kind}"
                yield Entry(full, part, partial(reader.read_values, key, place * length, length))
        else:
            full = f"{layer}{NAMES[module]}{f'.{kind}' if kind else ''}"
            yield Entry(full, shape, partial(reader.read_tensor, key))


def write_hf(draft: Path, origin: Origin) -> None:
    """Write weights, config and preprocessing.

    Raises:
        ConfigError: if no model of transformers computes the student.
        OSError: if the store refuses.
    """
    config = model_config(origin.config)
    rename = dinov3_vit.renamed_entries if config["model_type"] == "dinov3_vit" else renamed_entries
    with ChunkReader(origin.folder) as reader:
        entries = list(rename(reader, ENCODERS[origin.weights]))
        write_tensors(draft / WEIGHTS, entries, {"format": "pt"})
    write_atomic(draft / "config.json", json.dumps(config, indent=2) + "\n")
    processor = processor_config(origin.config.views.image_size)
    write_atomic(draft / "preprocessor_config.json", json.dumps(processor, indent=2) + "\n")


@torch.no_grad()
def check_hf(folder: Path, origin: Origin, images: Tensor) -> Agreement:
    """Load a folder with transformers alone and compare all tokens with the run's network.

    Images are uint8, ``[B, S, S, 3]``.

    Raises:
        CheckpointError: if transformers misses a tensor, preprocesses images differently, or
            computes something else.
    """
    transformers = require_transformers()
    library = f"transformers {transformers.__version__}"
    options = WITHOUT_POOLER.get(model_config(origin.config)["model_type"], {})
    model, loading = transformers.AutoModel.from_pretrained(
        folder, **options, output_loading_info=True, local_files_only=True
    )
    problems = {name: sorted(map(str, keys)) for name, keys in loading.items() if keys}
    if problems:
        raise CheckpointError(f"{library} does not load all tensors: {problems}; please report")
    processor = transformers.AutoImageProcessor.from_pretrained(folder, local_files_only=True)
    no_resize = {"do_resize": False, "do_center_crop": False, "return_tensors": "pt"}
    theirs = processor(list(images.numpy()), **no_resize)["pixel_values"]
    pixels = normalise_images(images, IMAGENET_MEAN, IMAGENET_STD)
    require_agreement(pixels, theirs, f"{library}'s image processor")
    size = origin.config.views.image_size
    whole = processor(images[0, :, : size // 2].numpy(), return_tensors="pt")["pixel_values"]
    if whole.shape != (1, 3, size, size):
        raise CheckpointError(f"{library} crops to {list(whole.shape)} in place of {size} pixels")
    tokens = model.eval()(pixel_values=pixels).last_hidden_state
    return require_agreement(origin.encoder()(pixels), tokens, library)


def hf_snippet(origin: Origin, repo: str | None) -> str:
    """Return Python code that loads the folder, or the repository of the hub."""
    options = WITHOUT_POOLER.get(model_config(origin.config)["model_type"], {})
    place = repo or "FOLDER"
    arguments = ", ".join([f'"{place}"', *(f"{key}={value}" for key, value in options.items())])
    return f"""from transformers import AutoImageProcessor, AutoModel
model = AutoModel.from_pretrained({arguments}).eval()
processor = AutoImageProcessor.from_pretrained("{place}")
"""
