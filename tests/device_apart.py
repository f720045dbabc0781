"""A device that computes on the CPU and refuses what a GPU refuses: tensors of the host.

``python -m tests.device_apart COMMAND ...`` is ``cmtmae COMMAND ...`` on this device. An operation
on one of its tensors and one of the host fails, and so does a NumPy array of its memory. Whatever
the program does only where ``device.type == "cuda"`` (pinned memory, streams, events) is not run.
"""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._pytree import tree_leaves, tree_map

NAME = "apart"
MOVES = ("copy_", "_copy_from", "_to_copy", "_foreach_copy_")
"""Operations that take tensors of two devices."""
INDEXED = ("index", "index_put_", "_index_put_impl_", "_unsafe_index")
"""Operations whose indices, after the first argument, may be on the host."""
KEPT: list[torch.library.Library] = []
"""A library that is collected takes its kernels with it."""


class Stream:
    """A stream or an event: all work is done at once, so there is nothing to wait for."""

    stream_id = device_index = device_type = 0

    def __init__(self, *args: Any, **options: Any) -> None: ...

    def wait_stream(self, stream: "Stream") -> None: ...

    def wait_event(self, event: "Stream") -> None: ...

    def record_event(self, event: "Stream | None" = None) -> "Stream":
        return event or Stream()

    def record(self, stream: "Stream | None" = None) -> None: ...

    def wait(self, stream: "Stream | None" = None) -> None: ...

    def synchronize(self) -> None: ...


class Module(backend_registration._DummyBackendModule):
    """The functions that torch requires of ``torch.apart``."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]

    Stream = Event = Stream

    def current_stream(self, device: Any = None) -> Stream:
        return Stream()

    def stream(self, stream: Stream) -> AbstractContextManager[None]:
        return nullcontext()

    def synchronize(self, device: Any = None) -> None: ...

    def manual_seed_all(self, seed: int) -> None: ...

    def _is_in_bad_fork(self) -> bool:
        return False


class Apart(Tensor):
    """A tensor of the device; ``held`` has its values, on the CPU."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> "Apart":
        return Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=torch.device(NAME, 0),
        )

    def __init__(self, held: Tensor) -> None:
        self.held = held

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return compute(func, args, kwargs or {})

    def __repr__(self) -> str:
        return f"Apart({self.held!r})"

    def __format__(self, spec: str) -> str:
        return format(self.item(), spec) if self.dim() == 0 else super().__format__(spec)

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        return self.numpy()

    def numpy(self, *, force: bool = False) -> Any:
        if not force:
            raise TypeError("can't convert a tensor of the device to numpy")
        return self.held.numpy(force=True)

    def tolist(self) -> Any:
        return self.held.tolist()

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def new_tensor(self, data: Any, **options: Any) -> Tensor:
        return torch.tensor(data, **{"dtype": self.dtype, "device": self.device, **options})

    @property
    def data(self) -> Tensor:
        return Tensor.data.__get__(self)

    @data.setter
    def data(self, value: "Apart") -> None:
        Tensor.data.__set__(self, value)
        self.held = value.held


def is_apart(device: Any) -> bool:
    return device is not None and torch.device(device).type == NAME


def compute(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Compute an operation on the CPU; refuse tensors of the host beside those of the device."""
    name = func._schema.name.split("::")[1]
    tensors = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
    own = [one for one in tensors if isinstance(one, Apart)]
    others = [one for one in tensors if not isinstance(one, Apart) and one.dim()]
    indices_alone = name in INDEXED and isinstance(args[0], Apart)
    if own and others and name not in MOVES and not indices_alone:
        found = ", ".join(f"{list(one.shape)} on {one.device}" for one in others)
        raise RuntimeError(f"{func}: expected all tensors on {NAME}, but found {found}")
    device, options = kwargs.get("device"), dict(kwargs)
    to_host = device is not None and not is_apart(device)
    if is_apart(device):
        options["device"] = torch.device("cpu")
    wrapped = {id(one.held): one for one in own}

    def wrap(value: Any) -> Any:
        if not isinstance(value, Tensor) or to_host:
            return value
        return wrapped[id(value)] if id(value) in wrapped else Apart(value)

    result = func(*tree_map(unwrap, tuple(args)), **tree_map(unwrap, options))
    return tree_map(wrap, result)


def unwrap(value: Any) -> Any:
    return value.held if isinstance(value, Apart) else value


def from_host(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Let a function that takes Python's numbers make tensors of the device."""

    def made(data: Any, *args: Any, device: Any = None, **options: Any) -> Tensor:
        if not is_apart(device):
            return make(data, *args, device=device, **options)
        return make(data, *args, **options).to(device)

    return made


def register_device() -> torch.device:
    """Register the device with torch, for the rest of this process."""
    backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=Module())
    library = torch.library.Library("_", "IMPL")
    library.fallback(lambda func, *args, **kwargs: compute(func, args, kwargs), "PrivateUse1")
    KEPT.append(library)
    torch.tensor, torch.as_tensor = from_host(torch.tensor), from_host(torch.as_tensor)
    return torch.device(NAME, 0)


def run(arguments: Sequence[str]) -> int:
    """Run a command of ``cmtmae`` on the device."""
    device = register_device()
    from torch.distributed.fsdp._fully_shard import _fsdp_param

    from cmtmae_scale.commands.main import run_command
    from cmtmae_scale.runtime import collectives

    generator: Any = torch.Generator
    torch.Generator = lambda place="cpu": generator("cpu" if is_apart(place) else place)
    # Storages of ``Apart`` have no memory that could be released.
    _fsdp_param.alloc_storage = _fsdp_param.free_storage = lambda _: None

    whole = collectives.process_group

    @contextmanager
    def process_group(world: Any, _: torch.device, timeout_s: float = 1800) -> Iterator[None]:
        with whole(world, torch.device("cpu"), timeout_s):
            yield

    collectives.pick_device, collectives.process_group = lambda _: device, process_group
    return run_command(arguments)


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
