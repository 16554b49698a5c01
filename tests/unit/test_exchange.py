"""The exchange on one rank: every way ends in the same sum; slices; what is owed; frames that are not as planned."""

import functools
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from alone import Alone
from hypothesis import given
from hypothesis import strategies as st
from together import together
from torch import Tensor

from feddip_mpi import besides, codec, exchange, values
from feddip_mpi.aggregate import Aggregate, Sum
from feddip_mpi.codec import AGGREGATE, Bytes, Message, Upload
from feddip_mpi.errors import PeerError
from feddip_mpi.exchange import Exchange, Outcome, Task
from feddip_mpi.support import Support

N, P = 2040, 2000
CLIENTS = (2, 5, 11)
MODES = {"allgatherv": "allgatherv", "sharded": "alltoallv", "node": "node_allgatherv", "dense": "allreduce"}
MASK = torch.from_numpy(np.random.default_rng(0).random(P) < 0.4)
UPLOADS = [Upload(), Upload("int8", regrow=150), Upload("int4", dense=True), Upload("int4", True, regrow=9999, compress=True),
           Upload("bf16", regrow=1)]  # fmt: skip


def task(upload: Upload = UPLOADS[1], mode: str = "allgatherv", **other: Any) -> Task:
    made = Task(mode, False, 3, Support.of(MASK), N, upload, dict.fromkeys(CLIENTS, 0), {2: 0.2, 5: 0.5, 11: 0.3})
    return replace(made, **other)


def messages(plan: Task, client: int) -> list[Message]:
    generator = np.random.default_rng(client)
    update = torch.from_numpy((generator.standard_normal(N) * 10.0 ** generator.integers(-3, 4, N)).astype(np.float32))
    return list(codec.encode(update, plan.support, plan.upload, plan.round, client, generator))


def run(plan: Task, comm: Alone | None = None, owed: Tensor | None = None) -> Outcome:
    made = Exchange(comm or Alone(), plan, owed)
    for client in plan.placed:
        for message in messages(plan, client):
            made.post(message)
    made.close()
    return made.finish()


def expected(plan: Task) -> Aggregate:
    total = Sum(plan.carried, N, 0, N, plan.start)
    for client in plan.placed:
        for message in messages(plan, client):
            piece = codec.read(message.frame(), plan.support, N, plan.round)
            total.add(plan.shares[client], piece, (plan.support_shares or plan.shares)[client])
    return total.result()


def bits(aggregate: Aggregate) -> list[bytes]:
    return [getattr(aggregate, name).numpy().tobytes() for name in ("packed", "indices", "sums", "other")]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("upload", UPLOADS, ids=str)
def test_every_way_ends_in_the_same_sum(mode: str, overlap: bool, upload: Upload) -> None:
    plan, comm = task(upload, mode, overlap=overlap), Alone(background=True)
    outcome, wanted = run(plan, comm), expected(plan)
    if mode == "dense":  # a sum of zero off the mask has left no trace in the vector that was reduced
        wanted = replace(wanted, indices=wanted.indices[wanted.sums != 0], sums=wanted.sums[wanted.sums != 0])
    assert bits(outcome.aggregate) == bits(wanted)
    assert outcome.aggregate.support is plan.carried or outcome.aggregate.support.positions is None
    assert outcome.owed is None and outcome.download == Bytes()
    waves = len(CLIENTS) * len(upload.kinds) if overlap and mode != "dense" else 1
    assert comm.calls == {MODES[mode]: waves}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("upload", UPLOADS[1:3], ids=str)
def test_a_start_and_other_weights_of_the_support(mode: str, upload: Upload) -> None:
    start = torch.from_numpy(np.random.default_rng(9).standard_normal(P).astype(np.float32))
    kept = start.clone()
    plan = task(upload, mode, start=start, support_shares={2: 0.02, 5: 0.05, 11: 0.03})
    got, wanted = run(plan).aggregate, expected(plan)
    if mode == "dense":  # adds the start last: its bits are its own
        assert torch.allclose(got.packed, wanted.packed, rtol=1e-5, atol=1e-4)
        got = replace(got, packed=wanted.packed)
    assert bits(got) == bits(wanted)
    assert torch.equal(start, kept)


def test_the_order_of_clients_is_that_of_the_plan() -> None:
    plan = task(Upload(), placed=dict.fromkeys(CLIENTS[::-1], 0))
    assert bits(run(plan).aggregate) == bits(expected(plan)) != bits(expected(task(Upload())))


@pytest.mark.parametrize("mode", MODES)
def test_posted_bytes_are_those_of_whole_frames(mode: str) -> None:
    plan = task(UPLOADS[3], mode)
    made = Exchange(Alone(), plan)
    for client in plan.placed:
        for message in messages(plan, client):
            assert made.post(message) == message.framed()[1]


@pytest.mark.parametrize("overlap", [False, True])
def test_time_under_way_is_measured_and_phases_are_named(overlap: bool) -> None:
    class Slow(Alone):
        def allgatherv(self, payloads: list[np.ndarray], counts: list[int]) -> list[np.ndarray]:
            sleep(0.01)
            return super().allgatherv(payloads, counts)

    from time import sleep

    names: list[str] = []

    def phase(name: str) -> Any:
        names.append(name)
        return exchange.untimed(name)

    plan = task(overlap=overlap)
    made = Exchange(Slow(background=True), plan, None, phase)
    for client in plan.placed:
        for message in messages(plan, client):
            made.post(message)
    made.close()
    made.drain()
    made.finish()
    assert made.transfer_seconds >= 0.01 * (6 if overlap else 1)
    assert names == ["exchange", "decode"]


# What is owed


@pytest.mark.parametrize("download", ["fp32", "bf16", "int8", "int4"])
@pytest.mark.parametrize("upload", UPLOADS, ids=str)
@pytest.mark.parametrize("before", [False, True])
def test_what_is_rounded_off_is_owed_and_paid(download: str, upload: Upload, before: bool) -> None:
    plan = task(upload, "sharded", download=download)
    count = plan.carried.count
    owed = torch.from_numpy(np.random.default_rng(5).standard_normal(count).astype(np.float32)) if before else None
    given = None if owed is None else owed.clone()
    exact, outcome = expected(plan), run(plan, owed=owed)
    due = exact.packed if owed is None else exact.packed + owed
    if download == "fp32":
        assert outcome.owed is None
        assert bits(outcome.aggregate) == bits(replace(exact, packed=due))
    else:
        coded = values.code(due, download, False, np.random.default_rng(0)).restored()
        assert outcome.owed is not None and outcome.owed.shape == (count,)
        assert bits(outcome.aggregate) == bits(replace(exact, packed=coded))
        assert torch.equal(outcome.owed, due - coded)
        assert bool(outcome.owed.any())
    if owed is not None:
        assert torch.equal(owed, given)
    handed_on = outcome.download
    if download == "fp32" and owed is None:
        assert handed_on == Bytes()
        return
    length, unions = values.packed_bytes(count, download), 4 * exact.indices.numel()
    assert handed_on.values <= length + unions if upload.compress else handed_on.values == length + unions
    assert (handed_on.other, handed_on.frame) == (4 * (N - P), 56 * len(upload.kinds))
    assert (handed_on.indices > 0) == (len(upload.kinds) > 1)


def test_debts_do_not_grow() -> None:
    """Over rounds the sums handed on add up to the exact ones, less what is owed last."""
    plan, owed = task(Upload("int8"), "sharded", download="int4"), None
    exact, got = torch.zeros(plan.support.count).double(), torch.zeros(plan.support.count).double()
    for _ in range(12):
        outcome = run(plan, owed=owed)
        owed = outcome.owed
        exact += expected(plan).packed.double()
        got += outcome.aggregate.packed.double()
    one_round = expected(plan).packed.abs().max()
    assert owed is not None and torch.allclose(got + owed.double(), exact, atol=1e-4 * float(one_round))
    assert float(owed.abs().max()) < float(one_round) / 7


# What is not as planned


class Altered(Alone):
    """Whatever is gathered goes through a function."""

    def __init__(self, change: Callable[[list[np.ndarray]], list[np.ndarray]]) -> None:
        super().__init__()
        self._change = change

    def allgatherv(self, payloads: list[np.ndarray], counts: list[int]) -> list[np.ndarray]:
        return self._change(super().allgatherv(payloads, counts))


def flipped(frame: np.ndarray, position: int) -> np.ndarray:
    out = frame.copy()
    out[position] ^= 16
    return out


@pytest.mark.parametrize("position", [0, 4, 5, 12, 17, 24, 55, 56, 200, -1])
def test_a_frame_that_was_altered_names_rank_client_and_round(position: int) -> None:
    """Also where the part that names the client is what was altered."""
    for place, client in enumerate(CLIENTS):
        comm = Altered(lambda got, p=place: [flipped(f, position) if i == 2 * p else f for i, f in enumerate(got)])
        with pytest.raises(PeerError, match=f"from rank 0, client {client}: .*round 4"):
            run(task(), comm)


@pytest.mark.parametrize("order", [[1, 0, 2, 3, 4, 5], [2, 3, 0, 1, 4, 5], [0, 0, 2, 3, 4, 5], [0, 1, 2, 3, 4, 1]])
def test_a_frame_in_the_place_of_another_is_refused(order: list[int]) -> None:
    with pytest.raises(PeerError, match=r"round 4: a frame of client \d+ .* in place of client \d+'s"):
        run(task(), Altered(lambda got: [got[i] for i in order]))


@pytest.mark.parametrize("kind", [0, 1])
def test_a_part_or_another_model_is_refused(kind: int) -> None:
    plan = task()
    for lo, hi in ((0, N - 1), (1, N), (0, P)):
        part = messages(plan, CLIENTS[0])[kind].frame(lo, hi)
        comm = Altered(lambda got, part=part: [part if i == kind else f for i, f in enumerate(got)])
        with pytest.raises(PeerError, match=f"coordinates {lo} to {hi}"):
            run(plan, comm)


def test_a_dense_upload_where_none_is_planned_is_refused() -> None:
    """Even where the mask keeps everything, so that all lengths fit."""
    everything = Support.of(torch.ones(P, dtype=torch.bool))
    plan = task(Upload("int8"), support=everything)
    dense = replace(plan, upload=Upload("int8", dense=True))
    frame = messages(dense, CLIENTS[0])[0].frame()
    with pytest.raises(PeerError, match="in place of client 2's"):
        run(plan, Altered(lambda got: [frame, *got[1:]]))


@pytest.mark.parametrize(
    "rule", [Upload("fp32", dense=True), Upload("int8", regrow=40), Upload("int4", stochastic=True)]
)
def test_what_travels_besides_is_the_same_by_slices_and_no_rank_gets_all_of_it(rule: Upload) -> None:
    size, placed = 5000, {3: 0, 4: 2, 8: 1, 9: 0, 11: 1}
    support = Support.of(torch.rand(size, generator=torch.Generator().manual_seed(1)) < 0.3)

    def summed(comm: Any, updates: str) -> tuple[bytes, int]:
        own = {client: (vector(client, size),) for client, rank in placed.items() if rank == comm.rank}
        messages, _ = besides.encoded(own, [rule], support, 2, 7)
        federation: Any = SimpleNamespace(comm=comm, samples=list(range(10, 30)))
        (total,) = besides.summed(federation, messages, [rule], support, 2, placed, updates=updates)
        return total.numpy().tobytes(), comm.sent["update"]

    by_slices, whole = (together(3, functools.partial(summed, updates=mode)) for mode in ("sharded", "node"))
    assert {bits for bits, _ in by_slices} == {bits for bits, _ in whole} and len({bits for bits, _ in whole}) == 1
    assert [sent for _, sent in by_slices] != [sent for _, sent in whole], "slices went to their owners"


def vector(client: int, size: int) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(client))


@pytest.mark.parametrize("mode", ["allgatherv", "sharded", "node"])
@pytest.mark.parametrize("overlap", [False, True])
def test_messages_that_could_not_be_made_are_nothing_and_are_noticed(mode: str, overlap: bool) -> None:
    """A rank whose client failed still takes part in what the others wait for."""
    plan, comm = task(mode=mode, overlap=overlap), Alone(background=True)
    made = Exchange(comm, plan)
    made.post(messages(plan, CLIENTS[0])[0])
    made.close()
    made.drain()
    assert comm.calls == ({MODES[mode]: 5} if overlap else {})  # the last wave has nothing to hide behind
    with pytest.raises(PeerError, match="from rank 0, client 2: round 4: a frame of 0 bytes"):
        made.finish()
    assert comm.calls == {MODES[mode]: 6 if overlap else 1}


def test_the_yardstick_sends_nothing_before_the_end() -> None:
    plan, comm = task(mode="dense", overlap=True), Alone(background=True)
    made = Exchange(comm, plan)
    made.post(messages(plan, CLIENTS[0])[0])
    made.close()
    made.drain()
    assert not comm.calls


def test_a_frame_of_another_round_is_refused_where_it_is_read() -> None:
    plan = task()
    old = messages(replace(plan, round=2), CLIENTS[0])[0]
    made = Exchange(Alone(), plan)
    made.post(old)
    made.close()
    with pytest.raises(PeerError, match="client 2, round 3: arrived in round 4"):
        made.finish()
    with pytest.raises(PeerError, match="client 2, round 3: arrived in round 4"):
        Exchange(Alone(), replace(plan, mode="dense")).post(old)


@pytest.mark.parametrize(
    ("change", "clue"),
    [
        (lambda got: [flipped(got[0], 70), got[1]], "from rank 0: the sum, round 4"),
        (lambda got: [got[0], flipped(got[1], 4)], "from rank 0: round 4"),
        (lambda got: got[::-1], "round 4: rank 0 handed on"),
        (lambda got: [got[0], got[0]], "round 4: rank 0 handed on"),
    ],
)
def test_a_sum_that_was_altered_names_its_owner(change: Callable, clue: str) -> None:
    with pytest.raises(PeerError, match=clue):
        run(task(mode="sharded", download="int8"), Altered(change))


def test_a_part_of_a_sum_is_refused() -> None:
    plan = task(Upload(), mode="sharded", download="int8")
    coded = values.code(torch.zeros(plan.support.count), "int8", False, np.random.default_rng(0))
    none = torch.zeros(0, dtype=torch.int64)
    part = Message(codec.SUPPORT, 3, AGGREGATE, plan.support, N, coded, 0, none, torch.zeros(N - P), False, False)
    with pytest.raises(PeerError, match=f"handed on the coordinates 0 to {P} instead of 0 to {N}"):
        run(plan, Altered(lambda got: [part.frame(0, P)]))


# Slices


@given(
    st.integers(0, 4000), st.integers(0, 1500), st.integers(1, 64), st.sampled_from(values.KINDS),
    st.sampled_from([0.0, 0.01, 0.5, 1.0]),
)  # fmt: skip
def test_slices_ascend_cover_and_end_at_whole_blocks(
    prunable: int, tail: int, ranks: int, kind: str, density: float
) -> None:
    mask = torch.from_numpy(np.random.default_rng(1).random(prunable) < density)
    for support in (Support.of(mask), Support.of(mask).whole()):
        bounds = exchange.slices(support, prunable + tail, ranks, kind)
        assert len(bounds) == ranks + 1 and bounds == sorted(bounds)
        assert (bounds[0], bounds[-1]) == (0, prunable + tail)
        assert all(type(bound) is int for bound in bounds)
        for bound in bounds:
            first = support.rank(min(bound, prunable))
            assert first % 256 == 0 or first == support.count
            assert first < support.count or bound == 0 or bound >= prunable  # what is pruned behind the last goes along


@pytest.mark.parametrize("kind", values.KINDS)
@pytest.mark.parametrize("density", [0.05, 0.6, 1.0])
@pytest.mark.parametrize("tail", [0, 300, 150_000])
@pytest.mark.parametrize("ranks", [1, 2, 3, 8, 17])
def test_slices_carry_equal_bytes_within_a_granule(kind: str, density: float, tail: int, ranks: int) -> None:
    prunable = 200_000
    support = Support.of(torch.from_numpy(np.random.default_rng(1).random(prunable) < density))
    bounds = exchange.slices(support, prunable + tail, ranks, kind)
    a_value = values.bytes_per_value(kind)

    def cost(lo: int, hi: int) -> float:
        kept = support.rank(min(hi, prunable)) - support.rank(min(lo, prunable))
        return kept * a_value + 4 * (max(hi, prunable) - max(lo, prunable))

    costs = [cost(lo, hi) for lo, hi in pairwise(bounds)]
    assert sum(costs) == pytest.approx(cost(0, prunable + tail))
    assert max(abs(each - sum(costs) / ranks) for each in costs) <= 256 * a_value + 4


def test_more_ranks_than_granules_leave_some_without_work() -> None:
    support = Support.of(torch.ones(300, dtype=torch.bool))
    bounds = exchange.slices(support, 300, 9, "int8")
    assert set(bounds) == {0, 256, 300} and len(bounds) == 10
    nothing = Support.of(torch.zeros(0, dtype=torch.bool))
    assert exchange.slices(nothing, 0, 4, "fp32") == [0] * 5
    assert exchange.slices(nothing, 8, 4, "fp32") == [0, 2, 4, 6, 8]
    assert exchange.slices(Support.of(torch.zeros(5, dtype=torch.bool)), 5, 2, "fp32") == [0, 5, 5]


def test_slices_of_a_sum_join_to_the_whole_however_many_ranks_there_are() -> None:
    """What owners do, one after the other in this process: the bits do not depend on their number."""
    wanted = {}
    for upload in UPLOADS:
        plan = task(upload)
        frames = [message for client in CLIENTS for message in messages(plan, client)]
        for download in ("fp32", "int8", "int4"):
            for ranks in (1, 2, 5, 40):
                parts = []
                for lo, hi in pairwise(exchange.slices(plan.carried, N, ranks, upload.values)):
                    total = Sum(plan.carried, N, lo, hi)
                    for message in frames:
                        piece = codec.read(message.frame(lo, hi), plan.support, N, 3)
                        total.add(plan.shares[piece.client], piece)
                    packed = values.code(total.result().packed, download, False, np.random.default_rng(0)).restored()
                    parts.append(packed)
                got = torch.cat(parts).numpy().tobytes()
                assert wanted.setdefault((upload, download), got) == got, (upload, download, ranks)
