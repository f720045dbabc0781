"""Bytes held by tensors, counted without the allocator: every storage until it is freed."""

import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the storages of given tensors and of all that operations return while it is open.

    Args:
        held: tensors that exist already, and count.
        others: tensors that exist already, and do not count.
    """

    def __init__(self, held: Iterable[Tensor], others: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.known: set[int] = {one.untyped_storage()._cdata for one in others}
        self.live = self.peak = 0
        for tensor in held:
            self.add(tensor)

    def add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known.add(key)
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self.drop, key, size)

    def drop(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for one in tree_leaves(out):
            if isinstance(one, Tensor):
                self.add(one)
        return out
