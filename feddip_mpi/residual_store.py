"""Where a rank keeps its clients' residuals: on its GPU and in memory up to budgets, the rest in a file that nobody else sees.

Memory then grows with the model and not with the number of clients. From the GPU to memory, and from there to the file, goes
what was stored longest ago; it comes back bit for bit when its client takes part again.
"""

from __future__ import annotations

import os
import socket
import tempfile
import weakref
from collections.abc import Callable, Iterator, MutableMapping
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from feddip_mpi.errors import FeddipError, InputError
from feddip_mpi.residuals import Residual
from feddip_mpi.settings import Config, UploadConfig


class _Entry:
    """A stored residual; gives its place back when no store refers to it any more."""

    def __init__(self, space: _Space, residual: Residual) -> None:
        self.space, self.round, self.slot = space, residual.round, -1
        values, self.device_bytes = residual.values, 0
        # On a GPU, in memory as it would lie in the file, or (None) in the file.
        self.kept: Tensor | np.ndarray | None = values.to(torch.bfloat16) if space.half else values
        if values.device.type == "cpu":
            self.leave_device()

    def leave_device(self) -> None:
        assert isinstance(self.kept, Tensor)
        here = self.kept.cpu()
        self.kept = here.view(torch.int16).numpy().view(np.uint16) if self.space.half else here.numpy()

    @property
    def values(self) -> np.ndarray:
        """What lies in memory, or would lie in the file."""
        assert not isinstance(self.kept, Tensor)
        return self.space.read(self.slot) if self.kept is None else self.kept

    def residual(self) -> Residual:
        if isinstance(self.kept, Tensor):
            return Residual(self.kept.to(torch.float32), self.round)
        values = self.values
        return Residual(torch.from_numpy(_doubled(values) if self.space.half else values), self.round)

    def __del__(self) -> None:
        self.space.forget(self)


class _Space:
    """Memory and file of a store and of its copies.

    Attributes:
        device_bytes, memory_bytes: of values on the GPU and in memory.
        file_bytes: size of the file.
    """

    def __init__(self, budget: int, folder: str | None, half: bool, device_budget: Callable[[], int]) -> None:
        self.half, self.device_bytes, self.memory_bytes, self.file_bytes = half, 0, 0, 0
        self._budget, self._folder = budget, folder
        self._ask_device_budget, self._device_budget = device_budget, -1
        self._on_device: dict[int, weakref.ref[_Entry]] = {}  # by identity, oldest first
        self._in_memory: dict[int, weakref.ref[_Entry]] = {}
        self._file: BinaryIO | None = None
        self._free: list[int] = []
        self._length, self._dtype = 0, np.dtype(np.float32)

    def add(self, entry: _Entry) -> None:
        """Raises FeddipError where the file cannot take what memory has no room for."""
        if not isinstance(entry.kept, Tensor):
            self._add_here(entry)
            return
        if self._device_budget < 0:  # now a client has trained, and what that takes is taken
            self._device_budget = self._ask_device_budget()
        self._on_device[id(entry)] = weakref.ref(entry)
        entry.device_bytes = entry.kept.untyped_storage().nbytes()  # that of the update, of which a residual is a part
        self.device_bytes += entry.device_bytes
        while self.device_bytes > self._device_budget:
            oldest = next(iter(self._on_device.values()))()
            assert oldest is not None
            del self._on_device[id(oldest)]
            self.device_bytes -= oldest.device_bytes
            oldest.leave_device()
            self._add_here(oldest)

    def _add_here(self, entry: _Entry) -> None:
        self._in_memory[id(entry)] = weakref.ref(entry)
        self.memory_bytes += entry.values.nbytes
        while self.memory_bytes > self._budget:
            oldest = next(iter(self._in_memory.values()))()
            assert oldest is not None
            self._spill(oldest)

    def forget(self, entry: _Entry) -> None:
        if self._on_device.pop(id(entry), None) is not None:
            self.device_bytes -= entry.device_bytes
        elif self._in_memory.pop(id(entry), None) is not None:
            self.memory_bytes -= entry.values.nbytes
        elif entry.slot >= 0:
            self._free.append(entry.slot)

    def read(self, slot: int) -> np.ndarray:
        assert self._file is not None
        values = np.empty(self._length, self._dtype)
        view, done = values.view(np.uint8).data, 0
        while done < values.nbytes:  # a call reads 2 GiB at most
            try:
                read = os.preadv(self._file.fileno(), [view[done:]], slot * values.nbytes + done)
            except OSError as error:
                raise FeddipError(
                    f"residuals: the file in {self._place()} cannot be read ({error.strerror}); resume, with another "
                    "upload.residual_folder where that one fails again"
                ) from None
            if not read:
                raise FeddipError(f"residuals: the file in {self._place()} is too short; resume")
            done += read
        return values

    def _spill(self, entry: _Entry) -> None:
        values = entry.values
        size = values.nbytes
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(dir=self._folder, prefix="feddip-residuals-")  # noqa: SIM115
                self._length, self._dtype = values.size, values.dtype
            slot = self._free[-1] if self._free else self.file_bytes // size
            view, start, done = values.view(np.uint8).data, slot * size, 0
            while done < size:
                done += os.pwrite(self._file.fileno(), view[done:], start + done)
        except OSError as error:
            raise FeddipError(
                f"residuals: {self.memory_bytes} bytes are more than upload.residual_memory, and the file in "
                f"{self._place()} cannot take them ({error.strerror}); free space there, or resume with another "
                "upload.residual_folder or a larger upload.residual_memory"
            ) from None
        if self._free:
            self._free.pop()
        self.file_bytes = max(self.file_bytes, start + size)
        entry.kept, entry.slot = None, slot
        self.memory_bytes -= size
        del self._in_memory[id(entry)]

    def _place(self) -> str:
        return self._folder or tempfile.gettempdir()


def _doubled(upper: np.ndarray) -> np.ndarray:
    return (upper.astype(np.uint32) << 16).view(np.float32)


# Of a GPU's memory, where the configuration says nothing: several ranks may share it, and training comes first.
_SHARE_OF_DEVICE = 8


def device_budget(config: Config, device: torch.device) -> int:
    """Bytes of residuals that may stay on a rank's GPU; 0 on the CPU."""
    if device.type != "cuda":
        return 0
    if config.upload.residual_device_memory is not None:
        return config.upload.residual_device_memory * 2**20
    free, total = torch.cuda.mem_get_info(device)
    own = free
    if config.memory_fraction < 1:
        own = int(config.memory_fraction * total) - torch.cuda.memory_reserved(device)
    return max(0, min(free, own)) // _SHARE_OF_DEVICE


def require_folder(policy: UploadConfig) -> None:
    """Raises InputError where the folder that a configuration names is not there: else that shows when memory is full."""
    folder = policy.residual_folder
    if folder is not None and not (os.path.isdir(folder) and os.access(folder, os.W_OK | os.X_OK)):
        raise InputError(
            f"upload.residual_folder: got {folder!r}, which is no folder on {socket.gethostname()} that can be written to; "
            "name one that every node has, or leave it out for the system's folder for temporary files"
        )


class ResidualStore(MutableMapping[int, Residual]):
    """This rank's residuals by client. A residual that is read may be the stored one and is not to be changed."""

    def __init__(
        self,
        budget: int,
        folder: str | None = None,
        half: bool = False,
        device_budget: Callable[[], int] = lambda: 0,
    ) -> None:
        """An empty store.

        Args:
            budget: bytes of values that may lie in memory, those of all copies together.
            folder: where the file is made when it is needed (it has no name, and goes with the process); None: the
                system's folder for temporary files.
            half: two bytes a value, for values that are rounded to bfloat16 already.
            device_budget: tells how many bytes may stay on the GPU on which they are stored; asked when the first one is.
        """
        self._space = _Space(budget, folder, half, device_budget)
        self._entries: dict[int, _Entry] = {}

    @classmethod
    def of(cls, policy: UploadConfig, device_budget: Callable[[], int] = lambda: 0) -> ResidualStore:
        """The store that a configuration asks for."""
        half = policy.residual_values == "bf16"
        return cls(policy.residual_memory * 2**20, policy.residual_folder, half, device_budget)

    def copy(self) -> ResidualStore:
        """A store with the same residuals, none of which is copied; changes of one are not seen by the other."""
        twin = ResidualStore.__new__(ResidualStore)
        twin._space, twin._entries = self._space, dict(self._entries)
        return twin

    @property
    def device_bytes(self) -> int:
        """Bytes of values on the GPU, those of all copies together."""
        return self._space.device_bytes

    @property
    def memory_bytes(self) -> int:
        """Bytes of values in memory, those of all copies together."""
        return self._space.memory_bytes

    @property
    def file_bytes(self) -> int:
        """Size of the file."""
        return self._space.file_bytes

    def __getitem__(self, client: int) -> Residual:
        return self._entries[client].residual()

    def __setitem__(self, client: int, residual: Residual) -> None:
        self._entries.pop(client, None)  # its place is free before the new one takes its own
        entry = _Entry(self._space, residual)
        self._space.add(entry)
        self._entries[client] = entry

    def __delitem__(self, client: int) -> None:
        del self._entries[client]

    def __iter__(self) -> Iterator[int]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, client: object) -> bool:
        return client in self._entries
