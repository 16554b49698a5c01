"""The codec: nothing is lost, nothing foreign is accepted, every byte is counted, any cut says the same."""

import struct
import tracemalloc
import zlib
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from feddip_mpi import codec, entropy, indices, masks, values
from feddip_mpi.codec import AGGREGATE, REGROW, SUPPORT, Message, Upload
from feddip_mpi.errors import PeerError
from feddip_mpi.support import Support

KINDS = values.KINDS
MODES = [(kind, stochastic) for kind in KINDS for stochastic in (False, True)]
# Written down again, so that a change of the format is a change of this test: name -> (offset, struct code).
FIELDS = {
    "magic": (0, "4s"), "version": (4, "B"), "kind": (5, "B"), "values": (6, "B"), "flags": (7, "B"), "coding": (8, "B"),
    "parameter": (9, "B"), "phase": (10, "H"), "round": (12, "I"), "client": (16, "I"), "digest": (20, "I"),
    "lo": (24, "Q"), "hi": (32, "Q"), "count": (40, "Q"), "index_bytes": (48, "I"), "crc": (52, "I"),
}  # fmt: skip
FRAME = 56
VALUES = st.one_of(
    st.floats(width=32, allow_nan=False, allow_infinity=False),
    st.floats(-1, 1, width=32),
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, 1e-45, -1e-45, 1.1754942e-38, 3.4028235e38, -3.4028235e38, 65504.0, 65520.0]),
)  # fmt: skip
# Between two float32, below the smallest one, and beyond the largest one.
FINER = st.one_of(VALUES, st.floats(-4, 4), st.sampled_from([1e-50, -1e-50, 1 + 2.0**-40, 1e39, -1e300, 1 / 3]))


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def bits(tensor: Tensor) -> bytes:
    return tensor.numpy().tobytes()


def normal(count: int, seed: int = 1) -> Tensor:
    return torch.from_numpy(
        (rng(seed).standard_normal(count) * np.logspace(-6, 3, count)).astype(np.float32)[rng(seed).permutation(count)]
    )


def messages(total: Tensor, mask: Tensor, upload: Upload, seed: int = 0) -> tuple[list[Message], Tensor]:
    """What client 6 sends in round 4 (of the log: 5), and its residual [P]; `total` is left alone."""
    left = total.clone()
    made = list(codec.encode(left, Support.of(mask), upload, 4, 6, rng(seed)))
    assert left.dtype == total.dtype
    return made, left[: mask.numel()]


def frames(total: Tensor, mask: Tensor, upload: Upload, seed: int = 0) -> list[np.ndarray]:
    return [message.frame() for message in messages(total, mask, upload, seed)[0]]


def decode(sent: list[np.ndarray], mask: Tensor, size: int) -> Tensor:
    return codec.decode(sent, Support.of(mask), size, 4)


@st.composite
def cases(draw: st.DrawFn, numbers: st.SearchStrategy = VALUES, dtype: torch.dtype = torch.float32) -> tuple:
    """Update plus residual [n], mask [P] with P <= n, regrow count, dense or not, compressed or not."""
    size = draw(st.integers(0, 40))
    some = st.lists(st.booleans(), min_size=size, max_size=size)
    kept = draw(st.one_of(some, st.just([True] * size), st.just([False] * size)))
    tail = draw(st.integers(0, 5))
    ties = st.sampled_from([0.0, 1.0, -1.0])
    total = draw(st.lists(draw(st.sampled_from([numbers, ties])), min_size=size + tail, max_size=size + tail))
    regrow = draw(st.one_of(st.integers(0, size), st.just(0), st.just(size + 3)))
    mask = torch.tensor(kept, dtype=torch.bool)
    vector = torch.tensor(total, dtype=dtype)
    vector[size:].clamp_(-3.4e38, 3.4e38)  # travels as float32, and nothing remembers what that loses
    return vector, mask, regrow, draw(st.booleans()), draw(st.booleans())


def value_bytes(count: int, kind: str) -> int:
    """Independent count: int types carry two bytes of scale for each started block."""
    blocks = {"int8": (count + 255) // 256, "int4": (count + 63) // 64}.get(kind, 0)
    per_value = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1}.get(kind)
    return 2 * blocks + (count * per_value if per_value else (count + 1) // 2)


def off_mask_sent(total: Tensor, mask: Tensor, upload: Upload) -> list[int]:
    """The largest |total| outside the mask, by sorting."""
    off = [] if upload.dense else [i for i, kept in enumerate(mask.tolist()) if not kept]
    return sorted(sorted(off, key=lambda i: (-abs(float(total[i])), i))[: upload.regrow])


def assert_nothing_lost(total: Tensor, decoded: Tensor, residual: Tensor, kind: str) -> None:
    size = residual.numel()
    assert bool(torch.isfinite(residual).all()) and bool(torch.isfinite(decoded).all())
    assert decoded.dtype == torch.float32
    assert torch.equal(decoded[size:], total[size:].to(torch.float32))
    # Exactly: for fp32 values a - q is a number of a's own type, unless a float64 was so large that it travelled as the
    # largest float32; for all others the residual is a - q rounded once.
    half_ulp = Fraction(torch.finfo(total.dtype).eps) / 2
    for a, q, e in zip(total.tolist(), decoded[:size].tolist(), residual.tolist(), strict=False):
        left = Fraction(a) - Fraction(q)
        exact = kind == "fp32" and abs(a) <= torch.finfo(torch.float32).max
        assert abs(Fraction(e) - left) <= (0 if exact else abs(left) * half_ulp)


def check_law(kind: str, stochastic: bool, case: tuple, seed: int) -> None:
    total, mask, regrow, dense, compress = case
    upload = Upload(kind, stochastic, dense, regrow, compress)
    made, residual = messages(total, mask, upload, seed)
    framed = [message.framed() for message in made]
    sent = [frame for frame, _ in framed]
    decoded = decode(sent, mask, total.numel())
    assert_nothing_lost(total, decoded, residual, kind)
    assert bits(made[0].coded.restored()) == bits(decoded[: mask.numel()] if dense else decoded[: mask.numel()][mask])

    # Nothing but the mask and the largest outside it has travelled, and what did not is remembered as it was.
    extra = off_mask_sent(total, mask, upload)
    assert (
        tuple(message.kind for message in made) == upload.kinds == ((SUPPORT, REGROW)[: 1 + (regrow > 0 and not dense)])
    )
    assert all(message.indices.tolist() == extra for message in made[1:])
    travelled = torch.ones_like(mask) if dense else mask.clone()
    travelled[extra] = True
    assert not decoded[: mask.numel()][~travelled].any()
    assert bits(residual[~travelled]) == bits(total[: mask.numel()][~travelled])

    inside, tail = (mask.numel() if dense else int(mask.sum())), total.numel() - mask.numel()
    counts = [
        (inside, 0, tail),
        (len(extra), indices.pack(torch.tensor(extra, dtype=torch.int64), mask.numel()).data.numel(), 0),
    ]
    for (frame, counted), (count, index_bytes, other) in zip(framed, counts, strict=False):
        assert frame.dtype == np.uint8 and frame.ndim == 1
        assert counted.total == frame.size
        assert (counted.indices, counted.other, counted.frame) == (index_bytes, 4 * other, FRAME)
        assert counted.values == value_bytes(count, kind) or (compress and counted.values < value_bytes(count, kind))


@settings(max_examples=40)
@pytest.mark.parametrize(("kind", "stochastic"), MODES)
@given(case=cases(), seed=st.integers(0, 99))
def test_decoded_plus_residual_is_update_plus_old_residual(kind: str, stochastic: bool, case: tuple, seed: int) -> None:
    check_law(kind, stochastic, case, seed)


@settings(max_examples=40)
@pytest.mark.parametrize(("kind", "stochastic"), MODES)
@given(case=cases(FINER, torch.float64), seed=st.integers(0, 99))
def test_the_same_in_float64(kind: str, stochastic: bool, case: tuple, seed: int) -> None:
    check_law(kind, stochastic, case, seed)


@pytest.mark.parametrize(("kind", "stochastic"), MODES)
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_law_over_many_blocks(kind: str, stochastic: bool, dense: bool, dtype: torch.dtype) -> None:
    mask = torch.from_numpy(rng(2).random(2990) < 0.6)
    check_law(kind, stochastic, (normal(3001).to(dtype) * (1 + 2.0**-30), mask, 777, dense, False), 3)
    check_law(kind, stochastic, (normal(3001).to(dtype), mask, 777, dense, True), 3)


@settings(max_examples=40)
@pytest.mark.parametrize("kind", KINDS)
@given(case=cases())
def test_what_was_decoded_is_encoded_without_loss(kind: str, case: tuple) -> None:
    """Not so for stochastic rounding: it may round the largest value of a block down, and then its scale is another.

    Nor for regrow coordinates in quantised blocks: one that was rounded to zero gives way to a lower index, and the
    blocks are filled anew; with as many coordinates as there are outside the mask nothing gives way.
    """
    total, mask, regrow, dense, compress = case
    outside = mask.numel() - int(mask.sum())
    if kind in values.BLOCK and regrow < outside:
        regrow = 0
    upload = Upload(kind, False, dense, regrow, compress)
    once = decode(frames(total, mask, upload), mask, total.numel())
    made, residual = messages(once, mask, upload)
    assert torch.equal(decode([message.frame() for message in made], mask, total.numel()), once)
    assert not residual.any()


def test_messages_stay_what_they_are_when_total_changes_on_the_way() -> None:
    """The first message may be on its way (in a thread) while `total` becomes the residual."""
    for mask in (torch.ones(300, dtype=torch.bool), torch.arange(300) % 3 == 0):
        for upload in (Upload(dense=True), Upload(regrow=50), Upload("bf16", regrow=50)):
            total = normal(310)
            running = codec.encode(total, Support.of(mask), upload, 4, 6, rng())
            first = next(running)
            early = first.frame()
            rest = list(running)
            later = [message.frame() for message in rest]
            total.fill_(7.0)
            assert bits(torch.from_numpy(first.frame())) == early.tobytes()
            assert [message.frame().tobytes() for message in rest] == [frame.tobytes() for frame in later]
            assert torch.equal(decode([early, *later], mask, 310), decode(frames(normal(310), mask, upload), mask, 310))
            early[:] = 255  # and a frame owns its bytes
            assert first.frame().tobytes() != early.tobytes()


def test_what_is_left_of_a_kept_weight_is_known_before_the_largest_others_are_sought() -> None:
    total = torch.tensor([1.0, 100.3, 2.0, -3.0])
    running = codec.encode(
        total, Support.of(torch.tensor([True, True, False, False])), Upload("int4", regrow=1), 0, 0, rng()
    )
    next(running)
    assert total.tolist() == pytest.approx([1.0, 100.3, 2.0, -3.0])
    second = next(running)
    assert second.indices.tolist() == [3]
    assert abs(float(total[1])) < 100.3 / 14 and float(total[0]) == 1.0
    assert list(running) == []
    assert total[2:].tolist() == [2.0, pytest.approx(0, abs=0.02)]


def test_stochastic_rounding_draws_from_the_generator_given() -> None:
    total, mask = torch.rand(300), torch.arange(300) < 200
    upload = Upload("int4", True, regrow=80)

    def encoded(seed: int) -> list[bytes]:
        return [frame.tobytes() for frame in frames(total, mask, upload, seed)]

    assert encoded(1) == encoded(1)
    assert all(one != other for one, other in zip(encoded(1), encoded(2), strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_the_entropy_stage_changes_no_value_and_is_left_out_where_it_does_not_pay(kind: str) -> None:
    mask = torch.from_numpy(rng(2).random(20_000) < 0.5)
    for total, shorter in ((normal(20_003), kind in values.BLOCK), (torch.ones(20_003), True)):
        plain, packed = (frames(total, mask, Upload(kind, regrow=900, compress=c)) for c in (False, True))
        assert torch.equal(decode(plain, mask, 20_003), decode(packed, mask, 20_003))
        assert all(a.size >= b.size for a, b in zip(plain, packed, strict=True))
        assert not shorter or packed[0].size < plain[0].size
        entry = dict(zip(("plain", "packed"), (field(f[0], "flags") & 2 for f in (plain, packed)), strict=True))
        assert entry["plain"] == 0 and (entry["packed"] == 2) == (packed[0].size < plain[0].size)


# Slices


@settings(max_examples=60)
@pytest.mark.parametrize("kind", KINDS)
@given(case=cases(), data=st.data())
def test_slices_joined_are_the_whole(kind: str, case: tuple, data: st.DataObject) -> None:
    total, mask, regrow, dense, compress = case
    cuts = data.draw(st.lists(st.integers(0, total.numel()), max_size=5).map(sorted))
    check_slices(total, mask, Upload(kind, False, dense, regrow, compress), [0, *cuts, total.numel()])


def check_slices(total: Tensor, mask: Tensor, upload: Upload, bounds: list[int]) -> None:
    support, size = Support.of(mask), total.numel()
    for message in messages(total, mask, upload)[0]:
        whole = codec.read(message.frame(), support, size, 4)
        assert (whole.lo, whole.hi, whole.client, whole.kind) == (0, size, 6, message.kind)
        parts = [codec.read(message.frame(lo, hi), support, size, 4) for lo, hi in pairwise(bounds)]
        assert [(part.lo, part.hi) for part in parts] == list(pairwise(bounds))
        assert {(part.kind, part.client, part.dense) for part in parts} == {(whole.kind, 6, whole.dense)}
        for name in ("values", "indices", "other"):
            assert bits(torch.cat([getattr(part, name) for part in parts])) == bits(getattr(whole, name))
        for part in parts:
            assert bool((part.indices >= part.lo).all() and (part.indices < part.hi).all())
            assert part.other.numel() in (0, max(0, part.hi - max(part.lo, mask.numel())))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("ranks", [1, 2, 3, 7, 50])
def test_slices_of_many_blocks(kind: str, dense: bool, compress: bool, ranks: int) -> None:
    mask = torch.from_numpy(rng(4).random(2000) < 0.6)
    bounds = sorted(rng(ranks).integers(0, 2101, ranks - 1).tolist())
    check_slices(normal(2100), mask, Upload(kind, False, dense, 500, compress), [0, *bounds, 2100])


def test_frames_of_slices_decode_in_any_order() -> None:
    mask = torch.from_numpy(rng(4).random(2000) < 0.6)
    made, _ = messages(normal(2100), mask, Upload("int8", regrow=500))
    cut = [message.frame(lo, hi) for message in made for lo, hi in pairwise([0, 1, 700, 1999, 2000, 2050, 2100])]
    whole = decode([message.frame() for message in made], mask, 2100)
    assert bits(decode([cut[i] for i in rng().permutation(len(cut))], mask, 2100)) == bits(whole)


@pytest.mark.parametrize("kind", KINDS)
def test_a_slice_of_the_sum_begins_where_its_owner_does(kind: str) -> None:
    """An owner codes its own part only, from the beginning of a block on."""
    mask = torch.arange(2000) % 2 == 0
    support = Support.of(mask)
    sums, tail = normal(1000), normal(30, 2)
    none = torch.zeros(0, dtype=torch.int64)
    whole = values.code(sums, kind, False, rng()).restored()
    got = []
    for lo, hi in pairwise([0, 512, 1536, 2000, 2010, 2030]):
        first, last = support.rank(lo), support.rank(hi)
        coded = values.code(sums[first:last], kind, False, rng())
        other = tail[max(0, lo - 2000) : max(0, hi - 2000)]
        message = Message(SUPPORT, 4, AGGREGATE, support, 2030, coded, lo, none, other, False, False)
        piece = codec.read(message.frame(lo, hi), support, 2030, 4)
        assert (piece.client, piece.lo, piece.hi) == (AGGREGATE, lo, hi)
        got.append((piece.values, piece.other))
    assert bits(torch.cat([v for v, _ in got])) == bits(whole)
    assert bits(torch.cat([o for _, o in got])) == bits(tail)


# Damage

SMALL = torch.tensor([0.5, -3.0, 2.0, 0.25, 8.0, -1.0, 4.0, 0.125, 9.0, 1.0])
SMALL_MASK = torch.tensor([True, False, True, True, False, True, False, False])


def small(kind: str, dense: bool = False, mask: Tensor = SMALL_MASK, compress: bool = False) -> list[np.ndarray]:
    return frames(SMALL, mask, Upload(kind, dense=dense, regrow=2, compress=compress))


def read(frame: np.ndarray, mask: Tensor = SMALL_MASK, size: int = SMALL.numel(), round: int = 4) -> codec.Piece:
    return codec.read(frame, Support.of(mask), size, round)


def field(frame: np.ndarray, name: str) -> int:
    offset, kind = FIELDS[name]
    return struct.unpack_from("<" + kind, frame.tobytes(), offset)[0]


def forged(frame: np.ndarray, body: bytes | None = None, **changes: int) -> np.ndarray:
    """A frame with other fields (and another body) and a checksum that is honest about them."""
    raw = bytearray(frame.tobytes()[:FRAME] + (frame.tobytes()[FRAME:] if body is None else body))
    for name, value in changes.items():
        struct.pack_into("<" + FIELDS[name][1], raw, FIELDS[name][0], value)
    crc = zlib.crc32(raw[: FRAME - 4] + raw[FRAME:])
    struct.pack_into("<I", raw, FRAME - 4, crc)
    return np.frombuffer(bytes(raw), np.uint8).copy()


def test_a_forged_frame_without_changes_is_accepted() -> None:
    for frame in [*small("int8"), *small("fp32", dense=True)]:
        assert forged(frame).tobytes() == frame.tobytes()
        read(forged(frame))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dense", [False, True])
def test_every_altered_bit_and_byte_is_noticed(kind: str, dense: bool) -> None:
    for frame in small(kind, dense):
        for position in range(frame.size):
            for flip in (1, 2, 4, 8, 16, 32, 64, 128, 3, 255):
                altered = frame.copy()
                altered[position] ^= flip
                with pytest.raises(PeerError, match=r"round 5"):
                    read(altered)


def test_altered_bits_are_noticed_where_the_mask_keeps_all() -> None:
    everything = torch.ones(8, dtype=torch.bool)  # the dense flag then changes no length
    for frame in small("fp16", mask=everything):
        for position in range(FRAME):
            for flip in range(1, 256):
                altered = frame.copy()
                altered[position] ^= flip
                with pytest.raises(PeerError):
                    read(altered, everything)


@pytest.mark.parametrize("kind", KINDS)
def test_every_truncation_and_any_addition_is_noticed(kind: str) -> None:
    for frame in small(kind):
        for length in range(frame.size):
            with pytest.raises(PeerError, match="round 5"):
                read(frame[:length])
        for more in (np.zeros(1, np.uint8), np.zeros(56, np.uint8), frame):
            with pytest.raises(PeerError, match="client 6, round 5"):
                read(np.concatenate([frame, more]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("compress", [False, True])
def test_truncations_and_additions_with_an_honest_checksum_are_noticed(kind: str, compress: bool) -> None:
    mask = torch.arange(600) % 2 == 0
    for frame in frames(torch.ones(604), mask, Upload(kind, regrow=150, compress=compress)):
        body = frame.tobytes()[FRAME:]
        assert bool(field(frame, "flags") & 2) == compress
        for cut in {*range(0, len(body), 1 + len(body) // 90), len(body) - 1}:
            with pytest.raises(PeerError, match="client 6, round 5"):
                read(forged(frame, body[:cut]), mask, 604)
        for more in (b"\0", b"\0" * 4, body):
            with pytest.raises(PeerError, match="client 6, round 5"):
                read(forged(frame, body + more), mask, 604)


@pytest.mark.parametrize("round", [3, 5])
def test_another_round_is_named(round: int) -> None:
    for frame in small("fp32"):
        with pytest.raises(PeerError, match=f"client 6, round 5: arrived in round {round + 1}"):
            read(frame, round=round)


def test_another_mask_is_named_by_client_and_round() -> None:
    other = SMALL_MASK.roll(1)  # as many weights kept: lengths fit, the digest does not
    assert int(other.sum()) == int(SMALL_MASK.sum())
    for frame in [*small("fp32"), *small("int4", dense=True)]:
        digests = f"digest {masks.digest(SMALL_MASK):08x}, here {masks.digest(other):08x}"
        with pytest.raises(PeerError, match=f"client 6, round 5: encoded with another mask .{digests}"):
            read(frame, other)


@pytest.mark.parametrize("size", [0, 8, 9])
def test_another_model_is_named_by_client_and_round(size: int) -> None:
    with pytest.raises(PeerError, match=r"client 6, round 5"):
        read(small("fp32")[0], size=size)
    grown = torch.cat([SMALL_MASK, torch.zeros(1, dtype=torch.bool)])
    for frame in small("fp32"):
        with pytest.raises(PeerError, match=r"client 6, round 5"):
            read(frame, grown)
        # Also where the digest says that the mask is the same.
        with pytest.raises(PeerError, match=r"client 6, round 5"):
            read(forged(frame, digest=masks.digest(grown), hi=12), grown)


SUPPORT_LIES = [
    {"kind": REGROW}, {"flags": 1}, {"flags": 2}, {"flags": 4}, {"coding": 1}, {"parameter": 1}, {"phase": 1},
    {"phase": 300}, {"lo": 1}, {"lo": 2**63}, {"hi": 9}, {"hi": 8}, {"hi": 11}, {"hi": 2**64 - 1}, {"lo": 11, "hi": 10},
    {"lo": 10, "hi": 9}, {"count": 3}, {"count": 5}, {"count": 0}, {"count": 2**63}, {"index_bytes": 1},
    {"index_bytes": 2**32 - 1},
]  # fmt: skip
REGROW_LIES = [
    {"kind": SUPPORT}, {"flags": 1}, {"flags": 2}, {"flags": 4}, {"coding": 1}, {"coding": 2}, {"coding": 255},
    {"parameter": 1}, {"parameter": 255}, {"phase": 1}, {"phase": 65535}, {"lo": 4}, {"lo": 9}, {"lo": 2**63},
    {"hi": 2}, {"hi": 0}, {"hi": 11}, {"hi": 2**64 - 1}, {"lo": 3, "hi": 2}, {"count": 1}, {"count": 3}, {"count": 0},
    {"count": 8}, {"count": 2**40}, {"count": 2**64 - 1}, {"index_bytes": 0}, {"index_bytes": 2}, {"index_bytes": 2**32 - 1},
]  # fmt: skip
LIES = [(0, lie) for lie in SUPPORT_LIES] + [(1, lie) for lie in REGROW_LIES]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("message", "lie"), LIES, ids=str)
def test_a_header_that_lies_with_an_honest_checksum_is_refused(kind: str, message: int, lie: dict[str, int]) -> None:
    frame = small(kind)[message]
    tracemalloc.start()
    try:
        if (message, lie) == (1, {"coding": 1}):  # Rice codes without remainders are a bitmap
            assert torch.equal(read(forged(frame, **lie)).indices, read(frame).indices)
        else:
            with pytest.raises(PeerError, match="client 6, round 5"):
                read(forged(frame, **lie))
        assert tracemalloc.get_traced_memory()[1] < 10**6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "lie", [{"version": 1}, {"version": 3}, {"kind": 2}, {"kind": 255}, {"values": 6}, {"flags": 8}, {"flags": 128}]
)
def test_what_this_format_does_not_know_is_no_frame(lie: dict[str, int]) -> None:
    for frame in small("fp32"):
        with pytest.raises(PeerError, match=r"round 5: a message is no frame of format 2"):
            read(forged(frame, **lie))


@pytest.mark.parametrize(
    ("kind", "other"), [(a, b) for a in KINDS for b in KINDS if {a, b} != {"fp16", "bf16"} and a != b]
)
def test_another_value_type_does_not_fit(kind: str, other: str) -> None:
    mask = torch.arange(600) % 2 == 0
    for frame in frames(torch.ones(604), mask, Upload(kind, regrow=150)):
        with pytest.raises(PeerError, match="client 6, round 5"):
            read(forged(frame, values=KINDS.index(other)), mask, 604)


@pytest.mark.parametrize("phase", [0, 1, 39, 41, 63, 64])
def test_a_wrong_phase_in_a_slice_is_refused(phase: int) -> None:
    """As many blocks as before, but values would get the scales of others."""
    mask = torch.arange(400) % 2 == 0
    message = messages(normal(400), mask, Upload("int4"))[0][0]
    frame = message.frame(80, 320)
    assert field(frame, "phase") == 40
    read(frame, mask, 400)
    with pytest.raises(PeerError, match="client 6, round 5"):
        read(forged(frame, phase=phase), mask, 400)


def test_an_index_inside_the_mask_is_refused() -> None:
    """It would be added twice: once with the values of the mask."""
    coded = values.code(torch.ones(2), "fp32", False, rng())
    for places, honest in (([1, 4], True), ([0, 4], False), ([1, 5], False)):
        message = Message(
            REGROW, 4, 6, Support.of(SMALL_MASK), 10, coded, 0, torch.tensor(places), torch.zeros(0), False, False
        )
        if honest:
            assert read(message.frame()).indices.tolist() == places
            continue
        with pytest.raises(PeerError, match="client 6, round 5.*without any"):
            read(message.frame())


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_body_with_an_honest_checksum_is_refused_or_another_message(kind: str, compress: bool) -> None:
    """No checksum can tell; but nothing else is raised, lengths fit, and no index leaves its place."""
    mask, total = torch.arange(600) % 2 == 0, torch.ones(604)
    total[::7] = 0.5
    for frame in frames(total, mask, Upload(kind, regrow=150, compress=compress)):
        body = frame.tobytes()[FRAME:]
        assert bool(field(frame, "flags") & 2) == compress
        for position in range(0, len(body), 1 + len(body) // 150):
            for flip in (1, 16, 128, 255):
                altered = bytearray(body)
                altered[position] ^= flip
                try:
                    piece = read(forged(frame, bytes(altered)), mask, 604)
                except PeerError as error:
                    assert "client 6, round 5" in str(error)
                    continue
                assert piece.values.numel() == field(frame, "count")
                assert piece.indices.numel() in (0, 150) and piece.other.numel() in (0, 4)
                if piece.kind == REGROW:
                    assert bool((piece.indices.diff() > 0).all()) and not mask[piece.indices].any()


def test_compressed_values_cannot_ask_for_memory() -> None:
    """Neither by the length that they state nor by one that they do not."""
    import zstandard

    frame = small("fp32")[0]
    other = SMALL[8:].numpy().tobytes()
    bomb = zstandard.ZstdCompressor().compress(bytes(10**8))
    silent = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(10**7))
    for body in (bomb, silent, zstandard.ZstdCompressor().compress(b""), b"", b"\x28\xb5\x2f\xfd"):
        tracemalloc.start()
        try:
            with pytest.raises(PeerError, match="client 6, round 5"):
                read(forged(frame, body + other, flags=2))
            assert tracemalloc.get_traced_memory()[1] < 10**6
        finally:
            tracemalloc.stop()
    honest = zstandard.ZstdCompressor().compress(SMALL[:8][SMALL_MASK].numpy().tobytes())
    assert read(forged(frame, honest + other, flags=2)).values.tolist() == SMALL[:8][SMALL_MASK].tolist()


@settings(max_examples=300)
@given(
    st.binary(max_size=120),
    st.integers(0, 1),
    st.dictionaries(st.sampled_from([*FIELDS][2:-1]), st.integers(0, 255), max_size=4),
    st.sampled_from(KINDS),
)
def test_any_frame_with_an_honest_checksum_is_read_or_refused(
    body: bytes, message: int, changes: dict[str, int], kind: str
) -> None:
    frame = forged(small(kind)[message], body, **changes)
    try:
        piece = read(frame)
    except PeerError:
        return
    assert 0 <= piece.lo <= piece.hi <= 10 and piece.bytes.total == frame.size


def test_no_frames_at_all() -> None:
    for frame in (np.zeros(0, np.uint8), np.zeros(55, np.uint8)):
        with pytest.raises(PeerError, match=f"round 5: a frame of {frame.size} bytes is shorter than its header"):
            read(frame)
    for frame in (np.zeros(56, np.uint8), np.full(1000, 255, np.uint8)):
        with pytest.raises(PeerError, match="no frame"):
            read(frame)


def test_a_slice_of_the_sum_is_named_as_such() -> None:
    with pytest.raises(PeerError, match=r"the sum, round 5"):
        read(forged(small("fp32")[0], client=AGGREGATE, count=3))


def test_read_accepts_memory_that_is_not_aligned() -> None:
    for kind in KINDS:
        for frame in small(kind):
            for offset in (1, 2, 3):
                shifted = np.concatenate([np.zeros(offset, np.uint8), frame])[offset:]
                assert torch.equal(read(shifted).values, read(frame).values)
                assert torch.equal(read(shifted).other, read(frame).other)


def test_a_piece_owns_its_memory() -> None:
    """The buffer in which it arrived is used again."""
    for kind in KINDS:
        for frame in small(kind):
            arrived = frame.copy()
            piece = read(arrived)
            arrived[:] = 0
            assert torch.equal(piece.values, read(frame).values)
            assert torch.equal(piece.indices, read(frame).indices) and torch.equal(piece.other, read(frame).other)


# Counts


def test_bytes_add_up_by_kind() -> None:
    assert codec.Bytes(1, 2, 3, 4) + codec.Bytes(10, 20, 30, 40) == codec.Bytes(11, 22, 33, 44)
    assert codec.Bytes(1, 20, 300, 4000).total == 4321


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("regrow", [0, 1, 40, 900, 99_999])
def test_expected_bytes_are_those_of_a_random_mask(kind: str, dense: bool, regrow: int) -> None:
    mask = torch.from_numpy(rng(6).random(5000) < 0.3)
    upload, total = Upload(kind, dense=dense, regrow=regrow), torch.from_numpy(rng(7).standard_normal(5050)).float()
    sent = [message.framed() for message in messages(total, mask, upload)[0]]
    index_bytes = sum(counted.indices for _, counted in sent)
    expected = codec.expected_bytes(upload, int(mask.sum()), 5000, 5050)
    assert abs(sum(frame.size for frame, _ in sent) - expected) <= max(4, 0.03 * index_bytes)
    if dense or not regrow:
        assert sum(frame.size for frame, _ in sent) == expected


def test_entropy_undoes_itself() -> None:
    for data in (np.zeros(1000, np.uint8), rng().integers(0, 16, 5000).astype(np.uint8)):
        packed, compressed = entropy.shorter(data)
        assert compressed and packed.size < data.size
        assert entropy.restore(torch.from_numpy(packed.copy()), data.size).numpy().tobytes() == data.tobytes()
        for size in (0, 1, data.size - 1, data.size + 1, 2**60):
            with pytest.raises(ValueError, match="compressed values"):
                entropy.restore(torch.from_numpy(packed.copy()), size)
    noise = rng().integers(0, 256, 999).astype(np.uint8)
    for data in (noise, np.zeros(0, np.uint8)):
        same, compressed = entropy.shorter(data)
        assert same is data and not compressed
