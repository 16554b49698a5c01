"""The exchange benchmark without ranks: its options, its data, its table rows and its picture."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from alone import Alone

from feddip_mpi.bench import contenders, exchange, inputs
from feddip_mpi.bench.options import CONTENDERS, DEFAULT_SIZE, Options
from feddip_mpi.codec import Bytes
from feddip_mpi.errors import InputError
from feddip_mpi.report import benching, plots

# Options


@pytest.mark.parametrize(
    "wrong, said",
    [
        ({"size": 0}, "--size 0"),
        ({"size": 2**31}, "--size 2147483648"),
        ({"size": 5, "model": "lenet5"}, "--model and --size"),
        ({"sparsity": (0.5, 1.0)}, "--sparsity 1"),
        ({"sparsity": (float("nan"),)}, "--sparsity nan"),
        ({"values": ("int8", "int3")}, "--values int3"),
        ({"download": "zip"}, "--download zip"),
        ({"modes": ("ring",)}, "--modes ring"),
        ({"regrow": -0.1}, "--regrow -0.1"),
        ({"regrow": float("inf")}, "--regrow inf"),
        ({"download": "int8", "modes": ("node",)}, "--modes sharded"),
        ({"clients": 0}, "--clients 0"),
        ({"repeats": 0}, "--repeats 0"),
        ({"seconds": float("nan")}, "--seconds nan"),
    ],
)
def test_wrong_options_are_named(wrong: dict, said: str) -> None:
    with pytest.raises(InputError) as caught:
        Options(**wrong).check()
    assert said in str(caught.value)


def test_all_wrong_options_are_said_at_once_and_good_ones_pass() -> None:
    with pytest.raises(InputError, match=r"--clients -1.*--repeats -2"):
        Options(clients=-1, repeats=-2).check()
    Options(size=10, sparsity=(0.0, 0.99), values=("fp32", "int4"), modes=CONTENDERS, download="int8").check()
    assert Options().weights == DEFAULT_SIZE


def test_contenders_by_default_and_as_asked() -> None:
    assert Options().chosen(4, 2) == list(CONTENDERS)
    assert Options().chosen(4, 4) == [mode for mode in CONTENDERS if mode != "node"]
    assert Options(modes=("node", "dense", "node")).chosen(4, 4) == ["node", "dense"]


def test_too_little_memory_is_said_before_it_is_used() -> None:
    inputs.require_memory(1000, 1, 2, 10**6)
    with pytest.raises(InputError, match="--size or --model"):
        inputs.require_memory(10**9, 1, 2, 10**9)


# Data


def test_data_are_the_same_for_any_number_of_ranks() -> None:
    options = {ranks: Options(size=50, clients=4 // ranks) for ranks in (1, 2, 4)}
    made = {ranks: [inputs.make(o, 50, 40, rank, ranks) for rank in range(ranks)] for ranks, o in options.items()}
    for parts in made.values():
        assert [client for part in parts for client in part.updates] == [0, 1, 2, 3]
        assert {tuple(part.shares.items()) for part in parts} == {tuple(made[1][0].shares.items())}
        for part in parts:
            for client, update in part.updates.items():
                assert torch.equal(update, made[1][0].updates[client])
                assert torch.equal(part.residuals[client].values, made[1][0].residuals[client].values)
    assert sum(made[1][0].shares.values()) == pytest.approx(1)
    assert made[4][3].placed == {0: 0, 1: 1, 2: 2, 3: 3} and made[2][0].placed == {0: 0, 1: 0, 2: 1, 3: 1}


@pytest.mark.parametrize("sparsity, kept", [(0.0, 1000), (0.95, 50), (0.9999, 0)])
def test_masks_keep_the_share_asked_for(sparsity: float, kept: int) -> None:
    assert inputs.support(Options(size=1000), 1000, sparsity).count == kept


def test_models_give_their_counts() -> None:
    size, prunable = inputs.counts(Options(model="lenet5"))
    assert size > prunable > 0
    assert inputs.counts(Options(size=7)) == (7, 7)
    with pytest.raises(InputError, match="unknown"):
        inputs.counts(Options(model="nope"))


# Rows


def test_a_repeat_is_as_slow_as_its_slowest_rank_and_counts_its_busiest() -> None:
    # seconds, six phases, sent, received, sent by kind, received by kind, digest
    rows = np.array([
        [1.0, *(0.1,) * 6, 100, 10, 90, 0, 4, 6, 9, 0, 0, 1, 255],
        [2.0, *(0.2,) * 6, 100, 20, 80, 9, 4, 7, 19, 0, 0, 1, 255],
    ])  # fmt: skip
    repeat = exchange.repeat_of(rows)
    assert repeat["seconds"] == 2.0 and repeat["seconds_by_rank"] == [1.0, 2.0]
    assert repeat["phases"] == dict.fromkeys(exchange.PHASES.values(), 0.2)
    assert repeat["sent"] == {"total": 100, "values": 80, "indices": 9, "other": 4, "frame": 7}
    assert repeat["received"]["total"] == 20 and repeat["sent_by_all"] == 200
    assert repeat["digest"] == "000000ff"


def test_bytes_that_are_nothing_else_are_frames() -> None:
    assert exchange.by_kind(Bytes(values=10, indices=5, other=2), 20) == [10, 5, 2, 3]
    assert exchange.by_kind(Bytes(values=10), 0) == [0, 0, 0, 0]  # another rank of the node sends for this one


class OneNode(Alone):
    """Two ranks that share memory; both hand over the same."""

    size = 2

    def nodes(self) -> list[list[int]]:
        return [[0, 1]]

    def gather(self, row: np.ndarray) -> np.ndarray:
        return np.stack([row, row])


def test_within_a_node_only_lengths_are_handed_to_mpi() -> None:
    options, comm = Options(size=1000), OneNode()
    desk = contenders.Desk.of(comm, options, inputs.make(options, 1000, 1000, 0, 2))  # type: ignore[arg-type]
    node = contenders.ByExchange(desk, "node", 0.95, "int8", inputs.support(options, 1000, 0.95))
    sent, received = node._bytes(Bytes(values=50, frame=16), Bytes(), Bytes())
    assert exchange.by_kind(sent, 8) == exchange.by_kind(received, 8) == [0, 0, 0, 8]


def case(mode: str, median: float, received: int, **more: object) -> dict:
    kinds = {"values": received, "indices": 0, "other": 0, "frame": 0}
    return {
        "mode": mode, "sparsity": None, "values": None, "download": None, "cold": False, "blocking": None,
        "seconds": {"median": median, "min": median, "max": 2 * median},
        "phases": dict.fromkeys(benching.PHASES, 0.001), "sent": {"total": received, **kinds},
        "received": {"total": received, **kinds}, "predicted": None, **more,
    }  # fmt: skip


@pytest.fixture
def result() -> dict:
    cases = [
        case("dense-allreduce", 0.5, 8000, blocking=True),
        case("sharded", 0.125, 1000, sparsity=0.95, values="int8", download="int4", predicted={"seconds": 0.15}),
        case("node", 0.25, 0, sparsity=0.95, values="int8", cold=True),
    ]
    for one in cases:
        one |= benching.against(one, cases[0])
    took = dict.fromkeys(("allgatherv", "sharded", "node", "dense", "dense-allreduce"), 0.0123)
    rows = [{"ranks": r, "participants": r, "seconds": took, "crossover": 7 if r == 2 else None} for r in (2, 4)]
    return {
        "cases": cases, "size": 2000, "prunable": 2000, "clients": 2, "ranks": 2, "nodes": 1, "overlap": True,
        "hardware": [{"processor": "cpu", "cores": 2}], "mpi": "MPI", "unchecked": ["dense"], "left_out": ["x: 1 of 5"],
        "networks": [{"background": False, "latency_seconds": 2e-5, "bandwidth_bytes": 1.25e7, "relative_error": 0.1}],
        "predicted": [{"sparsity": 0.95, "values": "int8", "crossover_ranks": 3, "rows": rows}],
    }  # fmt: skip


def test_rows_say_what_was_measured_beside_what_was_predicted(result: dict) -> None:
    _, dense, sharded, node = benching.seconds_rows(result)
    assert dense == ["dense-allreduce", "-", "fp32", "500", "500", "1,000", "-", "-", "1x"]
    assert sharded == ["sharded", "0.95", "int8, back int4", "125", "125", "250", "150", "+20%", "4x"]
    assert node[-1] == "2x"


def test_rows_of_bytes_phases_and_predictions(result: dict) -> None:
    assert benching.byte_rows(result)[2][-2:] == ["1.0 kB", "8x"]
    assert benching.byte_rows(result)[3][-1] == "-"  # shared memory: nothing to compare
    assert benching.phase_rows(result)[1][3:] == ["1"] * 6
    rows = benching.predicted_rows(result["predicted"][0])
    assert rows[0] == ["ranks", "participants", "dense-allreduce", "allgatherv", "sharded", "node", "dense",
                       "sharded wins from"]  # fmt: skip
    assert rows[1] == ["2", "2", *["12.3"] * 5, "7 participants"] and rows[2][-1] == "never"


def test_nothing_that_was_left_out_goes_unsaid(result: dict, capsys: pytest.CaptureFixture[str]) -> None:
    benching.show(result)
    shown = capsys.readouterr().out
    for said in ("left out: x: 1 of 5", "cold run only: node 0.95 int8", "not compared", "PREDICTED", "20 us a step",
                 "100 Mbit/s", "from 3 ranks on", "MPI_Allreduce", "lengths of payloads alone"):  # fmt: skip
        assert said in shown, said
    result |= {"networks": [], "predicted": []}
    benching.show(result)
    assert "nothing is sent" in capsys.readouterr().out


def test_the_picture_shows_every_case_and_every_curve(result: dict, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    left, right = plots.draw_exchange(result).axes
    assert [label.get_text() for label in left.get_yticklabels()] == [
        "dense-allreduce", "sharded 0.95 int8 /int4", "node 0.95 int8",
    ]  # fmt: skip
    assert {line.get_label() for line in right.lines} >= set(result["predicted"][0]["rows"][0]["seconds"])
    points = {tuple(line.get_ydata()) for line in right.lines if len(line.get_xdata()) == 1}
    assert points == {(0.5,), (0.125,), (0.25,)}
    plots.exchange_figure({**result, "predicted": [], "cases": result["cases"][1:]}, tmp_path / "exchange.png")
    assert (tmp_path / "exchange.png").stat().st_size > 5000


def test_a_sum_handed_on_in_slices_is_the_sum_handed_on_whole() -> None:
    from feddip_mpi import values
    from feddip_mpi.aggregate import Aggregate
    from feddip_mpi.exchange import slices

    support = inputs.support(Options(size=20_000), 20_000, 0.5)
    packed = torch.from_numpy(np.random.default_rng(1).normal(size=support.count).astype(np.float32))
    whole = Aggregate(support, packed, packed[:0].to(torch.int64), packed[:0], packed[:0])
    bounds = [support.rank(bound) for bound in slices(support, 20_000, 3, "int8")]
    for kind in values.KINDS:
        parts = [
            values.code(packed[lo:hi], kind, False, np.random.default_rng(0)).restored()
            for lo, hi in itertools.pairwise(bounds)
        ]
        assert torch.equal(contenders.handed_on_as(whole, kind).packed, torch.cat(parts))
    assert contenders.distance(whole, whole) == 0
    other = Aggregate(support, 2 * packed, whole.indices, whole.sums, whole.other)
    assert contenders.distance(other, whole) == pytest.approx(1)


def test_results_never_go_over_others(tmp_path: Path) -> None:
    assert exchange._new_folder(str(tmp_path / "new" / "folder")) == str(tmp_path / "new" / "folder")
    (tmp_path / "file").write_text("mine")
    for taken in (tmp_path, tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InputError, match="--out"):
            exchange._new_folder(str(taken))
