"""Teachers of the user's own: any ``nn.Module`` that a factory returns.

docs/teachers.md shows one. Its attributes:

- ``patch_size``: image pixels per side of a patch.
- ``embed_dim``: F, channels of its tokens.
- ``mean``, ``std``: of each channel, of pixels in [0, 1].
- ``num_prefix_tokens``: P, tokens before the patches; 0 if it is absent.
- ``has_class_token``: whether the first of them is a class token; ``False`` if it is absent.
- ``attention_source``: ``cls``, ``pool`` or ``mean_query``, the query that its forward returns;
  ``None`` or absent: it returns none.

Its ``forward`` maps normalised images ``[B, 3, S, S]``, S any multiple of ``patch_size``, to tokens
``[B, P + N, F]``, or with an ``attention_source`` to ``(tokens, query, key)``: query ``[B, H, Q,
d]`` of the class token, the pooling head or all patches, and key ``[B, H, P + N, d]``, or ``[B, H,
N, d]``, as they are multiplied in its attention, with a scale of ``d ** -0.5``.
"""

import hashlib
import importlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from cmtmae_scale.config.schema import Teacher as TeacherConfig
from cmtmae_scale.errors import TeacherError
from cmtmae_scale.method.attention import activation_map, mean_query_row, patch_map
from cmtmae_scale.teachers.base import (
    TeacherOutputs,
    TowerOutput,
    WholeNetwork,
    are_channels,
    is_count,
)
from cmtmae_scale.teachers.state_dicts import load_strictly
from cmtmae_scale.teachers.weights import is_file_name, read_weights

SOURCES = ("cls", "pool", "mean_query")
RETURNED: WeakSet[nn.Module] = WeakSet()
"""Modules that factories have returned; the program moves and casts them."""


class PythonTower(WholeNetwork):
    """A module of the user's; see ``Tower`` for the attributes."""

    def __init__(
        self, module: nn.Module, name: str, image_size: int, source: dict[str, object]
    ) -> None:
        own: Any = module
        self.model = module
        self.name = name
        self.blocks = [module]
        side = image_size // own.patch_size
        self.grid = (side, side)
        self.num_prefix = int(getattr(own, "num_prefix_tokens", 0))
        self.has_cls = bool(getattr(own, "has_class_token", False))
        self.mean, self.std = tuple(map(float, own.mean)), tuple(map(float, own.std))
        self.channels = int(own.embed_dim)
        self.attention_source = getattr(own, "attention_source", None)
        self.source = source

    def forward(self, images: Tensor, outputs: TeacherOutputs) -> TowerOutput:
        """Run the module once.

        Raises:
            TeacherError: for outputs of another form than its attributes promise.
        """
        returned = self.forward_on_meta(images) if images.is_meta else self.model(images)
        has_attention = self.attention_source is not None
        parts: tuple[Any, ...] = returned if isinstance(returned, tuple) else (returned,)
        if len(parts) != (3 if has_attention else 1) or not all(
            isinstance(part, Tensor) for part in parts
        ):
            wanted = "tokens, query and key" if has_attention else "tokens"
            raise TeacherError(
                f"teacher.model={self.name}: its forward returned {form_of(returned)}; with "
                f"attention_source={self.attention_source} it must return {wanted}"
            )
        tokens, patches = parts[0], self.grid[0] * self.grid[1]
        self.check_shape("tokens", tokens, (len(images), self.num_prefix + patches, self.channels))
        maps: list[Tensor] = []
        if outputs.attention_layers and outputs.source == "activation_norm":
            maps = [activation_map(tokens[:, self.num_prefix :])]
        elif outputs.attention_layers:
            query, key = parts[1], parts[2]
            if query.ndim != 4:
                raise TeacherError(
                    f"teacher.model={self.name}: its forward returned query of shape "
                    f"{list(query.shape)}; expected four dimensions, [B, H, Q, d]"
                )
            with_prefix = key.shape[2:3] == (self.num_prefix + patches,)
            prefix = self.num_prefix if with_prefix else 0
            heads, depth = query.shape[1], query.shape[-1]
            self.check_shape("key", key, (len(images), heads, prefix + patches, depth))
            queries = {"cls": 1, "mean_query": patches}.get(outputs.source)
            if queries is not None:
                self.check_shape("query", query, (len(images), heads, queries, depth))
            maps = [patch_map(mean_query_row(query, key, depth**-0.5), prefix)]
        return TowerOutput(maps, [tokens for _ in outputs.feature_layers])

    def forward_on_meta(self, images: Tensor) -> Any:
        """Run the module on the meta device, where FLOPs and memory are counted.

        Raises:
            TeacherError: if it does not run on the meta device.
        """
        try:
            return self.model(images)
        except Exception as error:  # the user's code raises anything; it ends the command
            raise TeacherError(
                f"teacher.model={self.name}: its forward failed on the meta device "
                f"({type(error).__name__}: {error}), where sizes are counted; create tensors on "
                "the device of the images, and read no values"
            ) from error

    def check_shape(self, what: str, found: Tensor, expected: tuple[int, ...]) -> None:
        """Refuse an output of another shape.

        Raises:
            TeacherError: naming both shapes.
        """
        if tuple(found.shape) != expected:
            raise TeacherError(
                f"teacher.model={self.name}: its forward returned {what} of shape "
                f"{list(found.shape)}; its attributes promise {list(expected)} for a grid of "
                f"{self.grid[0]}x{self.grid[1]} patches"
            )

    def check_feature(self, feature: str) -> None:
        """Accept ``block`` alone: the tokens as the module returns them."""
        if feature != "block":
            raise TeacherError(
                f"teacher.feature={feature}: teacher.model={self.name} returns its tokens as they "
                "are; set teacher.feature=block"
            )

    def check_source(self, source: str, layers: Sequence[int]) -> None:
        """Accept the module's own source, and ``activation_norm``."""
        if source not in (self.attention_source, "activation_norm"):
            own = f"{self.attention_source} or " if self.attention_source else ""
            raise TeacherError(
                f"attention.source={source}: teacher.model={self.name} has "
                f"attention_source={self.attention_source}; set attention.source={own}"
                "activation_norm"
            )


class PythonSource:
    """Import a factory and call it.

    Args:
        config: of the teacher.
        seed: seed of weights that the factory draws.

    Raises:
        TeacherError: for a factory that cannot be imported or fails, a result that is no such
            module, or keys that do not apply to one.
    """

    def __init__(self, config: TeacherConfig, seed: int) -> None:
        self.config = config
        self.name = str(config.model)
        for key, unused in (("quick_gelu", None), ("depth", None), ("precision", "bf16")):
            if getattr(config, key) != unused:
                raise TeacherError(
                    f"teacher.{key}={getattr(config, key)} does not apply to "
                    "teacher.library=python: the factory decides it; remove the key"
                )
        weights = config.weights
        if weights is not None and not is_file_name(weights):
            raise TeacherError(
                f"teacher.weights={weights} is not a file; with teacher.library=python name a "
                "file, or remove the key to keep the weights of the factory"
            )
        place, factory = import_factory(self.name)
        try:
            with torch.random.fork_rng(devices=[]), torch.device("cpu"):
                torch.manual_seed(seed)
                self.module = factory()
        except Exception as error:  # the user's code raises anything; it ends the run
            raise TeacherError(
                f"teacher.model={self.name}: the factory failed ({type(error).__name__}: {error})"
            ) from error
        check_module(self.module, self.name)
        if self.module in RETURNED:
            raise TeacherError(
                f"teacher.model={self.name}: the factory returned the module of an earlier call, "
                "which may be without weights by now; return a new module at each call"
            )
        RETURNED.add(self.module)
        self.patch = int(self.module.patch_size)
        self.digest = code_digest(place, self.module)

    def build(self, image_size: int, seed: int, *, load: bool = True) -> PythonTower:
        """Return the module as a tower for one size, with its weights.

        Args:
            image_size: S, a multiple of the patch.
            seed: of the factory; in the weights already.
            load: False keeps the factory's weights where ``teacher.weights`` names a file.

        Raises:
            TeacherError: for a file that is missing or does not fit.
        """
        file = self.config.weights
        if file is not None and load:
            remedy = "give a state dict of this module"
            load_strictly(self.module, read_weights(file), file, self.name, remedy)
        source: dict[str, object] = {
            "library": "python",
            "model": self.name,
            "factory_sha256": self.digest,
            "weights": "of the factory" if file is None else Path(file).name,
            "weights_file": file,
            "state_sha256": state_digest(self.module.state_dict()) if file is None else None,
        }
        module = self.module.to(torch.empty(0).device)  # meta, where only shapes are requested
        return PythonTower(module, self.name, image_size, source)


def import_factory(name: str) -> tuple[ModuleType, Callable[[], Any]]:
    """Import ``package.module:factory``; the working folder is searched too.

    Raises:
        TeacherError: naming what is missing.
    """
    path, _, attribute = name.partition(":")
    if not path or not attribute.isidentifier():
        raise TeacherError(
            f"teacher.model={name} is not of the form package.module:factory, which "
            "teacher.library=python needs"
        )
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # what the module imports later is found too
    try:
        place = importlib.import_module(path)
    except Exception as error:  # the user's module raises anything; it ends the run
        raise TeacherError(
            f"teacher.model={name}: {path} cannot be imported ({type(error).__name__}: {error}); "
            "it is searched in the working folder and in PYTHONPATH"
        ) from error
    factory = getattr(place, attribute, None)
    if not callable(factory):
        found = "nothing" if factory is None else f"a {type(factory).__name__}"
        raise TeacherError(f"teacher.model={name}: {attribute} in {path} is {found}, no function")
    return place, factory


def check_module(module: Any, name: str) -> None:
    """Refuse a result of a factory that is not a teacher.

    Raises:
        TeacherError: naming the attribute.
    """
    where = f"teacher.model={name}"
    if not isinstance(module, nn.Module):
        raise TeacherError(f"{where}: the factory returned {form_of(module)}, no nn.Module")
    if next(module.parameters(), None) is None:
        raise TeacherError(f"{where}: the module has no parameters, so no dtype and no device")
    own: Any = module

    prefix = getattr(own, "num_prefix_tokens", 0)
    source = getattr(own, "attention_source", None)
    has_cls = getattr(own, "has_class_token", False)
    wanted = {
        "patch_size": (is_count(getattr(own, "patch_size", None)), "a whole number above 0"),
        "embed_dim": (is_count(getattr(own, "embed_dim", None)), "a whole number above 0"),
        "mean": (are_channels(getattr(own, "mean", None)), "three numbers"),
        "std": (are_channels(getattr(own, "std", None), above_zero=True), "three numbers above 0"),
        "num_prefix_tokens": (prefix == 0 or is_count(prefix), "a whole number"),
        "has_class_token": (not has_cls or prefix != 0, "False where num_prefix_tokens is 0"),
        "attention_source": (
            source is None or source in SOURCES,
            f"None or one of {', '.join(SOURCES)}",
        ),
    }
    for attribute, (is_right, expected) in wanted.items():
        if not is_right:
            found = repr(getattr(own, attribute, "absent"))
            raise TeacherError(f"{where}: its {attribute} is {found}; expected {expected}")


def form_of(value: object) -> str:
    """Return what a value is, for a message."""
    if isinstance(value, tuple):
        return f"a tuple of {len(value)}"
    return f"a {type(value).__name__}"


def code_digest(place: ModuleType, module: nn.Module) -> str:
    """Return the SHA-256 of the code of a teacher.

    It covers the source files of the factory, and of the classes of all parts of the module and
    their bases, as far as they are in the factory's top-level package.
    """
    package = place.__name__.partition(".")[0]
    names = {base.__module__ for part in module.modules() for base in type(part).__mro__}
    names = {name for name in names if name.partition(".")[0] == package} | {place.__name__}
    total = hashlib.sha256()
    for name in sorted(names):
        file = getattr(sys.modules.get(name), "__file__", None)
        total.update(f"{name}\n".encode())
        if file is not None:
            total.update(hashlib.sha256(Path(file).read_bytes()).digest())
    return total.hexdigest()


def state_digest(state: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of names, dtypes, shapes and values of a state dict."""
    total = hashlib.sha256()
    for name in sorted(state):
        value = state[name].detach().cpu().contiguous()
        total.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        total.update(value.flatten().view(torch.uint8).numpy().data)
    return total.hexdigest()
