"""The record of a round: every name, its unit and its meaning declared once; the run folder's metrics.jsonl."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from feddip_mpi import hdf5
from feddip_mpi.errors import InputError

Record = dict[str, Any]
KINDS_OF_BYTES = ("values", "indices", "other", "frame")  # of an update


@dataclass(frozen=True)
class Field:
    """One name of a record.

    Attributes:
        kind: "int", "float", "ints" or "floats" (lists of fixed length), "layers" (a number per prunable tensor).
        depends_on: "config" (repeats bit for bit), "ranks" (also on the number of ranks) or "clock" (measured).
        meaning: for the reference.
    """

    kind: str
    depends_on: str
    meaning: str


FIELDS: dict[str, Field] = {
    "round": Field("int", "config", "finished rounds, from 1"),
    "participants": Field("ints", "config", "clients that took part"),
    "learning_rate": Field("float", "config", "eta_t"),
    "penalty": Field("float", "config", "lambda_t"),
    "sparsity_asked": Field("float", "config", "s_t of the schedule after this round, share of zeros"),
    "sparsity": Field("float", "config", "share of zeros among the prunable weights of the model that travels"),
    "sparsity_by_layer": Field("layers", "config", "the same for each prunable tensor"),
    "mask_updated": Field("int", "config", "1 if the mask was renewed"),
    "mask_grown": Field("int", "config", "weights that entered the mask"),
    "mask_pruned": Field("int", "config", "weights that left the mask"),
    "mask_delayed": Field("int", "config", "1 if adaptive control let a due mask update wait"),
    "penalty_scale": Field("float", "config", "factor of adaptive control in lambda_t"),
    "regrow_scale": Field("float", "config", "factor of adaptive control on the regrow share"),
    "train_loss": Field("float", "config", "cross-entropy of the participants' batches, weighted by images"),
    "test_loss": Field(
        "float", "config", "cross-entropy of the pruned model on the test images; null if not evaluated"
    ),
    "test_accuracy": Field("float", "config", "top-1 accuracy of the pruned model, 0 to 1"),
    "test_accuracy_top5": Field("float", "config", "top-5 accuracy of the pruned model, 0 to 1"),
    "client_accuracy": Field("floats", "config", "top-1 accuracy on each client's own test part (eval.clients)"),
    "update_norm": Field("float", "config", "||sum_k p_k q_k||"),
    "pruning_error": Field("float", "config", "||v - m*v||^2 / ||v||^2 over the prunable weights"),
    "residual_norm": Field("float", "config", "root of the participants' summed squared residuals (ef21: references)"),
    "samples": Field("int", "config", "images trained on, epochs counted"),
    "upload_bytes": Field("int", "config", "payloads of all participants: what the next five add up to"),
    "upload_values_bytes": Field("int", "config", "updates: values of prunable weights"),
    "upload_indices_bytes": Field("int", "config", "updates: indices of off-mask weights"),
    "upload_other_bytes": Field("int", "config", "updates: tensors that are not prunable"),
    "upload_frame_bytes": Field("int", "config", "updates: frames"),
    "upload_extra_bytes": Field(
        "int", "config", "what the method sends besides updates (saliency, squared gradients, votes), with its frames"
    ),
    "dense_bytes": Field("int", "config", "the same uploads as dense float32"),
    "ranks": Field("int", "ranks", "MPI ranks"),
    "residuals_lost": Field(
        "int", "ranks", "clients whose residual was lost with its rank before this round, or made older"
    ),
    "wire_bytes": Field(
        "int", "ranks", "update bytes handed to MPI for sending, all ranks: payloads and their lengths"
    ),
    "received_bytes": Field("int", "ranks", "update bytes received from other ranks, all ranks"),
    **{
        f"download_{kind}_bytes": Field("int", "ranks", f"sums that the owners of slices handed on (sharded): {what}")
        for kind, what in {
            "values": "values of prunable weights",
            "indices": "indices of off-mask weights",
            "other": "tensors that are not prunable",
            "frame": "frames",
        }.items()
    },
    "residual_bytes": Field("int", "ranks", "residuals that moved with their client to another rank"),
    "control_bytes": Field(
        "int", "ranks", "digest of the plan, status and scores handed to MPI in the round, all ranks"
    ),
    "train_seconds": Field("float", "clock", "local training, slowest rank"),
    "encode_seconds": Field("float", "clock", "encoding, slowest rank"),
    "wait_seconds": Field("float", "clock", "waiting for the slowest rank before the exchange, largest"),
    "idle_seconds": Field("float", "clock", "the same waiting, mean of all ranks"),
    "exchange_seconds": Field("float", "clock", "waiting for messages after training, slowest rank"),
    "transfer_seconds": Field("float", "clock", "messages under way, slowest rank; most of it behind training"),
    "decode_seconds": Field("float", "clock", "decoding and summing, slowest rank"),
    "server_seconds": Field("float", "clock", "server step, slowest rank"),
    "evaluate_seconds": Field("float", "clock", "evaluation at the end of the round, slowest rank"),
    "evaluate_waiting_seconds": Field(
        "float", "clock", "evaluation of the round before (eval.overlap) beside the others' training, largest"
    ),
    "checkpoint_seconds": Field("float", "clock", "what the run waited for its checkpoints after this round"),
    "round_seconds": Field("float", "clock", "the whole round on rank 0, checkpoint included"),
    "samples_per_second": Field("float", "clock", "images trained on per second of the round"),
    "host_memory_bytes": Field(
        "int", "clock", "peak host memory of all ranks together; what ranks of a node share (the data) counts for each"
    ),
    "device_memory_bytes": Field("int", "clock", "peak device memory of all ranks together"),
}


def columns(records: Sequence[Record]) -> dict[str, np.ndarray]:
    """Records as arrays with one row per round: int64 or float64, NaN where nothing was measured."""
    out = {}
    for name, field in FIELDS.items():
        values = [_numbers(record.get(name)) for record in records]
        width = max((len(v) for v in values if isinstance(v, list)), default=0)
        if field.kind in ("ints", "floats", "layers"):
            rows: Any = [v if isinstance(v, list) else [math.nan] * width for v in values]
            shape: tuple[int, ...] = (len(records), width)
        else:
            rows, shape = [math.nan if v is None else v for v in values], (len(records),)
        # Whole numbers stay whole; a column with gaps needs NaN.
        whole = field.kind in ("int", "ints") and all(v is not None for v in values)
        out[name] = np.array(rows, dtype=np.int64 if whole else np.float64).reshape(shape)
    return out


def records(table: Mapping[str, np.ndarray], layers: Sequence[str]) -> list[Record]:
    """The inverse of `columns`; `layers` names the prunable tensors. A name that is not in the table was not measured."""
    count = len(table["round"]) if "round" in table else 0
    return [
        {
            name: _value(field.kind, table[name][row], layers) if name in table else None
            for name, field in FIELDS.items()
        }
        for row in range(count)
    ]


def _numbers(value: Any) -> Any:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [math.nan if v is None else v for v in value]
    return value


def _value(kind: str, cell: Any, layers: Sequence[str]) -> Any:
    if kind in ("ints", "floats", "layers"):
        items = [_scalar("int" if kind == "ints" else "float", x) for x in cell]
        measured = any(x is not None for x in items)
        if kind == "layers" and (measured or not layers):
            return dict(zip(layers, items, strict=True))
        return items if measured else None
    return _scalar(kind, cell)


def _scalar(kind: str, cell: Any) -> Any:
    if math.isnan(cell):
        return None
    return int(cell) if kind == "int" else float(cell)


def to_line(record: Record) -> str:
    """One JSON line; NaN and infinity become null, as JSON has neither."""
    return json.dumps({name: without_nan(value) for name, value in record.items()}, allow_nan=False)


def without_nan(value: Any) -> Any:
    """JSON values with null in place of NaN and infinity."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Sink(Protocol):
    """Takes the record of each round."""

    def append(self, record: Record) -> None: ...

    def close(self) -> None: ...


class MetricsFile:
    """metrics.jsonl of a run folder; one line a round, flushed as it is written."""

    def __init__(self, path: Path, history: Sequence[Record]) -> None:
        """Begin with the lines of `history`: rounds after the resumed checkpoint are run, and written, again."""
        self._path = path
        hdf5.write_text(path, "".join(to_line(record) + "\n" for record in history))
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115  (open as long as the run)

    def append(self, record: Record) -> None:
        """Raises FeddipError where the line cannot be written."""
        try:
            self._file.write(to_line(record) + "\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise hdf5.cannot_write(error, self._path) from None

    def close(self) -> None:
        with contextlib.suppress(OSError):  # what was not written has been complained about
            self._file.close()


class TensorBoardFiles:
    """The scalars of the records for TensorBoard, in a folder of their own."""

    def __init__(self, folder: Path, history: Sequence[Record]) -> None:
        """Begin with the rounds of `history`, in place of what is there: every step is there once, also after a resume."""
        from torch.utils.tensorboard import SummaryWriter

        for old in folder.glob("events.out.tfevents.*"):
            old.unlink()
        self._writer = SummaryWriter(str(folder))
        for record in history:
            self._add(record)
        self._writer.flush()

    def append(self, record: Record) -> None:
        """Raises FeddipError where it cannot be written."""
        try:
            self._add(record)
            self._writer.flush()
        except OSError as error:
            raise hdf5.cannot_write(error, Path(self._writer.log_dir)) from None

    def _add(self, record: Record) -> None:
        for name, value in scalars(record).items():
            self._writer.add_scalar(name, value, record["round"])

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._writer.close()


def scalars(record: Record) -> dict[str, float]:
    """The finite numbers of a record by name, layers as name/layer; of a list of measurements its mean and its lowest."""
    found: dict[str, Any] = {}
    for name, field in FIELDS.items():
        value = record.get(name)
        if name == "round" or value is None or field.kind == "ints":
            continue
        if field.kind == "layers":
            found |= {f"{name}/{layer}": share for layer, share in value.items()}
        elif field.kind == "floats":
            known = [x for x in value if x is not None]
            found |= {f"{name}/mean": sum(known) / len(known), f"{name}/lowest": min(known)} if known else {}
        else:
            found[name] = value
    return {name: float(value) for name, value in found.items() if value is not None and math.isfinite(value)}


def require_tensorboard() -> None:
    """Raises InputError where the package is missing."""
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError as error:
        raise InputError(
            f'tensorboard: on needs the package tensorboard ({error}): pip install "feddip-mpi[tensorboard]", or leave it off'
        ) from None


def open_sinks(folder: Path, metrics_file: Path, history: Sequence[Record], tensorboard: bool) -> list[Sink]:
    """Everything that takes a run's records.

    Args:
        folder: of the run.
        metrics_file: its metrics.jsonl.
        history: the rounds that are done.
        tensorboard: also write `folder`/tensorboard.
    """
    sinks: list[Sink] = [MetricsFile(metrics_file, history)]
    if tensorboard:
        sinks.append(TensorBoardFiles(folder / "tensorboard", history))
    return sinks


def read(path: Path) -> list[Record]:
    """The records of a metrics.jsonl; a last line cut off by a crash is left out."""
    lines = path.read_text(encoding="utf-8").splitlines()
    out = []
    for number, line in enumerate(lines):
        try:
            out.append(json.loads(line))
        except json.JSONDecodeError:
            if number != len(lines) - 1:
                raise
    return out


def last_accuracies(history: Sequence[Mapping[str, Any]]) -> list[float]:
    """Of the last five evaluations, or fewer, the accuracies of models about as sparse as the last one, which comes last.

    A mean that took in the models before a cut, which kept more weights, would be no sparsity's.
    """
    scored = [row for row in history if row.get("test_accuracy") is not None][-5:]
    if not scored:
        return []
    kept = 1 - scored[-1]["sparsity"]
    alike = [row for row in scored if abs(1 - row["sparsity"] - kept) <= _ALIKE * kept + 1e-12]
    return [float(row["test_accuracy"]) for row in alike]


# Of the weights kept: a run whose mask is never frozen still makes its last cuts, which change so little, at its end.
_ALIKE = 0.05


def bytes_besides(record: Mapping[str, Any]) -> int:
    """What went up besides updates. Records of older versions have it within the kinds of the update: then 0 is left."""
    own = sum(int(record.get(f"upload_{kind}_bytes") or 0) for kind in KINDS_OF_BYTES)
    return int(record.get("upload_extra_bytes") or 0) if own < int(record.get("upload_bytes") or 0) else 0


def misfits(record: Mapping[str, Any]) -> list[str]:
    """Names of a record that has been read whose value is not what this program writes: null, or finite and of its kind."""

    def is_number(value: Any) -> bool:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and -_HUGE < value < _HUGE

    def fits(kind: str, value: Any) -> bool:
        if kind in ("ints", "floats"):
            return isinstance(value, list) and all(item is None or is_number(item) for item in value)
        if kind == "layers":
            return isinstance(value, dict) and all(item is None or is_number(item) for item in value.values())
        return is_number(value)

    return [
        name for name, field in FIELDS.items() if record.get(name) is not None and not fits(field.kind, record[name])
    ]


_HUGE = 1e300  # nothing is as large, and sums of what is smaller stay finite


def reference() -> str:
    """The names of a record as a Markdown table."""
    rows = ["| name | depends on | meaning |", "|---|---|---|"]
    rows += [f"| `{name}` | {field.depends_on} | {field.meaning} |" for name, field in FIELDS.items()]
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    print(reference(), end="")
