"""One client's update as a payload of bytes, and back. Pure: knows no rank and no file.

What travels (docs/method.md, "Upload"): the in-mask values without indices, since both sides know the mask; some
off-mask values with their indices; everything that is not prunable as float32. The law of error feedback holds by
construction, because the residual is computed from what the *decoder* returns:

    decode(payload) + residual == update + old residual

exactly for values sent as fp32, to one float32 rounding for the others.

Each off-mask coordinate of a client's update is carried by exactly one of two memories: by the server's (dense
memory W) once it was sent, by the client's residual until then.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from feddip_mpi import masks
from feddip_mpi.errors import PeerError

_MAGIC = b"FDIP"
_VERSION = 1
# magic, version, value type, dense flag, pad; round, client, mask digest; in-mask, off-mask, other counts; CRC of
# all of these and of the body.
_HEADER = struct.Struct("<4sBBBxIIIQQQI")
_CRC = struct.Struct("<I")
_VALUE_TYPES = ("fp32", "fp16", "bf16", "int8", "int4")
_BLOCK = {"int8": 256, "int4": 64}
_LEVELS = {"int8": 127, "int4": 7}


@dataclass(frozen=True)
class Bytes:
    """Bytes of a payload (or of many) by kind."""

    values: int = 0
    indices: int = 0
    other: int = 0
    frame: int = 0

    def __add__(self, more: Bytes) -> Bytes:
        return Bytes(*(getattr(self, f.name) + getattr(more, f.name) for f in fields(self)))

    @property
    def total(self) -> int:
        return self.values + self.indices + self.other + self.frame


@dataclass(frozen=True)
class Upload:
    """What both ends agree on before a client encodes.

    Attributes:
        values: value type of the prunable coordinates.
        stochastic: round quantised values up or down at random (unbiased) instead of to the nearest.
        dense: all prunable coordinates travel; otherwise those in the mask and `regrow` others.
        regrow: coordinates sent from outside the mask: those with the largest |update + residual|.
    """

    values: str = "fp32"
    stochastic: bool = False
    dense: bool = False
    regrow: int = 0


def encode(
    total: Tensor, mask: Tensor, upload: Upload, round: int, client: int, generator: np.random.Generator
) -> tuple[np.ndarray, Tensor]:
    """Compress update + old residual.

    Args:
        total: float32 [n], update plus old residual, finite.
        mask: bool [P] with P <= n, on the same device.
        upload: what to send and how.
        round, client: travel in the frame.
        generator: random stream for stochastic rounding.

    Returns:
        payload uint8 [bytes] on the CPU, and the new residual float32 [P]: total[:P] minus what `decode` returns.
    """
    size = mask.numel()
    prunable = total[:size]
    support = torch.ones_like(mask) if upload.dense else mask
    extra = _off_mask_indices(prunable, mask, upload)
    in_values = prunable[support]
    off_values = prunable[extra]
    body_in, sent_in = _pack_values(in_values, upload, generator)
    body_off, sent_off = _pack_values(off_values, upload, generator)
    residual = prunable.clone()
    residual[support] = in_values - sent_in
    residual[extra] = off_values - sent_off
    indices = extra.to(torch.int32).cpu().numpy().view(np.uint8)
    body = np.concatenate([body_in, indices, body_off, _bytes_of(total[size:])])
    header = _HEADER.pack(
        _MAGIC, _VERSION, _VALUE_TYPES.index(upload.values), upload.dense, round, client, masks.digest(mask),
        in_values.numel(), extra.numel(), total.numel() - size, 0,
    )[:-_CRC.size]  # fmt: skip
    payload = np.concatenate([np.frombuffer(header + bytes(_CRC.size), np.uint8), body])
    payload[len(header) : _HEADER.size] = np.frombuffer(_CRC.pack(_checksum(payload)), np.uint8)
    return payload, residual


@dataclass(frozen=True)
class Decoded:
    """A payload read back: who sent it, what it says (float32 [n], zero where nothing was sent), bytes by kind."""

    client: int
    update: Tensor
    bytes: Bytes


def decode(payload: np.ndarray, mask: Tensor, size: int, round: int, mask_digest: int | None = None) -> Decoded:
    """Read a payload back into a dense float32 [size] vector on the mask's device.

    Raises:
        PeerError: the frame is truncated, altered, from another round or made with another mask. It names client
            and round; nothing has been added to anything by then.
    """
    head = _read_header(payload, round)
    ours = masks.digest(mask) if mask_digest is None else mask_digest
    if head.mask_digest != ours:
        raise PeerError(
            f"client {head.client}, round {round + 1}: encoded with another mask (digest {head.mask_digest:08x}, here "
            f"{ours:08x}): the ranks' masks have drifted apart; resume from the last checkpoint"
        )
    prunable = mask.numel()
    sections = _sections(head)
    expected = _HEADER.size + sum(sections)
    in_mask = prunable if head.dense else int(mask.sum())
    if payload.size != expected or head.in_count != in_mask or head.other_count != size - prunable:
        raise PeerError(
            f"client {head.client}, round {round + 1}: payload of {payload.size} bytes does not fit this model "
            f"({expected} expected)"
        )
    body = payload[_HEADER.size :]
    raw_in, raw_index, raw_off, raw_other = np.split(body, np.cumsum(sections)[:-1])
    update = torch.zeros(size, dtype=torch.float32, device=mask.device)
    in_values = _unpack_values(raw_in, head.in_count, head.values).to(mask.device)
    if head.dense:
        update[:prunable] = in_values
    else:
        update[:prunable][mask] = in_values
    indices = torch.from_numpy(np.frombuffer(raw_index.tobytes(), np.int32).astype(np.int64)).to(mask.device)
    if head.off_count and not (0 <= int(indices.min()) and int(indices.max()) < prunable):
        raise PeerError(f"client {head.client}, round {round + 1}: an index lies outside the model")
    update[indices] = _unpack_values(raw_off, head.off_count, head.values).to(mask.device)
    update[prunable:] = _unpack_values(raw_other, head.other_count, "fp32").to(mask.device)
    kinds = Bytes(values=sections[0] + sections[2], indices=sections[1], other=sections[3], frame=_HEADER.size)
    return Decoded(head.client, update, kinds)


def _off_mask_indices(prunable: Tensor, mask: Tensor, upload: Upload) -> Tensor:
    """Ascending int64 indices of the off-mask coordinates to send."""
    count = 0 if upload.dense else min(upload.regrow, mask.numel() - int(mask.sum()))
    if count == 0:
        return torch.zeros(0, dtype=torch.int64, device=mask.device)
    # In-mask entries get -1, below every magnitude, so that they are never chosen.
    return masks.select_largest(prunable.abs().masked_fill(mask, -1.0), count).nonzero().squeeze(1)


def _pack_values(values: Tensor, upload: Upload, generator: np.random.Generator) -> tuple[np.ndarray, Tensor]:
    """(bytes, the float32 values that `_unpack_values` will return) of float32 [m]."""
    kind = upload.values
    if kind == "fp32":
        return _bytes_of(values), values
    if kind in ("fp16", "bf16"):
        dtype = torch.float16 if kind == "fp16" else torch.bfloat16
        # Beyond the largest finite one of the type that one travels, and the residual keeps the rest.
        largest = torch.finfo(dtype).max
        low = values.clamp(-largest, largest).to(dtype)
        return _bytes_of(low), low.to(torch.float32)
    raw = _quantise(values, kind, upload.stochastic, generator)
    return raw, _unpack_values(raw, values.numel(), kind).to(values.device)


def _unpack_values(raw: np.ndarray, count: int, kind: str) -> Tensor:
    """float32 [count] on the CPU."""
    if count == 0:
        return torch.zeros(0)
    data = torch.from_numpy(raw.copy())
    if kind in ("fp32", "fp16", "bf16"):
        dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[kind]
        return data.view(dtype).to(torch.float32)
    block = _BLOCK[kind]
    blocks = -(-count // block)
    scales = data[: 2 * blocks].view(torch.bfloat16).to(torch.float32)
    codes = data[2 * blocks :]
    if kind == "int4":
        codes = torch.stack([codes & 15, codes >> 4], dim=1).reshape(-1)[:count].to(torch.int8) - 8
    levels = codes.view(torch.int8).to(torch.float32)
    return (_padded(levels, block) * scales[:, None]).reshape(-1)[:count]


def _quantise(values: Tensor, kind: str, stochastic: bool, generator: np.random.Generator) -> np.ndarray:
    """Signed integers in blocks that share a bfloat16 scale (max |value| / levels): scales first, then codes."""
    levels = _LEVELS[kind]
    blocks = _padded(values, _BLOCK[kind])
    scales = (blocks.abs().amax(dim=1) / levels).to(torch.bfloat16)
    steps = scales.to(torch.float32)[:, None]
    scaled = torch.where(steps > 0, blocks / steps, torch.zeros_like(blocks))
    if stochastic:
        noise = torch.from_numpy(generator.random(tuple(scaled.shape), dtype=np.float32)).to(scaled.device)
        rounded = torch.floor(scaled + noise)
    else:
        rounded = torch.round(scaled)
    codes = rounded.clamp(-levels, levels).to(torch.int8).reshape(-1)[: values.numel()]
    if kind == "int4":
        nibbles = _padded(codes + 8, 2, fill=8).to(torch.uint8)
        codes = nibbles[:, 0] | (nibbles[:, 1] << 4)
    return np.concatenate([_bytes_of(scales), _bytes_of(codes)])


def _padded(values: Tensor, block: int, fill: int = 0) -> Tensor:
    """[m] as [ceil(m / block), block], filled up with `fill`."""
    missing = -values.numel() % block
    return torch.nn.functional.pad(values, (0, missing), value=fill).view(-1, block)


def _bytes_of(tensor: Tensor) -> np.ndarray:
    return tensor.detach().contiguous().cpu().view(torch.uint8).numpy() if tensor.numel() else np.zeros(0, np.uint8)


def _value_bytes(count: int, kind: str) -> int:
    if kind in ("int8", "int4"):
        blocks = -(-count // _BLOCK[kind])
        return 2 * blocks + (count if kind == "int8" else -(-count // 2))
    return count * (4 if kind == "fp32" else 2)


@dataclass(frozen=True)
class _Header:
    values: str
    dense: bool
    client: int
    mask_digest: int
    in_count: int
    off_count: int
    other_count: int


def _sections(head: _Header) -> list[int]:
    """Bytes of: in-mask values, indices, off-mask values, the rest."""
    return [
        _value_bytes(head.in_count, head.values),
        4 * head.off_count,
        _value_bytes(head.off_count, head.values),
        4 * head.other_count,
    ]


def _read_header(payload: np.ndarray, round: int) -> _Header:
    if payload.size < _HEADER.size:
        raise PeerError(f"round {round + 1}: a payload of {payload.size} bytes is shorter than its frame")
    raw = payload[: _HEADER.size].tobytes()
    magic, version, kind, dense, their_round, client, digest, in_n, off_n, other_n, crc = _HEADER.unpack_from(raw)
    if magic != _MAGIC or version != _VERSION or kind >= len(_VALUE_TYPES):
        raise PeerError(f"round {round + 1}: a message is no payload of format {_VERSION} (begins {raw[:8].hex()})")
    if _checksum(payload) != crc:
        raise PeerError(f"client {client}, round {round + 1}: payload altered or cut on its way (CRC differs)")
    if their_round != round:
        raise PeerError(f"client {client}: payload of round {their_round + 1} arrived in round {round + 1}")
    return _Header(_VALUE_TYPES[kind], bool(dense), client, digest, in_n, off_n, other_n)


def _checksum(payload: np.ndarray) -> int:
    """CRC-32 of a payload without the field that holds it: an altered frame is as bad as an altered value."""
    frame = payload[: _HEADER.size - _CRC.size].tobytes()
    return zlib.crc32(payload[_HEADER.size :].tobytes(), zlib.crc32(frame))


def upload_bytes(in_mask: int, off_mask: int, other: int, values: str) -> int:
    """Length of a payload, from its counts alone (for `plan`)."""
    return _HEADER.size + sum(_sections(_Header(values, False, 0, 0, in_mask, off_mask, other)))
