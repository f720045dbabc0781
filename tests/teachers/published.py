"""Weights of timm's models under the names of their first publication."""

import torch
from torch import Tensor

State = dict[str, Tensor]


def replaced(state: State, *pairs: tuple[str, str]) -> State:
    found = {}
    for name, value in state.items():
        for old, new in pairs:
            name = name.replace(old, new)
        found[name] = value
    return found


def as_dinov3(state: State, width: int, depth: int) -> State:
    """facebookresearch/dinov3: the biases of keys are masked, SwiGLU is ``w1``, ``w2``, ``w3``."""
    found = replaced(
        state,
        ("reg_token", "storage_tokens"),
        ("gamma_1", "ls1.gamma"),
        ("gamma_2", "ls2.gamma"),
        ("mlp.fc1_g", "mlp.w1"),
        ("mlp.fc1_x", "mlp.w2"),
    )
    if any("mlp.w1" in name for name in found):
        found = replaced(found, ("mlp.fc2", "mlp.w3"))
    zero, ones = torch.zeros(width), torch.ones(width)
    for number in range(depth):
        inner = f"blocks.{number}.attn."
        query, value = (found.pop(f"{inner}{one}_bias", zero) for one in "qv")
        found[f"{inner}qkv.bias"] = torch.cat([query, torch.randn(width), value])
        found[f"{inner}qkv.bias_mask"] = torch.cat([ones, zero, ones])
    found["mask_token"] = torch.randn(1, width)
    found["rope_embed.periods"] = torch.ones(4, dtype=torch.bfloat16)
    found["local_cls_norm.weight"] = found["local_cls_norm.bias"] = ones
    return found


def as_dinov2(state: State, width: int) -> State:
    """facebookresearch/dinov2: with registers the class token has a position of its own."""
    found = replaced(state, ("reg_token", "register_tokens"))
    if any("mlp.fc1.weight" in n and v.shape[0] != 4 * width for n, v in found.items()):
        found = replaced(found, ("mlp.fc1", "mlp.w12"), ("mlp.fc2", "mlp.w3"))
    if "register_tokens" in found:
        position = torch.randn(1, 1, width)
        found["pos_embed"] = torch.cat([position, found["pos_embed"]], 1)
        found["cls_token"] = found["cls_token"] - position
    found["mask_token"] = torch.randn(1, width)
    return found


def as_clip(state: State, prefix: str = "visual.") -> State:
    """openai/CLIP, open_clip and PE: of the image tower."""
    found = replaced(
        state,
        ("patch_embed.proj", "conv1"),
        ("blocks.", "transformer.resblocks."),
        ("norm_pre", "ln_pre"),
        ("norm1", "ln_1"),
        ("norm2", "ln_2"),
        ("gamma_", "ls_"),
        ("attn.qkv.", "attn.in_proj_"),
        ("attn.proj", "attn.out_proj"),
        ("mlp.fc1", "mlp.c_fc"),
        ("mlp.fc2", "mlp.c_proj"),
    )
    for kind in ("weight", "bias"):
        found[f"ln_post.{kind}"] = found.pop(f"norm.{kind}")
    if "attn_pool.latent" in found:
        found["attn_pool.probe"] = found.pop("attn_pool.latent")
        for kind in ("weight", "bias"):
            parts = [found.pop(f"attn_pool.{part}.{kind}") for part in ("q", "kv")]
            found[f"attn_pool.attn.in_proj_{kind}"] = torch.cat(parts)
            found[f"attn_pool.attn.out_proj.{kind}"] = found.pop(f"attn_pool.proj.{kind}")
            found[f"attn_pool.layernorm.{kind}"] = found.pop(f"attn_pool.norm.{kind}")
    found["positional_embedding"] = found.pop("pos_embed")[0]
    found["class_embedding"] = found.pop("cls_token").flatten()
    return {f"{prefix}{name}": value for name, value in found.items()}
