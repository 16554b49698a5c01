"""What every method must obey: ranks, stops and value types change nothing, masks and bytes are what the plan says."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from alone import Alone
from together import together
from torch import Tensor, nn

from feddip_mpi import checkpoint, codec, config, federation, masks, methods, rounds, run_folder, session
from feddip_mpi.errors import Abandoned, InputError, Stopped
from feddip_mpi.federation import Federation
from feddip_mpi.life import Life
from feddip_mpi.local import LocalRule
from feddip_mpi.methods.base import Method
from feddip_mpi.report import planning, summaries
from feddip_mpi.saver import FolderSaver
from feddip_mpi.schedules import Control, plan_round
from feddip_mpi.settings import METHODS, Config

DENSE = ("fedavg", "fedprox")
OWN = f"{__name__}:Steady"
ALL = (*METHODS, OWN)

# The worked example of "Add your own method", as it stands there: a class `Steady` with a memory of its own.
PAGE = (Path(__file__).parents[2] / "docs" / "methods.md").read_text(encoding="utf-8")
EXAMPLE = PAGE.split("## Add your own method")[1].split("```python\n")[1].split("```")[0]
exec(compile(EXAMPLE, "docs/methods.md", "exec"))


class Net(nn.Module):
    def __init__(self, in_channels: int, image_size: tuple[int, int], classes: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(in_channels, 8, 3), nn.BatchNorm2d(8)
        self.hidden = nn.Linear(8 * (image_size[0] - 2) * (image_size[1] - 2), 20)
        self.out = nn.Linear(20, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.hidden(torch.relu(self.norm(self.conv(x))).flatten(1))))


def settings(method: str, **values: Any) -> Config:
    return config.validate({
        "rounds": 4, "clients": 5, "participants": 3, "local_epochs": 2, "batch_size": 16, "learning_rate": 0.05,
        "method": method, "model": {"name": f"{__name__}:Net"}, "mask": {"every": 2, "freeze_after": 0.75},
        "sparsity": {"initial": 0.4, "final": 0.8}, "upload": {"values": "int8"},
        "data": {
            "name": "synthetic", "partition": "quantity", "alpha": 2.0,
            "synthetic": {"shape": [2, 6, 6], "classes": 3, "train_samples": 203, "test_samples": 60},
        },
        **values,
    })  # fmt: skip


def build(method: str, comm: Any = None, **values: Any) -> Federation:
    return federation.build(settings(method, **values), comm or Alone(), torch.device("cpu"))


def play(built: Federation, state: rounds.State, first: int = 0) -> list[dict]:
    return [rounds.play(built, state, plan_round(built.config, t)) for t in range(first, built.config.rounds)]


def bits(states: list[rounds.State]) -> list[Any]:
    """All that the next round depends on, of a federation whose ranks these are."""
    held = {client: r for state in states for client, r in state.held.items()}
    first = states[0]
    return [
        first.server.weights.numpy().tobytes(),
        first.server.mask.numpy().tobytes(),
        {name: values.numpy().tobytes() for name, values in first.memories.items()},
        {client: held[client].values.numpy().tobytes() for client in sorted(held)},
    ]


@pytest.mark.parametrize("method", ALL)
def test_ranks_change_no_bit_and_no_count(method: str) -> None:
    values: dict[str, Any] = {"upload": {"values": "int4", "rounding": "stochastic"}}
    alone = build(method, **values)
    state = rounds.initial_state(alone)
    expected = play(alone, state)
    built = [build(method, **values) for _ in range(3)]  # not in the threads: torch's generator belongs to all

    def work(comm: Any) -> tuple[rounds.State, list[dict]]:
        own = dataclasses.replace(built[comm.rank], comm=comm)
        begun = rounds.initial_state(own)
        return begun, play(own, begun)

    results = together(3, work)
    assert bits([each for each, _ in results]) == bits([state])
    for names in (
        ("upload_bytes", "upload_extra_bytes", "upload_indices_bytes", "test_loss", "train_loss", "sparsity"),
    ):
        assert [[r[n] for n in names] for r in results[0][1]] == [[r[n] for n in names] for r in expected]
    for _, records in results:
        # What the ranks handed over are the frames, those of the opening and of the extras too.
        assert [r["wire_bytes"] for r in records] == [r["upload_bytes"] for r in records]
        # Each byte is of one kind: what a method sends besides is no value of an update.
        kinds = [name for name in summaries.BYTE_KINDS if name.startswith("upload_")]
        assert [sum(r[kind] for kind in kinds) for r in records] == [r["upload_bytes"] for r in records]


@pytest.mark.parametrize("residual", ["keep", "ef21"])
def test_a_dense_exchange_ends_close_to_the_others(residual: str) -> None:
    """Its sums have other last bits; what is trained, cut and counted is the same."""
    upload = {"values": "fp32", "residual": residual, "regrow": 0.2, "regrow_schedule": "constant"}
    values: dict[str, Any] = {"upload": upload}
    expected = rounds.initial_state(alone := build("feddip", **values))
    records = play(alone, expected)
    built = [build("feddip", exchange="dense", **values) for _ in range(2)]

    def work(comm: Any) -> tuple[rounds.State, list[dict]]:
        own = dataclasses.replace(built[comm.rank], comm=comm)
        begun = rounds.initial_state(own)
        return begun, play(own, begun)

    (one, told), (other, _) = together(2, work)
    assert torch.equal(one.server.weights, other.server.weights) and torch.equal(one.server.mask, other.server.mask)
    assert torch.equal(one.server.mask, expected.server.mask)
    assert torch.allclose(one.server.weights, expected.server.weights, rtol=1e-4, atol=1e-5)
    assert [r["upload_bytes"] for r in told] == [r["upload_bytes"] for r in records]
    assert sum(r["upload_indices_bytes"] for r in told) > 0 and sum(r["mask_pruned"] for r in told) > 0


@pytest.mark.parametrize("method", ["ssfl", "prunefl"])
def test_every_rank_knows_what_all_have_sent_before_the_first_round(method: str) -> None:
    """Whoever dies before the first record takes no count along."""
    alone = rounds.initial_state(build(method)).opened
    assert alone is not None and alone.uploaded > 0
    built = [build(method) for _ in range(3)]
    results = together(3, lambda comm: rounds.initial_state(dataclasses.replace(built[comm.rank], comm=comm)).opened)
    assert [each.uploaded for each in results] == [alone.uploaded] * 3


@pytest.mark.parametrize("after", [0, 1])
def test_a_stop_ends_an_opening_between_clients_on_all_ranks(after: int) -> None:
    """One rank alone has seen the signal, after so many of its clients; the opening done again is the same."""
    built = [build("ssfl") for _ in range(3)]

    def work(comm: Any) -> str:
        asked = iter(range(99))

        def stopped() -> Stopped | None:
            return Stopped("by a signal") if comm.rank == 1 and next(asked) == after else None

        own = dataclasses.replace(built[comm.rank], comm=comm)
        with pytest.raises(Stopped) as caught:
            rounds.initial_state(own, Life(stopped=stopped))
        again = rounds.initial_state(own)
        return f"{caught.value} {bits([again])}"

    whole = rounds.initial_state(build("ssfl"))
    assert together(3, work) == [f"by a signal {bits([whole])}"] * 3


@pytest.mark.parametrize("method", ["ssfl", "prunefl"])
def test_an_opening_is_abandoned_between_two_batches_on_all_ranks(method: str) -> None:
    built = [build(method) for _ in range(2)]

    def work(comm: Any) -> tuple[str, list[str]]:
        asked, phases = iter(range(99)), []
        own = dataclasses.replace(built[comm.rank], comm=comm)
        life = Life(lambda: next(asked) == 1, lambda phase, _: phases.append(phase))
        with pytest.raises(Abandoned, match="abandoned"):
            rounds.initial_state(own, life)
        return bits([rounds.initial_state(own)]), phases

    done = together(2, work)
    assert [state for state, _ in done] == [bits([rounds.initial_state(build(method))])] * 2
    # What a watchdog is told: who measures, and who waits for it.
    assert "opening" in done[0][1] + done[1][1]
    assert [phases[-1] for _, phases in done] == ["wait"] * 2


@pytest.mark.parametrize("method", ALL)
def test_resumed_equals_never_stopped(method: str, tmp_path: Path) -> None:
    whole = build(method)
    never_stopped = rounds.initial_state(whole)
    records = play(whole, never_stopped)
    for stop in (1, 3):
        first = build(method)
        state, history = rounds.initial_state(first), []
        for t in range(stop):
            history.append(rounds.play(first, state, plan_round(first.config, t)))
        folder = run_folder.RunFolder(tmp_path / str(stop))
        folder.checkpoints.mkdir(parents=True)
        saver = FolderSaver(first, folder, "2026-01-02T03:04:05+0000")
        saver.save(state, history)
        saver.wait()
        found, _ = checkpoint.newest(folder.checkpoints)
        second = build(method)
        resumed, _, _ = session._restore(second, found)
        assert set(resumed.memories) == set(state.memories)
        rest = play(second, resumed, stop)
        assert bits([resumed]) == bits([never_stopped])
        for name in ("upload_bytes", "test_loss", "mask_grown", "mask_pruned", "upload_extra_bytes"):
            assert [r[name] for r in history + rest] == [r[name] for r in records]


@pytest.mark.parametrize("method", ALL)
def test_a_run_is_as_sparse_as_asked_and_as_its_plan(method: str) -> None:
    built = build(method, upload={"values": "fp32"})
    state = rounds.initial_state(built)
    first = int(state.server.mask.sum())
    records = play(built, state)
    prunable = built.layout.prunable
    final = prunable if method in DENSE else masks.kept_count(prunable, 0.8)
    left = int(state.server.mask.sum())
    if method == "prunetrain":
        assert 0.5 * final < left <= final  # to a channel, not to a weight
    else:
        assert left == final
    off_mask = state.server.weights[:prunable][~state.server.mask]
    if built.method.confined:
        assert not off_mask.any()
    rows = planning.rows(built.config, built.layout, built.method.opening())
    assert rows[0]["upload_bytes"] >= built.config.participants * 4 * first or method == "sparsyfed"
    known = methods.named(method).counts_are_known(built.config)
    assert ("how many weights are kept" in planning.summary(built.config, rows)) == (not known)
    if not known:
        return
    assert [row["kept"] for row in rows] == [round((1 - r["sparsity"]) * prunable) for r in records]
    for row, record in zip(rows, records, strict=True):
        assert row["upload_bytes"] == pytest.approx(record["upload_bytes"], rel=0.05)
        places = record["upload_indices_bytes"] or (method in ("feddst", "fedrts") and record["mask_updated"])
        if not places:  # their code's length is an estimate
            assert row["upload_bytes"] == record["upload_bytes"]


@pytest.mark.parametrize("method", [m for m in ALL if m not in ("feddip", *DENSE)])
def test_nothing_of_a_client_lies_outside_the_masks(method: str) -> None:
    """Confined methods: a residual has nothing outside what its client could send."""
    built = build(method, upload={"values": "int4"})
    state = rounds.initial_state(built)
    for t in range(built.config.rounds):
        before = state.server.mask
        plan = plan_round(built.config, t)
        rounds.play(built, state, plan)
        for client in plan.participants:
            if client in state.held and not plan.update_mask:
                assert not state.held[client].values[~before].any()


@pytest.mark.parametrize("method", ALL)
def test_a_mask_update_that_was_put_off_may_come_after_the_last(method: str) -> None:
    """Adaptive control delays updates, so one may fall where a method's own schedule moves nothing any more.

    SparsyFed has its own rounds of updates and none after the last; methods with one mask have none at all.
    """
    built = build(method)
    state = rounds.initial_state(built)
    for t in range(3):
        rounds.play(built, state, plan_round(built.config, t))
    due = plan_round(built.config, 3, control=Control(mask_due=True))
    before = state.server.support.count
    rounds.play(built, state, due)
    assert 0 < state.server.support.count <= before


@pytest.mark.parametrize("method", ["feddst", "sparsyfed", "prunefl", "fedrts"])
def test_references_do_not_fit_clients_with_masks_of_their_own(method: str) -> None:
    with pytest.raises(InputError, match=f"upload.residual: got ef21, .*{method}.*allowed: keep"):
        build(method, upload={"residual": "ef21"})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fedsgd", "method: got 'fedsgd'; did you mean 'fed.*valid: feddip, fedavg"),
        ("zzz", "method: got 'zzz'; valid: feddip, .*package.module:name"),
    ],
)
def test_unknown_names(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        config.parse(f"method: {name}")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (":X", "is no import path"),
        ("no_such_module:X", "cannot import 'no_such_module'"),
        (f"{__name__}:Absent", "has no class 'Absent'"),
        (f"{__name__}:Net", "'Net', which is no subclass"),
    ],
)
def test_wrong_import_paths(path: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        methods.named(path)


def test_the_example_of_the_page_does_what_the_page_says() -> None:
    """It cuts by the mean over the rounds before, not by the magnitude of now."""
    built = build(OWN, upload={"values": "fp32"})
    state = rounds.initial_state(built)
    size, mean = built.layout.prunable, state.server.weights[: built.layout.prunable].abs()
    differs = False
    for t in range(4):
        old, plan = state.server.mask, plan_round(built.config, t)
        rounds.play(built, state, plan)
        if plan.update_mask:
            keep = masks.kept_count(size, plan.sparsity)
            assert torch.equal(state.server.mask, masks.select_largest(mean.masked_fill(~old, -1.0), keep))
            now = masks.select_largest(state.memories["mean"].masked_fill(~old, -1.0), keep)
            differs = differs or not torch.equal(now, state.server.mask)
        else:
            now = 0.7 * mean + 0.3 * state.server.weights[:size].abs()
            assert torch.allclose(state.memories["mean"][old], now[old])
        mean = state.memories["mean"]
    assert differs


class Wrong(Method):
    """Does one thing wrong, which a test chooses."""

    summary = "wrong"
    thing = ""

    def start(self, weights: Tensor, opened: Any) -> tuple[Tensor, Tensor]:
        weights, mask = super().start(weights, opened)
        return weights, mask.float() if self.thing == "mask of start" else mask

    def first_memories(self, weights: Tensor, mask: Tensor) -> dict[str, Tensor]:
        return {"owed": torch.ones(3)} if self.thing == "memory 'owed'" else {}

    def remember(self, seen: Any, mask: Tensor) -> dict[str, Tensor]:
        return {"mean": torch.ones(3, dtype=torch.int64)} if self.thing == "memory 'mean'" else {}

    def merge(self, seen: Any) -> Tensor:
        return seen.value[:5] if self.thing == "value of merge" else seen.value

    def cut(self, seen: Any) -> Any:
        return seen.old.mask.numpy() if self.thing == "mask of cut" else None

    @classmethod
    def extras(cls, config: Config, plan: Any, upload: Any) -> tuple[codec.Upload, ...]:
        return (codec.Upload(dense=True),) if cls.thing == "hook" else ()


@pytest.mark.parametrize(
    "thing", ["mask of start", "memory 'owed'", "memory 'mean'", "value of merge", "mask of cut", "hook"]
)
def test_what_a_method_of_ones_own_does_wrong_is_said(thing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("test_methods.Wrong.thing", thing)
    built = build("test_methods:Wrong")
    with pytest.raises(InputError, match=f"^method: its {thing}.* correct the class"):
        play(built, rounds.initial_state(built))


@pytest.mark.parametrize("method", ALL)
def test_clients_train_as_configured(method: str) -> None:
    keys = {
        "seed": 7, "local_epochs": 3, "batch_size": 5, "weight_decay": 0.25, "proximal": 0.5, "feedback": False,
        "penalty": {"norm": "l1"}, "precision": "bf16", "clients_at_once": 2,
        "data": {"name": "synthetic", "augment": "standard", "synthetic": {"shape": [2, 6, 6], "train_samples": 90}},
    }  # fmt: skip
    expected = LocalRule(
        seed=7, epochs=3, batch_size=5, weight_decay=0.25, feedback=method in DENSE, penalty_norm="l1",
        proximal=0.5 if method == "fedprox" else 0.0, augment="standard", precision="bf16",
    )  # fmt: skip
    built = build(method, **keys)
    assert built.method.local_rule() == expected
    assert [trainer.rule for trainer in built.trainers.all] == [expected] * 2
    assert build(method).trainer.rule.feedback == (method in ("feddip", *DENSE))


def test_every_method_says_what_it_does() -> None:
    for name in ALL:
        assert 10 < len(methods.named(name).summary) < 100
    assert {methods.named(name) for name in METHODS} == {type(build(name).method) for name in METHODS}
