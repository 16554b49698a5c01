"""Values on their way: any slice decodes to the bits of the whole, errors are bounded, nothing is biased."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from feddip_mpi import values
from feddip_mpi.values import KINDS

LEVELS, BLOCK = {"int8": 127, "int4": 7}, {"int8": 256, "int4": 64}
QUANTISED = [("int8", 127, 256), ("int4", 7, 64)]
ODD = [0.0, -0.0, 1.0, -1.0, 1e-45, -1e-45, 1.1754942e-38, 9.18e-41, 65504.0, 65520.0, 3.4028235e38, -3.4028235e38]


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def normal(count: int, seed: int = 0, spread: float = 4.0) -> Tensor:
    """Floats of many magnitudes, a few of them odd ones."""
    out = rng(seed).standard_normal(count) * 10.0 ** rng(seed + 1).uniform(-spread, spread, count)
    out[::97] = rng(seed + 2).choice(ODD[:7], len(out[::97]))
    return torch.from_numpy(out.astype(np.float32))


def bits(tensor: Tensor) -> bytes:
    return tensor.numpy().tobytes()


def length(count: int, kind: str, phase: int) -> int:
    """Bytes of packed values, counted block by block."""
    if kind not in BLOCK:
        return count * {"fp32": 4, "fp16": 2, "bf16": 2}[kind]
    blocks = len({(phase + i) // BLOCK[kind] for i in range(count)})
    return 2 * blocks + (count if kind == "int8" else math.ceil(count / 2))


def unpacked(coded: values.Coded, start: int, stop: int) -> Tensor:
    data, phase = coded.packed(start, stop)
    assert data.dtype == torch.uint8 and data.dim() == 1
    assert data.numel() == values.packed_bytes(stop - start, coded.kind, phase)
    return values.unpack(data.clone(), stop - start, coded.kind, phase)


@settings(max_examples=60)
@pytest.mark.parametrize("kind", KINDS)
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False) | st.sampled_from(ODD), max_size=300),
       st.booleans(), st.data())  # fmt: skip
def test_any_slice_has_the_bits_of_the_whole(
    kind: str, given: list[float], stochastic: bool, data: st.DataObject
) -> None:
    original = torch.tensor(given, dtype=torch.float32)
    before = original.clone()
    coded = values.code(original, kind, stochastic, rng(3))
    whole = coded.restored()
    assert bits(original) == bits(before)
    assert whole.dtype == torch.float32 and bool(torch.isfinite(whole).all())
    cuts = data.draw(st.lists(st.integers(0, len(given)), max_size=4).map(sorted))
    parts = [unpacked(coded, start, stop) for start, stop in zip([0, *cuts], [*cuts, len(given)], strict=True)]
    assert bits(torch.cat(parts)) == bits(whole)


@pytest.mark.parametrize("kind", KINDS)
def test_every_slice_around_the_edges_of_blocks(kind: str) -> None:
    coded = values.code(normal(3 * 256 + 5), kind, False, rng())
    whole = coded.restored()
    edges = [0, 1, 2, 63, 64, 65, 127, 128, 255, 256, 257, 511, 512, 513, 768, 772, 773]
    for start in edges:
        for stop in (edge for edge in edges if edge >= start):
            assert bits(unpacked(coded, start, stop)) == bits(whole[start:stop])
            data, phase = coded.packed(start, stop)
            assert phase == (start % BLOCK[kind] if kind in BLOCK else 0)
            assert data.numel() == length(stop - start, kind, phase)


@given(st.integers(0, 700), st.sampled_from(KINDS), st.integers(0, 255))
def test_lengths(count: int, kind: str, phase: int) -> None:
    if kind in BLOCK:
        phase %= BLOCK[kind]
    assert values.packed_bytes(count, kind, phase) == length(count, kind, phase)
    assert values.bytes_per_value(kind) == pytest.approx(values.packed_bytes(256_000, kind) / 256_000)


@pytest.mark.parametrize(("kind", "phase"), [("int8", -1), ("int8", 256), ("int4", 64), ("int4", 65535)])
def test_a_phase_outside_its_block_is_refused(kind: str, phase: int) -> None:
    with pytest.raises(ValueError, match=f"phase {phase}"):
        values.packed_bytes(3, kind, phase)
    with pytest.raises(ValueError, match=f"phase {phase}"):
        values.unpack(torch.zeros(5, dtype=torch.uint8), 3, kind, phase)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [0, 1, 64, 300])
def test_bytes_that_do_not_fit_the_count_are_refused(kind: str, count: int) -> None:
    data, phase = values.code(normal(count), kind, False, rng()).packed(0, count)
    for wrong in {0, data.numel() - 1, data.numel() + 1, 10_000} - {data.numel(), -1}:
        with pytest.raises(ValueError, match=f"{wrong} bytes for {count} {kind} values"):
            values.unpack(torch.zeros(wrong, dtype=torch.uint8), count, kind, phase)
    with pytest.raises(ValueError, match="bytes for"):
        values.unpack(data, 10**15, kind, phase)


@pytest.mark.parametrize(("kind", "dtype"), [("fp32", np.float32), ("fp16", np.float16)])
def test_floats_travel_as_numpy_rounds_them(kind: str, dtype: type) -> None:
    given = normal(1000).clamp(-60000, 60000)
    coded = values.code(given, kind, True, rng())  # there is nothing to draw for
    assert bits(coded.restored()) == given.numpy().astype(dtype).astype(np.float32).tobytes()
    assert bytes(coded.packed(0, 1000)[0].tolist()) == given.numpy().astype(dtype).tobytes()


def test_bf16_rounds_to_the_nearest_even_of_its_grid() -> None:
    given = normal(1000)
    raw = given.numpy().view(np.uint32).astype(np.uint64)
    rounded = ((raw + 0x7FFF + ((raw >> 16) & 1)) >> 16 << 16).astype(np.uint32).view(np.float32)
    assert bits(values.code(given, "bf16", False, rng()).restored()) == rounded.tobytes()


@pytest.mark.parametrize(
    ("kind", "largest"), [("fp32", 3.4028234663852886e38), ("fp16", 65504.0), ("bf16", 3.3895313892515355e38)]
)
def test_values_beyond_the_type_travel_as_its_largest(kind: str, largest: float) -> None:
    given = torch.tensor([1e300, -1e300, 3.4028234663852886e38, largest, 1.0], dtype=torch.float64)
    assert values.code(given, kind, False, rng()).restored().tolist() == [largest, -largest, largest, largest, 1.0]


@pytest.mark.parametrize(("kind", "levels", "block"), QUANTISED)
@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_quantisation_follows_its_formula(
    kind: str, levels: int, block: int, stochastic: bool, dtype: torch.dtype
) -> None:
    given = normal(1000, 5, spread=1.0).to(dtype)
    coded = values.code(given, kind, stochastic, rng(9))
    restored = coded.restored()
    assert coded.scales.numel() == math.ceil(1000 / block)
    for place, start in enumerate(range(0, 1000, block)):
        part = given[start : start + block].to(torch.float32)
        scale = float((part.abs().max() / levels).to(torch.bfloat16))
        assert float(coded.scales[place]) == scale
        codes = coded.codes[start : start + block]
        assert int(codes.abs().max()) <= levels
        assert restored[start : start + block].tolist() == (codes.to(torch.float32) * scale).tolist()
        error = (restored[start : start + block].double() - part.double()).abs().max()
        assert float(error) <= scale * (1.0 if stochastic else 0.5) * (1 + 1e-6)
        if not stochastic:  # halves go to the even code
            assert codes.tolist() == np.rint(part.numpy() / np.float32(scale)).clip(-levels, levels).tolist()


@pytest.mark.parametrize(("kind", "levels", "block"), QUANTISED)
@pytest.mark.parametrize("level", [0.3, -0.3, 2.75, -4.9, 6.5])
def test_stochastic_rounding_is_unbiased(kind: str, levels: int, block: int, level: float) -> None:
    scale, blocks = 2.0**-7, 40_000 // block
    given = torch.full((blocks, block), level * scale)
    given[:, 0] = levels * scale  # fixes the scale of the block, exactly
    drawn = values.code(given.view(-1), kind, True, rng(8)).restored().view(blocks, block)[:, 1:] / scale
    low = math.floor(level)
    assert set(drawn.unique().tolist()) == {low, low + 1}
    sigma = math.sqrt((level - low) * (1 - level + low) / drawn.numel())
    assert abs(float(drawn.double().mean()) - level) < 5 * sigma
    nearest = values.code(given.view(-1), kind, False, rng()).restored().view(blocks, block)[:, 1:] / scale
    assert set(nearest.unique().tolist()) == {float(round(level))}


@pytest.mark.parametrize(("kind", "levels", "block"), QUANTISED)
def test_what_lies_on_a_level_stays_there_under_stochastic_rounding(kind: str, levels: int, block: int) -> None:
    given = torch.arange(-levels, levels + 1).to(torch.float32).repeat(block) * 0.25
    given = torch.nn.functional.pad(given.view(-1, 2 * levels + 1), (0, -(2 * levels + 1) % block)).view(-1)
    restored = values.code(given, kind, True, rng(1)).restored()
    # A sum of level and noise is rounded to float32, which once in some 10^5 draws reaches the next level.
    assert float((restored != given).double().mean()) < 1e-3
    assert float((restored - given).abs().max()) <= 0.25


def test_the_generator_given_decides() -> None:
    given = torch.rand(300)

    def codes(seed: int, stochastic: bool = True) -> bytes:
        return bits(values.code(given, "int4", stochastic, rng(seed)).codes)

    assert codes(1) == codes(1) != codes(2)
    assert codes(1, False) == codes(2, False)
    generator, untouched = rng(4), rng(4)
    for kind in KINDS:
        values.code(given, kind, kind not in BLOCK, generator)  # neither nearest rounding nor floats draw
    assert generator.random() == untouched.random()


@pytest.mark.parametrize(("kind", "levels", "block"), QUANTISED)
def test_blocks_do_not_depend_on_each_other(kind: str, levels: int, block: int) -> None:
    given = normal(2 * block)
    alone = values.code(given[block:].clone(), kind, False, rng())
    both = values.code(given, kind, False, rng())
    given[:block] *= 1000
    assert bits(both.restored()[block:]) == bits(alone.restored())
    assert bits(values.code(given, kind, False, rng()).restored()[block:]) == bits(alone.restored())


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize(("kind", "levels", "block"), QUANTISED)
@pytest.mark.parametrize("largest", [0.0, 1e-45, 1e-41, 9.2e-41 * 0.5, 1.2e-38, 1e-36, 3.4028235e38])
def test_extreme_blocks_stay_finite_and_bounded(
    kind: str, levels: int, block: int, stochastic: bool, largest: float
) -> None:
    given = torch.linspace(-1, 1, block) * largest
    coded = values.code(given, kind, stochastic, rng())
    restored = coded.restored()
    assert bool(torch.isfinite(restored).all())
    assert float(restored.abs().max()) <= largest * (1 + 2.0**-8) + levels * 2.0**-134
    # Half a step (one), and where the scale itself is a denormal bfloat16, what its own rounding takes.
    step = float(coded.scales[0])
    allowed = step * (1.0 if stochastic else 0.5) * (1 + 1e-6) + levels * 2.0**-134 * (1.0 if step < 1e-37 else 0.0)
    assert float((restored.double() - given.double()).abs().max()) <= allowed


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("stochastic", [False, True])
def test_float64_beyond_float32_is_held_at_its_largest(kind: str, stochastic: bool) -> None:
    given = torch.tensor([1e300, -1e300, 0.0, 3e38], dtype=torch.float64)
    restored = values.code(given, kind, stochastic, rng()).restored()
    assert bool(torch.isfinite(restored).all())
    assert restored[0] == -restored[1] == pytest.approx(3.4e38, rel=0.01)


@settings(max_examples=60)
@pytest.mark.parametrize("kind", KINDS)
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False) | st.sampled_from(ODD), max_size=130))
def test_what_was_restored_is_coded_without_loss(kind: str, given: list[float]) -> None:
    """With nearest rounding the largest code of a block is always the largest level, which fixes the scale again.

    Stochastic rounding has no such law: where it rounds the largest value down, the next scale is smaller.
    """
    once = values.code(torch.tensor(given, dtype=torch.float32), kind, False, rng()).restored()
    again = values.code(once, kind, False, rng()).restored()
    assert torch.equal(again, once)


def test_memory_as_bytes() -> None:
    tensor = torch.arange(6, dtype=torch.float32).view(2, 3)
    assert bytes(values.as_bytes(tensor).tolist()) == tensor.numpy().tobytes()
    assert values.as_bytes(tensor).data_ptr() == tensor.data_ptr()
    assert bytes(values.as_bytes(tensor.t()).tolist()) == tensor.numpy().T.tobytes()
    assert values.as_bytes(torch.zeros(0)).shape == (0,)
