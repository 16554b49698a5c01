"""The sum: float32 operations in client order, the same bits however the coordinates are cut."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from feddip_mpi import codec
from feddip_mpi.aggregate import Aggregate, Sum, joined
from feddip_mpi.codec import Upload
from feddip_mpi.support import Support

SIZE, PRUNABLE = 1030, 1000
KINDS = ("fp32", "bf16", "int8", "int4")


def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def bits(tensor: Tensor) -> bytes:
    return tensor.numpy().tobytes()


def mask_of(density: float) -> Tensor:
    return torch.from_numpy(rng(0).random(PRUNABLE) < density)


def clients(count: int) -> list[tuple[float, Tensor]]:
    """Weights that are no powers of two, and magnitudes so far apart that any other order ends in other bits."""
    shares = rng(1).random(count)
    updates = [rng(10 + i).standard_normal(SIZE) * 10.0 ** rng(30 + i).integers(-4, 5, SIZE) for i in range(count)]
    return [
        (float(share / shares.sum()), torch.from_numpy(update.astype(np.float32)))
        for share, update in zip(shares, updates, strict=True)
    ]


def sent(mask: Tensor, upload: Upload, count: int = 5) -> list[tuple[float, list[codec.Message]]]:
    support = Support.of(mask)
    return [
        (share, list(codec.encode(update.clone(), support, upload, 3, client, rng(client))))
        for client, (share, update) in enumerate(clients(count))
    ]


def added(
    mask: Tensor, upload: Upload, uploads: list, lo: int = 0, hi: int = SIZE, start: Tensor | None = None
) -> Aggregate:
    support = Support.of(mask)
    total = Sum(support.whole() if upload.dense else support, SIZE, lo, hi, start)
    for share, messages in uploads:
        for message in messages:
            total.add(share, codec.read(message.frame(lo, hi), support, SIZE, 3))
    return total.result()


def plain(mask: Tensor, uploads: list, start: Tensor | None = None) -> np.ndarray:
    """A loop over whole decoded vectors: every product and every sum is rounded to float32."""
    out = np.zeros(SIZE, np.float32)
    if start is not None:
        out[:PRUNABLE] = start.numpy()
    for share, messages in uploads:
        update = codec.decode([message.frame() for message in messages], Support.of(mask), SIZE, 3).numpy()
        product = np.float32(share) * update
        assert product.dtype == np.float32
        out = out + product
    return out


def dense(aggregate: Aggregate) -> Tensor:
    out = torch.zeros(SIZE)
    aggregate.add_to(out)
    return out


@pytest.mark.parametrize("values", KINDS)
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(("whole", "regrow"), [(False, 0), (False, 100), (False, 5000), (True, 0)])
def test_the_float32_sum_in_client_order(values: str, density: float, whole: bool, regrow: int) -> None:
    mask, upload = mask_of(density), Upload(values, dense=whole, regrow=regrow)
    uploads = sent(mask, upload)
    got = dense(added(mask, upload, uploads))
    assert bits(got + 0.0) == (plain(mask, uploads) + np.float32(0)).tobytes()
    if whole or density:
        assert bits(dense(added(mask, upload, uploads[::-1]))) != bits(got)


@settings(max_examples=40)
@given(
    st.lists(st.integers(0, SIZE), max_size=7).map(sorted),
    st.sampled_from(KINDS),
    st.sampled_from([0.0, 0.3, 1.0]),
    st.sampled_from([(False, 0), (False, 100), (True, 0)]),
    st.booleans(),
)
def test_any_cut_gives_the_same_bits(
    cuts: list[int], values: str, density: float, kind: tuple[bool, int], started: bool
) -> None:
    mask, upload = mask_of(density), Upload(values, dense=kind[0], regrow=kind[1])
    start = torch.from_numpy(rng(9).standard_normal(PRUNABLE).astype(np.float32)) if started else None
    uploads = sent(mask, upload, 3)
    whole = added(mask, upload, uploads, start=start)
    parts = joined([added(mask, upload, uploads, lo, hi, start) for lo, hi in pairwise([0, *cuts, SIZE])])
    for name in ("packed", "indices", "sums", "other"):
        assert bits(getattr(parts, name)) == bits(getattr(whole, name))
    assert parts.support.count == whole.support.count == whole.packed.numel()


def test_regrow_coordinates_are_united() -> None:
    mask = torch.tensor([True, False, False, False, True, False])
    support, none = Support.of(mask), torch.zeros(0)
    coded = [([1, 3], [1.0, 2.0]), ([], []), ([3, 5], [8.0, -4.0]), ([1], [0.5])]
    total = Sum(support, 7, 0, 7)
    for places, numbers in coded:
        indices = torch.tensor(places, dtype=torch.int64)
        total.add(0.5, codec.Piece(codec.REGROW, 0, 0, 7, torch.tensor(numbers), indices, none, False, codec.Bytes()))
    result = total.result()
    assert result.indices.tolist() == [1, 3, 5] and result.sums.tolist() == [0.75, 5.0, -2.0]
    assert dense7(result) == [0, 0.75, 0, 5.0, 0, -2.0, 0]
    # A piece of the support's values beside it; and the sum can go on after it was asked for.
    inside = torch.tensor([4.0, 6.0])
    total.add(0.25, codec.Piece(codec.SUPPORT, 0, 0, 7, inside, indices[:0], torch.ones(1), False, codec.Bytes()))
    assert dense7(total.result()) == [1.0, 0.75, 0, 5.0, 1.5, -2.0, 0.25]
    assert inside.tolist() == [4.0, 6.0]


def dense7(aggregate: Aggregate) -> list[float]:
    out = torch.zeros(7)
    aggregate.add_to(out)
    return out.tolist()


def test_add_to_adds_and_the_norm_is_that_of_the_whole() -> None:
    mask, upload = mask_of(0.3), Upload("int8", regrow=100)
    aggregate = added(mask, upload, sent(mask, upload))
    before = torch.from_numpy(rng(4).standard_normal(SIZE).astype(np.float32))
    after = before.clone()
    aggregate.add_to(after)
    assert bits(after) == bits(before + dense(aggregate))
    assert aggregate.norm() == pytest.approx(np.linalg.norm(dense(aggregate).double().numpy()), rel=1e-6)
    nothing = Sum(Support.of(mask), SIZE, 0, SIZE).result()
    assert nothing.norm() == 0 and not dense(nothing).any() and nothing.indices.numel() == 0


def test_a_start_and_another_weight_concern_the_support_alone() -> None:
    """EF21: the support's sum runs over all clients, everything else over the participants."""
    mask, upload = mask_of(0.3), Upload("int8", regrow=100)
    support, start = Support.of(mask), torch.from_numpy(rng(8).standard_normal(PRUNABLE).astype(np.float32))
    kept = start.clone()
    total = Sum(support, SIZE, 0, SIZE, start)
    expected = start.numpy().copy()
    tail = np.zeros(SIZE - PRUNABLE, np.float32)
    for share, messages in sent(mask, upload):
        pieces = [codec.read(message.frame(), support, SIZE, 3) for message in messages]
        for piece in pieces:
            total.add(share, piece, share / 3)
        expected[mask.numpy()] += np.float32(share / 3) * pieces[0].values.numpy()
        tail += np.float32(share) * pieces[0].other.numpy()
    result = total.result()
    assert bits(result.packed) == expected[mask.numpy()].tobytes()
    assert bits(result.other) == tail.tobytes()
    assert bits(result.sums) == bits(added(mask, upload, sent(mask, upload)).sums)
    assert bits(start) == bits(kept)  # also where the mask keeps all and `take` is a view
    everything = Support.of(torch.ones(PRUNABLE, dtype=torch.bool))
    Sum(everything, SIZE, 0, SIZE, start).packed.add_(1.0)
    assert bits(start) == bits(kept)


def test_a_fused_multiply_add_would_be_seen() -> None:
    """The test above can tell: a product that is not rounded on its own ends in other bits somewhere."""
    mask, upload = mask_of(1.0), Upload()
    uploads = sent(mask, upload)
    fused = torch.zeros(SIZE, dtype=torch.float64)
    for share, messages in uploads:
        update = codec.decode([message.frame() for message in messages], Support.of(mask), SIZE, 3)
        fused = (fused + float(np.float32(share)) * update.double()).float().double()
    assert bits(fused.float()) != plain(mask, uploads).tobytes()
