"""Tensors under the names of their first publication, renamed by timm's own functions.

DINOv3, DINOv2, EVA-02, PE and CLIP were published under other names than timm's. timm converts them
when it loads its pretrained weights (``checkpoint_filter_fn``); tensors that it drops are listed
here.
"""

import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

LEFT_OUT = "timm's model does not use it"
ZERO_BIAS = "qkv.bias is zero, and the model has none"
MASK = "qkv.bias_mask masks the biases of keys, and the model has none"
POSITIONS = ("pos_embed", "positional_embedding")
BIAS, BIAS_MASK = ".attn.qkv.bias", ".attn.qkv.bias_mask"


class Converted(NamedTuple):
    """A file's tensors under timm's names."""

    tensors: dict[str, Tensor]
    sources: dict[str, list[str]]
    """The names in the file that each tensor is computed from."""
    unused: dict[str, str]
    """Names in the file that no tensor is computed from, and the reason."""


def convert_names(model: nn.Module, state: Mapping[str, Tensor]) -> Converted:
    """Rename a file's tensors for a ``VisionTransformer`` or ``Eva`` by timm's function.

    timm resamples absolute positions of another grid, and patches of another side.

    Args:
        model: on any device; only shapes are read.
        state: under timm's names, or those of the publication; may be mapped.

    Raises:
        ValueError: for biases of queries, keys or values that timm would drop although they are not
            zero, and for tensors that timm's function does not expect.
    """
    try:
        zero = zero_biases(model, state)
        leaves = {name: follow(name, value) for name, value in state.items() if name not in zero}
        with torch.enable_grad():
            found: dict[str, Tensor] = dict(find_filter(model)(dict(leaves), model))
    except ValueError:
        raise
    except Exception as error:  # other shapes and absent tensors fail anywhere in timm's function
        first = str(error).strip().split("\n")[0]
        raise ValueError(
            f"timm cannot convert its names ({type(error).__name__}: {first}); take the published "
            "file of this architecture"
        ) from error
    names = {id(value): name for name, value in leaves.items()}
    sources = {ours: trace_sources(value, names) for ours, value in found.items()}
    used = {name for computed_from in sources.values() for name in computed_from}
    unused = {
        name: MASK if name.endswith(BIAS_MASK) else LEFT_OUT for name in leaves if name not in used
    }
    tensors = {name: value.detach() for name, value in found.items()}
    return Converted(tensors, sources, unused | dict.fromkeys(zero, ZERO_BIAS))


def find_filter(model: nn.Module) -> Any:
    """Return the function by which timm converts files for a model; ``None``: it has none."""
    modules = [kind.__module__ for kind in type(model).__mro__]
    filters = (
        getattr(sys.modules[module], "checkpoint_filter_fn", None)
        for module in modules
        if module.startswith("timm.models.")
    )
    return next(filter(None, filters), None)


def follow(name: str, value: Tensor) -> Tensor:
    """Return a tensor whose use autograd records; positions, which may be resampled, in float32."""
    is_float = value.is_floating_point()
    if is_float and name.endswith(POSITIONS):
        value = value.float()
    return value.detach().requires_grad_(is_float)


def trace_sources(value: Tensor, names: Mapping[int, str]) -> list[str]:
    """Return the names of the leaves that a tensor is computed from, by autograd's graph.

    ``names`` are those of the leaves, by ``id``.
    """
    if id(value) in names:
        return [names[id(value)]]
    found: list[str] = []
    waiting: list[Any] = [value.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None:
            leaf = getattr(node, "variable", None)
            found += [] if leaf is None else [names[id(leaf)]]
            waiting += [following for following, _ in node.next_functions]
    return sorted(set(found))


def zero_biases(model: nn.Module, state: Mapping[str, Tensor]) -> list[str]:
    """Return DINOv3's biases of queries, keys and values that a model without them may drop.

    Raises:
        ValueError: if one is not zero. Keys have no bias in timm's model: theirs must be zero too,
            as it is, or as DINOv3's mask makes it.
    """
    own = dict(model.named_parameters())
    zero: list[str] = []
    for name, bias in state.items():
        if "storage_tokens" not in state or not name.endswith(BIAS) or name in own:
            continue
        block = name.removesuffix(BIAS)
        mask = state.get(f"{block}{BIAS_MASK}", torch.ones(()))
        query, key, value = (bias * mask.to(bias.dtype)).unflatten(0, (3, -1))
        has_bias = f"{block}.attn.q_bias" in own
        if bool(key.any()):
            raise ValueError(
                f"{name} has a bias of keys, which timm's model does not have; multiply it by the "
                "bias_mask of the program that trained it, if it has one"
            )
        if not has_bias and (bool(query.any()) or bool(value.any())):
            raise ValueError(
                f"{name} is not zero, and the model has no such bias; choose the architecture of "
                "timm with dinov3_qkvb in its name"
            )
        zero += [] if has_bias else [name]
    return zero
