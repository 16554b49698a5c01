"""One client's update as messages of bytes, and back. Pure: knows no rank and no file.

What travels (docs/method.md, "Upload"): the in-mask values without indices, since both sides know the mask, with
everything that is not prunable as float32 (the `support` message); in some rounds a few off-mask values with their
indices (the `regrow` message). The law of error feedback holds by construction, because the residual is computed
from what the *decoder* returns:

    decode(messages) + residual == update + old residual

exactly for values sent as fp32, to one float32 rounding for the others.

Each off-mask coordinate of a client's update is carried by exactly one of two memories: by the server's (dense
memory W) once it was sent, by the client's residual until then.

A message can be framed whole or in slices of the coordinates (for an exchange in which each rank owns a slice).
Quantisation is decided for the whole message, so any slicing decodes to the same bits.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from feddip_mpi import entropy, indices, masks, staging, values
from feddip_mpi.errors import PeerError
from feddip_mpi.support import Support
from feddip_mpi.values import Coded

SUPPORT, REGROW = 0, 1  # kinds of messages
AGGREGATE = 2**32 - 1  # in a client's place: the sum that an owner of a slice hands on

_MAGIC = b"FDIP"
_VERSION = 2
# magic, version, kind, value type, flags, index coding, its parameter, phase; round, client, mask digest; first and
# last coordinate, values; bytes of indices; CRC of all of these and of the body.
_HEADER = struct.Struct("<4sBBBBBBHIIIQQQII")
_CRC = struct.Struct("<I")
_DENSE, _COMPRESSED, _COMPLEMENT = 1, 2, 4
FRAME_BYTES = _HEADER.size


@dataclass(frozen=True)
class Bytes:
    """Bytes of a frame (or of many) by kind."""

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
        values: value type of the prunable coordinates (values.WIRE).
        stochastic: round quantised values up or down at random (unbiased) instead of to the nearest.
        dense: all prunable coordinates travel; otherwise those in the mask and `regrow` others.
        regrow: coordinates sent from outside the mask: those with the largest |update + residual|.
        compress: pass the values through an entropy coder where that makes them shorter.
    """

    values: str = "fp32"
    stochastic: bool = False
    dense: bool = False
    regrow: int = 0
    compress: bool = False

    @property
    def kinds(self) -> tuple[int, ...]:
        """The messages that every client sends, in their order."""
        return (SUPPORT,) if self.dense or not self.regrow else (SUPPORT, REGROW)


@dataclass(frozen=True)
class Message:
    """What a client (or the owner of a slice of the sum) sends, before it is cut into frames.

    Attributes:
        kind: SUPPORT or REGROW.
        round, client: of whom it speaks.
        support: whose kept coordinates travel without indices.
        size: n, length of the flat vector.
        coded: the values; those of a SUPPORT message begin with the first kept coordinate that is not below `begin`.
        begin: 0, or where a slice of the sum begins; its values must not begin inside a block.
        indices: int64 ascending, coordinates of a REGROW message's values.
        other: float32, of a SUPPORT message: what follows the prunable weights, from `begin` on.
        dense: the support is the whole vector in spite of the mask.
        compress: see Upload.
    """

    kind: int
    round: int
    client: int
    support: Support
    size: int
    coded: Coded
    begin: int
    indices: Tensor
    other: Tensor
    dense: bool
    compress: bool

    def frame(self, lo: int = 0, hi: int | None = None) -> np.ndarray:
        """The part that concerns the coordinates lo..hi as uint8 [bytes] on the CPU."""
        return self.framed(lo, hi)[0]

    def framed(self, lo: int = 0, hi: int | None = None) -> tuple[np.ndarray, Bytes]:
        """See `frame`; and its bytes by kind."""
        hi = self.size if hi is None else hi
        if self.kind == SUPPORT:
            start, stop = (self.support.rank(bound) - self.support.rank(self.begin) for bound in (lo, hi))
            places, coding = None, (0, 0, 0)
            first = max(self.begin, self.support.size)
            tail = self.other[max(0, lo - first) : max(0, hi - first)]
        else:
            start, stop = torch.searchsorted(self.indices, torch.tensor([lo, hi], device=self.indices.device)).tolist()
            coded = indices.pack(self.indices[start:stop] - lo, min(hi, self.support.size) - min(lo, self.support.size))
            places, coding = coded.data, (coded.coding, coded.parameter, _COMPLEMENT * coded.complement)
            tail = self.other[:0]
        body, phase = self.coded.packed(start, stop)
        packed, compressed = entropy.shorter(staging.to_host(body)) if self.compress else (staging.to_host(body), False)
        index_bytes = staging.to_host(places) if places is not None else np.zeros(0, np.uint8)
        flags = _DENSE * self.dense | _COMPRESSED * compressed | coding[2]
        header = _HEADER.pack(
            _MAGIC, _VERSION, self.kind, values.WIRE.index(self.coded.kind), flags, coding[0], coding[1], phase,
            self.round, self.client, self.support.digest, lo, hi, stop - start, index_bytes.size, 0,
        )[: -_CRC.size]  # fmt: skip
        other = staging.to_host(values.as_bytes(tail))
        frame = np.concatenate([np.frombuffer(header + bytes(_CRC.size), np.uint8), index_bytes, packed, other])
        frame[len(header) : _HEADER.size] = np.frombuffer(_CRC.pack(_checksum(frame)), np.uint8)
        return frame, Bytes(packed.size, index_bytes.size, other.size, _HEADER.size)


def encode(
    total: Tensor, support: Support, upload: Upload, round: int, client: int, generator: np.random.Generator
) -> Iterator[Message]:
    """Compress update + old residual, one message after the other; `total` becomes the new residual on the way.

    The first message can be on its way while the second, which has to search the largest off-mask values, is made.

    Args:
        total: float [n], update plus old residual, finite. Changed: once the last message is out, total[:P] is the
            new residual, total[:P] minus what `decode` returns.
        support: of the server's mask, P <= n, on the same device.
        upload: what to send and how.
        round, client: travel in the frames.
        generator: random stream for stochastic rounding.
    """
    carried = support.whole() if upload.dense else support
    none = torch.zeros(0, dtype=torch.int64, device=total.device)
    # Copies, not views: the message outlives what follows here.
    inside = carried.take(total).clone() if carried.positions is None else carried.take(total)
    coded = values.code(inside, upload.values, upload.stochastic, generator)
    other = total[support.size :].to(torch.float32, copy=True)
    yield Message(SUPPORT, round, client, carried, total.numel(), coded, 0, none, other, upload.dense, upload.compress)
    carried.put(total, inside - coded.restored())
    if REGROW not in upload.kinds:
        return
    count = min(upload.regrow, support.size - support.count)
    chosen = masks.largest(total[: support.size], count, support.mask)
    outside = total.index_select(0, chosen)
    coded = values.code(outside, upload.values, upload.stochastic, generator)
    yield Message(REGROW, round, client, carried, total.numel(), coded, 0, chosen, other[:0], False, upload.compress)
    total.index_copy_(0, chosen, outside - coded.restored())


@dataclass(frozen=True)
class Piece:
    """A frame read back.

    Attributes:
        kind, client: of the message; AGGREGATE for a slice of the sum.
        lo, hi: the coordinates it speaks of.
        values: float32 [count]; of a SUPPORT frame for the kept coordinates in lo..hi, in their order.
        indices: int64 [count] ascending coordinates of a REGROW frame's values; empty otherwise.
        other: float32, what lo..hi has of the tensors that are not prunable.
        dense: the frame says that every prunable coordinate is kept.
        bytes: of the frame, by kind.
    """

    kind: int
    client: int
    lo: int
    hi: int
    values: Tensor
    indices: Tensor
    other: Tensor
    dense: bool
    bytes: Bytes


def read(frame: np.ndarray, support: Support, size: int, round: int) -> Piece:
    """Read a frame back, on the support's device.

    Args:
        frame: uint8 [bytes].
        support: of this rank's mask.
        size: n.
        round: t, as counted from 0.

    Raises:
        PeerError: the frame is truncated, altered, from another round or made with another mask. It names client
            and round; nothing has been added to anything by then.
    """
    head = _read_header(frame, round)
    if head.digest != support.digest:
        raise PeerError(
            f"{head.name(round)}: encoded with another mask (digest {head.digest:08x}, here {support.digest:08x}): the "
            "ranks' masks have drifted apart; resume from the last checkpoint"
        )
    try:
        return _read_body(frame, head, support.whole() if head.dense else support, size)
    except ValueError as error:
        raise PeerError(
            f"{head.name(round)}: a frame of {frame.size} bytes does not fit this model ({error})"
        ) from None


def _read_body(frame: np.ndarray, head: _Header, carried: Support, size: int) -> Piece:
    if not 0 <= head.lo <= head.hi <= size:
        raise ValueError(f"coordinates {head.lo} to {head.hi} of {size}")
    lo, hi = (min(bound, carried.size) for bound in (head.lo, head.hi))  # of the prunable ones
    count = carried.rank(hi) - carried.rank(lo) if head.kind == SUPPORT else head.count
    if head.count != count or not count <= hi - lo:
        raise ValueError(f"{head.count} values, {count} expected")
    _check_phase(head, carried, lo)
    other = 4 * (head.hi - head.lo - (hi - lo)) if head.kind == SUPPORT else 0
    body = staging.to_device(frame[_HEADER.size :], carried.mask.device)
    ends = [head.index_bytes, body.numel() - other]
    if not ends[0] <= ends[1]:
        raise ValueError("sections overlap")
    packed = body[ends[0] : ends[1]]
    if head.compressed:
        packed = entropy.restore(packed, values.packed_bytes(count, head.values, head.phase))
    places = torch.zeros(0, dtype=torch.int64, device=body.device)
    if head.kind == REGROW:
        places = lo + indices.unpack(
            body[: ends[0]].clone(), head.coding, head.parameter, head.complement, count, hi - lo
        )
        if head.dense or carried.mask[places].any():
            raise ValueError("indices of weights that travel without any")
    elif head.index_bytes or head.coding or head.parameter or head.complement:
        raise ValueError("indices in a message without any")
    return Piece(
        kind=head.kind,
        client=head.client,
        lo=head.lo,
        hi=head.hi,
        # A section of its own: types of several bytes may not begin at any place of the frame.
        values=values.unpack(packed.clone(), count, head.values, head.phase),
        indices=places,
        other=values.unpack(body[ends[1] :].clone(), other // 4, "fp32", 0),
        dense=head.dense,
        bytes=Bytes(ends[1] - ends[0], head.index_bytes, other, _HEADER.size),
    )


def _check_phase(head: _Header, carried: Support, lo: int) -> None:
    """A wrong phase would give values the scales of other blocks. Only a slice of a REGROW message may have any."""
    block = values.BLOCK.get(head.values, 1)
    if head.kind == REGROW and lo > 0 and block > 1:
        return
    first = carried.rank(lo) if head.kind == SUPPORT and head.client != AGGREGATE else 0
    if head.phase != first % block:
        raise ValueError(f"values begin at place {head.phase} of a block, {first % block} expected")


def decode(frames: Sequence[np.ndarray], support: Support, size: int, round: int) -> Tensor:
    """What one client's frames say: float32 [n], zero where nothing was sent. See `read` for errors."""
    update = torch.zeros(size, dtype=torch.float32, device=support.mask.device)
    for frame in frames:
        piece = read(frame, support, size, round)
        carried = support.whole() if piece.dense else support
        if piece.kind == SUPPORT:
            kept = torch.arange(support.size, device=update.device) if carried.positions is None else carried.positions
            update[kept[carried.rank(piece.lo) : carried.rank(piece.hi)]] = piece.values
            update[max(piece.lo, support.size) : max(piece.hi, support.size)] = piece.other
        else:
            update[piece.indices] = piece.values
    return update


def expected_bytes(upload: Upload, kept: int, prunable: int, size: int) -> float:
    """Length of one client's frames, from the counts alone (for plans and the cost model).

    Exact but for the indices, whose coding depends on where they lie, and for `compress`, which is left out.

    Args:
        upload: how it encodes.
        kept: weights inside the mask.
        prunable: P.
        size: n.
    """
    inside = prunable if upload.dense else kept
    length = _HEADER.size + values.packed_bytes(inside, upload.values) + 4 * (size - prunable)
    if REGROW in upload.kinds:
        outside = min(upload.regrow, prunable - kept)
        length += _HEADER.size + values.packed_bytes(outside, upload.values) + indices.expected_bytes(prunable, outside)
    return length


@dataclass(frozen=True)
class _Header:
    kind: int
    values: str
    flags: int
    coding: int
    parameter: int
    phase: int
    client: int
    digest: int
    lo: int
    hi: int
    count: int
    index_bytes: int

    @property
    def dense(self) -> bool:
        return bool(self.flags & _DENSE)

    @property
    def compressed(self) -> bool:
        return bool(self.flags & _COMPRESSED)

    @property
    def complement(self) -> bool:
        return bool(self.flags & _COMPLEMENT)

    def name(self, round: int) -> str:
        """Whose frame it is, for errors."""
        whose = "the sum" if self.client == AGGREGATE else f"client {self.client}"
        return f"{whose}, round {round + 1}"


def _read_header(frame: np.ndarray, round: int) -> _Header:
    if frame.size < _HEADER.size:
        raise PeerError(f"round {round + 1}: a frame of {frame.size} bytes is shorter than its header")
    raw = frame[: _HEADER.size].tobytes()
    magic, version, kind, value_type, flags, coding, parameter, phase, their_round, client, digest, *rest = (
        _HEADER.unpack_from(raw)
    )
    lo, hi, count, index_bytes, crc = rest
    known = kind in (SUPPORT, REGROW) and value_type < len(values.WIRE) and flags < 8
    if magic != _MAGIC or version != _VERSION or not known:
        raise PeerError(f"round {round + 1}: a message is no frame of format {_VERSION} (begins {raw[:8].hex()})")
    head = _Header(
        kind, values.WIRE[value_type], flags, coding, parameter, phase, client, digest, lo, hi, count, index_bytes
    )
    if _checksum(frame) != crc:
        raise PeerError(f"{head.name(round)}: frame altered or cut on its way (CRC differs)")
    if their_round != round:
        raise PeerError(f"{head.name(their_round)}: arrived in round {round + 1}")
    return head


def _checksum(frame: np.ndarray) -> int:
    """CRC-32 of a frame without the field that holds it: an altered header is as bad as an altered value."""
    head = zlib.crc32(frame[: _HEADER.size - _CRC.size].data)
    return zlib.crc32(np.ascontiguousarray(frame[_HEADER.size :]).data, head)
