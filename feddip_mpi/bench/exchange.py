"""`feddip-mpi bench exchange`: the whole exchange of a round in all modes, against two yardsticks, and what follows."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import numpy as np

from feddip_mpi import config, costs, hdf5, metrics, records, runtime, session
from feddip_mpi.bench import contenders, inputs
from feddip_mpi.bench.contenders import ByExchange, Contender, DenseAllreduce, Desk, Result
from feddip_mpi.bench.options import DENSE, Options
from feddip_mpi.collectives import Communicator
from feddip_mpi.costs import Compute, Load, Network, Sample
from feddip_mpi.errors import FeddipError, InputError, PeerError
from feddip_mpi.report import benching, terminal

Json = dict[str, Any]
T = TypeVar("T")

# A round's name for it, and ours.
PHASES = {
    "encode": "encode", "transfer": "transfer", "wait": "wait", "exchange": "exchange", "decode": "decode",
    "server": "apply",
}  # fmt: skip
KINDS = ("values", "indices", "other", "frame")
_PROBE_BYTES = (8, 2**14, 2**18, 2**20, 2**22, 2**24)  # those longer than the whole vector are left out
_SHORT_PROBE = 2**18
_LONG_PROBE = 2**23  # from here on only what the dense yardstick needs
_DENSE_PROBE_FLOATS = 10**6
_ROUNDING = 1e-5  # relative: float32 sums in another order


def run(comm: Communicator, options: Options, out: str | None, as_json: bool) -> None:
    """Measure, print and save. Raises InputError on all ranks for wrong options, PeerError where results differ."""
    runtime.check_launch(comm.size)
    agreed(comm, options.check)
    size, prunable = agreed(comm, lambda: inputs.counts(options))
    nodes = comm.open_nodes()
    on_node = max(len(node) for node in comm.nodes())
    free = runtime.process()["memory_available_bytes"]
    agreed(comm, lambda: inputs.require_memory(size, options.clients, on_node, free))
    folder = Path(session.on_root(comm, lambda: _new_folder(out)))
    runtime.prepare_torch(config.parse("", ["device=cpu"]), 0)
    desk = Desk.of(comm, options, inputs.make(options, size, prunable, comm.rank, comm.size))
    for sparsity in options.sparsity:
        desk.support_of[sparsity] = inputs.support(options, prunable, sparsity)
    overlap = options.overlap and comm.open_background()
    bench = Bench(desk, contenders.make(desk, options.chosen(comm.size, nodes)), overlap)
    bench.measure()
    result = {**_facts(desk, overlap, nodes), **bench.result(Network(0.0, 0.0, comm.size, nodes))}
    error = None
    if comm.rank == 0:
        try:
            _save(result, folder)
            (terminal.print_json if as_json else benching.show)(result)
            terminal.note(f"saved in {folder}")
        except FeddipError as caught:
            error = caught
    comm.check(error)


def agreed(comm: Communicator, work: Callable[[], T]) -> T:
    """Do something on every rank; if it fails on one, all raise that error."""
    value: T | None = None
    error = None
    try:
        value = work()
    except FeddipError as caught:
        error = caught
    comm.check(error)
    return value  # type: ignore[return-value]


@dataclass
class Line:
    """What was measured of a contender: repeat 0 warms up and counts only where there is no other."""

    contender: Contender
    repeats: list[Json] = field(default_factory=list)
    computes: list[dict[str, float]] = field(default_factory=list)

    @property
    def counted(self) -> list[Json]:
        return self.repeats[1:] or self.repeats

    @property
    def group(self) -> tuple[float | None, str | None]:
        """Contenders of one group send the same values."""
        return self.contender.sparsity, self.contender.values

    @property
    def name(self) -> str:
        sparsity, kind = self.group
        return self.contender.mode + (f" {sparsity:g}" if sparsity is not None else "") + (f" {kind}" if kind else "")


class Bench:
    """Measures contenders in turn, repeat by repeat, so that what changes on the machine meets all of them."""

    def __init__(self, desk: Desk, found: Sequence[Contender], overlap: bool) -> None:
        self._desk, self._comm, self._overlap = desk, desk.comm, overlap
        self.lines = [Line(contender) for contender in found]
        self.samples: dict[tuple[bool, str, int], list[float]] = {}
        self._references: dict[Any, Result] = {}
        self.unchecked: list[str] = []

    def measure(self) -> None:
        """All repeats that the budget allows; at least one contender once."""
        deadline = time.monotonic() + self._desk.options.seconds
        self._choose_allreduce()
        for step in self._steps():
            late = self.lines[0].repeats and time.monotonic() >= deadline
            if self._comm.broadcast(bool(late)):  # rank 0's clock counts
                return
            step()

    def _steps(self) -> Iterator[Callable[[], None]]:
        for _ in range(self._desk.options.repeats + 1):
            for line in self.lines:
                yield lambda line=line: self._play(line)  # type: ignore[misc]
            for size in _PROBE_BYTES:
                if self._comm.size > 1 and size <= max(4 * self._desk.inputs.size, _SHORT_PROBE):
                    yield lambda size=size: self._probe(size)  # type: ignore[misc]
            for line in self._calibrated().values():
                yield lambda line=line: self._calibrate(line)  # type: ignore[misc]

    def _calibrated(self) -> dict[Any, Line]:
        """One line of each group; `sharded` where it is there, since it alone hands on."""
        found: dict[Any, Line] = {}
        for line in self.lines:
            key = line.group if isinstance(line.contender, ByExchange) else line.name
            if key not in found or line.contender.mode == "sharded":
                found[key] = line
        return found

    def _choose_allreduce(self) -> None:
        """The yardstick is the faster of the library's two, tried on a part of the vector."""
        comm = self._comm
        part = np.zeros(min(self._desk.inputs.size, _DENSE_PROBE_FLOATS), np.float32)
        times = {}
        for blocking in (False, True):
            took = [self._timed(lambda blocking=blocking: comm.allreduce(part, blocking)) for _ in range(3)]  # type: ignore[misc]
            times[blocking] = min(took[1:])
        for line in self.lines:
            if isinstance(line.contender, DenseAllreduce):
                line.contender.blocking = times[True] < times[False]

    def _timed(self, work: Callable[[], object]) -> float:
        """Seconds of the slowest rank, from a barrier on."""
        self._comm.barrier()
        started = time.perf_counter()
        work()
        return float(self._comm.gather(np.array([time.perf_counter() - started])).max())

    def _play(self, line: Line) -> None:
        comm = self._comm
        self._desk.lay_out()
        comm.barrier()
        meter, started = records.Meter(comm), time.perf_counter()
        line.contender.play(meter)
        total = time.perf_counter() - started
        sent, *_, received = meter.traffic()
        result = line.contender.result()
        own = [
            total, *(meter.seconds[name] for name in PHASES), sent, received, *by_kind(result.sent, sent),
            *by_kind(result.received, received), result.digest,
        ]  # fmt: skip
        rows = comm.gather(np.array(own, np.float64))
        line.repeats.append(repeat_of(rows))
        self._check(line, result, rows[:, -1])

    def _check(self, line: Line, result: Result, digests: np.ndarray) -> None:
        """All ranks have the same mean, and it is the one that the other modes have."""
        contender, reference = line.contender, self._references.get(line.group)
        wrong = "" if (digests == digests[0]).all() else "the ranks hold different results"
        if not wrong and isinstance(contender, ByExchange) and result.aggregate is not None:
            if reference is None:
                self._refer(line, result)
            else:
                wrong = self._differs(line, result, reference)
        if wrong:
            self._comm.check(PeerError(f"bench exchange, {line.name}: {wrong}; this is a bug, or damaged memory"))
        self._comm.check(None)

    def _refer(self, line: Line, result: Result) -> None:
        if line.contender.mode in costs.EQUAL_BITS and line.contender.download in (None, "fp32"):
            self._references[line.group] = result
        elif line.name not in self.unchecked:
            self.unchecked.append(line.name)

    def _differs(self, line: Line, result: Result, reference: Result) -> str:
        contender = line.contender
        assert result.aggregate is not None and reference.aggregate is not None
        if contender.mode == "dense":
            if len(line.repeats) > 1:
                return ""  # said once: comparing takes longer than the exchange
            far = contenders.distance(result.aggregate, reference.aggregate)
            return f"off by {far:.1e} of the sum in fixed order, {_ROUNDING:g} allowed" if far > _ROUNDING else ""
        wanted = reference.digest
        if contender.download not in (None, "fp32"):
            wanted = contenders.digest(contenders.handed_on_as(reference.aggregate, str(contender.download)))
        return "" if result.digest == wanted else "its bits differ from those of the other modes"

    def _probe(self, size: int) -> None:
        """Transfers of `size` bytes, as an exchange makes them: blocking, and in the background if that is open.

        The two are different algorithms of the library and different ways to wait: each is a network of its own.
        """
        comm, data = self._comm, np.zeros(size, np.uint8)
        works: dict[str, Callable[[], object]] = {
            "allgatherv": lambda: comm.allgatherv([data], [1] * comm.size),
            "alltoallv": lambda: comm.alltoallv([[data] * comm.size], [1] * comm.size),
        }
        if size >= _LONG_PROBE:
            del works["alltoallv"]
        for name, work in works.items():
            for behind in (False, True) if self._overlap and size < _LONG_PROBE else (False,):
                took = self._timed(lambda b=behind, w=work: comm.post(w).result() if b else w())  # type: ignore[misc]
                self.samples.setdefault((behind, name, size), []).append(took)

    def _calibrate(self, line: Line) -> None:
        """All ranks compute at the same time, as in an exchange: they share caches, memory and maybe cores."""
        self._desk.lay_out()
        self._comm.barrier()
        took = line.contender.calibrate()
        slowest = self._comm.gather(np.array(list(took.values()))).max(axis=0).tolist()
        line.computes.append(dict(zip(took, slowest, strict=True)))

    # What follows from it

    def result(self, shape: Network) -> Json:
        """Everything measured and predicted, as JSON values. `shape`: its ranks and nodes count."""
        networks, fitted = self._networks(shape)
        computes = {key: _compute(line) for key, line in self._calibrated().items() if line.computes}
        cases = [self._case(line, networks, computes) for line in self.lines if line.repeats]
        dense = next((case for case in cases if case["mode"] == DENSE), None)
        for case in cases:
            case |= benching.against(case, dense)
        return {
            "cases": cases,
            "networks": fitted,
            "compute": [
                {"case": self._calibrated()[key].name, **vars(compute)} for key, compute in computes.items()
            ],
            "predicted": self._predictions(networks, computes) if networks else [],
            "left_out": self._left_out(),
            "unchecked": self.unchecked,
        }  # fmt: skip

    def _networks(self, shape: Network) -> tuple[dict[bool, Network], list[Json]]:
        """What the probes tell, by whether they ran in the background; and the same for the record."""
        make = {"allgatherv": costs.gathered, "alltoallv": costs.exchanged}
        taken = {key: times[1:] or times for key, times in self.samples.items()}
        networks, fitted = {}, []
        for behind in sorted({key[0] for key in taken}):
            own = {(name, size): times for (kind, name, size), times in taken.items() if kind == behind}
            samples: list[Sample] = [
                make[name](shape.ranks, size, median(times)) for (name, size), times in own.items()
            ]
            a, b, error = costs.fit(samples)
            curves = {
                name: costs.curve(
                    shape.ranks, {size: median(times) for (kind, size), times in own.items() if kind == name}
                )
                for name in make
            }
            networks[behind] = Network(a, b, shape.ranks, shape.nodes, curves)
            probes = [{"collective": name, "bytes": size, "seconds": times} for (name, size), times in own.items()]
            fitted.append({
                "background": behind, "latency_seconds": a, "bandwidth_bytes": b, "relative_error": error,
                "probes": probes,
            })  # fmt: skip
        return networks, fitted

    def _case(self, line: Line, networks: dict[bool, Network], computes: dict[Any, Compute]) -> Json:
        contender, counted = line.contender, line.counted
        compute = computes.get(line.group if isinstance(contender, ByExchange) else line.name)
        predicted = None
        if networks and compute is not None:
            predicted = costs.predict(contender.base, self._meets(line, networks), contender.load(), compute)
        times = [repeat["seconds"] for repeat in counted]
        return {
            "mode": contender.mode,
            "sparsity": contender.sparsity,
            "values": contender.values,
            "download": contender.download,
            "seconds": {"median": median(times), "min": min(times), "max": max(times)},
            "phases": {name: median(repeat["phases"][name] for repeat in counted) for name in PHASES.values()},
            "sent": counted[-1]["sent"],
            "received": counted[-1]["received"],
            "predicted": predicted and {**predicted, "seconds": sum(predicted.values())},
            "cold": len(line.repeats) == 1,
            "blocking": contender.blocking if isinstance(contender, DenseAllreduce) else None,
            "repeats": line.repeats,
        }

    def _meets(self, line: Line, networks: dict[bool, Network]) -> Network:
        """The network as a contender uses it: the last message blocks, a dense sum too; others may be in the background."""
        contender = line.contender
        if contender.base == "dense" or not isinstance(contender, ByExchange):
            return networks[False]
        return networks[self._overlap and costs.waves(networks[False], contender.load()) > 1]

    def _predictions(self, networks: dict[bool, Network], computes: dict[Any, Compute]) -> list[Json]:
        """For every group what each of its modes would take on more ranks, and where `sharded` begins to win."""
        found = []
        yardsticks = [line for line in self.lines if not isinstance(line.contender, ByExchange) and line.computes]
        for key, compute in computes.items():
            line = self._calibrated()[key]
            if not isinstance(line.contender, ByExchange) or not line.repeats:
                continue
            beside = [other for other in yardsticks if other.contender.sparsity in (None, line.contender.sparsity)]
            behind, load = self._meets(line, networks), line.contender.load()
            models = {mode: Model(mode, networks[False] if mode == "dense" else behind, load, compute)
                      for mode in costs.MODES} | {
                other.contender.mode: Model(
                    other.contender.base, networks[False], other.contender.load(), computes[other.name]
                )
                for other in beside
            }  # fmt: skip
            rows = [_row(models, ranks) for ranks in costs.powers()]
            crossover = costs.crossover_ranks(behind, load, compute)
            sparsity, kind = line.group
            found.append({"sparsity": sparsity, "values": kind, "crossover_ranks": crossover, "rows": rows})
        return found

    def _left_out(self) -> list[str]:
        wanted = self._desk.options.repeats
        short = [(line.name, max(0, len(line.repeats) - 1)) for line in self.lines if len(line.repeats) <= wanted]
        return [f"{name}: {done} of {wanted} repeats" for name, done in short]


def _compute(line: Line) -> Compute:
    """Medians over the repeats."""
    taken = line.computes[1:] or line.computes
    return Compute(**{name: median(took[name] for took in taken) for name in taken[0]})


@dataclass(frozen=True)
class Model:
    """What predicts a contender: the mode of the cost model, and what was measured on the ranks of this run."""

    mode: str
    network: Network
    load: Load
    compute: Compute

    def on(self, ranks: int) -> tuple[Network, Load, Compute]:
        """The same links and clients a rank, with another number of ranks."""
        return self.network.grown(ranks), costs.grown(self.load, self.network, ranks), self.compute


def _row(models: dict[str, Model], ranks: int) -> Json:
    """What each contender takes on so many ranks."""
    took = {name: sum(costs.predict(model.mode, *model.on(ranks)).values()) for name, model in models.items()}
    network, load, compute = models["sharded"].on(ranks)
    fewest = costs.crossover_participants(network, load, compute)
    return {"ranks": ranks, "participants": load.participants, "seconds": took, "crossover": fewest}


def by_kind(counted: Any, total: int) -> list[int]:
    """Bytes by KINDS; what is neither values nor indices nor other tensors of `total` is frames and lengths."""
    if not total:
        return [0, 0, 0, 0]
    return [counted.values, counted.indices, counted.other, total - counted.values - counted.indices - counted.other]


def repeat_of(rows: np.ndarray) -> Json:
    """One repeat from all ranks' rows (see Bench._play): the slowest rank's seconds, the busiest rank's bytes."""
    phases = len(PHASES)
    seconds, traffic = rows[:, : 1 + phases], rows[:, 1 + phases : -1].astype(np.int64)
    busiest = int(traffic[:, :2].sum(axis=1).argmax())
    sent, received, *kinds = traffic[busiest].tolist()
    return {
        "seconds": float(seconds[:, 0].max()),
        "phases": dict(zip(PHASES.values(), seconds[:, 1:].max(axis=0).tolist(), strict=True)),
        "seconds_by_rank": seconds[:, 0].tolist(),
        "sent": {"total": sent, **dict(zip(KINDS, kinds[:4], strict=True))},
        "received": {"total": received, **dict(zip(KINDS, kinds[4:], strict=True))},
        "sent_by_all": int(traffic[:, 0].sum()),
        "received_by_all": int(traffic[:, 1].sum()),
        "digest": f"{int(rows[0, -1]):08x}",
    }


def _facts(desk: Desk, overlap: bool, nodes: int) -> Json:
    """What a result has to name. No host: results are published."""
    comm, options = desk.comm, desk.options
    hardware = {name: value for name, value in runtime.hardware().items() if name != "host"}
    everywhere = comm.gather_json(hardware)
    return {
        "benchmark": "exchange",
        "date": time.strftime("%Y-%m-%d"),
        "arguments": options.to_json(),
        "ranks": comm.size,
        "nodes": nodes,
        "ranks_per_node": runtime.ranks_per_node(),
        "clients": len(desk.inputs.placed),
        "size": desk.inputs.size,
        "prunable": desk.inputs.prunable,
        "kept": {f"{sparsity:g}": support.count for sparsity, support in desk.support_of.items()},
        "overlap": overlap,
        "versions": runtime.versions(),
        "mpi": comm.library(),
        "threads_in_mpi": comm.thread_level(),
        "omp_num_threads": runtime.process()["omp_num_threads"],
        "hardware": [hardware for k, hardware in enumerate(everywhere) if hardware not in everywhere[:k]],
    }


def _new_folder(out: str | None) -> str:
    """Make the folder that the results go to. Raises InputError if it holds anything."""
    path = Path(out) if out else Path("runs") / f"bench-exchange-{time.strftime('%Y%m%d-%H%M%S')}"
    try:
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise InputError(f"--out {path}: must be new or an empty folder; name another one")
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {path}: cannot be created ({error}); name a folder you may write to") from None
    return str(path)


def _save(result: Json, folder: Path) -> None:
    from feddip_mpi.report import plots

    text = json.dumps(metrics.without_nan(result), indent=1, allow_nan=False)
    try:
        hdf5.write_text(folder / "exchange.json", text + "\n")
    except OSError as error:
        raise InputError(f"{folder}: cannot be written to ({error})") from None
    try:
        plots.exchange_figure(result, folder / "exchange.png")
    except InputError as error:  # matplotlib is an extra: the numbers are complete without a picture
        terminal.note(f"no picture: {error}")
