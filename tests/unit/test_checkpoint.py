"""Checkpoints: bit for bit, damaged ones refused by name, old ones deleted with care."""

import os
import random
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from alone import Alone
from torch import nn

from feddip_mpi import checkpoint, config, federation, hdf5, metrics, server
from feddip_mpi.checkpoint import Loaded, Snapshot
from feddip_mpi.errors import DamagedFileError, FeddipError, InputError, UnreadableFileError
from feddip_mpi.residuals import Residual
from feddip_mpi.schedules import participants
from feddip_mpi.vector import Layout, flatten

LAYERS = ["3.weight", "0.weight"]


def history(rounds: int) -> list[metrics.Record]:
    """Records of rounds of which every second was evaluated."""
    kinds = {"int": 3, "float": 0.1, "ints": [0, 4], "floats": [0.5, None, 0.25], "layers": dict.fromkeys(LAYERS, 0.3)}
    records = []
    for round in range(1, rounds + 1):
        record = {name: kinds[field.kind] for name, field in metrics.FIELDS.items()}
        record |= {"round": round, "train_loss": 0.1 * round}
        if round % 2:
            record |= {"test_loss": None, "test_accuracy": None, "test_accuracy_top5": None, "client_accuracy": None}
        records.append(record)
    return records


def snapshot(rounds: int = 4, seed: int = 0, **settings: object) -> Snapshot:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 3))
    layout = Layout.of(model, LAYERS)
    weights = flatten(model, layout)
    # Values that a careless conversion would lose.
    weights[:4] = torch.tensor([-0.0, 1e-45, 3.4e38, float("nan")])
    mask = torch.rand(layout.prunable) < 0.4
    return Snapshot(
        config=config.validate({"clients": 3, "participants": 2, "seed": 2**62 + 1, **settings}),
        layout=layout,
        server=server.Server.of(rounds, weights, mask),
        history=history(rounds),
        identity="synthetic 60x1x4x4 0123abcd",
        histogram=np.arange(9).reshape(3, 3),
        input_shape=(1, 4, 4),
        classes=3,
        created="2026-01-02T03:04:05+0000",
        mean=(0.1,),
        std=(0.3,),
        class_names=("cat", "Katze", "ねこ"),
        memories={"reference": np.linspace(-1, 1, 42, dtype=np.float32), "owed": np.array([1e-45, -0.0], np.float32)},
    )


def residuals() -> list[tuple[int, Residual]]:
    sparse, dense = torch.zeros(42), torch.randn(42, generator=torch.Generator().manual_seed(1))
    sparse[[0, 7, 41]] = torch.tensor([1e-45, -3.0, 2.5])
    return [(0, Residual(sparse, 3)), (2, Residual(dense, 1)), (10, Residual(torch.ones(42), 2))]


def saved(folder: Path, rounds: int = 4, **settings: object) -> Path:
    path = checkpoint.path_of(folder, rounds)
    checkpoint.save(path, snapshot(rounds, **settings), residuals())
    return path


def content(path: Path) -> bytes:
    """All that a resume takes from a checkpoint, as bytes that are equal only for equal bits."""
    loaded = checkpoint.load(path)
    parts = [
        repr((loaded.config, loaded.server.round, loaded.layout_names, loaded.prunable_names, loaded.parameter_count)),
        repr((loaded.history, loaded.identity, loaded.input_shape, loaded.classes, loaded.created, loaded.saved)),
        repr((loaded.versions, loaded.digest, loaded.mean, loaded.std, loaded.class_names)),
    ]
    arrays = [loaded.server.weights.numpy(), loaded.server.mask.numpy(), loaded.histogram]
    arrays += [*loaded.tensors.values(), *loaded.masks.values()]
    parts.append(repr(sorted(loaded.memories)))
    arrays += [loaded.memories[name] for name in sorted(loaded.memories)]
    for client, residual in checkpoint.read_residuals(path):
        parts.append(repr((client, residual.round)))
        arrays.append(residual.values.numpy())
    return b"".join([*(part.encode() for part in parts), *(array.tobytes() for array in arrays)])


def test_round_trip_bit_for_bit(tmp_path: Path) -> None:
    given = snapshot()
    path = saved(tmp_path)
    loaded = checkpoint.load(path)
    assert loaded.server.round == 4
    assert loaded.server.weights.numpy().tobytes() == given.server.weights.numpy().tobytes()
    assert loaded.server.weights.dtype == torch.float32
    assert torch.equal(loaded.server.mask, given.server.mask) and loaded.server.mask.dtype == torch.bool
    assert loaded.history == given.history
    assert loaded.config == given.config
    assert np.array_equal(loaded.histogram, given.histogram)
    assert loaded.layout_names == given.layout.names
    assert (loaded.prunable_names, loaded.parameter_count) == (tuple(LAYERS), given.layout.parameter_tensors)
    for name in ("identity", "input_shape", "classes", "created", "mean", "std", "class_names"):
        assert getattr(loaded, name) == getattr(given, name)
    for name, view in zip(given.layout.names, given.layout.views(given.server.weights), strict=True):
        assert loaded.tensors[name].shape == tuple(view.shape)
        assert loaded.tensors[name].tobytes() == view.numpy().tobytes()
    for name, part in zip(LAYERS, given.layout.views(given.server.mask), strict=False):
        assert np.array_equal(loaded.masks[name], part.numpy())
    assert path.name == "round-000004.h5"
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_residuals_come_back_bit_for_bit_in_both_forms(tmp_path: Path) -> None:
    path = saved(tmp_path)
    back = list(checkpoint.read_residuals(path))
    assert [(client, residual.round) for client, residual in back] == [(0, 3), (2, 1), (10, 2)]
    for (_, got), (_, given) in zip(back, residuals(), strict=True):
        assert got.values.numpy().tobytes() == given.values.numpy().tobytes()
    with hdf5.open_file(path) as reader:
        assert "clients/0/residual/indices" in reader.names()  # few values: with indices
        assert "clients/2/residual/indices" not in reader.names()
    assert checkpoint.residual_bytes(path) == {0: 3 * 4 + 3 * 4, 2: 42 * 4, 10: 42 * 4}
    assert list(checkpoint.residual_rounds(path).items()) == [(c, r.round) for c, r in checkpoint.read_residuals(path)]


def test_a_file_is_listed_once_however_many_clients_have_a_residual(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, left = tmp_path / "round-000004.h5", torch.ones(42)
    checkpoint.save(path, snapshot(), [(client, Residual(left, 1)) for client in range(20)])
    real, listed = hdf5._datasets, []
    monkeypatch.setattr(hdf5, "_datasets", lambda file: listed.append(file) or real(file))
    assert len(list(checkpoint.read_residuals(path))) == 20
    assert len(listed) == 1, "a listing opens every object of the file: once for each client would be quadratic"


def test_what_the_server_remembers_comes_back_bit_for_bit(tmp_path: Path) -> None:
    given = snapshot()
    loaded = checkpoint.load(saved(tmp_path))
    assert set(loaded.memories) == {"reference", "owed"}
    for name, values in given.memories.items():
        assert loaded.memories[name].dtype == np.float32
        assert loaded.memories[name].tobytes() == values.tobytes()
    for memories in ({}, {"owed": np.zeros(0, np.float32)}):
        checkpoint.save(tmp_path / "other.h5", replace(given, memories=memories), [])
        assert {name: v.size for name, v in checkpoint.load(tmp_path / "other.h5").memories.items()} == {
            name: v.size for name, v in memories.items()
        }


def test_other_memories_are_another_state(tmp_path: Path) -> None:
    given = snapshot()
    other = {**given.memories, "owed": np.array([1e-45, 0.0], np.float32)}
    digests = {checkpoint.save(tmp_path / "a.h5", replace(given, memories=m), []) for m in (given.memories, other, {})}
    assert len(digests) == 3


@pytest.mark.parametrize("missing", ["transfer_seconds", "download_frame_bytes", "sparsity"])
def test_a_file_of_an_earlier_version_lacks_a_name_and_no_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    monkeypatch.setattr(metrics, "FIELDS", {name: f for name, f in metrics.FIELDS.items() if name != missing})
    path = saved(tmp_path)
    monkeypatch.undo()
    expected = [{**record, missing: None} for record in snapshot().history]
    assert checkpoint.load(path).history == expected


@pytest.mark.parametrize("share", [0.0, 0.1, 0.49, 0.5, 0.51, 1.0])
def test_residuals_of_any_density(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: float) -> None:
    monkeypatch.setattr(checkpoint, "_PART", 7)  # several parts, the last of them shorter
    values = torch.zeros(100)
    values[torch.randperm(100)[: round(100 * share)]] = torch.rand(round(100 * share)) + 0.5
    checkpoint.save(tmp_path / "round-000004.h5", snapshot(), [(1, Residual(values, 0))])
    ((client, back),) = checkpoint.read_residuals(tmp_path / "round-000004.h5")
    assert client == 1 and torch.equal(back.values, values)


def test_a_checkpoint_before_the_first_round(tmp_path: Path) -> None:
    given = replace(snapshot(0), history=[], class_names=(), mean=(), std=())
    checkpoint.save(tmp_path / "round-000000.h5", given, [])
    loaded = checkpoint.load(tmp_path / "round-000000.h5")
    assert loaded.history == [] and loaded.class_names == () and loaded.server.round == 0
    assert list(checkpoint.read_residuals(tmp_path / "round-000000.h5")) == []


def test_equal_state_gives_equal_arrays_and_other_state_another_digest(tmp_path: Path) -> None:
    digests = [checkpoint.save(tmp_path / f"{seed}.h5", snapshot(seed=seed), residuals()) for seed in (0, 1)]
    assert digests[0] != digests[1]
    datasets, loaded = checkpoint.verify(tmp_path / "0.h5")
    assert loaded.digest == digests[0]
    with hdf5.open_file(tmp_path / "0.h5") as reader:
        assert datasets == len(reader.names())


def load_all(path: Path) -> bytes | None:
    """The content, or None where the file is refused; any other exception is a failed test."""
    try:
        return content(path)
    except DamagedFileError as error:
        assert str(path) in str(error)
        return None


def test_truncation_anywhere_is_noticed(tmp_path: Path) -> None:
    path = saved(tmp_path)
    whole = path.read_bytes()
    lengths = [*random.Random(0).sample(range(len(whole)), 30), 0, 1, 8, 100, len(whole) - 1]
    for length in lengths:
        path.write_bytes(whole[:length])
        assert load_all(path) is None, length


def test_a_flipped_byte_anywhere_is_noticed(tmp_path: Path) -> None:
    path = saved(tmp_path, rounds=2)
    whole = path.read_bytes()
    for position in {*random.Random(1).sample(range(len(whole)), 200), *range(0, 600, 3), len(whole) - 1}:
        altered = bytearray(whole)
        altered[position] ^= 1 + position % 255
        path.write_bytes(altered)
        assert load_all(path) is None, position


def test_every_part_is_under_a_checksum_of_its_own(tmp_path: Path) -> None:
    """Also when the file as a whole is sealed: a part that was wrong before it was written is found and named."""
    path = saved(tmp_path, rounds=2)
    whole = path.read_bytes()
    with h5py.File(path, "r") as file:
        found: dict[str, int] = {}
        file.visititems(
            lambda name, node: found.__setitem__(name, node.id.get_offset()) if getattr(node, "nbytes", 0) else None
        )
    assert len(found) > 40
    for name, offset in found.items():
        altered = bytearray(whole)
        altered[offset] ^= 1
        path.write_bytes(altered)
        hdf5._seal(path)
        with pytest.raises(DamagedFileError, match=f"'{name}' does not match its checksum"):
            checkpoint.verify(path)


def test_newest_takes_the_last_that_verifies_and_says_why_others_were_refused(tmp_path: Path) -> None:
    paths = [saved(tmp_path, rounds) for rounds in (2, 4, 6, 8)]
    (tmp_path / "round-000009.h5.tmp").write_bytes(b"not one of ours")
    (tmp_path / ".round-000010.h5.tmp-77").write_bytes(b"half written")
    assert checkpoint.newest(tmp_path)[0].server.round == 8
    assert checkpoint.newest(tmp_path)[1] == []
    paths[3].write_bytes(paths[3].read_bytes()[:5000])
    damaged = bytearray(paths[2].read_bytes())
    with h5py.File(paths[2], "r") as file:
        damaged[file["model/parameters/3.weight"].id.get_offset()] ^= 1
    paths[2].write_bytes(damaged)
    loaded, refused = checkpoint.newest(tmp_path)
    assert loaded.server.round == 4
    assert len(refused) == 2
    assert str(paths[3]) in refused[0] and "truncated or damaged" in refused[0]
    assert str(paths[2]) in refused[1] and "does not match its checksum" in refused[1]
    for path in paths[:2]:
        path.write_bytes(b"")
    with pytest.raises(DamagedFileError) as caught:
        checkpoint.newest(tmp_path)
    assert all(str(path) in str(caught.value) for path in paths)


class Failing:
    """Calls that fail so many times for a file, then go through."""

    def __init__(self, real: Callable[..., Any], name: str, error: BaseException, times: int) -> None:
        self.real, self.name, self.error, self.left = real, name, error, times

    def __call__(self, path: Path, *arguments: Any, **options: Any) -> Any:
        if Path(path).name == self.name and self.left > 0:
            self.left -= 1
            raise self.error
        return self.real(path, *arguments, **options)

    def method(self) -> Callable[..., Any]:
        """The same as a function, which in the place of a method is handed its object."""
        return lambda *arguments, **options: self(*arguments, **options)


STALE = OSError(116, "Stale file handle")
# As h5py says it.
IN_HDF5 = KeyError(
    "Unable to open object (file read failed: errno = 5, error message = 'Input/output error', offset = 9)"
)


@pytest.mark.parametrize(
    ("owner", "name", "error", "said"),
    [
        (hdf5, "open", STALE, "Stale file handle"),
        (hdf5, "open", MemoryError(), "not enough memory"),
        (Path, "stat", STALE, "Stale file handle"),
        (h5py, "File", OSError(5, "errno = 5, error message = 'Input/output error', offset = 9"), "Input/output error"),
        (h5py, "File", IN_HDF5, "Input/output error"),
    ],
)
def test_what_cannot_be_read_now_is_not_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, error: BaseException, said: str
) -> None:
    """It is tried again, and nothing older takes its place."""
    path = [saved(tmp_path, rounds) for rounds in (2, 4)][-1]
    monkeypatch.setattr(checkpoint, "_PAUSES", (0.0, 0.0, 0.0))
    real = getattr(owner, name, open)
    for times in (1, 3):
        failing = Failing(real, path.name, error, times)
        monkeypatch.setattr(owner, name, failing.method(), raising=False)
        assert checkpoint.newest(tmp_path)[0].server.round == 4 and failing.left == 0
    monkeypatch.setattr(owner, name, Failing(real, path.name, error, 4).method(), raising=False)
    with pytest.raises(UnreadableFileError, match=rf"round-000004.h5: cannot be read now \({said}\)") as caught:
        checkpoint.newest(tmp_path)
    assert caught.value.exit_code == 1


def test_newest_looks_again_where_files_go_while_it_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody who inspects a running job has listed a file that is deleted before he opens it."""
    old = [saved(tmp_path, rounds) for rounds in (2, 4)]
    listed, looked = checkpoint.listed, []

    def then_saved(folder: Path) -> list[Path]:
        found = listed(folder)
        if not looked:
            saved(tmp_path, 6)
            for path in old:
                path.unlink()
        looked.append(found)
        return found

    monkeypatch.setattr(checkpoint, "listed", then_saved)
    found, refused = checkpoint.newest(tmp_path)
    assert looked[0] == old and found.server.round == 6 and refused == []


def test_newest_of_nothing_is_wrong_input(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(InputError, match="no checkpoint"):
            checkpoint.newest(folder)


def test_newest_goes_by_the_number_in_the_name(tmp_path: Path) -> None:
    for rounds in (1_000_000, 999_999, 2):
        saved(tmp_path, 4).rename(checkpoint.path_of(tmp_path, rounds))
    assert [path.name for path in checkpoint.listed(tmp_path)] == [
        "round-000002.h5", "round-999999.h5", "round-1000000.h5",
    ]  # fmt: skip


def test_find_takes_a_file_a_run_folder_or_a_folder_of_checkpoints(tmp_path: Path) -> None:
    inside = tmp_path / "checkpoints"
    inside.mkdir()
    path = saved(inside)
    assert [checkpoint.find(p)[0].path for p in (path, inside, tmp_path)] == [path] * 3
    with pytest.raises(InputError):
        checkpoint.find(tmp_path / "nothing")


def test_a_file_of_another_kind_is_wrong_input_and_not_damage(tmp_path: Path) -> None:
    """Where the user has named it; under a checkpoint's name, and in a run's folder, it is damage: older ones are taken."""
    inside = tmp_path / "checkpoints"
    inside.mkdir()
    whole = saved(inside)
    with h5py.File(tmp_path / "foreign.h5", "w") as file:
        file["weights"] = np.ones(3)
    np.savez(tmp_path / "model.npz", x=np.ones(2))
    (tmp_path / "config.yaml").write_text("rounds: 3\n")
    for name, kind in (("foreign.h5", "an HDF5 file"), ("model.npz", "a zip file"), ("config.yaml", "a text file")):
        with pytest.raises(
            InputError, match=f"{name}: is {kind}.* and no checkpoint; name one such as {whole}, or a run folder"
        ):
            checkpoint.find(tmp_path / name)
    content = whole.read_bytes()
    for damaged in (b"", b"rounds: 3\n"):
        whole.write_bytes(damaged)
        with pytest.raises(DamagedFileError):
            checkpoint.find(whole)
    for name, damaged in (
        ("head", b"?" + content[1:]),
        ("seal", content[:512]),
        ("empty", b""),
        ("noise", bytes(range(256))),
    ):
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(DamagedFileError):
            checkpoint.find(tmp_path / name)


def test_a_newer_format_is_wrong_input_and_not_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path, 2)
    monkeypatch.setattr(checkpoint, "FORMAT_VERSION", 2)
    path = saved(tmp_path, 4)
    monkeypatch.undo()
    for read in (checkpoint.load, checkpoint.verify):
        with pytest.raises(InputError, match="format 2 is newer.*update the package"):
            read(path)
    with pytest.raises(InputError, match="is newer"):  # falling back to round 2 would throw rounds away
        checkpoint.newest(tmp_path)


def test_a_file_by_the_name_of_another_round_is_refused(tmp_path: Path) -> None:
    older, newer = saved(tmp_path, 2), saved(tmp_path, 4)
    newer.rename(checkpoint.path_of(tmp_path, 9))
    found, (refused,) = checkpoint.newest(tmp_path)
    assert (
        found.path == older and "round-000009.h5: its name is another round's, it holds round 4: rename it" in refused
    )
    with pytest.raises(DamagedFileError, match="holds round 4"):
        checkpoint.verify(checkpoint.path_of(tmp_path, 9))
    copy = checkpoint.path_of(tmp_path, 9).rename(tmp_path / "mine.h5")  # other names say nothing of a round
    assert checkpoint.load(copy).server.round == 4


def test_a_damaged_format_version_is_damage(tmp_path: Path) -> None:
    saved(tmp_path, 2)
    path = saved(tmp_path, 4)
    with h5py.File(path, "r+") as file:
        file.attrs["format_version"] = 257
    hdf5._seal(path)
    with pytest.raises(DamagedFileError):
        checkpoint.load(path)
    loaded, refused = checkpoint.newest(tmp_path)
    assert loaded.server.round == 2 and len(refused) == 1


def test_files_that_are_no_checkpoints(tmp_path: Path) -> None:
    path = tmp_path / "round-000004.h5"
    with pytest.raises(InputError, match="no such file"):
        checkpoint.load(path)
    for text in (b"", b"rounds: 3\n"):
        path.write_bytes(text)
        with pytest.raises(DamagedFileError):
            checkpoint.load(path)
    with h5py.File(path, "w") as file:
        file["weights"] = np.ones(3)
    with pytest.raises(DamagedFileError):
        checkpoint.load(path)
    hdf5.write(path, [], {"by": "another program"})  # complete and consistent, but none of ours
    with pytest.raises(DamagedFileError, match="not a checkpoint of this program"):
        checkpoint.load(path)
    hdf5.write(path, [], {"format_version": 1})
    with pytest.raises(DamagedFileError):
        checkpoint.load(path)


def test_a_save_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path)
    before = path.read_bytes()

    def interrupted():
        yield residuals()[0]
        raise FeddipError("a rank is gone")

    with pytest.raises(FeddipError):
        checkpoint.save(path, snapshot(seed=1), interrupted())

    def refuse(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hdf5.os, "fsync", refuse)
    with pytest.raises(OSError, match="space"):
        checkpoint.save(path, snapshot(seed=1), residuals())
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def scored(folder: Path, round: int, accuracy: float | None, sparsity: float) -> None:
    given = snapshot(round)
    mask = torch.arange(42) >= int(42 * sparsity)
    history = [{**given.history[-1], "test_accuracy": accuracy}] if round else []
    state = server.Server.of(given.server.round, given.server.weights, mask)
    checkpoint.save(checkpoint.path_of(folder, round), replace(given, server=state, history=history), [])


@pytest.mark.parametrize(
    ("keep", "best", "left"),
    [
        (1, False, [7]),
        (3, False, [5, 6, 7]),
        (9, False, [1, 2, 3, 4, 5, 6, 7]),
        (1, True, [4, 7]),
        (4, True, [4, 5, 6, 7]),
    ],
)
def test_the_newest_and_the_best_at_the_final_sparsity_are_kept(
    tmp_path: Path, keep: int, best: bool, left: list[int]
) -> None:
    # Rounds 1 and 2 are better but not yet as sparse; 4 beats 3 and 5; 6 was not evaluated.
    for round, (accuracy, sparsity) in enumerate(
        [(0.99, 0.2), (0.95, 0.4), (0.8, 0.5), (0.9, 0.5), (0.85, 0.5), (None, 0.5), (0.7, 0.5)], start=1
    ):
        scored(tmp_path, round, accuracy, sparsity)
    (tmp_path / ".round-000008.h5.tmp-4242").write_bytes(b"left by a killed process")
    (tmp_path / "notes.txt").write_text("the user's own")
    checkpoint.prune_old(tmp_path, keep, best, 0.5, 7)
    assert [path.name for path in checkpoint.listed(tmp_path)] == [f"round-{r:06d}.h5" for r in left]
    assert sorted(entry.name for entry in tmp_path.iterdir() if entry.name[-1] != "5") == ["notes.txt"]


def test_of_equally_good_checkpoints_the_newest_is_kept_and_damaged_ones_do_not_count(tmp_path: Path) -> None:
    for round in (1, 2, 3, 4, 5):
        scored(tmp_path, round, 0.9 if round < 4 else 0.1, 0.5)
    checkpoint.path_of(tmp_path, 3).write_bytes(b"damaged")
    checkpoint.prune_old(tmp_path, 1, True, 0.5, 5)
    assert [path.name for path in checkpoint.listed(tmp_path)] == ["round-000002.h5", "round-000005.h5"]


def test_an_old_checkpoint_that_cannot_be_read_may_be_the_best_and_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for round in (1, 2, 3, 4):
        scored(tmp_path, round, 0.9 - 0.1 * round, 0.5)
    stat = Path.stat

    def stale(path: Path, **options: bool) -> os.stat_result:
        if path.name == "round-000002.h5":
            raise OSError(116, "Stale file handle")
        return stat(path, **options)

    monkeypatch.setattr(Path, "stat", stale)
    checkpoint.prune_old(tmp_path, 1, True, 0.5, 4)
    monkeypatch.undo()
    assert [path.name for path in checkpoint.listed(tmp_path)] == [f"round-{r:06d}.h5" for r in (1, 2, 4)]
    assert "round-000002.h5: cannot be tidied up (Stale file handle)" in caplog.text


def test_damaged_checkpoints_that_a_run_went_back_behind_do_not_push_good_ones_out(tmp_path: Path) -> None:
    for round in (2, 3, 4, 6):
        scored(tmp_path, round, 0.5, 0.5)
    for round in (4, 6):
        checkpoint.path_of(tmp_path, round).write_bytes(b"damaged")
    checkpoint.prune_old(tmp_path, 1, False, 0.5, 3)
    found, refused = checkpoint.newest(tmp_path)
    assert found.path.name == "round-000003.h5" and len(refused) == 2
    checkpoint.prune_old(tmp_path, 1, False, 0.5, 6)
    assert [path.name for path in checkpoint.listed(tmp_path)] == ["round-000006.h5"]


def test_check_model_names_the_first_tensor_that_differs(tmp_path: Path) -> None:
    loaded: Loaded = checkpoint.load(saved(tmp_path))
    checkpoint.check_model(loaded, snapshot().layout)
    wider = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 4))
    with pytest.raises(InputError, match=r"since \(3.weight: \[3, 8\] there, \[4, 8\] now\); take the code"):
        checkpoint.check_model(loaded, Layout.of(wider, LAYERS))
    with pytest.raises(InputError, match="has changed since"):
        checkpoint.check_model(loaded, Layout.of(wider, LAYERS[::-1]))


def test_a_file_of_the_first_program_with_format_1_loads(tmp_path: Path) -> None:
    """golden/format-1.h5 was written before int32 indices and `checkpoint.background`; it stays as it is."""
    golden = Path(__file__).with_name("golden") / "format-1.h5"
    checkpoint.verify(golden)
    loaded = checkpoint.load(golden)
    assert zlib.crc32(loaded.server.weights.numpy().tobytes()) == 1439054773
    assert zlib.crc32(loaded.server.mask.numpy().tobytes()) == 2612361971
    assert (loaded.server.round, loaded.identity) == (4, "synthetic 60x1x12x12 9f747ce9")
    assert [record["round"] for record in loaded.history] == [1, 2, 3, 4]
    assert loaded.history[-1]["test_accuracy"] == pytest.approx(0.3) and loaded.history[0]["test_accuracy"] is None
    assert loaded.class_names == ("pattern 0", "pattern 1", "pattern 2")
    with h5py.File(golden) as file:
        assert "background" not in file.attrs["config"] and file["clients/0/residual/indices"].dtype == np.int64
    assert loaded.config.checkpoint.background is True  # what it lacks has its default
    residuals = [(c, r.round, zlib.crc32(r.values.numpy().tobytes())) for c, r in checkpoint.read_residuals(golden)]
    assert residuals == [(0, 3, 13623658), (1, 2, 1177109853), (2, 3, 1257319550)]
    _, layout = federation.build_model(loaded.config, loaded.input_shape, loaded.classes)
    checkpoint.check_model(loaded, layout)


def test_what_a_file_of_the_first_program_was_trained_on_is_drawn_again() -> None:
    golden = Path(__file__).with_name("golden") / "format-1.h5"
    loaded = checkpoint.load(golden)
    built = federation.build(loaded.config, Alone(), torch.device("cpu"))
    assert built.identity == loaded.identity
    with h5py.File(golden) as file:
        assert np.array_equal(built.partition.histogram(built.dataset.train_labels, 3), file["partition/histogram"])
    drawn = [list(participants(loaded.config, record["round"] - 1)) for record in loaded.history]
    assert drawn == [record["participants"] for record in loaded.history]


@pytest.mark.parametrize("version", [0, -1])
def test_a_format_that_never_was_is_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: int) -> None:
    monkeypatch.setattr(checkpoint, "FORMAT_VERSION", version)
    path = saved(tmp_path)
    monkeypatch.undo()
    with pytest.raises(DamagedFileError, match=f"format_version {version}; the first is 1"):
        checkpoint.load(path)


def test_what_is_no_file_does_not_hide_older_checkpoints(tmp_path: Path) -> None:
    saved(tmp_path, 2)
    checkpoint.path_of(tmp_path, 4).mkdir()
    checkpoint.path_of(tmp_path, 6).symlink_to("nothing.h5")
    os.mkfifo(checkpoint.path_of(tmp_path, 8))  # opening it would wait for ever
    loaded, refused = checkpoint.newest(tmp_path)
    assert loaded.server.round == 2
    assert [Path(text.split(":")[0]).name for text in refused] == [f"round-{r:06d}.h5" for r in (8, 6, 4)]
    assert all("no file" in text for text in refused)
