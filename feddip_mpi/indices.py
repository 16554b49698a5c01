"""Coding of a set of positions: a bitmap or Rice codes of the gaps, whichever is shorter. Pure tensors.

Rice codes (Rice & Plaunt 1971) are Golomb's codes (1966) with a power of two: a gap g is g >> b in unary (that many zeros,
then a one) and its b low bits as they are. The gaps of a random set are geometric, for which such codes are within 3 % of
log2 C(size, count) while less than a third of the positions are in the set, and within 5 % up to a half; near it a
bitmap, of the length of Rice codes with b = 0, takes over. Above that the positions that are *not* in the set are coded.

There is no third coding: bytes of 7 bits (varint, LEB128) spend at least 8 bits on a gap, on random gaps 16 % more than Rice
codes at best and 25 to 40 % more at most densities of pruning; they are never shorter there (`test_indices.py`,
docs/results/selection.json). They could win only on runs of neighbours with vast gaps between the runs.

Layout of Rice codes, so that both directions are a handful of tensor operations: all quotients as one string of bits,
padded to a byte; then the remainders, b // 8 planes of whole bytes, least significant first, and the b % 8 bits left,
packed. Bits fill a byte from its least significant end. Where the first stream ends follows from the length of the second,
which `count` and b determine. Bytes are taken for integers in place, which assumes a little-endian machine.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

BITMAP, RICE = 0, 1
MAX_SIZE = 2**31 - 1  # products of two positions stay inside int64 while `unpack` adds up what it does not trust


@dataclass(frozen=True, eq=False)
class Coded:
    """A coded set of positions; `unpack` needs its count and the size of the whole too.

    Attributes:
        coding: 0 bitmap, 1 Rice.
        parameter: bits b of a remainder; 0 for a bitmap.
        complement: the positions that are not in the set are coded (Rice only, exactly when count > size / 2).
        data: uint8 [bytes], on the device of the positions.
    """

    coding: int
    parameter: int
    complement: bool
    data: Tensor


def pack(indices: Tensor, size: int) -> Coded:
    """Code a set of positions as short as this module can, to one byte.

    Args:
        indices: integers [count], strictly ascending, in [0, size).
        size: number of positions there are, at most 2^31 - 1.

    Raises:
        ValueError: the indices do not ascend strictly or lie outside.
    """
    count = indices.numel()
    _check_counts(count, size)
    indices = indices.to(torch.int64)
    if count and not (_gaps(indices).min() >= 0 and indices[-1] < size):
        raise ValueError(f"positions to code must ascend strictly within [0, {size})")
    complement = 2 * count > size
    gaps = _gaps(_others(indices, size) if complement else indices)
    parameter, unary_bits = _best_parameter(gaps)
    if _bytes(size) <= _bytes(unary_bits) + _bytes(gaps.numel() * parameter):
        return Coded(BITMAP, 0, False, _bit_string(indices, size))
    return Coded(RICE, parameter, complement, _rice(gaps, parameter, unary_bits))


def unpack(data: Tensor, coding: int, parameter: int, complement: bool, count: int, size: int) -> Tensor:
    """The inverse of `pack`, for input that may be damaged.

    Memory stays within a small multiple of `data`, of the int64 result and, where `complement`, of `size` bytes,
    whatever the arguments say.

    Args:
        data, coding, parameter, complement: as in `Coded`.
        count: number of positions in the set, in [0, size].
        size: as given to `pack`.

    Returns:
        int64 [count], strictly ascending, in [0, size), on the device of `data`.

    Raises:
        ValueError: these are not `count` positions among `size`, or not in the one form that `parameter` gives them.
            (Whether another parameter would have been shorter is not asked.)
    """
    _check_counts(count, size)
    if data.dtype != torch.uint8 or data.dim() != 1:
        raise ValueError(f"coded positions are uint8 in one dimension, not {data.dtype} in {data.dim()}")
    if coding == BITMAP and parameter == 0 and not complement:
        return _read_bitmap(data, count, size)
    widest = max(1, (size - 1).bit_length() - 1)  # 2^b beyond every gap would never pay
    if coding != RICE or not 0 <= parameter <= widest or complement != (2 * count > size):
        raise ValueError(
            f"no coding of {count} of {size} positions: coding {coding}, parameter {parameter}, complement {complement}"
        )
    coded = _read_rice(data, parameter, size - count if complement else count, size)
    return _others(coded, size) if complement else coded


def expected_bytes(size: int, count: int) -> int:
    """Bytes that `pack` needs on average for `count` random positions of `size`, to 3 % or 4 bytes.

    By the geometric distribution with the gaps' true mean (size - coded) / (coded + 1): of g ~ (1 - p)^g p the quotient
    g >> b has the mean x / (1 - x) with x = (1 - p)^(2^b).
    """
    _check_counts(count, size)
    coded = min(count, size - count)
    if coded == 0:
        return 0
    rate = -math.log1p(-(coded + 1) / (size + 1))
    parameter, quotient = 0, 1 / math.expm1(rate)
    while quotient - (halved := 1 / math.expm1(rate * 2 ** (parameter + 1))) > 1:
        parameter, quotient = parameter + 1, halved
    return min(_bytes(size), _bytes(math.ceil(coded * (1 + quotient))) + _bytes(coded * parameter))


def _best_parameter(gaps: Tensor) -> tuple[int, int]:
    """The b for which the Rice codes of int64 [k] are shortest, and the bits of its unary stream.

    One more bit a gap costs k and saves sum(ceil((g >> b) / 2)), which falls with b: the first b that no longer pays is
    the best of all.
    """
    count, rest = gaps.numel(), gaps
    parameter, quotients = 0, int(gaps.sum())
    while True:
        rest = rest >> 1
        halved = int(rest.sum())
        if quotients - halved <= count:
            return parameter, count + quotients
        parameter, quotients = parameter + 1, halved


def _rice(gaps: Tensor, parameter: int, unary_bits: int) -> Tensor:
    ends = ((gaps >> parameter) + 1).cumsum(0) - 1
    return torch.cat([_bit_string(ends, unary_bits), _pack_numbers(gaps, parameter)])


def _read_rice(data: Tensor, parameter: int, count: int, size: int) -> Tensor:
    """int64 [count] from untrusted Rice codes; every length is checked before anything of that length is made."""
    head = data.numel() - _bytes(count * parameter)
    # The gaps of `count` positions add up to at most size - count.
    longest = _bytes(count + ((size - count) >> parameter)) if count else 0
    if not (_bytes(count) <= head <= longest):
        raise ValueError(f"{data.numel()} bytes cannot be the Rice codes of {count} of {size} positions")
    ends = _read_bit_string(data[:head], count, 8 * head)
    if count == 0:
        return ends
    if int(ends[-1]) < 8 * (head - 1):
        raise ValueError("Rice codes are followed by bytes that mean nothing")
    gaps = (_gaps(ends) << parameter) | _unpack_numbers(data[head:], parameter, count)
    positions = (gaps + 1).cumsum(0) - 1
    if int(positions[-1]) >= size:
        raise ValueError(f"coded position {int(positions[-1])} lies outside [0, {size})")
    return positions


def _read_bitmap(data: Tensor, count: int, size: int) -> Tensor:
    if data.numel() != _bytes(size):
        raise ValueError(f"a bitmap of {size} positions has {_bytes(size)} bytes, not {data.numel()}")
    return _read_bit_string(data, count, size)


def _bit_string(ones: Tensor, size: int) -> Tensor:
    """uint8 [ceil(size / 8)] with the bits at int64 `ones` set."""
    bits = torch.zeros(8 * _bytes(size), dtype=torch.uint8, device=ones.device)
    return _pack_octets(bits.index_fill_(0, ones, 1), 1)


def _read_bit_string(data: Tensor, count: int, size: int) -> Tensor:
    """int64 [count]: where the bits of uint8 [ceil(size / 8)] are set; ValueError unless they are `count` below `size`."""
    shifts = torch.arange(8, dtype=torch.uint8, device=data.device)
    bits = (data[:, None] >> shifts).bitwise_and_(1).view(-1)
    found = int(bits.count_nonzero())
    if found != count or bits[size:].any():
        raise ValueError(
            f"{found} bits are set in a string of {size} for {count} positions, or some lie behind its end"
        )
    return bits.nonzero().squeeze(1)


def _pack_numbers(values: Tensor, width: int) -> Tensor:
    """The low `width` bits of int64 [k] as uint8 [ceil(k * width / 8)]."""
    planes = [(values >> shift & 255).to(torch.uint8) for shift in range(0, width - width % 8, 8)]
    rest = width % 8
    if rest:
        planes.append(_pack_octets(values >> (width - rest) & (1 << rest) - 1, rest))
    return torch.cat(planes) if planes else torch.zeros(0, dtype=torch.uint8, device=values.device)


def _unpack_numbers(data: Tensor, width: int, count: int) -> Tensor:
    """The inverse of `_pack_numbers`: int64 [count]; ValueError if the bits that fill up the last byte are not zero."""
    whole, rest = divmod(width, 8)
    values = torch.zeros(count, dtype=torch.int64, device=data.device)
    if rest:
        octets = _unpack_octets(data[whole * count :], rest)
        if octets[count:].any():
            raise ValueError("the bits that fill up the last byte of Rice codes are not zero")
        values = octets[:count]
    for j in reversed(range(whole)):
        values = values << 8 | data[j * count : (j + 1) * count]
    return values


def _pack_octets(values: Tensor, width: int) -> Tensor:
    """Integers [k] below 2^width, 0 < width < 8, as uint8 [ceil(k * width / 8)]: eight of them make `width` bytes."""
    columns = torch.nn.functional.pad(values, (0, -values.numel() % 8)).view(-1, 8)
    octets = torch.zeros(len(columns), dtype=torch.int64, device=values.device)
    for j in range(8):
        octets |= columns[:, j].to(torch.int64) << (j * width)
    raw = octets.view(torch.uint8).view(-1, 8)[:, :width].reshape(-1)
    return raw[: _bytes(values.numel() * width)]


def _unpack_octets(data: Tensor, width: int) -> Tensor:
    """The inverse of `_pack_octets`: int64 [k] and up to seven more, zeros where the last byte was filled with zeros."""
    raw = torch.nn.functional.pad(data, (0, -data.numel() % width)).view(-1, width)
    octets = torch.nn.functional.pad(raw, (0, 8 - width)).view(torch.int64)
    values = torch.empty(len(octets), 8, dtype=torch.int64, device=data.device)
    for j in range(8):
        values[:, j] = octets[:, 0] >> (j * width) & (1 << width) - 1
    return values.view(-1)


def _gaps(positions: Tensor) -> Tensor:
    """How many positions are left out before each of int64 [k]."""
    return torch.diff(positions, prepend=positions.new_tensor([-1])) - 1


def _others(positions: Tensor, size: int) -> Tensor:
    """int64 [size - k]: the positions below `size` that are not among int64 [k]."""
    free = torch.ones(size, dtype=torch.bool, device=positions.device)
    return free.index_fill_(0, positions, False).nonzero().squeeze(1)


def _bytes(bits: int) -> int:
    return -(-bits // 8)


def _check_counts(count: int, size: int) -> None:
    if not 0 <= count <= size <= MAX_SIZE:
        raise ValueError(f"cannot code {count} of {size} positions; sizes go to {MAX_SIZE}")
