"""A student of timm's ``Eva`` as transformers' ``DINOv3ViTModel``: settings and tensor names.

Only students that the model computes exactly are supported: rotary positions alone, as in DINOv3,
a class token, registers, layer scale, and an MLP or SwiGLU.

Source: ``transformers.models.dinov3_vit`` of 4.57 and 5.24; names are those of published files.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from timm.layers.mlp import Mlp, SwiGLU
from timm.layers.pos_embed_sincos import RotaryEmbeddingDinoV3
from timm.models.eva import Eva, EvaAttention, EvaBlock
from torch import nn

from cmtmae_scale.checkpoint.chunks import ChunkReader
from cmtmae_scale.checkpoint.tensor_file import Entry

ROPE = {
    "min_period": None,
    "max_period": None,
    "normalize_coords": "separate",
    "grid_offset": 0.0,
    "grid_indexing": "ij",
    "rotate_half": True,
}
"""Settings of timm's rotary positions for which transformers has no other values."""
NAMES = {
    "cls_token": "embeddings.cls_token",
    "reg_token": "embeddings.register_tokens",
    "patch_embed.proj": "embeddings.patch_embeddings",
    "norm": "norm",
    "norm1": "norm1",
    "norm2": "norm2",
    "gamma_1": "layer_scale1.lambda1",
    "gamma_2": "layer_scale2.lambda1",
    "attn.q_bias": "attention.q_proj.bias",
    "attn.v_bias": "attention.v_proj.bias",
    "attn.proj": "attention.o_proj",
    "mlp.fc1": "mlp.up_proj",
    "mlp.fc1_g": "mlp.gate_proj",
    "mlp.fc1_x": "mlp.up_proj",
    "mlp.fc2": "mlp.down_proj",
}
QKV = ("q_proj", "k_proj", "v_proj")
MASK_TOKEN = "embeddings.mask_token"
ACTIVATIONS = {"none": "gelu", "tanh": "gelu_pytorch_tanh"}


def model_config(student: Eva, size: int) -> dict[str, Any]:
    """Return ``config.json`` of a supported student for images of ``size`` pixels."""
    first: Any = student.blocks[0]
    rope: Any = student.rope
    is_gated = isinstance(first.mlp, SwiGLU)
    biased = first.attn.q_bias is not None
    inner = first.mlp.fc1_x if is_gated else first.mlp.fc1
    return {
        "architectures": ["DINOv3ViTModel"],
        "model_type": "dinov3_vit",
        "hidden_size": student.embed_dim,
        "num_hidden_layers": len(student.blocks),
        "num_attention_heads": first.attn.num_heads,
        "intermediate_size": inner.out_features,
        "hidden_act": "silu" if is_gated else ACTIVATIONS[first.mlp.act.approximate],
        "use_gated_mlp": is_gated,
        "attention_dropout": 0.0,
        "drop_path_rate": 0.0,
        "layer_norm_eps": first.norm1.eps,
        "rope_theta": rope.temperature,
        "pos_embed_rescale": None,
        "image_size": size,
        "patch_size": int(student.patch_embed.patch_size[0]),
        "num_channels": 3,
        "num_register_tokens": student.num_prefix_tokens - 1,
        "query_bias": biased,
        "key_bias": False,
        "value_bias": biased,
        "proj_bias": True,
        "mlp_bias": inner.bias is not None,
    }


def unsupported_parts(student: Eva) -> Iterator[str]:
    """Yield the parts of a student, as timm builds it, that a ``DINOv3ViTModel`` cannot compute."""
    if student.pos_embed is not None:
        yield "absolute positions"
    rope = student.rope
    if rope is None:
        yield "no rotary positions"
    elif type(rope) is not RotaryEmbeddingDinoV3 or any(
        getattr(rope, name) != value for name, value in ROPE.items()
    ):
        yield f"rotary positions of another kind ({type(rope).__name__})"
    if student.cls_token is None:
        yield "no class token"
    if student.reg_token is None:
        yield "no registers"
    if not isinstance(student.norm_pre, nn.Identity):
        yield "a norm before the blocks"
    if isinstance(student.norm, nn.Identity):
        yield "no final norm"
    if student.patch_embed.proj.bias is None:
        yield "a patch embedding without bias"
    blocks: list[Any] = list(student.blocks)
    yield from dict.fromkeys(what for block in blocks for what in unsupported_block_parts(block))
    yield from unsupported_norms(student)


def unsupported_norms(student: nn.Module) -> Iterator[str]:
    """Yield what transformers' models, which have one kind of LayerNorm, cannot compute."""
    norms = [m for m in student.modules() if "norm" in type(m).__name__.lower()]
    other = {type(m).__name__ for m in norms if not isinstance(m, nn.LayerNorm) or m.bias is None}
    if other:
        yield f"norms other than LayerNorm with bias ({', '.join(sorted(other))})"
    elif len({m.eps for m in norms if isinstance(m, nn.LayerNorm)}) > 1:
        yield "norms of different epsilon"


def unsupported_block_parts(block: Any) -> Iterator[str]:
    """Yield the parts of a block that a ``DINOv3ViTLayer`` cannot compute."""
    if type(block) is not EvaBlock:
        yield f"blocks of another kind ({type(block).__name__})"
        return
    if block.gamma_1 is None or block.gamma_2 is None:
        yield "no layer scale"
    attn = block.attn
    if type(attn) is not EvaAttention:
        yield f"attention of another kind ({type(attn).__name__})"
    elif attn.qkv is None:
        yield "queries, keys and values of separate matrices"
    elif not isinstance(attn.q_norm, nn.Identity):
        yield "norms of queries and keys"
    if not isinstance(attn.norm, nn.Identity):
        yield "a norm after the attention"
    mlp = block.mlp
    if type(mlp) not in (Mlp, SwiGLU):
        yield f"an MLP of another kind ({type(mlp).__name__})"
        return
    if not isinstance(mlp.norm, nn.Identity):
        yield "a norm within the MLP"
    if type(mlp.act) is not (nn.GELU if type(mlp) is Mlp else nn.SiLU):
        yield f"another activation ({type(mlp.act).__name__})"


def renamed_entries(reader: ChunkReader, prefix: str) -> Iterator[Entry]:
    """Yield an encoder's tensors under transformers' names; data is read later.

    The mask token, which only pre-training by DINOv3 uses, is zero.
    """
    for key in reader.index:
        if not key.startswith(prefix):
            continue
        module, shape = key.removeprefix(prefix), reader.shape(key)
        layer = ""
        if module.startswith("blocks."):
            _, number, module = module.split(".", 2)
            layer = f"layer.{number}."
        if module == "attn.qkv.weight":
            part = (shape[0] // 3, *shape[1:])
            length = torch.Size(part).numel()
            for place, name in enumerate(QKV):
                read = partial(reader.read_values, key, place * length, length)
                yield Entry(f"{layer}attention.{name}.weight", part, read)
            continue
        name = NAMES.get(module)
        if name is None:
            module, _, kind = module.rpartition(".")
            name = f"{NAMES[module]}.{kind}"
        if name == NAMES["cls_token"]:
            yield Entry(MASK_TOKEN, shape, partial(torch.zeros, shape))
        yield Entry(f"{layer}{name}", shape, partial(reader.read_tensor, key))
