"""What a start finds in its folder, and what it leaves there, without ranks and rounds."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from feddip_mpi import config, hdf5, session
from feddip_mpi.errors import InputError
from feddip_mpi.run_folder import RunFolder

SAVED = config.validate({"rounds": 4, "seed": 7})


def last_told(folder: Path) -> config.Config:
    found: Any = SimpleNamespace(config=SAVED, path=folder / "checkpoints" / "round-000004.h5")
    return session._last_told(RunFolder(folder), found)


def test_the_folder_says_what_a_resume_was_told_last(tmp_path: Path) -> None:
    assert last_told(tmp_path) == SAVED
    told = config.override(SAVED, ["rounds=9", "network.latency=5", "watchdog=none"], config.RESUMABLE_KEYS)
    (tmp_path / "config.yaml").write_text(config.to_yaml(told))
    assert last_told(tmp_path) == told


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("rounds: 9", "seed is 1, but 7 in round-000004.h5"),
        ("rounds: [", "not valid YAML"),
        ("{rounds: 0, seed: 7}", "rounds: got 0"),
        (b"\xff\xfe", "cannot read the configuration"),
    ],
)
def test_a_configuration_that_is_not_the_runs_is_refused(tmp_path: Path, text: str | bytes, said: str) -> None:
    (tmp_path / "config.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=said) as caught:
        last_told(tmp_path)
    assert "config.yaml" in str(caught.value) and "remove it, and `resume` goes on" in str(caught.value)


def test_a_finished_run_is_not_reopened_before_its_new_configuration_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder(tmp_path)
    folder.finished.touch()

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="space"):
        patch.setattr(hdf5, "write_text", refuse)
        session._reopen(folder, SAVED)
    assert folder.finished.exists()
    session._reopen(folder, SAVED)
    assert not folder.finished.exists() and config.load(folder.config) == SAVED
