"""What a checkpoint holds, and whether checkpoints are whole. Needs no MPI."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from feddip_mpi import checkpoint, config, export, run_folder
from feddip_mpi.checkpoint import Loaded
from feddip_mpi.errors import DamagedFileError, FeddipError, InputError
from feddip_mpi.report import terminal


def describe(path: Path) -> dict[str, Any]:
    """A checkpoint, or the newest good one of a run folder, in JSON values.

    Raises:
        InputError: there is none.
        DamagedFileError: none can be read.
    """
    loaded, refused = checkpoint.find(path)
    try:
        residuals, file_bytes = checkpoint.residual_bytes(loaded.path), loaded.path.stat().st_size
    except (FeddipError, OSError):
        if loaded.path == path or not _is_gone(loaded.path):
            raise
        return describe(path)  # of a running job, which has newer ones by now
    last = loaded.history[-1] if loaded.history else {}
    return {
        "checkpoint": str(loaded.path),
        "refused": refused,
        "round": loaded.server.round,
        "rounds": loaded.config.rounds,
        "created": loaded.created,
        "saved": loaded.saved,
        "versions": loaded.versions,
        "format_version": checkpoint.FORMAT_VERSION,
        "digest": loaded.digest,
        "method": loaded.config.method,
        "seed": loaded.config.seed,
        "data": loaded.identity,
        "clients": loaded.config.clients,
        "model": loaded.config.model.name,
        "input_shape": list(loaded.input_shape),
        "classes": loaded.classes,
        "test_accuracy": last.get("test_accuracy"),
        "test_loss": last.get("test_loss"),
        "sparsity_asked": last.get("sparsity_asked"),
        "sparsity": _share_of_zeros(loaded),
        "layers": _layers(loaded),
        "values": loaded.server.weights.numel(),
        "prunable": loaded.server.mask.numel(),
        "kept": int(loaded.server.mask.sum()),
        "file_bytes": file_bytes,
        "dense_bytes": 4 * loaded.server.weights.numel(),
        "pruned_bytes": _pruned_bytes(loaded),
        "residual_clients": list(residuals),
        "residual_bytes": sum(residuals.values()),
        "uploaded_bytes": sum(record["upload_bytes"] for record in loaded.history),
        "config": config.to_dict(loaded.config),
    }


def _share_of_zeros(loaded: Loaded) -> float:
    mask = loaded.server.mask
    return 1 - int(mask.sum()) / mask.numel() if mask.numel() else 0.0


def _layers(loaded: Loaded) -> list[dict[str, Any]]:
    """Every tensor that may be pruned, in the model's order."""
    return [
        {
            "name": name,
            "shape": list(mask.shape),
            "weights": mask.size,
            "kept": int(mask.sum()),
            "sparsity": 1 - int(mask.sum()) / mask.size,
        }
        for name, mask in loaded.masks.items()
    ]


def _pruned_bytes(loaded: Loaded) -> int:
    """The file that `export` writes in its sparse form, but for batch counters, for which the network would have to be built."""
    tensors = {name: torch.from_numpy(loaded.tensors[name]) for name in loaded.layout_names}
    return len(export.sparse_file(tensors, loaded))


def config_text(path: Path) -> str:
    """The configuration that a checkpoint carries, as YAML that `train` takes."""
    return config.to_yaml(checkpoint.find(path)[0].config)


def show(facts: dict[str, Any]) -> None:
    """The description as two tables on stdout."""
    terminal.warn_refused(facts["refused"])
    about = terminal.table()
    for name, value in _rows(facts):
        about.add_row(name, value)
    numbers = ("weights", "kept", "sparsity")
    layers = terminal.table("layer", "shape", *numbers, right=numbers)
    for layer in facts["layers"]:
        shape = "x".join(map(str, layer["shape"]))
        layers.add_row(layer["name"], shape, f"{layer['weights']:,}", f"{layer['kept']:,}", f"{layer['sparsity']:.4f}")
    layers.add_section()
    layers.add_row("together", "", f"{facts['prunable']:,}", f"{facts['kept']:,}", f"{facts['sparsity']:.4f}")
    terminal.print_tables(facts["checkpoint"], about, "Prunable tensors", layers)


def _rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    size = terminal.size
    accuracy, asked = facts["test_accuracy"], facts["sparsity_asked"]
    clients = len(facts["residual_clients"])
    return [
        ("round", f"{facts['round']} of {facts['rounds']}"),
        ("accuracy of the pruned model", f"{accuracy:.4f}" if accuracy is not None else "not measured in this round"),
        ("sparsity", f"{facts['sparsity']:.6f}" + (f" (asked {asked:.6f})" if asked is not None else "")),
        ("method", f"{facts['method']}, seed {facts['seed']}, {facts['clients']} clients"),
        ("model", f"{facts['model']}: {facts['values']:,} values, {facts['prunable']:,} prunable"),
        ("input, classes", f"{'x'.join(map(str, facts['input_shape']))}, {facts['classes']}"),
        ("data", facts["data"]),
        ("dense model", size(facts["dense_bytes"])),
        ("pruned model", f"{size(facts['pruned_bytes'])} exported as sparse, {facts['dense_bytes'] / facts['pruned_bytes']:.1f} "
                         "times smaller"),
        ("residuals", f"of {clients} clients, {size(facts['residual_bytes'])}" if clients else "none"),
        ("uploaded so far", size(facts["uploaded_bytes"])),
        ("file", f"{size(facts['file_bytes'])}, format {facts['format_version']}"),
        ("run began, file saved", f"{facts['created']}, {facts['saved']}"),
        ("written by", ", ".join(f"{name} {version}" for name, version in facts["versions"].items())),
    ]  # fmt: skip


def verify(paths: Sequence[str]) -> int:
    """Read every byte of checkpoints and of the checkpoints in run folders; one line a file on stdout.

    A checkpoint in a run folder must also have the configuration that the folder has, without which `resume` refuses it.

    Files of a running job's folder that it deletes meanwhile are passed over.

    Returns:
        How many files were read and found whole.

    Raises:
        DamagedFileError: at least one is damaged; all were looked at before.
        InputError: a path is no checkpoint or holds none, is of a newer format or another run's; all were looked at before.
    """
    problems: list[FeddipError] = []
    whole = 0
    for path, error in _files(paths):
        try:
            if error is not None:
                raise error
            datasets, loaded = checkpoint.verify(path)
            _check_config(path, loaded)
        except FeddipError as caught:
            if path not in map(Path, paths) and _is_gone(path):
                continue
            problems.append(caught)
            terminal.say(f"{'DAMAGED' if isinstance(caught, DamagedFileError) else 'REFUSED'}  {caught}")
        else:
            whole += 1
            terminal.say(f"OK       {path}: round {loaded.server.round}, {datasets} datasets{_size(path)}")
    damaged = sum(isinstance(problem, DamagedFileError) for problem in problems)
    if damaged:
        raise DamagedFileError(
            f"{damaged} of {whole + len(problems)} files damaged; `resume` uses the newest whole one"
        )
    if problems:
        raise InputError(f"{len(problems)} of {whole + len(problems)} cannot be checked, see above")
    return whole


def _check_config(path: Path, loaded: Loaded) -> None:
    folder = run_folder.RunFolder(path.absolute().parent.parent)
    if path.parent.name == folder.checkpoints.name and folder.config.exists():
        checkpoint.check_config(folder.config, config.load(folder.config), loaded)


def _is_gone(path: Path) -> bool:
    """Whether a file that was listed is not listed any more; a file system that answers with errors has not lost it."""
    return path not in checkpoint.listed(path.parent)


def _size(path: Path) -> str:
    try:
        return f", {terminal.size(path.stat().st_size)}"
    except FileNotFoundError:  # deleted since it was read
        return ""


def _files(paths: Sequence[str]) -> list[tuple[Path, InputError | None]]:
    """Every file that the paths mean; in place of one, the error that says why there is none."""
    found: list[tuple[Path, InputError | None]] = []
    for path in map(Path, paths):
        if not path.is_dir():
            found.append((path, checkpoint.other_kind(path)))
            continue
        inside = checkpoint.listed(checkpoint.folder_of(path))
        found += [(file, None) for file in inside]
        if not inside:
            way_out = run_folder.name_one_of(path)
            found.append(
                (path, InputError(f"{path}: no checkpoint (round-NNNNNN.h5) in this folder{way_out and '; '}{way_out}"))
            )
    return found
