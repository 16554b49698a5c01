"""A GPU that is pretended, on a machine without one: real values in host memory, the rules of two places.

Within `pretended_gpu` tensors may be on `cuda:0`. As on a real one, what mixes the two places raises, so does what reads a
tensor there as numpy would, and what has no deterministic form there in some torch that setup.py allows; a copy to the host
that nobody waits for leaves rubbish. What a GPU rounds differently, and all that is fast or slow, is not pretended. Work
inside a function of torch's is not looked at, nor is a backward pass.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode

from feddip_mpi import staging

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")

_UNREADABLE = (Tensor.numpy, Tensor.__array__, Tensor.pin_memory)
_RAW = (torch._has_compatible_shallow_copy_type, Tensor.data.__set__)


def _named(*names: str) -> set[Any]:
    return {getattr(owner, name) for name in names for owner in (torch, Tensor) if hasattr(owner, name)}


_NOT_DETERMINISTIC = _named("kthvalue", "median", "nanmedian", "histc", "put", "put_")
_NOT_OF_FLOATS = _named("cumsum", "cumsum_")
_RUBBISH = 0xAB


class Here(threading.local):
    """What each thread has for itself: the GPU that it has chosen, and its current stream."""

    def __init__(self) -> None:
        self.device: torch.device | None = None
        self.stream = Stream()


class Stream:
    """Remembers what it is told and does it when somebody waits for it."""

    made = 0

    def __init__(self, device: torch.device = GPU) -> None:
        Stream.made += 1
        self.device, self._told = device, list[Callable[[], object]]()

    def tell(self, work: Callable[[], object]) -> None:
        self._told.append(work)

    def wait_stream(self, other: Stream) -> None:
        self._told.append(other.synchronize)

    def synchronize(self) -> None:
        while self._told:
            self._told.pop(0)()


class Generator(torch.Generator):
    """Numbers of the CPU's generator, for tensors of the place that it is made for."""

    place = CPU

    def __new__(cls, device: torch.device = CPU) -> Generator:
        made = super().__new__(cls, CPU)
        made.place = torch.device(device)
        return made


class Pretended(TorchFunctionMode):
    """Knows which tensors are on the GPU, by their storages. Each thread enters it for itself."""

    def __init__(self) -> None:
        super().__init__()
        self._there: dict[int, StorageWeakRef] = {}  # whose place nobody else is given as long as it is referred to
        self.here, self.recorded = Here(), list[Stream]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func == Tensor.device.__get__:
            return GPU if self._is_there(args[0]) else CPU
        if func in _RAW:
            return func(*args, **kwargs)
        if func in (Tensor.to, Tensor.cpu):
            return self._to(*args, **({"device": CPU} if func is Tensor.cpu else {}), **kwargs)
        if func is Tensor.copy_:
            return self._copy(*args, **kwargs)
        given = list(_tensors([args, kwargs]))
        places = [self._is_there(tensor) for tensor in given]
        # A CPU's tensor without dimensions counts as a number.
        if len({there for tensor, there in zip(given, places, strict=True) if there or tensor.dim()}) > 1:
            raise RuntimeError(f"{func.__name__}: tensors on the CPU and on the GPU")
        there = any(places)
        if there:
            self._allow(func, given, kwargs.get("generator"))
        if func is Tensor.pin_memory:
            return args[0].clone()
        if kwargs.get("device") is not None:
            there = torch.device(kwargs["device"]).type == "cuda"
            kwargs["device"] = CPU
        kwargs.pop("pin_memory", None)
        result = func(*args, **kwargs)
        if there:
            for tensor in _tensors([result]):
                self._place(tensor)
        return result

    @staticmethod
    def _allow(func: Any, given: list[Tensor], generator: Any) -> None:
        if func in _UNREADABLE:
            raise TypeError(f"{func.__name__} of a tensor on the GPU")
        if func in _NOT_DETERMINISTIC or (func in _NOT_OF_FLOATS and given[0].is_floating_point()):
            raise RuntimeError(f"{func.__name__} CUDA does not have a deterministic implementation, but ...")
        if generator is not None and generator.place.type != "cuda":
            raise RuntimeError(f"{func.__name__}: a generator of the CPU's")

    def _is_there(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._there

    def _place(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        self._there[storage._cdata] = StorageWeakRef(storage)
        return tensor

    def _to(self, tensor: Tensor, *rest: Any, device: Any = None, non_blocking: bool = False, **kwargs: Any) -> Tensor:
        there = self._is_there(tensor)
        device = next((x for x in rest if isinstance(x, (str, torch.device))), device)
        wanted = there if device is None else torch.device(device).type == "cuda"
        moved = tensor if wanted == there else tensor.detach().clone()
        dtypes = [x for x in rest if isinstance(x, torch.dtype)]
        result = moved.to(*dtypes, **kwargs) if dtypes or kwargs else moved
        return self._place(result) if wanted else result

    def _copy(self, target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        if not non_blocking or self._is_there(target) or not self._is_there(source):
            return target.copy_(source)
        self.here.stream.tell(functools.partial(target.copy_, source.clone()))
        target.fill_(_RUBBISH)
        return target

    @contextmanager
    def on(self, stream: Stream | None) -> Iterator[None]:
        """`torch.cuda.stream`."""
        before = self.here.stream
        self.here.stream = stream or before
        try:
            yield
        finally:
            self.here.stream = before

    def record(self, tensor: Tensor, stream: Stream) -> None:
        """`Tensor.record_stream`."""
        assert self._is_there(tensor)
        self.recorded.append(stream)

    def choose(self, device: torch.device) -> None:
        """`torch.cuda.set_device`."""
        self.here.device = device


def _tensors(values: Any) -> Iterator[Tensor]:
    for each in values.values() if isinstance(values, dict) else values:
        if isinstance(each, Tensor):
            yield each
        elif isinstance(each, (list, tuple, dict)):
            yield from _tensors(each)


@contextmanager
def pretended_gpu() -> Iterator[Pretended]:
    """A GPU for this thread; others enter what it gives."""
    mode = Pretended()
    staging._side_stream.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "Generator", Generator)
        for name, instead in (
            ("Stream", Stream), ("stream", mode.on), ("current_stream", lambda device: mode.here.stream),
            ("set_device", mode.choose), ("mem_get_info", lambda device: (2**20, 2**20)),
        ):  # fmt: skip
            patch.setattr(torch.cuda, name, instead)
        patch.setattr(Tensor, "record_stream", lambda tensor, stream: mode.record(tensor, stream))
        with mode:
            yield mode
    staging._side_stream.cache_clear()
