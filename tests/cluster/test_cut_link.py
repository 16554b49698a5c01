"""A network link that goes down while a run exchanges: nobody reports it, so the watchdog has to."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import launch
import pytest
import runs
from hosts import PROGRAMS, Hosts

pytestmark = pytest.mark.cluster

WATCHDOG_SECONDS = 5
# Ranks that wait give the one that is stuck a quarter more; one whose MPI library is stuck itself ends 5 seconds later.
LIMIT_SECONDS = 1.25 * WATCHDOG_SECONDS + 5 + 5


def ranks(hosts: Hosts) -> list[int]:
    """Ids of the ranks' processes on all hosts."""
    found = []
    for pid in hosts.processes():
        try:
            if b"OMPI_COMM_WORLD_RANK=" in Path(f"/proc/{pid}/environ").read_bytes():
                found.append(pid)
        except OSError:
            continue
    return found


def test_a_cut_link_ends_all_ranks_and_the_run_goes_on(
    make_hosts: Callable[[int, str], Hosts], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(PROGRAMS), os.environ.get("PYTHONPATH", "")]))
    config, slow, run, never = (tmp_path / name for name in ("empty.yaml", "slow", "run", "never"))
    config.write_text("")
    slow.touch()
    changes = {"model__name": "patient_models:patient", "rounds": 12, "watchdog": WATCHDOG_SECONDS}
    hosts = make_hosts(3, "none")
    extra = {"FEDDIP_TEST_SLOW": str(slow), "FEDDIP_TEST_SLEEP": "0.03", "FEDDIP_TEST_FREE": "0"}
    with hosts.start([*launch.FEDDIP, *runs.train(config, run, **changes)], seconds=90, extra=extra) as job:
        job.wait_until(lambda: len(runs.lines(run)) >= 3)
        assert len(ranks(hosts)) == 3
        subprocess.run(["ip", "-n", hosts.names[2], "link", "set", "eth0", "down"], check=True, timeout=60)
        cut = time.monotonic()
        while (left := ranks(hosts)) and time.monotonic() < cut + LIMIT_SECONDS:
            time.sleep(0.1)
        assert not left, f"{len(left)} ranks are still there {LIMIT_SECONDS} s after the cut:\n{job.text}"
        print(f"all ranks ended {time.monotonic() - cut:.1f} s after the cut")
        # mpirun may wait for its daemon beyond the cut; where it has ended, it says that something went wrong.
        assert job.process.poll() != 0
        assert f"waits for another rank: no progress for {WATCHDOG_SECONDS} s" in job.text
    assert not (run / "finished.json").exists()
    slow.unlink()
    launch.run([*launch.FEDDIP, "resume", str(run)]).expect(0)
    launch.run([*launch.FEDDIP, *runs.train(config, never, **changes)]).expect(0)
    runs.assert_equal(never, run)
