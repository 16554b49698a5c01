"""The codec: nothing is lost, nothing foreign is accepted, every byte is counted."""

import struct
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from feddip_mpi import codec, masks
from feddip_mpi.codec import Upload
from feddip_mpi.errors import PeerError

KINDS = ("fp32", "fp16", "bf16", "int8", "int4")
MODES = [(kind, stochastic) for kind in KINDS for stochastic in (False, True)]
FRAME = 48
VALUES = st.one_of(
    st.floats(width=32, allow_nan=False, allow_infinity=False),
    st.floats(-1, 1, width=32),
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, 1e-45, -1e-45, 1.1754942e-38, 3.4028235e38, -3.4028235e38, 65504.0, 65520.0]),
)  # fmt: skip


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, Tensor, int, bool]:
    """Update plus residual [n], mask [P] with P <= n, regrow count, dense or not."""
    size = draw(st.integers(0, 40))
    bits = draw(
        st.one_of(
            st.lists(st.booleans(), min_size=size, max_size=size), st.just([True] * size), st.just([False] * size)
        )
    )
    tail = draw(st.integers(0, 5))
    total = draw(st.lists(VALUES, min_size=size + tail, max_size=size + tail))
    regrow = draw(st.one_of(st.integers(0, size), st.just(0), st.just(size + 3)))
    return torch.tensor(total, dtype=torch.float32), torch.tensor(bits, dtype=torch.bool), regrow, draw(st.booleans())


def value_bytes(count: int, kind: str) -> int:
    """Independent count: int types carry two bytes of scale for each started block."""
    blocks = {"int8": (count + 255) // 256, "int4": (count + 63) // 64}.get(kind, 0)
    per_value = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1}.get(kind)
    return 2 * blocks + (count * per_value if per_value else (count + 1) // 2)


def off_mask_sent(total: Tensor, mask: Tensor, regrow: int, dense: bool) -> list[int]:
    """The largest |total| outside the mask, by sorting."""
    off = [] if dense else [i for i, kept in enumerate(mask.tolist()) if not kept]
    return sorted(sorted(off, key=lambda i: (-abs(float(total[i])), i))[:regrow])


def assert_nothing_lost(total: Tensor, decoded: Tensor, residual: Tensor, kind: str) -> None:
    size = residual.numel()
    assert bool(torch.isfinite(residual).all()) and bool(torch.isfinite(decoded).all())
    assert torch.equal(decoded[size:], total[size:])
    exact = total[:size].double()
    error = (decoded[:size].double() + residual.double() - exact).abs()
    # fp32 loses nothing; for the others the difference a - q is rounded to float32 once.
    allowed = torch.zeros_like(exact) if kind == "fp32" else (exact - decoded[:size].double()).abs() * 2.0**-24
    assert bool((error <= allowed).all())


@settings(deadline=None, max_examples=50)
@pytest.mark.parametrize(("kind", "stochastic"), MODES)
@given(case=cases(), seed=st.integers(0, 99))
def test_decoded_plus_residual_is_update_plus_old_residual(
    kind: str, stochastic: bool, case: tuple[Tensor, Tensor, int, bool], seed: int
) -> None:
    total, mask, regrow, dense = case
    before = total.clone()
    payload, residual = codec.encode(total, mask, Upload(kind, stochastic, dense, regrow), 3, 7, rng(seed))
    decoded = codec.decode(payload, mask, total.numel(), 3)
    assert torch.equal(total, before)
    assert payload.dtype == np.uint8 and residual.shape == mask.shape and decoded.client == 7
    assert_nothing_lost(total, decoded.update, residual, kind)

    extra = off_mask_sent(total, mask, regrow, dense)
    support = torch.ones_like(mask) if dense else mask.clone()
    inside = int(support.sum())
    start = FRAME + value_bytes(inside, kind)
    assert payload[start : start + 4 * len(extra)].view(np.int32).tolist() == extra
    support[extra] = True
    assert not decoded.update[: mask.numel()][~support].any()

    counted, tail = decoded.bytes, total.numel() - mask.numel()
    assert counted.total == payload.size == codec.upload_bytes(inside, len(extra), tail, kind)
    assert counted.values == value_bytes(inside, kind) + value_bytes(len(extra), kind)
    assert (counted.indices, counted.other, counted.frame) == (4 * len(extra), 4 * tail, FRAME)


@pytest.mark.parametrize(("kind", "stochastic"), MODES)
@pytest.mark.parametrize("shape", ["masked", "dense"])
def test_law_over_many_blocks(kind: str, stochastic: bool, shape: str) -> None:
    total = torch.from_numpy(
        rng(1).standard_normal(3001).astype(np.float32) * np.logspace(-6, 3, 3001, dtype=np.float32)
    )
    mask = torch.from_numpy(rng(2).random(2990) < 0.6)
    payload, residual = codec.encode(total, mask, Upload(kind, stochastic, shape == "dense", 77), 0, 0, rng(3))
    assert_nothing_lost(total, codec.decode(payload, mask, 3001, 0).update, residual, kind)


@settings(deadline=None, max_examples=50)
@pytest.mark.parametrize("kind", ["fp32", "fp16", "bf16"])
@given(case=cases())
def test_what_was_decoded_is_encoded_without_loss(kind: str, case: tuple[Tensor, Tensor, int, bool]) -> None:
    total, mask, regrow, dense = case
    upload = Upload(kind, False, dense, regrow)
    once = codec.decode(codec.encode(total, mask, upload, 0, 0, rng())[0], mask, total.numel(), 0).update
    payload, residual = codec.encode(once, mask, upload, 0, 0, rng())
    assert torch.equal(codec.decode(payload, mask, total.numel(), 0).update, once)
    assert not residual.any()


@pytest.mark.parametrize(("kind", "levels", "block"), [("int8", 127, 256), ("int4", 7, 64)])
@pytest.mark.parametrize("stochastic", [False, True])
def test_quantisation_error_is_bounded_by_the_scale_of_its_block(
    kind: str, levels: int, block: int, stochastic: bool
) -> None:
    values = torch.from_numpy(rng(5).standard_normal(1000).astype(np.float32))
    mask = torch.ones(1000, dtype=torch.bool)
    _, residual = codec.encode(values, mask, Upload(kind, stochastic), 0, 0, rng())
    for start in range(0, 1000, block):
        part = values[start : start + block]
        scale = float((part.abs().max() / levels).to(torch.bfloat16))
        assert float(residual[start : start + block].abs().max()) <= scale * (1.0 if stochastic else 0.5) * (1 + 1e-5)


@pytest.mark.parametrize(("kind", "levels", "block"), [("int8", 127, 256), ("int4", 7, 64)])
@pytest.mark.parametrize("level", [0.3, -0.3, 2.75, -4.9])
def test_stochastic_rounding_is_unbiased(kind: str, levels: int, block: int, level: float) -> None:
    scale, blocks = 2.0**-7, 40_000 // block
    values = torch.full((blocks, block), level * scale)
    values[:, 0] = levels * scale  # fixes the scale of the block, exactly
    flat = values.reshape(-1)
    mask = torch.ones_like(flat, dtype=torch.bool)
    decoded = codec.decode(codec.encode(flat, mask, Upload(kind, True), 0, 0, rng(8))[0], mask, flat.numel(), 0).update
    drawn = decoded.view(blocks, block)[:, 1:] / scale
    low = np.floor(level)
    assert set(drawn.unique().tolist()) == {low, low + 1}
    sigma = np.sqrt((level - low) * (1 - level + low) / drawn.numel())
    assert abs(float(drawn.double().mean()) - level) < 5 * sigma
    nearest = codec.decode(codec.encode(flat, mask, Upload(kind), 0, 0, rng())[0], mask, flat.numel(), 0).update
    assert set((nearest.view(blocks, block)[:, 1:] / scale).unique().tolist()) == {float(round(level))}


def test_stochastic_rounding_draws_from_the_generator_given() -> None:
    values, mask = torch.rand(300), torch.ones(300, dtype=torch.bool)

    def encode(seed: int) -> bytes:
        return codec.encode(values, mask, Upload("int4", True), 0, 0, rng(seed))[0].tobytes()

    assert encode(1) == encode(1) != encode(2)


@pytest.mark.parametrize(("kind", "largest"), [("fp16", 65504.0), ("bf16", 3.3895313892515355e38)])
def test_values_beyond_the_type_travel_as_its_largest_and_the_rest_is_remembered(kind: str, largest: float) -> None:
    values = torch.tensor([3.4028235e38, -3.4028235e38])
    mask = torch.ones(2, dtype=torch.bool)
    payload, residual = codec.encode(values, mask, Upload(kind), 0, 0, rng())
    assert codec.decode(payload, mask, 2, 0).update.tolist() == [largest, -largest]
    assert bool(torch.isfinite(residual).all())


SMALL = torch.tensor([0.5, -3.0, 2.0, 0.25, 8.0, -1.0, 4.0, 0.125, 9.0, 1.0])
SMALL_MASK = torch.tensor([True, False, True, True, False, True, False, False])


def small_payload(kind: str, dense: bool = False, mask: Tensor = SMALL_MASK) -> np.ndarray:
    return codec.encode(SMALL, mask, Upload(kind, dense=dense, regrow=2), 4, 6, rng())[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dense", [False, True])
def test_every_altered_bit_and_byte_is_noticed(kind: str, dense: bool) -> None:
    payload = small_payload(kind, dense)
    for position in range(payload.size):
        for flip in (1, 2, 4, 8, 16, 32, 64, 128, 3, 255):
            altered = payload.copy()
            altered[position] ^= flip
            with pytest.raises(PeerError):
                codec.decode(altered, SMALL_MASK, SMALL.numel(), 4)


def test_altered_bits_are_noticed_where_the_mask_keeps_all() -> None:
    everything = torch.ones(8, dtype=torch.bool)  # the dense flag then changes no length
    payload = small_payload("fp16", mask=everything)
    for position in range(FRAME):
        for flip in range(1, 256):
            altered = payload.copy()
            altered[position] ^= flip
            with pytest.raises(PeerError):
                codec.decode(altered, everything, SMALL.numel(), 4)


@pytest.mark.parametrize("kind", KINDS)
def test_every_truncation_and_any_addition_is_noticed(kind: str) -> None:
    payload = small_payload(kind)
    for length in range(payload.size):
        with pytest.raises(PeerError):
            codec.decode(payload[:length], SMALL_MASK, SMALL.numel(), 4)
    with pytest.raises(PeerError):
        codec.decode(np.concatenate([payload, np.zeros(1, np.uint8)]), SMALL_MASK, SMALL.numel(), 4)


@pytest.mark.parametrize("round", [3, 5])
def test_another_round_is_named(round: int) -> None:
    with pytest.raises(PeerError, match=f"client 6: payload of round 5 arrived in round {round + 1}"):
        codec.decode(small_payload("fp32"), SMALL_MASK, SMALL.numel(), round)


def test_another_mask_is_named_by_client_and_round() -> None:
    other = SMALL_MASK.roll(1)  # as many weights kept: lengths fit, the digest does not
    assert int(other.sum()) == int(SMALL_MASK.sum())
    for given_digest in (None, masks.digest(other)):
        with pytest.raises(PeerError, match=r"client 6, round 5: encoded with another mask"):
            codec.decode(small_payload("fp32"), other, SMALL.numel(), 4, given_digest)


@pytest.mark.parametrize("size", [9, 11])
def test_another_model_is_named_by_client_and_round(size: int) -> None:
    with pytest.raises(PeerError, match=r"client 6, round 5"):
        codec.decode(small_payload("fp32"), SMALL_MASK, size, 4)


@pytest.mark.parametrize("index", [-1, 8, 9, 2**31 - 1])
def test_an_index_outside_the_prunable_weights_is_refused(index: int) -> None:
    payload = small_payload("fp32")
    start = FRAME + 4 * 4
    payload[start : start + 4] = np.array([index], np.int32).view(np.uint8)
    # An honest checksum around a wrong index: the checksum is the frame's last field and covers all else.
    covered = payload[: FRAME - 4].tobytes() + payload[FRAME:].tobytes()
    payload[FRAME - 4 : FRAME] = np.frombuffer(struct.pack("<I", zlib.crc32(covered)), np.uint8)
    with pytest.raises(PeerError, match="an index lies outside the model"):
        codec.decode(payload, SMALL_MASK, SMALL.numel(), 4)


def test_bytes_add_up_by_kind() -> None:
    assert codec.Bytes(1, 2, 3, 4) + codec.Bytes(10, 20, 30, 40) == codec.Bytes(11, 22, 33, 44)
    assert codec.Bytes(1, 20, 300, 4000).total == 4321


def test_decode_accepts_memory_that_is_not_aligned() -> None:
    payload = small_payload("fp32")
    shifted = np.concatenate([np.zeros(1, np.uint8), payload])[1:]
    assert torch.equal(
        codec.decode(shifted, SMALL_MASK, SMALL.numel(), 4).update,
        codec.decode(payload, SMALL_MASK, SMALL.numel(), 4).update,
    )
