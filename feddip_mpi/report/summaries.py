"""From runs to numbers over their seeds. Pure: no file is read, nothing is drawn.

Everywhere a spread is the mean with the lowest and the highest of the seeds: with two or three of them a standard deviation
would promise more than is known.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from feddip_mpi import config, identity, metrics
from feddip_mpi.report import terminal
from feddip_mpi.report.runs import Hardware, Row, Run
from feddip_mpi.settings import METHODS, Config

# Disjoint; the uploads are what `upload_bytes` adds up. Control messages are no kind of these: they go
# with the ranks and not with the method, and a single rank counts them too.
BYTE_KINDS = (
    "upload_values_bytes", "upload_indices_bytes", "upload_other_bytes", "upload_frame_bytes", "upload_extra_bytes",
    "download_values_bytes", "download_indices_bytes", "download_other_bytes", "download_frame_bytes", "residual_bytes",
)  # fmt: skip
PHASES = (
    "train",
    "encode",
    "wait",
    "exchange",
    "decode",
    "server",
    "evaluate",
    "checkpoint",
)  # transfer runs beside them


# As papers write them; see `name_of`.
_NAMES = {
    "fedavg": "FedAvg", "fedprox": "FedProx", "feddip": "FedDIP", "erk": "ERK", "gradual": "Gradual", "snip": "SNIP",
    "ssfl": "SSFL", "feddst": "FedDST", "prunefl": "PruneFL", "prunetrain": "PruneTrain", "sparsyfed": "SparsyFed",
    "fedrts": "FedRTS",
}  # fmt: skip


@dataclass(frozen=True)
class Spread:
    """Mean, lowest and highest of so many seeds."""

    mean: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """At least one value."""
        found = [float(value) for value in values]
        low, high = min(found), max(found)
        # A sum is rounded: the mean of equal values may lie a bit above them.
        return cls(min(max(sum(found) / len(found), low), high), low, high, len(found))


@dataclass(frozen=True, eq=False)
class Group:
    """Runs that differ in nothing but their seed.

    Attributes:
        setting: what the task is; one line.
        method: its label.
        sparsity: share of zeros of the final model, as measured; the seeds' mean.
        variant: what tells it from groups of the same setting, method and asked sparsity; empty where nothing has to.
        runs: in the order of their seeds.
    """

    setting: str
    method: str
    sparsity: float
    variant: str
    runs: tuple[Run, ...]

    @property
    def config(self) -> Config:
        return self.runs[0].config

    @property
    def label(self) -> str:
        return self.method + (f" ({self.variant})" if self.variant else "")

    @property
    def title(self) -> str:
        """Label and sparsity."""
        return f"{self.label} {self.sparsity:.4g}" if self.prunes else f"{self.label} dense"

    @property
    def name(self) -> str:
        """The label as papers write it."""
        return name_of(self.method) + (f" ({self.variant})" if self.variant else "")

    @property
    def shown(self) -> str:
        """Name and sparsity."""
        return f"{self.name} {self.sparsity:.4g}" if self.prunes else f"{self.name} dense"

    @property
    def heading(self) -> str:
        """The setting with its partition as a heading has it."""
        partition = partition_of(self.config)
        return self.setting.replace(f", {partition}, ", f", {capital(partition)}, ", 1)

    @property
    def prunes(self) -> bool:
        return self.sparsity > 0

    @property
    def level(self) -> float:
        """The sparsity asked for, by which methods are put side by side; some end somewhat beside it."""
        return self.config.sparsity.final if self.prunes else 0.0

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(run.config.seed for run in self.runs)

    @property
    def hardware(self) -> tuple[Hardware, ...]:
        """Each kind once."""
        return tuple(sorted({run.hardware for run in self.runs}))


@dataclass(frozen=True, eq=False)
class Line:
    """A row of the summary table.

    Attributes:
        accuracy: top-1 of the truly pruned model after the last round, 0 to 1.
        last5: the same, mean of the last evaluations (`metrics.last_accuracies`).
        upload_bytes: of all clients in all rounds.
        seconds: of all rounds; None where the seeds ran on unlike hardware.
        against: the dense group it is compared with, if the setting has one.
        accuracy_difference: mean accuracy minus that of `against`.
        times_fewer_bytes: uploads of `against` / own.
        time_ratio: seconds / seconds of `against`; None on unlike hardware.
    """

    group: Group
    accuracy: Spread
    last5: Spread
    upload_bytes: Spread
    seconds: Spread | None
    against: Group | None
    accuracy_difference: float | None
    times_fewer_bytes: float | None
    time_ratio: float | None


def groups(runs: Sequence[Run]) -> list[Group]:
    """Runs by configuration without the seed; sorted by setting, asked sparsity and label."""
    together: dict[str, list[Run]] = {}
    for run in runs:
        key = {name: value for name, value in identity.of(run.config).items() if name != "seed"}
        together.setdefault(run.label + json.dumps(key, sort_keys=True), []).append(run)
    parts = [tuple(sorted(group, key=lambda run: run.config.seed)) for group in together.values()]
    alike: dict[tuple[str, str, float], list[tuple[Run, ...]]] = {}
    for part in parts:
        final = part[0].config.sparsity.final if identity.has_mask(part[0].config) else 0.0
        alike.setdefault((setting_of(part[0].config), part[0].label, final), []).append(part)
    made = [
        Group(setting, label, _sparsity(part), variant, part)
        for (setting, label, _), same in alike.items()
        for part, variant in zip(same, _variants([part[0].config for part in same]), strict=True)
    ]
    return sorted(made, key=lambda group: (group.setting, group.level, group.label))


def name_of(label: str) -> str:
    """A method's label as papers write it: FedDIP int4 for `feddip-int4`; labels of other words stay as they are."""
    head, _, tail = label.partition("-")
    return f"{_NAMES[head]} {tail}".rstrip() if head in _NAMES else label


def setting_of(settings: Config) -> str:
    """The task in one line: data, model, partition, rounds, clients."""
    data = settings.data.name
    if settings.data.path and config.holds_own_data(settings):
        data += f" {Path(settings.data.path).name}"
    rounds, clients, epochs = settings.rounds, settings.clients, settings.local_epochs
    return (
        f"{settings.model.name} on {data}, {partition_of(settings)}, {terminal.counted(rounds, 'round')}, "
        f"{settings.participants} of {terminal.counted(clients, 'client')} a round, {terminal.counted(epochs, 'local epoch')}"
    )


def partition_of(settings: Config) -> str:
    """The partition with its parameter."""
    data = settings.data
    if data.partition in ("dirichlet", "quantity"):
        return f"{data.partition}({data.alpha:g})"
    if data.partition == "pathological":
        return f"{data.classes_per_client} classes a client"
    return data.partition


def capital(partition: str) -> str:
    """A partition's name as a heading: IID, Dirichlet(0.5)."""
    return "IID" if partition == "iid" else partition[:1].upper() + partition[1:]


def _sparsity(runs: Sequence[Run]) -> float:
    """As measured, to four figures: the seeds' mean, as some methods' masks have a size of their own."""
    return float(f"{Spread.of(run.records[-1]['sparsity'] for run in runs).mean:.4f}")


def _variants(settings: Sequence[Config]) -> list[str]:
    """For each configuration the keys in which these differ, as far as they are not the program's defaults."""
    tables = [{key: value for key, value in identity.of(one).items() if key != "seed"} for one in settings]
    defaults = config.flat(Config())
    names = dict.fromkeys(key for table in tables for key in table)
    differing = [key for key in names if any(table.get(key) != tables[0].get(key) for table in tables)]
    texts = [", ".join(f"{k}={_plain(t[k])}" for k in differing if k in t and t[k] != defaults[k]) for t in tables]
    if len(set(texts)) == len(texts):
        return texts
    return [", ".join(f"{key}={_plain(table[key])}" for key in differing if key in table) for table in tables]


def _plain(value: Any) -> str:
    return {True: "on", False: "off", None: "none"}[value] if value is None or isinstance(value, bool) else str(value)


def unequal(made: Sequence[Group]) -> list[str]:
    """Keys beside those that make a method, of which not all methods of a setting have the same values: `key (who: what)`."""
    tables: dict[str, list[dict[str, Any]]] = {}
    for group in made:
        tables.setdefault(group.method, []).append(identity.of(group.config))
    names = dict.fromkeys(key for of_one in tables.values() for table in of_one for key in table)
    return [f"{key} ({text})" for key in names if not key.startswith(_SAID) and (text := _who_has_what(tables, key))]


# What makes a method; and what is said of every run: its partition and its seed.
_SAID = (
    "seed", "data.partition", "data.alpha", "data.classes_per_client", "method", "proximal", "feedback", "server_memory",
    *identity.OF_MASKS, *(f"{method}." for method in METHODS),
)  # fmt: skip


def _who_has_what(tables: Mapping[str, Sequence[Mapping[str, Any]]], key: str) -> str:
    """The values of a key by method; empty where all have the same. Most are `the others`."""
    who: dict[str, list[str]] = {}
    for label, of_one in tables.items():
        values = ", ".join(sorted({_plain(table[key]) for table in of_one if key in table}))
        who.setdefault(values, []).append(name_of(label))
    if len(who) < 2:
        return ""
    ordered = sorted(who.items(), key=lambda item: len(item[1]))
    texts = [f"{', '.join(labels)}: {values or 'none'}" for values, labels in ordered]
    if len(ordered[-1][1]) > 2:
        texts[-1] = f"the others: {ordered[-1][0] or 'none'}"
    return "; ".join(texts)


def unequal_text(made: Sequence[Group]) -> str:
    """`unequal` as a sentence; empty where there is nothing to say."""
    found = unequal(made)
    return f"Not the same for all methods: {', '.join(found)}." if found else ""


def families(made: Sequence[Group]) -> dict[str, dict[str, list[Group]]]:
    """Groups by their setting without its partition, then by the partition; IID first."""
    found: dict[str, dict[str, list[Group]]] = {}
    for group in sorted(made, key=lambda group: group.config.data.partition != "iid"):
        partition = partition_of(group.config)
        family = group.setting.replace(f", {partition}, ", ", ", 1)
        found.setdefault(family, {}).setdefault(partition, []).append(group)
    return found


def settings(made: Sequence[Group]) -> dict[str, list[Group]]:
    """Groups by their setting."""
    found: dict[str, list[Group]] = {}
    for group in made:
        found.setdefault(group.setting, []).append(group)
    return found


def dense_of(made: Sequence[Group]) -> Group | None:
    """The yardstick of a setting: `dense_ones`, where there is one, or all have the same results."""
    found = dense_ones(made)
    results = {
        tuple((run.config.seed, run.summary["test_accuracy"], run.summary["upload_bytes"]) for run in group.runs)
        for group in found
    }
    return found[0] if len(results) == 1 else None


def dense_ones(made: Sequence[Group]) -> list[Group]:
    """Of a setting FedAvg with float32 uploads, else any FedAvg."""
    plain = [group for group in made if group.config.method == "fedavg"]
    return [group for group in plain if group.config.upload.values == "fp32"] or plain


def last_evaluations(made: Sequence[Group]) -> str:
    """Of which evaluations `Line.last5` is the mean, in words: of as many as each run has of its last sparsity, up to five."""
    counts = {run.summary.get("evaluations_in_mean", 5) for group in made for run in group.runs}
    low, high = min(counts), max(counts)
    return f"last {f'{low} to {high}' if low < high else high} evaluation{'s' * (high > 1)}"


# What `last_evaluations` leaves out, for those who read the number.
AS_SPARSE = "of the last five evaluations those whose models keep as many weights as the last one, within 5 %"


def lines(made: Sequence[Group]) -> list[Line]:
    """The summary of one setting."""
    dense = dense_of(made)
    return [_line(group, dense) for group in made]


def _line(group: Group, dense: Group | None) -> Line:
    accuracy = Spread.of(run.summary["test_accuracy"] for run in group.runs)
    uploads = Spread.of(run.summary["upload_bytes"] for run in group.runs)
    seconds = seconds_of(group)
    difference = fewer = ratio = None
    if dense is not None:
        difference = accuracy.mean - Spread.of(run.summary["test_accuracy"] for run in dense.runs).mean
        fewer = Spread.of(run.summary["upload_bytes"] for run in dense.runs).mean / max(1.0, uploads.mean)
        theirs = seconds_of(dense)
        if seconds is not None and theirs is not None and group.hardware == dense.hardware and theirs.mean > 0:
            ratio = seconds.mean / theirs.mean
    last5 = Spread.of(run.summary["test_accuracy_mean_of_last_5"] for run in group.runs)
    return Line(group, accuracy, last5, uploads, seconds, dense, difference, fewer, ratio)


def seconds_of(group: Group) -> Spread | None:
    """Seconds of all rounds; None where the seeds ran on unlike hardware: their mean would mean nothing."""
    if len(group.hardware) > 1:
        return None
    return Spread.of(run.summary["seconds"] for run in group.runs)


def by_round(group: Group, value: str | Callable[[Mapping[str, Any]], float | None]) -> np.ndarray:
    """float64 [rounds that all seeds measured, 4]: round, mean, lowest, highest.

    Args:
        value: a name of the records, or what to take of a record; None where it was not measured.
    """
    take = value if callable(value) else lambda row: row.get(value)
    columns = [
        {int(row["round"]): float(number) for row in run.records if (number := take(row)) is not None}
        for run in group.runs
    ]
    shared = sorted(set.intersection(*(set(column) for column in columns)))
    table = [(r, *_mean_low_high([column[r] for column in columns])) for r in shared]
    return np.array(table, dtype=np.float64).reshape(-1, 4)


def _mean_low_high(values: Sequence[float]) -> tuple[float, float, float]:
    return sum(values) / len(values), min(values), max(values)


def layers(group: Group) -> dict[str, np.ndarray]:
    """`by_round` of the sparsity of every prunable tensor, in the model's order."""

    def of_layer(name: str) -> Callable[[Mapping[str, Any]], float | None]:
        return lambda row: (row.get("sparsity_by_layer") or {}).get(name)

    names = list(group.runs[0].records[-1].get("sparsity_by_layer") or {})
    return {name: by_round(group, of_layer(name)) for name in names}


def totals(group: Group, names: Sequence[str]) -> dict[str, float]:
    """The sum over the rounds of each name, mean over the seeds; what was not measured counts as nothing."""

    def of(row: Row, name: str) -> float:
        return float(metrics.bytes_besides(row) if name == "upload_extra_bytes" else row.get(name) or 0)

    return {name: Spread.of(sum(of(row, name) for row in run.records) for run in group.runs).mean for name in names}


def phase_seconds(group: Group) -> dict[str, float]:
    """Seconds a round by phase, mean over rounds and seeds; "other" is what the round took besides."""
    rounds = sum(len(run.records) for run in group.runs)
    names = [f"{phase}_seconds" for phase in PHASES]
    sums = {
        name: sum(float(row.get(name) or 0) for run in group.runs for row in run.records) / rounds for name in names
    }
    whole = sum(float(row["round_seconds"]) for run in group.runs for row in run.records) / rounds
    found = {phase: sums[f"{phase}_seconds"] for phase in PHASES}
    return found | {"other": max(0.0, whole - sum(found.values()))}


def peak(group: Group, name: str) -> Spread:
    """The largest value of a run, over the seeds."""
    return Spread.of(max(float(row.get(name) or 0) for row in run.records) for run in group.runs)


def client_accuracy(group: Group) -> np.ndarray:
    """float64 [clients of all seeds that have test images], sorted: of the last round that was evaluated by client."""
    found: list[float] = []
    for run in group.runs:
        told = [row["client_accuracy"] for row in run.records if row.get("client_accuracy")]
        found += [float(value) for value in (told[-1] if told else []) if value is not None]
    return np.sort(np.array(found, dtype=np.float64))


def hardware_letters(runs: Sequence[Run]) -> dict[Hardware, str]:
    """A, B, .. for each kind of hardware."""
    kinds = sorted({run.hardware for run in runs})
    return {kind: _letters(number) for number, kind in enumerate(kinds)}


def _letters(number: int) -> str:
    return (_letters(number // 26 - 1) if number >= 26 else "") + chr(ord("A") + number % 26)


def warnings(made: Sequence[Group], letters: Mapping[Hardware, str]) -> list[str]:
    """What a reader must not overlook."""
    said = []
    for members in settings(made).values():
        setting = members[0].heading
        kinds = sorted({letters[kind] for group in members for kind in group.hardware})
        if len(kinds) > 1:
            said.append(
                f"{setting}: ran on different hardware ({', '.join(kinds)}); seconds may be compared within one letter only, "
                "and accuracies of one seed may differ between them"
            )
        for group in members:
            if len(group.hardware) > 1:
                named = ", ".join(letters[kind] for kind in group.hardware)
                said.append(
                    f"{setting}, {group.shown}: its seeds ran on different hardware ({named}); no mean of seconds"
                )
            if any(" and " in field for k in group.hardware for field in (k.processor, k.cores, k.ranks)):
                said.append(f"{setting}, {group.shown}: a run was resumed on other hardware; its seconds mix both")
        seeds = {group.seeds for group in members}
        if len(seeds) > 1:
            said.append(
                f"{setting}: not all groups have the same seeds ({'; '.join(_seed_text(s) for s in sorted(seeds))})"
            )
        if text := unequal_text(members):
            said.append(f"{setting}: {text[:1].lower()}{text[1:-1]}")
        if dense_of(members) is None:
            said.append(f"{setting}: {_without_yardstick(dense_ones(members))}")
    versions = sorted({run.versions for group in made for run in group.runs})
    if len(versions) > 1:
        said.append("runs of different versions: " + "; ".join(versions))
    return said


def _without_yardstick(dense: Sequence[Group]) -> str:
    """Why nothing is compared, and the way out."""
    if not dense:
        return (
            "no dense FedAvg, so nothing to compare with; a run of the same setting with method: fedavg and upload.values: "
            "fp32 would be that"
        )
    named = "; ".join(f"{group.name}: {', '.join(run.name for run in group.runs)}" for group in dense)
    return f"several dense FedAvgs, so nothing is compared with one of them; report the runs of one alone ({named})"


def _seed_text(seeds: Sequence[int]) -> str:
    return ", ".join(map(str, seeds))
