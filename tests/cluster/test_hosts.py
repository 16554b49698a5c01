"""`benchmarks/hosts.sh`: links carry what was sent and no faster than they may, hosts count as nodes, nothing is left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hosts import PROGRAMS, SCRIPT, Hosts, Result

pytestmark = pytest.mark.cluster

Make = Callable[[int, str], Hosts]
TRAFFIC = str(PROGRAMS / "traffic.py")
KIB = 1024


def printed(result: Result) -> Any:
    """The one line of JSON among what the job printed; mpirun may add remarks."""
    (line,) = [line for line in result.text.splitlines() if line.startswith(("{", "[{", "[["))]
    return json.loads(line)


@pytest.mark.parametrize("step", ["ring", "gather"])
def test_interfaces_count_what_was_sent(make_hosts: Make, step: str) -> None:
    """Every payload byte crosses the receiver's interface once, and little else does."""
    done = make_hosts(4, "none").run([TRAFFIC, step, "1000000"]).expect(0)
    payload = printed(done)["received"]
    assert len(payload) == 4 and min(payload) >= 1_000_000
    received = [traffic.received for traffic in done.traffic]
    assert all(counted >= sent for counted, sent in zip(received, payload, strict=True))
    for counted in (sum(received), sum(traffic.sent for traffic in done.traffic)):
        assert sum(payload) <= counted <= 1.05 * sum(payload) + 64 * KIB


@pytest.mark.parametrize("step", ["ring", "gather", "to_first", "from_first"])
def test_links_take_their_time(make_hosts: Make, step: str) -> None:
    """No link carries more than its rate allows: one direction is the narrowest in `to_first`, the other in `from_first`."""
    hosts = make_hosts(3, "100mbit")
    measured = printed(hosts.run([TRAFFIC, step, "1000000"]).expect(0))
    narrowest = (sum if step == "from_first" else max)(measured["received"])
    # What the token bucket lets pass at once and the messages before the clock started are far below 64 KiB.
    assert measured["seconds"] >= (narrowest - 64 * KIB) * 8 / 100e6


def test_the_rate_changes_without_new_hosts(make_hosts: Make) -> None:
    hosts = make_hosts(2, "none")
    before = hosts.traffic()
    hosts.set_rate("none")
    hosts.set_rate("100mbit")
    hosts.set_rate("50mbit")
    measured = printed(hosts.run([TRAFFIC, "ring", "500000"]).expect(0))
    assert measured["seconds"] >= (max(measured["received"]) - 64 * KIB) * 8 / 50e6
    hosts.set_rate("none")
    limited = ["tc", "-n", hosts.names[1], "qdisc", "show", "dev", "eth0", "root"]
    assert "tbf" not in subprocess.run(limited, capture_output=True, text=True, check=True, timeout=60).stdout
    assert hosts.traffic()[1].received > before[1].received + 500_000


def test_mpi_sees_a_node_a_host(make_hosts: Make) -> None:
    hosts = make_hosts(2, "none")
    rows = printed(hosts.run([str(PROGRAMS / "nodes.py")], ranks_per_host=2).expect(0))
    first, second = hosts.names
    assert rows == [[first, 2, 0, 0], [first, 2, 1, 1], [second, 2, 0, 0], [second, 2, 1, 1]]


def test_options_of_mpirun_override_the_settings(make_hosts: Make) -> None:
    code = "import os; print(os.environ['OMPI_MCA_btl_tcp_links'], os.environ['MINE'])"
    done = make_hosts(1, "none").run(["-c", code], options=["--mca", "btl_tcp_links", "1"], extra={"MINE": "x"})
    assert "1 x" in done.expect(0).text.splitlines()


def test_a_job_that_hangs_is_ended(make_hosts: Make) -> None:
    hosts = make_hosts(2, "none")
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(300)"
    done = hosts.run(["-c", code], seconds=2)
    assert done.code in (124, 137), done.text
    assert hosts.processes() == []


def test_signals_reach_every_rank(make_hosts: Make) -> None:
    code = (
        "import signal; signal.signal(signal.SIGUSR1, lambda *_: print('told'));"
        "print('ready', flush=True); signal.pause()"
    )
    with make_hosts(2, "none").start(["-c", code]) as job:
        job.wait_until(lambda: job.text.count("ready") == 2)
        job.send(signal.SIGUSR1)
        assert job.wait().expect(0).text.count("told") == 2


def test_a_job_leaves_no_process_behind(make_hosts: Make) -> None:
    """Not even one that mpirun knows nothing of; processes of others stay."""
    hosts = make_hosts(2, "none")
    with subprocess.Popen(["ip", "netns", "exec", hosts.names[1], "sleep", "300"]) as other:
        try:
            # mpirun waits until nobody holds the ranks' output any more.
            code = (
                "from subprocess import DEVNULL as no, Popen;"
                "Popen(['sleep', '300'], stdout=no, stderr=no, start_new_session=True)"
            )
            hosts.run(["-c", code]).expect(0)
            assert hosts.processes() == [other.pid]
        finally:
            other.kill()


def test_down_removes_the_hosts_and_what_runs_there(make_hosts: Make) -> None:
    hosts = make_hosts(1, "1gbit")
    with hosts, subprocess.Popen(["ip", "netns", "exec", hosts.names[0], "sleep", "300"]) as left:
        try:
            while hosts.processes() != [left.pid]:
                assert left.poll() is None
            hosts.__exit__()
            assert left.wait(10) == -signal.SIGKILL
        finally:
            left.kill()
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True, timeout=60).stdout
    assert hosts.prefix not in listed


def test_hosts_are_not_made_twice(make_hosts: Make) -> None:
    hosts = make_hosts(1, "none")
    done = script("up", "2", "none", prefix=hosts.prefix)
    assert done.returncode == 1 and "exist already" in done.stderr
    assert len(hosts.traffic()) == 1
    done = script("run", "2", "true", prefix=hosts.prefix)
    assert done.returncode == 1 and "2 hosts asked for, 1 named" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("", "usage"),
        ("make 4", "no such command: 'make'"),
        ("up 4", "number of hosts and the rate"),
        ("up 0 1gbit", "got '0'"),
        ("up 2 fast", "got 'fast'"),
        ("rate", "new rate"),
        ("rate 1gbps", "got '1gbps'"),
        ("run", "HOSTS or HOSTSxRANKS"),
        ("run 2x0 true", "got '2x0'"),
        ("run 2", "takes a program"),
        ("run 2 --mca btl self true", "end with --"),
        ("bytes all", "no arguments"),
        ("down 4", "no arguments"),
    ],
)
def test_wrong_arguments(arguments: str, told: str) -> None:
    done = script(*arguments.split(), prefix="fdtwrong")
    assert done.returncode == 2 and told in done.stderr and "usage" in done.stderr


def test_a_machine_without_tools_is_told_the_package(tmp_path: Path) -> None:
    # Nothing but what the script needs before it looks for `ip`.
    for name in ("bash", "realpath", "uname"):
        (tmp_path / name).symlink_to(next(path for path in _on_path(name)))
    text = SCRIPT.read_text(encoding="utf-8").replace("/usr/sbin:/sbin", "/nowhere")
    copy = tmp_path / "hosts.sh"
    copy.write_text(text, encoding="utf-8")
    done = subprocess.run(
        [str(tmp_path / "bash"), str(copy), "down"],
        capture_output=True, text=True, check=False, timeout=60, env={"PATH": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 1 and "apt-get install iproute2" in done.stderr


def _on_path(name: str) -> list[Path]:
    folders = os.environ["PATH"].split(os.pathsep)
    return [Path(folder, name) for folder in folders if Path(folder, name).exists()]


def script(*arguments: str, prefix: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "FEDDIP_HOSTS_PREFIX": prefix}
    command = ["bash", str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, env=environment)
