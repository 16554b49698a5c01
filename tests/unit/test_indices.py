"""Coding of positions: inverse, short, exact in layout, and never fooled."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from feddip_mpi import indices
from feddip_mpi.indices import BITMAP, RICE, Coded

SETS = st.lists(st.booleans(), max_size=60) | st.builds(
    lambda size, chosen: [i in chosen for i in range(size)],
    st.integers(0, 400),
    st.sets(st.integers(0, 399), max_size=9),
)
SIZES = (20_000, 300_000, 2_000_000)
SHARES = (0.0, 0.001, 0.01, 0.05, 0.11, 0.2, 0.3, 0.38, 0.45, 0.5, 0.6, 0.7, 0.9, 0.99, 1.0)
RANDOM = [(size, min(max(64, int(share * size)), size - 64)) for size in SIZES for share in SHARES]


def positions(flags: list[bool]) -> torch.Tensor:
    return torch.tensor([i for i, flag in enumerate(flags) if flag], dtype=torch.int64)


def random_set(size: int, count: int, seed: int = 0) -> torch.Tensor:
    chosen = np.random.default_rng(seed).choice(size, count, replace=False, shuffle=False)
    return torch.from_numpy(np.sort(chosen))


def read(coded: Coded, count: int, size: int) -> torch.Tensor:
    return indices.unpack(coded.data, coded.coding, coded.parameter, coded.complement, count, size)


def gaps_of(chosen: list[int]) -> list[int]:
    return [b - a - 1 for a, b in zip([-1, *chosen], chosen, strict=False)]


def to_bytes(bits: str) -> list[int]:
    """Bits in the order of the stream, the first one lowest in its byte."""
    bits += "0" * (-len(bits) % 8)
    return [int(bits[i : i + 8][::-1], 2) for i in range(0, len(bits), 8)]


def rice_by_hand(gaps: list[int], b: int) -> list[int]:
    """The layout of the module's docstring, bit by bit."""
    unary = "".join("0" * (g >> b) + "1" for g in gaps)
    planes = [g >> 8 * j & 255 for j in range(b // 8) for g in gaps]
    high = [format((g & (1 << b) - 1) >> b // 8 * 8, f"0{b % 8}b")[::-1] if b % 8 else "" for g in gaps]
    return to_bytes(unary) + planes + to_bytes("".join(high))


@settings(max_examples=300)
@given(SETS)
def test_unpack_is_the_inverse_of_pack(flags: list[bool]) -> None:
    chosen = positions(flags)
    coded = indices.pack(chosen, len(flags))
    assert coded.data.dtype == torch.uint8
    got = read(coded, len(chosen), len(flags))
    assert got.dtype == torch.int64 and torch.equal(got, chosen)


@settings(max_examples=300)
@given(SETS)
def test_the_coding_is_the_documented_one_and_the_shortest(flags: list[bool]) -> None:
    size, complement = len(flags), 2 * sum(flags) > len(flags)
    gaps = gaps_of([i for i, flag in enumerate(flags) if flag != complement])
    bitmap = to_bytes("".join("01"[flag] for flag in flags))
    coded = indices.pack(positions(flags), size)
    if coded.coding == BITMAP:
        assert (coded.data.tolist(), coded.parameter, coded.complement) == (bitmap, 0, False)
    else:
        assert (coded.data.tolist(), coded.complement) == (rice_by_hand(gaps, coded.parameter), complement)
    shortest = min(len(bitmap), *(len(rice_by_hand(gaps, b)) for b in range(10)))
    assert len(coded.data) <= shortest + 1  # two streams are padded: b is best in bits


def test_remainders_wider_than_a_byte_by_hand() -> None:
    chosen = [70_000, 70_001 + 66_000, 1_000_000]
    coded = indices.pack(torch.tensor(chosen), 1_000_001)
    assert coded.parameter > 16
    assert coded.data.tolist() == rice_by_hand(gaps_of(chosen), coded.parameter)
    assert read(coded, 3, 1_000_001).tolist() == chosen


@pytest.mark.parametrize(("size", "count"), RANDOM)
def test_random_sets_come_near_the_bound_and_the_forecast(size: int, count: int) -> None:
    chosen = random_set(size, count)
    coded = indices.pack(chosen, size)
    assert torch.equal(read(coded, count, size), chosen)
    bound = (math.lgamma(size + 1) - math.lgamma(count + 1) - math.lgamma(size - count + 1)) / math.log(2)
    measured = coded.data.numel()
    assert bound / 8 * 0.99 <= measured <= bound / 8 * 1.1
    assert abs(indices.expected_bytes(size, count) - measured) <= 0.03 * measured + 4


@pytest.mark.parametrize(("size", "count"), RANDOM)
def test_varint_is_never_shorter(size: int, count: int) -> None:
    chosen = random_set(size, count, seed=1)
    coded = indices.pack(chosen, size)
    gaps = torch.diff(chosen, prepend=torch.tensor([-1])) - 1
    varint = count + sum(int((gaps >= 1 << 7 * j).sum()) for j in range(1, 5))
    assert coded.data.numel() < varint


@given(st.integers(0, 40), st.integers(0, 40))
def test_the_forecast_holds_for_small_sets(size: int, count: int) -> None:
    count = min(size, count)
    measured = [indices.pack(random_set(size, count, seed), size).data.numel() for seed in range(5)]
    assert abs(indices.expected_bytes(size, count) - sum(measured) / 5) <= 4


@pytest.mark.parametrize("size", [0, 1, 7, 1_000_000])
def test_nothing_and_everything_cost_nothing(size: int) -> None:
    for chosen in (torch.arange(0), torch.arange(size)):
        coded = indices.pack(chosen, size)
        assert coded.data.numel() == indices.expected_bytes(size, len(chosen)) == 0
        assert torch.equal(read(coded, len(chosen), size), chosen)


@pytest.mark.parametrize(
    "chosen",
    [
        torch.arange(500_000, 501_000),
        torch.cat([torch.arange(100), torch.arange(999_900, 1_000_000)]),
        torch.arange(0, 1_000_000, 997),
        torch.tensor([0]),
        torch.tensor([999_999]),
        torch.tensor([0, 999_999], dtype=torch.int32),
    ],
)
def test_sets_that_are_not_random(chosen: torch.Tensor) -> None:
    coded = indices.pack(chosen, 1_000_000)
    assert torch.equal(read(coded, len(chosen), 1_000_000), chosen.to(torch.int64))


def test_the_largest_size() -> None:
    chosen = torch.tensor([0, 5, 2**31 - 3, 2**31 - 2])
    assert torch.equal(read(indices.pack(chosen, 2**31 - 1), 4, 2**31 - 1), chosen)
    with pytest.raises(ValueError, match="sizes go to 2147483647"):
        indices.pack(chosen, 2**31)


def test_data_may_lie_anywhere_in_a_payload() -> None:
    chosen = random_set(10_000, 321)
    coded = indices.pack(chosen, 10_000)
    payload = torch.cat(
        [torch.full((3,), 255, dtype=torch.uint8), coded.data, torch.full((5,), 255, dtype=torch.uint8)]
    )
    inside = payload[3:-5]
    assert torch.equal(indices.unpack(inside, coded.coding, coded.parameter, coded.complement, 321, 10_000), chosen)
    spread = payload.repeat_interleave(2)[6:-10:2]
    assert torch.equal(indices.unpack(spread, coded.coding, coded.parameter, coded.complement, 321, 10_000), chosen)


@pytest.mark.parametrize("chosen", [[3, 2], [2, 2], [-1, 4], [4, 10], list(range(11))])
def test_pack_refuses_what_is_no_ascending_set(chosen: list[int]) -> None:
    with pytest.raises(ValueError, match="ascend strictly|cannot code 11 of 10"):
        indices.pack(torch.tensor(chosen), 10)


def raw(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("data", "coding", "parameter", "complement", "count", "size", "message"),
    [
        (raw(3), 2, 0, False, 2, 8, "coding 2"),
        (raw(3), -1, 0, False, 2, 8, "coding -1"),
        (raw(3), BITMAP, 1, False, 2, 8, "parameter 1"),
        (raw(3), BITMAP, 0, True, 2, 8, "complement True"),
        (raw(3, 0), BITMAP, 0, False, 2, 8, "has 1 bytes, not 2"),
        (raw(), BITMAP, 0, False, 0, 8, "has 1 bytes, not 0"),
        (raw(3), BITMAP, 0, False, 3, 8, "2 bits are set"),
        (raw(5), BITMAP, 0, False, 2, 2, "behind its end"),
        (raw(3), RICE, -1, False, 2, 8, "parameter -1"),
        (raw(3), RICE, 3, False, 2, 8, "parameter 3"),
        (raw(3), RICE, 10**12, False, 2, 8, "parameter 1000000000000"),
        (raw(3), RICE, 0, True, 2, 8, "complement True"),
        (raw(3), RICE, 0, False, 5, 8, "complement False"),
        (raw(3), RICE, 0, False, 1, 8, "2 bits are set"),
        (raw(7), RICE, 0, False, 2, 8, "3 bits are set"),
        (raw(3), RICE, 0, False, 9, 8, "cannot code 9 of 8"),
        (raw(3), RICE, 0, False, -1, 8, "cannot code -1 of 8"),
        (raw(0), RICE, 0, False, 0, 8, "1 bytes cannot be"),
        (raw(), RICE, 0, False, 1, 8, "0 bytes cannot be"),
        (raw(3, 0), RICE, 0, False, 2, 16, "mean nothing"),
        (raw(1, 0, 0, 0), RICE, 0, False, 1, 16, "4 bytes cannot be"),
        (raw(0, 128), RICE, 0, False, 1, 12, "position 15 lies outside"),
        (raw(3, 0b01_01_00), RICE, 2, False, 2, 8, "not zero"),
        (raw(1, 255, 255), RICE, 16, False, 1, 2**17, None),
        (raw(1, 255, 255), RICE, 16, False, 1, 65_535, "parameter 16"),
        (raw(3, 7), RICE, 1, False, 2, 8, "not zero"),
        (raw(1).to(torch.int8), RICE, 0, False, 1, 8, "uint8"),
        (raw(1)[:, None], RICE, 0, False, 1, 8, "one dimension"),
        (raw(255), RICE, 0, False, 2**30 - 1, 2**31 - 1, "1 bytes cannot be"),
        (raw(255), RICE, 30, False, 2**30 - 1, 2**31 - 1, "1 bytes cannot be"),
        (raw(), BITMAP, 0, False, 2**31 - 1, 2**31 - 1, "has 268435456 bytes, not 0"),
    ],
)
def test_what_pack_never_makes_is_refused(
    data: torch.Tensor, coding: int, parameter: int, complement: bool, count: int, size: int, message: str | None
) -> None:
    if message is None:
        assert indices.unpack(data, coding, parameter, complement, count, size).numel() == count
        return
    with pytest.raises(ValueError, match=message):
        indices.unpack(data, coding, parameter, complement, count, size)


@settings(max_examples=500)
@given(SETS, st.data())
def test_damage_is_refused_or_reads_as_another_set(flags: list[bool], data: st.DataObject) -> None:
    chosen, size = positions(flags), len(flags)
    coded = indices.pack(chosen, size)
    damaged = bytearray(coded.data.numpy().tobytes())
    for _ in range(data.draw(st.integers(0, 3))):
        at = data.draw(st.integers(0, len(damaged)))
        damaged[at : at + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=2))
    changed = bytes(damaged) != coded.data.numpy().tobytes()
    body = torch.frombuffer(damaged, dtype=torch.uint8) if damaged else raw()
    count = data.draw(st.just(len(chosen)) | st.integers(-1, size + 1))
    coding = data.draw(st.just(coded.coding) | st.integers(0, 2))
    parameter = data.draw(st.just(coded.parameter) | st.integers(-1, 40))
    complement = data.draw(st.just(coded.complement) | st.booleans())
    try:
        got = indices.unpack(body, coding, parameter, complement, count, size).tolist()
    except ValueError:
        return
    assert len(got) == count and got == sorted(set(got)) and all(0 <= i < size for i in got)
    same_form = (coding, parameter, complement) == (coded.coding, coded.parameter, coded.complement)
    assert not same_form or (got == chosen.tolist()) == (not changed)
