"""The plan: counts by hand, short runs, the choice of rows. That it equals a real run is in tests/e2e."""

import pytest

from feddip_mpi import codec, config, masks
from feddip_mpi.errors import InputError
from feddip_mpi.report import planning

BASE = (
    "{rounds: 12, clients: 4, participants: 2, mask: {every: 3, freeze_after: 1.0}, data: {name: synthetic}, "
    "upload: {values: fp32}}"
)


def plan(*overrides: str) -> tuple[config.Config, int, int, list[planning.Row]]:
    settings = config.parse(BASE, overrides)
    layout, rows = planning.make(settings)
    return settings, layout.prunable, layout.size - layout.prunable, rows


def test_rows_by_hand() -> None:
    _, prunable, other, rows = plan("upload.regrow=0", "sparsity.schedule=linear", "mask.initial=erk")
    assert [row["round"] for row in rows] == list(range(1, 13))
    assert [row["round"] for row in rows if row["mask_update"]] == [3, 6, 9, 12]
    asked = [0.5 + 0.4 * finished / 12 for finished in (3, 6, 9, 12)]
    kept = [masks.kept_count(prunable, s) for s in (0.5, *asked)]
    assert [row["kept"] for row in rows] == [kept[(t + 1) // 3] for t in range(12)]
    # A round is sent with the mask that it began with; the frame has a fixed length.
    assert [row["upload_bytes"] for row in rows] == [2 * (56 + 4 * (kept[t // 3] + other)) for t in range(12)]
    assert rows[-1]["total_bytes"] == sum(row["upload_bytes"] for row in rows)
    assert {row["dense_bytes"] for row in rows} == {2 * 4 * (prunable + other)}
    assert rows[-1]["sparsity"] == pytest.approx(0.9, abs=1e-5)


@pytest.mark.parametrize("values", ["fp32", "bf16", "int8", "int4"])
def test_rounds_that_regrow(values: str) -> None:
    _, prunable, other, rows = plan(
        "upload.regrow=0.1", f"upload.values={values}", "mask.initial=erk", "upload.regrow_schedule=constant",
    )  # fmt: skip
    kept = [masks.kept_count(prunable, 0.5), *(row["kept"] for row in rows)]
    for t, row in enumerate(rows):
        regrow = round(0.1 * kept[t]) if (t + 1) % 3 == 0 else 0
        assert row["regrow"] == regrow
        expected = codec.expected_bytes(codec.Upload(values, regrow=regrow), kept[t], prunable, prunable + other)
        assert row["upload_bytes"] == round(2 * expected)
        a_value = {"fp32": 4, "bf16": 2, "int8": 1 + 2 / 256, "int4": 0.5 + 2 / 64}[values]
        counted = 56 * (1 + (regrow > 0)) + a_value * (kept[t] + regrow) + 4 * other
        assert 2 * counted - 8 <= row["upload_bytes"] <= 2 * (counted + regrow) + 16  # at most a byte an index


def test_regrow_never_asks_for_more_than_is_pruned() -> None:
    _, prunable, _, rows = plan("upload.regrow=1000", "mask.initial=erk", "upload.regrow_rounds=all")
    kept = [masks.kept_count(prunable, 0.5), *(row["kept"] for row in rows)]
    assert rows[2]["regrow"] == prunable - kept[2]


@pytest.mark.parametrize("mode", ["dense", "dense_at_mask_updates"])
def test_dense_uploads_have_no_indices(mode: str) -> None:
    _, prunable, other, rows = plan(f"upload.mode={mode}", "mask.initial=erk")
    dense = [row["upload_bytes"] == 2 * (56 + 4 * (prunable + other)) for row in rows]
    assert dense == [mode == "dense" or row["mask_update"] for row in rows]
    assert not any(row["regrow"] for row in rows)


def test_dense_until_the_first_update() -> None:
    _, prunable, _, rows = plan("mask.initial=none")
    assert [row["kept"] for row in rows[:2]] == [prunable] * 2
    assert rows[1]["regrow"] == rows[0]["regrow"] == 0
    assert rows[2]["kept"] < prunable


def test_a_method_without_a_mask_keeps_everything() -> None:
    _, prunable, _, rows = plan("method=fedavg")
    assert {row["kept"] for row in rows} == {prunable}
    assert not any(row["mask_update"] for row in rows)
    assert {row["sparsity"] for row in rows} == {0.0}


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ("fedavg", "no mask: every weight is kept and travels"),
        ("snip", "one mask, made before the first round, stays: sparsity 0.9"),
        ("erk", "one mask, made before the first round, stays: sparsity 0.9"),
        ("feddst", "4 mask updates, the last in round 12; final sparsity 0.9"),
        ("feddip", "4 mask updates, the last in round 12; final sparsity 0.9"),
    ],
)
def test_what_is_said_of_the_mask(method: str, said: str) -> None:
    settings, _, _, rows = plan(f"method={method}")
    assert said in planning.summary(settings, rows)


def test_a_regrow_share_that_rounds_to_nothing_is_said() -> None:
    settings, prunable, _, rows = plan("upload.regrow=0.00001", "sparsity.final=0.999")
    text = planning.summary(settings, rows)
    assert "upload.regrow=1e-05 of so few kept weights rounds to 0 in all" in text
    assert not any(row["regrow"] for row in rows) and prunable > 0
    for fine in ("upload.regrow=0", "upload.regrow=0.1"):
        settings, _, _, rows = plan(fine)
        assert "rounds to 0" not in planning.summary(settings, rows)


def test_one_round() -> None:
    settings, _, _, rows = plan("rounds=1")
    assert len(rows) == 1 and rows[0]["mask_update"]
    assert "1 mask update" in planning.summary(settings, rows)
    assert planning.select(rows) == rows


def test_own_data_is_read_for_its_shape(tmp_path) -> None:
    with pytest.raises(InputError, match="no such file|cannot be read"):
        plan("data.name=npz", f"data.path={tmp_path / 'missing.npz'}")


@pytest.mark.parametrize("name", ["fashion-mnist", "mnist"])
def test_public_data_need_not_be_there(name: str, tmp_path) -> None:
    settings, _, _, rows = plan(f"data.name={name}", f"data.path={tmp_path}")
    assert len(rows) == settings.rounds


@pytest.mark.parametrize("rounds", [1, 2, 17, 18, 19, 1000])
@pytest.mark.parametrize("every", [1, 7, 2000])
def test_rows_fit_a_screen(rounds: int, every: int) -> None:
    rows = [{"round": t + 1, "mask_update": (t + 1) % every == 0} for t in range(rounds)]
    chosen = planning.select(rows)
    assert len(chosen) <= 18
    assert chosen[0] is rows[0] and chosen[-1] is rows[-1]
    assert [row["round"] for row in chosen] == sorted({row["round"] for row in chosen})


def test_every_nth_row() -> None:
    rows = [{"round": t + 1, "mask_update": False} for t in range(20)]
    assert [row["round"] for row in planning.select(rows, 5)] == [1, 5, 10, 15, 20]


def test_a_plan_says_where_it_is_an_estimate() -> None:
    def told(*overrides: str) -> str:
        settings, _, _, rows = plan(*overrides)
        return " ".join(planning.summary(settings, rows).split())

    assert "an estimate" not in told("method=prunefl")
    assert "how many weights are kept, also at the end, comes out" in told("method=prunefl", "prunefl.size=adaptive")
    assert "how many weights are kept, also at the end, comes out" in told(
        "method=prunetrain", "prunetrain.cut=threshold"
    )
    assert "how many weights are kept on the way comes out" in told("method=sparsyfed")
