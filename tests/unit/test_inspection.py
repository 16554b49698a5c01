"""What `inspect` and `verify` say of the folder of a job that goes on saving, and deleting, while they read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_checkpoint import saved, snapshot

from feddip_mpi import checkpoint, config, hdf5
from feddip_mpi.errors import InputError, UnreadableFileError
from feddip_mpi.report import inspection


def running(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> list[Path]:
    """Two checkpoints, of which the newer goes, for one still newer, when the function `name` first comes to it."""
    paths = [saved(folder, rounds) for rounds in (2, 4)]
    real = getattr(checkpoint, name)

    def meanwhile(path: Path) -> Any:
        if path == paths[1] and path.exists():
            saved(folder, 6)
            path.unlink()
        return real(path)

    monkeypatch.setattr(checkpoint, name, meanwhile)
    return paths


def test_verify_passes_over_what_a_running_job_deletes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    old, gone = running(tmp_path, monkeypatch, "verify")
    assert inspection.verify([str(tmp_path)]) == 1
    assert f"OK       {old}" in capsys.readouterr().out
    with pytest.raises(InputError, match="cannot be checked"):  # who names a file wants that one
        inspection.verify([str(gone)])


def test_verify_tells_what_it_has_read_also_where_that_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, real = saved(tmp_path, 4), checkpoint.verify

    def then_delete(path: Path) -> Any:
        found = real(path)
        path.unlink()
        return found

    monkeypatch.setattr(checkpoint, "verify", then_delete)
    assert inspection.verify([str(path)]) == 1


def test_inspect_takes_the_newest_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    running(tmp_path, monkeypatch, "residual_bytes")
    assert inspection.describe(tmp_path)["checkpoint"].endswith("round-000006.h5")


def test_a_file_that_cannot_be_read_is_not_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path, 4)

    def stale(path: Path) -> None:
        raise UnreadableFileError(f"{path}: cannot be read now")

    monkeypatch.setattr(hdf5, "check_seal", stale)
    with pytest.raises(InputError, match="1 of 1 cannot be checked"):
        inspection.verify([str(tmp_path)])


def test_verify_refuses_another_runs_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "checkpoints").mkdir()
    path, settings = saved(tmp_path / "checkpoints", 4), tmp_path / "config.yaml"
    settings.write_text(config.to_yaml(config.override(snapshot().config, ["rounds=500"], config.RESUMABLE_KEYS)))
    assert inspection.verify([str(tmp_path)]) == inspection.verify([str(path)]) == 1
    settings.write_text("{clients: 3, participants: 2, seed: 5}")
    for named in (tmp_path, path):
        with pytest.raises(InputError, match="1 of 1 cannot be checked"):
            inspection.verify([str(named)])
        assert f"seed is 5, but {2**62 + 1} in round-000004.h5" in capsys.readouterr().out
