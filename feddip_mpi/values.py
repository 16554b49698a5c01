"""How float32 values travel: fp32, fp16, bf16, or int8 and int4 codes in blocks that share a scale; votes as bits. Pure.

A quantised value is code * scale, with one bfloat16 scale per block of 256 (int8) or 64 (int4) values: the block's
largest magnitude over 127 or 7. Blocks are counted from the start of a client's whole message, so a slice of it
decodes to the same bits as the whole: it carries the scales of all blocks that it touches, and its `phase`, the
place of its first value in its block.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

KINDS = ("fp32", "fp16", "bf16", "int8", "int4")
WIRE = (*KINDS, "bit")  # the numbers of kinds in a frame; bit: 0 or 1 exactly, for what methods send besides updates
BLOCK = {"int8": 256, "int4": 64, "bit": 8}
_LEVELS = {"int8": 127, "int4": 7}
_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Coded:
    """Values ready to travel.

    Attributes:
        kind: one of WIRE.
        codes: float32, float16 or bfloat16 [m] values, int8 [m] codes in -levels..levels, or uint8 [m] bits.
        scales: bfloat16 [blocks] for int8 and int4; empty otherwise.
    """

    kind: str
    codes: Tensor
    scales: Tensor

    def restored(self) -> Tensor:
        """float32 [m], bit for bit what `unpack` makes of the packed bytes."""
        return _restore(self.kind, self.codes, self.scales, 0)

    def packed(self, start: int, stop: int) -> tuple[Tensor, int]:
        """(uint8 bytes, phase) of the values start..stop: the scales they touch, then their codes."""
        codes = self.codes[start:stop]
        if self.kind in _DTYPES:
            return as_bytes(codes), 0
        block = BLOCK[self.kind]
        phase = start % block
        if self.kind == "bit":
            return _packed_bits(self.codes[start - phase : stop] if stop > start else codes, phase), phase
        scales = self.scales[start // block : -(-stop // block)] if stop > start else self.scales[:0]
        if self.kind == "int4":
            nibbles = _padded(codes + 8, 2, fill=8).to(torch.uint8)
            codes = nibbles[:, 0] | (nibbles[:, 1] << 4)
        return torch.cat([as_bytes(scales), as_bytes(codes)]), phase


def code(values: Tensor, kind: str, stochastic: bool, generator: np.random.Generator) -> Coded:
    """Code floats [m] as `kind`.

    Args:
        values: float32 (or float64) [m], finite.
        kind: one of WIRE; as "bit" everything but 0 is 1.
        stochastic: round codes up or down at random, without bias, instead of to the nearest.
        generator: the stream for that.
    """
    none = torch.zeros(0, dtype=torch.bfloat16, device=values.device)
    if kind in _DTYPES:
        return Coded(kind, _within(values, _DTYPES[kind]), none)
    if kind == "bit":
        return Coded(kind, (values != 0).to(torch.uint8), none)
    levels = _LEVELS[kind]
    blocks = _padded(_within(values, torch.float32), BLOCK[kind])
    scales = (blocks.abs().amax(dim=1) / levels).to(torch.bfloat16)
    steps = scales.to(torch.float32)[:, None]
    scaled = torch.where(steps > 0, blocks / steps, 0.0)
    if stochastic:
        noise = torch.from_numpy(generator.random(tuple(scaled.shape), dtype=np.float32)).to(scaled.device)
        scaled = torch.floor(scaled.add_(noise))
    else:
        scaled = scaled.round_()
    return Coded(kind, scaled.clamp_(-levels, levels).to(torch.int8).view(-1)[: values.numel()], scales)


def unpack(data: Tensor, count: int, kind: str, phase: int) -> Tensor:
    """The inverse of `Coded.packed`: uint8 bytes as float32 [count], on the bytes' device.

    Raises:
        ValueError: the length does not fit `count`, or the phase is no place in a block.
    """
    if data.numel() != packed_bytes(count, kind, phase):
        raise ValueError(f"{data.numel()} bytes for {count} {kind} values")
    if kind in _DTYPES:
        return data.view(_DTYPES[kind]).to(torch.float32) if count else _nothing(data)
    if kind == "bit":
        return _unpacked_bits(data)[phase : phase + count].to(torch.float32)
    blocks = _blocks(count, kind, phase)
    scales, codes = data[: 2 * blocks].view(torch.bfloat16), data[2 * blocks :]
    if kind == "int4":
        codes = torch.stack([codes & 15, codes >> 4], dim=1).view(-1)[:count].to(torch.int8) - 8
    return _restore(kind, codes.view(torch.int8), scales, phase) if count else _nothing(data)


def packed_bytes(count: int, kind: str, phase: int = 0) -> int:
    """Length of `count` packed values whose first one is the `phase`-th of its block."""
    if kind in _DTYPES:
        return count * _DTYPES[kind].itemsize
    if not 0 <= phase < BLOCK[kind]:
        raise ValueError(f"phase {phase} in a block of {BLOCK[kind]}")
    if kind == "bit":
        return _blocks(count, kind, phase)
    return 2 * _blocks(count, kind, phase) + (count if kind == "int8" else -(-count // 2))


def bytes_per_value(kind: str) -> float:
    """Length of one value in a long message, scales included."""
    if kind in _DTYPES:
        return float(_DTYPES[kind].itemsize)
    if kind == "bit":
        return 1 / 8
    return (1.0 if kind == "int8" else 0.5) + 2 / BLOCK[kind]


def as_bytes(tensor: Tensor) -> Tensor:
    """A tensor's memory as uint8 [bytes], on its device; a view where it is contiguous."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8) if tensor.numel() else _nothing(tensor, torch.uint8)


def _within(values: Tensor, dtype: torch.dtype) -> Tensor:
    """As `dtype`. Beyond its largest finite value that one travels, and the residual keeps the rest."""
    largest = torch.finfo(dtype).max
    return values if values.dtype == dtype else values.clamp(-largest, largest).to(dtype)


def _blocks(count: int, kind: str, phase: int) -> int:
    return -(-(phase + count) // BLOCK[kind]) if count else 0


def _restore(kind: str, codes: Tensor, scales: Tensor, phase: int) -> Tensor:
    if kind in _DTYPES or kind == "bit":
        return codes.to(torch.float32)
    steps, block, count = scales.to(torch.float32), BLOCK[kind], codes.numel()
    if phase == 0:
        whole = count // block * block
        out = torch.empty(count, dtype=torch.float32, device=codes.device)
        torch.mul(codes[:whole].view(-1, block), steps[: whole // block, None], out=out[:whole].view(-1, block))
        if whole < count:
            torch.mul(codes[whole:], steps[-1], out=out[whole:])
        return out
    place = torch.arange(phase, phase + count, device=codes.device).div_(block, rounding_mode="floor")
    return codes * steps.index_select(0, place)


def _packed_bits(bits: Tensor, phase: int) -> Tensor:
    """uint8 [m] of 0 and 1 as uint8 [ceil(m / 8)], first bit highest; the `phase` first ones become 0."""
    rows = _padded(bits, 8)
    packed = (rows << torch.arange(7, -1, -1, dtype=torch.uint8, device=bits.device)).sum(dim=1, dtype=torch.uint8)
    if phase and packed.numel():
        packed[0] &= 255 >> phase
    return packed


def _unpacked_bits(data: Tensor) -> Tensor:
    """uint8 [bytes] as 0 and 1, [8 * bytes]."""
    places = torch.arange(7, -1, -1, dtype=torch.uint8, device=data.device)
    return ((data[:, None] >> places) & 1).view(-1)


def _padded(values: Tensor, block: int, fill: int = 0) -> Tensor:
    """[m] as [ceil(m / block), block], filled up with `fill`; no copy where nothing is missing."""
    missing = -values.numel() % block
    return (torch.nn.functional.pad(values, (0, missing), value=fill) if missing else values).view(-1, block)


def _nothing(like: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(0, dtype=dtype, device=like.device)
