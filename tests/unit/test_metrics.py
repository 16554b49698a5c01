"""Records: through HDF5 columns and JSON lines and back."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest

from feddip_mpi import metrics
from feddip_mpi.errors import InputError
from feddip_mpi.metrics import FIELDS, MetricsFile, Record

LAYERS = ["conv.weight", "fc.weight"]


def record(round: int, evaluated: bool = True, clients: bool = True) -> Record:
    """A record with a different number in each place."""
    out: Record = {}
    for place, (name, field) in enumerate(FIELDS.items()):
        base = 1000 * place + round
        out[name] = {
            "int": base + 2**52,
            "float": base + 0.1,
            "ints": [base, base + 1, base + 2],
            "floats": [base + 0.1, None, base + 0.3] if clients else None,
            "layers": {layer: base + i + 0.5 for i, layer in enumerate(LAYERS)},
        }[field.kind]
        if not evaluated and name.startswith("test_"):
            out[name] = None
    out["round"] = round
    return out


@pytest.mark.parametrize(
    "history",
    [
        [],
        [record(1)],
        [record(1, evaluated=False), record(2), record(3, evaluated=False)],
        [record(1, evaluated=False), record(2, evaluated=False)],
        [record(1, clients=False), record(2)],
        [record(1, clients=False), record(2, clients=False)],
    ],
)
def test_columns_and_records_are_inverse(history: list[Record]) -> None:
    table = metrics.columns(history)
    assert list(table) == list(FIELDS)
    assert all(len(column) == len(history) for column in table.values())
    back = metrics.records(table, LAYERS)
    assert back == history
    assert [list(r) for r in back] == [list(r) for r in history]
    for name, value in (back[0] if back else {}).items():
        kind = FIELDS[name].kind
        if value is not None:
            assert type(value) is {"int": int, "float": float, "layers": dict}.get(kind, list)
        if kind == "ints":
            assert all(type(x) is int for x in value)


@pytest.mark.parametrize("name", list(FIELDS))
def test_a_gap_in_any_column_is_a_gap_again(name: str) -> None:
    history = [record(1), record(2), record(3)]
    for r in history:  # whole numbers beside a gap are exact up to 2^53
        r[name] = r[name] if FIELDS[name].kind != "int" else r["round"]
    history[1][name] = None
    assert [r[name] for r in metrics.records(metrics.columns(history), LAYERS)] == [r[name] for r in history]


def test_types_of_columns() -> None:
    table = metrics.columns([record(1), record(2)])
    assert table["round"].dtype == table["participants"].dtype == np.int64
    assert table["participants"].shape == (2, 3)
    assert table["test_loss"].dtype == table["sparsity_by_layer"].dtype == np.float64
    gaps = metrics.columns([record(1, evaluated=False), record(2)])
    assert np.isnan(gaps["test_loss"]).tolist() == [True, False]


def test_every_field_says_what_it_is() -> None:
    for name, field in FIELDS.items():
        assert field.kind in ("int", "float", "ints", "floats", "layers"), name
        assert field.depends_on in ("config", "ranks", "clock"), name
        assert field.meaning
        if name.endswith(("_seconds", "_per_second")):
            assert field.depends_on == "clock"


def test_a_name_that_was_added_since_was_not_measured() -> None:
    table = metrics.columns([record(1), record(2)])
    for name in ("download_values_bytes", "transfer_seconds"):
        del table[name]
    for got, whole in zip(metrics.records(table, LAYERS), [record(1), record(2)], strict=True):
        assert list(got) == list(FIELDS)
        assert got == {**whole, "download_values_bytes": None, "transfer_seconds": None}


def test_bytes_of_the_exchange_depend_on_the_ranks_and_its_seconds_on_the_clock() -> None:
    kinds = ("values", "indices", "other", "frame")
    assert all(FIELDS[f"upload_{kind}_bytes"].depends_on == "config" for kind in kinds)
    assert all(FIELDS[f"download_{kind}_bytes"].depends_on == "ranks" for kind in kinds)
    assert FIELDS["transfer_seconds"].depends_on == FIELDS["exchange_seconds"].depends_on == "clock"


def test_a_line_is_json_even_for_numbers_that_json_lacks() -> None:
    odd = {"a": math.nan, "b": [1.5, math.inf, None], "c": {"x": -math.inf, "y": 2}, "d": 3, "e": "text"}

    def refuse(token: str) -> None:
        raise AssertionError(token)

    line = metrics.to_line(odd)
    assert "\n" not in line
    assert json.loads(line, parse_constant=refuse) == {
        "a": None, "b": [1.5, None, None], "c": {"x": None, "y": 2}, "d": 3, "e": "text",
    }  # fmt: skip


def test_the_file_holds_the_history_and_what_was_appended(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("rounds of a run that was cut off\n")
    file = MetricsFile(path, [record(1), record(2)])
    assert metrics.read(path) == [record(1), record(2)]
    file.append(record(3))
    assert metrics.read(path) == [record(1), record(2), record(3)]  # on disk before the file is closed
    file.close()
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_last_line_that_was_cut_is_left_out_wherever_it_was_cut(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first, last = metrics.to_line(record(1)) + "\n", metrics.to_line(record(2))
    for length in range(1, len(last), 7):
        path.write_text(first + last[:length])
        assert metrics.read(path) == [record(1)]
    path.write_text(first + last)
    assert metrics.read(path) == [record(1), record(2)]
    path.write_text("")
    assert metrics.read(path) == []


def test_a_cut_line_in_the_middle_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    line = metrics.to_line(record(1))
    path.write_text(line + "\n" + line[:30] + "\n" + line + "\n")
    with pytest.raises(json.JSONDecodeError):
        metrics.read(path)


# TensorBoard


def test_scalars_leave_out_what_is_no_number() -> None:
    row = record(3) | {"test_loss": math.nan, "client_accuracy": [0.5, None, 0.7], "sparsity_by_layer": {"a": 0.1}}
    found = metrics.scalars(row)
    assert "round" not in found and "participants" not in found and "test_loss" not in found
    assert found["client_accuracy/mean"] == pytest.approx(0.6) and found["client_accuracy/lowest"] == 0.5
    assert found["sparsity_by_layer/a"] == 0.1 and found["upload_bytes"] == row["upload_bytes"]
    assert (
        metrics.scalars(record(1, clients=False) | {"client_accuracy": [None]})
        .keys()
        .isdisjoint({"client_accuracy/mean"})
    )


def test_without_the_package_the_key_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(InputError, match=r'tensorboard: on needs the package.*pip install "feddip-mpi\[tensorboard\]"'):
        metrics.require_tensorboard()


def test_tensorboard_has_every_step_once_also_after_a_resume(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="the extra tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def rows(*rounds: int) -> list[Record]:
        return [record(1, clients=False) | {"round": r, "train_loss": float(r)} for r in rounds]

    def play(history: list[Record], new: list[Record]) -> None:
        sinks = metrics.open_sinks(tmp_path, tmp_path / "metrics.jsonl", history, tensorboard=True)
        for row in new:
            for sink in sinks:
                sink.append(row)
        for sink in sinks:
            sink.close()

    play([], rows(1, 2, 3, 4, 5))
    play(rows(1, 2, 3), rows(4, 5, 6))  # the checkpoint was that of round 3
    found = EventAccumulator(str(tmp_path / "tensorboard"), purge_orphaned_data=False)
    found.Reload()
    assert [(e.step, e.value) for e in found.Scalars("train_loss")] == [(r, float(r)) for r in range(1, 7)]
    assert set(found.Tags()["scalars"]) == set(metrics.scalars(rows(1)[0]))
    assert [row["round"] for row in metrics.read(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("kinds", "extra", "total", "besides"),
    [((70, 0, 20, 10), 50, 150, 50), ((100, 5, 20, 25), 50, 150, 0), ((90, 0, 0, 10), 0, 100, 0)],
)
def test_what_went_up_besides_updates_is_counted_once(
    kinds: tuple[int, ...], extra: int, total: int, besides: int
) -> None:
    """The second is a record of an older version: its four kinds hold all of it."""
    names = [f"upload_{kind}_bytes" for kind in ("values", "indices", "other", "frame")]
    record = {**dict(zip(names, kinds, strict=True)), "upload_extra_bytes": extra, "upload_bytes": total}
    assert metrics.bytes_besides(record) == besides
    assert sum(kinds) + besides == total


@pytest.mark.parametrize(
    ("sparsities", "counted"),
    [
        ([0.0, 0.853, 0.853, 0.946, 0.95, 0.95], [5, 6]),  # a short run: models before its last cuts are others
        ([0.0, *[0.95] * 6], [3, 4, 5, 6, 7]),  # five at most
        ([0.0, 0.9], [2]),
        ([0.0] * 3, [1, 2, 3]),  # dense
        (
            [0.97952, 0.97952, 0.97994, 0.97994, 0.98],
            [1, 2, 3, 4, 5],
        ),  # 100 rounds without a frozen end, rounds 92 to 100
        ([0.8, 0.9, 0.8], [1, 3]),  # a mask that grows
        ([], []),
    ],
)
def test_the_last_mean_is_of_one_sparsity(sparsities: list[float], counted: list[int]) -> None:
    history = [{"round": t, "sparsity": share, "test_accuracy": t / 10} for t, share in enumerate(sparsities, start=1)]
    history.insert(1, {"round": 0, "sparsity": 0.5, "test_accuracy": None})  # a round without an evaluation
    assert metrics.last_accuracies(history) == [t / 10 for t in counted]
