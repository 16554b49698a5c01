"""A run from its command to its folder: start or resume, save, finish. Every rank walks through the same steps."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from feddip_mpi import (
    checkpoint,
    config,
    deadlines,
    entropy,
    federation,
    hdf5,
    masks,
    methods,
    metrics,
    recovery,
    rounds,
    run_folder,
    runtime,
    schedules,
    scoring,
    server,
)
from feddip_mpi.checkpoint import Loaded
from feddip_mpi.collectives import Communicator
from feddip_mpi.errors import Abandoned, FeddipError, InputError, RankLost, Stopped
from feddip_mpi.exchange import own_part
from feddip_mpi.federation import Federation
from feddip_mpi.life import Life
from feddip_mpi.metrics import Record
from feddip_mpi.report import terminal
from feddip_mpi.residual_store import ResidualStore, device_budget, require_folder
from feddip_mpi.rounds import State
from feddip_mpi.run_folder import Lock, RunFolder
from feddip_mpi.runtime import log
from feddip_mpi.saver import FolderSaver
from feddip_mpi.settings import Config
from feddip_mpi.stopping import StopFlag
from feddip_mpi.summary import summarise

T = TypeVar("T")


def on_root(comm: Communicator, work: Callable[[], T]) -> T:
    """Do something on rank 0 and hand its JSON result to all ranks; an error there is raised on all ranks."""
    value, error = None, None
    if comm.rank == 0:
        try:
            value = work()
        except FeddipError as caught:
            error = caught
        except OSError as caught:
            error = hdf5.cannot_write(caught)
    comm.check(error)
    result: T = comm.broadcast(value)
    return result


def train(comm: Communicator, config_path: str, overrides: Sequence[str], out: str | None, stop: StopFlag) -> None:
    """Start a new run. Raises Stopped when a signal ended it after saving."""
    on_root(comm, lambda: runtime.check_launch(comm.size))
    stop.install()  # again: an MPI library may have taken a signal for itself

    def read() -> list[Any]:
        settings = config.load(config_path, overrides)
        _require_extras(settings)
        folder = RunFolder(Path(out) if out else _default_folder(config_path))
        folder.require_free()
        return [config.to_dict(settings), str(folder.path)]

    values, path = on_root(comm, read)
    settings, folder = config.validate(values), RunFolder(Path(path))
    with ExitStack() as held:
        watchdog = _watch(comm, settings, held)
        built = _build_to_train(comm, settings, watchdog)
        watchdog.enter(_of_root(comm, "open"))
        on_root(comm, lambda: _hold(held, folder.create(settings)))
        _open_log(comm, folder, f"start: {settings.method}, {comm.size} ranks, {comm.library()}")
        _begin(built, Run(folder, stop, held, watchdog, owner=comm.rank == 0))


@dataclass
class Run:
    """A command's hold on its folder.

    Attributes:
        folder: of the run.
        stop: set by signals.
        held: releases the lock.
        watchdog: over this rank, from the configuration to the last file.
        owner: whether this rank has the lock.
        created: ISO 8601 time at which the run began.
        faults: that tests have ordered for this rank.
        saver: may still be writing when a rank dies.
        recoveries: how many have begun.
    """

    folder: RunFolder
    stop: StopFlag
    held: ExitStack
    watchdog: deadlines.Watchdog
    owner: bool
    created: str = ""
    faults: list[runtime.Fault] = field(default_factory=list)
    saver: FolderSaver | None = None
    recoveries: int = 0

    def finish_writing(self) -> None:
        """Let a file that is being written become complete, on this rank alone."""
        if self.saver is not None:
            self.saver.close()
        self.saver = None


def _hold(held: ExitStack, lock: Lock) -> None:
    held.callback(lock.release)


def _watch(comm: Communicator, settings: Config, held: ExitStack) -> deadlines.Watchdog:
    """A watchdog over this rank until the command ends."""
    watchdog = deadlines.Watchdog(settings.watchdog, comm.world_ranks[comm.rank], comm.abort)
    held.callback(watchdog.close)
    return watchdog


def _of_root(comm: Communicator, phase: str) -> str:
    """What this rank enters where rank 0 works and the others wait for it."""
    return phase if comm.rank == 0 else "wait"


def _begin(built: Federation, run: Run) -> None:
    """Play a run from its first round on."""
    run.created = on_root(built.comm, lambda: time.strftime("%Y-%m-%dT%H:%M:%S%z"))
    _play(built, run, None, [])


def _first_state(built: Federation, run: Run) -> State:
    """The state before the first round. Raises Stopped where a signal came while clients measured for it."""
    try:
        return rounds.initial_state(built, _life(built, run))
    except Abandoned as abandoned:
        stopped = _stopped_before(0, run)
        stopped.shared = abandoned.shared  # all ranks are here: each ends by itself
        raise stopped from None


def _stopped_before(round: int, run: Run) -> Stopped:
    return Stopped(f"stopped by a signal before round {round + 1}; `feddip-mpi resume {run.folder.path}` goes on")


def resume(comm: Communicator, path: str, overrides: Sequence[str], stop: StopFlag) -> None:
    """Go on with a run from its newest checkpoint that verifies, on any number of ranks.

    A run that ended before its first checkpoint begins again, as its folder says.
    """
    on_root(comm, lambda: runtime.check_launch(comm.size))
    stop.install()
    with ExitStack() as held:
        _resume(comm, RunFolder(Path(path)), overrides, stop, held)


def _resume(comm: Communicator, folder: RunFolder, overrides: Sequence[str], stop: StopFlag, held: ExitStack) -> None:
    loaded: list[Loaded] = []

    def read() -> list[Any]:
        if not folder.path.is_dir():
            raise InputError(f"{folder.path}: no such run folder; `train` prints the name of the one it makes")
        if folder.config.exists() or checkpoint.listed(folder.checkpoints):  # nothing is written to any other folder
            _hold(held, Lock(folder, run_folder.lock_seconds(), lambda: stop.requested))
        saved = bool(checkpoint.listed(folder.checkpoints))  # the job that had the lock may have saved once more
        if not saved and folder.config.exists():
            settings = config.override(config.load(folder.config), overrides, config.RESUMABLE_KEYS)
            _require_extras(settings)
            return [config.to_dict(settings), [], 0, False]
        found, refused = checkpoint.newest(folder.checkpoints)
        settings = config.override(_last_told(folder, found), overrides, config.RESUMABLE_KEYS)
        _require_extras(settings)
        _check_rounds(settings, found)
        loaded.append(found)
        # Rank 0 looks for all: file systems show a file to some nodes sooner than to others.
        complete = found.server.round >= settings.rounds and folder.finished.exists()
        return [config.to_dict(settings), refused, found.server.round, complete]

    values, refused, done, complete = on_root(comm, read)
    settings = config.validate(values)
    watchdog = _watch(comm, settings, held)
    if comm.rank == 0:
        _open_log(comm, folder, f"resume after round {done} {_source(loaded)}: {comm.size} ranks")
        for reason in refused:
            log.warning("refused a checkpoint: %s", reason)
    if complete:
        if comm.rank == 0:
            terminal.say(f"{folder.path} is finished after {done} rounds; --set rounds=N with a larger N goes on")
        return
    built = _build_to_train(comm, settings, watchdog)
    run = Run(folder, stop, held, watchdog, owner=comm.rank == 0)
    watchdog.enter(_of_root(comm, "restore"))
    if done == 0:
        on_root(comm, lambda: _reopen(folder, settings))
        _begin(built, run)
        return
    state, history, run.created = _restore(built, loaded[0] if loaded else None, watchdog.progress)
    on_root(comm, lambda: _reopen(folder, settings))  # not before: data that does not fit must change nothing
    _play(built, run, state, history)


def _last_told(folder: RunFolder, found: Loaded) -> Config:
    """The configuration that the last start went by, as the folder has it.

    The checkpoint's lacks what `--set` has changed where that start ended before it could save. Raises InputError where the
    folder's cannot be read, or is another run's.
    """
    if not folder.config.exists():
        return found.config
    try:
        told = config.load(folder.config)
        checkpoint.check_config(folder.config, told, found)
    except InputError as error:
        raise InputError(
            f"{error}\n  mend this file; or remove it, and `resume` goes on as {found.path.name} says, without what "
            "--set has changed since"
        ) from None
    return told


def _require_extras(settings: Config) -> None:
    if settings.tensorboard:
        metrics.require_tensorboard()


def _source(loaded: Sequence[Loaded]) -> str:
    return f"from {loaded[0].path.name}" if loaded else "(it was never saved: it begins again)"


def _check_rounds(settings: Config, found: Loaded) -> None:
    """Raises InputError for a number of rounds that is past, or that leaves no mask update to reach the final sparsity."""
    done = found.server.round
    if settings.rounds < done:
        raise InputError(f"rounds={settings.rounds}: the run has finished {done} rounds; rounds must be at least that")
    prunes = methods.named(settings.method).ends_at_final(settings)
    reached = found.server.support.count <= masks.kept_count(found.server.support.size, settings.sparsity.final)
    share = settings.mask.freeze_after
    if prunes and not reached and schedules.last_mask_update(settings.rounds, share) <= done:
        enough = next(n for n in itertools.count(done) if schedules.last_mask_update(n, share) > done)
        raise InputError(
            f"rounds={settings.rounds}: the last mask update would belong to a round that is over ({done} are), and "
            f"the model has {masks.sparsity(found.server.mask):.4f} of sparsity.final = {settings.sparsity.final}; rounds "
            f"must be at least {enough}"
        )


def _reopen(folder: RunFolder, settings: Config) -> None:
    folder.checkpoints.mkdir(exist_ok=True)
    # In this order: a start that ends in between must not leave a run that was finished, and nothing of what it was told.
    hdf5.write_text(folder.config, config.to_yaml(settings))
    folder.finished.unlink(missing_ok=True)


def _default_folder(config_path: str) -> Path:
    return Path("runs") / f"{Path(config_path).stem}-{time.strftime('%Y%m%d-%H%M%S')}"


def _open_log(comm: Communicator, folder: RunFolder, message: str) -> None:
    runtime.start_log(folder.path, comm.rank)
    if comm.rank == 0:
        log.info("%s", message)
        log.info("with %s", _listed(runtime.versions()))


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def _build_to_train(comm: Communicator, settings: Config, watchdog: deadlines.Watchdog) -> Federation:
    """`build`, after what training alone needs: an evaluation may happen on another machine."""
    error = None
    watchdog.enter("load" if comm.node_rank == 0 else "wait")  # the first rank of each node reads the data
    try:
        require_folder(settings.upload)
        if settings.upload.entropy == "zstd":
            entropy.require()
    except InputError as caught:
        error = caught
    comm.check(error)
    return build(comm, settings)


def build(comm: Communicator, settings: Config) -> Federation:
    """This rank's device, then everything of `federation.build`. An error on one rank is raised on all."""
    error, device = None, torch.device("cpu")
    for fault in runtime.faults(comm.rank):
        fault.enter("setup", 0)
    try:
        device = runtime.prepare_torch(settings, runtime.local_rank(comm.rank, comm.node_rank))
    except FeddipError as caught:
        error = caught
    comm.check(error)
    return federation.build(settings, comm, device)


def _restore(
    built: Federation, loaded: Loaded | None, progress: Callable[[], None] = lambda: None
) -> tuple[State, list[Record], str]:
    """The checkpoint's state, history and time of creation on every rank; rank 0 has read it.

    The history is rank 0's alone unless MPI is fault tolerant: then each may have to take its place.
    """
    comm, layout, device = built.comm, built.layout, built.device

    def check() -> list[Any]:
        assert loaded is not None
        check_same(built, loaded)
        left = list(checkpoint.residual_rounds(loaded.path).items())  # who has one; read when they are handed out
        return [loaded.server.round, left, loaded.created]

    done, left, created = on_root(comm, check)
    names = on_root(comm, lambda: sorted(loaded.memories) if loaded else [])

    def everywhere(values: np.ndarray | None) -> torch.Tensor:
        return torch.from_numpy(comm.broadcast_array(values)).to(device)

    weights = everywhere(loaded.server.weights.numpy() if loaded else None)
    srv = server.Server.of(done, weights, everywhere(loaded.server.mask.numpy() if loaded else None))
    memories = {name: everywhere(loaded.memories[name] if loaded else None) for name in names}
    if "owed" in memories:  # each rank owes for its slice alone, also on another number of ranks
        kind = built.config.upload.values
        memories["owed"] = own_part(memories["owed"], srv.support, layout.size, comm.size, comm.rank, kind)
    holders = rounds.initial_holders(built.config.clients, comm.size)
    held = ResidualStore.of(built.config.upload, lambda: device_budget(built.config, built.device))
    stored = checkpoint.read_residuals(loaded.path) if loaded else None
    recovery.hand_out(comm, dict(left), holders, stored, held, progress)
    assert srv.weights.numel() == layout.size
    reference, owed = memories.pop("reference", None), memories.pop("owed", None)
    history = list(loaded.history) if loaded else []
    if comm.fault_tolerant:
        history = comm.broadcast(history)
    # A run that was stopped in the middle of a round had no time to evaluate the one before: the next round does.
    is_owed = on_root(comm, lambda: scoring.is_owed(built.config, history[-1]))
    unscored = (history[-1] if history else {}) if is_owed else None
    return State(srv, held, holders, reference, owed, memories, unscored=unscored), history, created


def check_same(built: Federation, loaded: Loaded) -> None:
    """Raises InputError where the data or the model are not those of the checkpoint."""
    if loaded.identity != built.identity:
        raise InputError(
            f"{loaded.path}: trained on {loaded.identity!r}, but the data found here is {built.identity!r} "
            f"({built.dataset.source}); set data.path to the data of the run"
        )
    checkpoint.check_model(loaded, built.layout)


def _cautions(built: Federation) -> list[str]:
    """What this run does in a way that its user will hardly want; it goes on."""
    found = [] if (caution := built.method.caution()) is None else [caution]
    if built.config.precision == "bf16" and built.device.type == "cpu" and runtime.lacks_bf16():
        found.append("precision: bf16 is emulated by this CPU, which has no instructions for it: fp32 will be faster")
    several = built.config.participants > built.comm.size  # else each rank's client trains alone, recorded
    if built.config.clients_at_once > 1 and several and built.trainer.recorder is not None:
        found.append(
            f"clients_at_once={built.config.clients_at_once}: clients that train at once are not recorded (cuda_graphs): one "
            "after another LeNet-5's were five times as fast on an H200"
        )
    return found


def _play(built: Federation, run: Run, state: State | None, history: list[Record]) -> None:
    """Play what is left of a run, on the ranks that are left; without a state, from its opening on."""
    run.faults = runtime.faults(built.comm.rank)
    if run.owner:  # not before it trains here: reports take what a run has run on from this line
        log.info("%s", run_folder.hardware_line(runtime.hardware()))
        for caution in _cautions(built):
            log.warning("%s", caution)
    if built.comm.unshared and built.comm.node_rank == 0:
        log.warning("%s", built.comm.unshared)
    while True:
        try:
            if state is None:
                state = _first_state(built, run)
            _play_on(built, run, state, history)
            built.comm.commit()  # nobody leaves before the marker is written
            return
        except RankLost as lost:
            if built.config.on_rank_failure == "abort":
                run.finish_writing()
                raise RankLost(f"{lost}; `feddip-mpi resume {run.folder.path}` goes on") from None
            state, history = _recover(built, run, state, history)


def _play_on(built: Federation, run: Run, state: State, history: list[Record]) -> None:
    comm, folder, stop = built.comm, run.folder, run.stop
    stopping = comm.any(stop.requested)
    # What the next round will score is told then, unless there will be none.
    told = [record for record in history if stopping or record is not state.unscored]
    saver = run.saver = FolderSaver(built, folder, run.created, run.watchdog.progress)
    sinks: list[metrics.Sink] = []  # of rank 0
    on_root(comm, lambda: sinks.extend(metrics.open_sinks(folder.path, folder.metrics, told, built.config.tensorboard)))
    if stopping:
        for sink in sinks:
            sink.close()
        comm.check(_stopped_before(state.server.round, run))
    progress = terminal.progress(built, folder.path) if comm.rank == 0 else None
    full = set(built.layout.prunable_names)
    if history:
        full -= set(emptied(history[-1], full))

    def report(record: Record) -> None:
        if progress is not None:
            for sink in sinks:
                sink.append(record)
            progress.show(record)
            log.info("%s", terminal.line(record, built.config.rounds))
            if record["mask_delayed"] or (record["penalty_scale"], record["regrow_scale"]) != (1.0, 1.0):
                chosen = {name: record[name] for name in ("mask_delayed", "penalty_scale", "regrow_scale")}
                log.info("adaptive control in round %d: %s", record["round"], _listed(chosen))
            for layer in emptied(record, full):
                full.discard(layer)
                log.warning(_EMPTIED, record["round"], layer)

    life = _life(built, run)
    try:
        stopped = rounds.run(built, state, history, saver, report, lambda: stop.requested, life)
        saver.wait()
    except RankLost:  # the others wait for this rank: what is being written has time until they have found each other
        raise
    except FeddipError:
        saver.close()
        raise
    finally:
        if progress is not None:
            progress.close()
        for sink in sinks:
            sink.close()
    if stopped:
        message = f"stopped by a signal after round {state.server.round}; `feddip-mpi resume {folder.path}` goes on"
        comm.check(Stopped(message))
    life.enter("finish", state.server.round - 1)
    _finish(built, run, state, history)


_EMPTIED = (
    "round %d: no weight of %s is left; where no shortcut goes round it, the output no longer depends on the image. Choose "
    "mask.allocation: lamp, which leaves some of every layer, cut later or less (sparsity.*, mask.*), or name the layer in "
    "model.keep_dense"
)


def emptied(record: Record, layers: Collection[str]) -> list[str]:
    """Those of some layers of which a round left nothing."""
    return [name for name, share in record["sparsity_by_layer"].items() if name in layers and share == 1.0]


def _life(built: Federation, run: Run) -> Life:
    grace = built.config.stop_grace

    def enter(phase: str, round: int) -> None:
        run.watchdog.enter(phase, round)
        for fault in run.faults:
            fault.enter(phase, round)

    def stopped() -> FeddipError | None:
        return _stopped_before(0, run) if run.stop.requested else None

    return Life(lambda: run.stop.expired(grace), enter, stopped)


def _recover(
    built: Federation, run: Run, state: State | None, history: list[Record]
) -> tuple[State | None, list[Record]]:
    """What the survivors go on from, after any number of further deaths; no state where that is the opening."""
    comm, settings = built.comm, built.config
    started = time.monotonic()
    while True:
        try:
            run.watchdog.enter("recover", state.server.round if state else 0)
            with deadlines.deadline(settings.recovery_timeout, "waiting for the ranks that survive"):
                survivors = comm.shrink()
            if state is not None:
                state.holders = recovery.renumber(state.holders, survivors)
            run.watchdog.enter("recover", state.server.round if state else 0)
            for fault in run.faults:
                fault.enter("recover", run.recoveries)
            run.recoveries += 1
            run.finish_writing()
            _take_over_folder(comm, run)
            state, history, how = _mended(built, run, state, history)
        except RankLost:
            continue
        break
    if comm.rank == 0:
        dead, left = ", ".join(map(str, comm.lost_ranks)), comm.size
        done = state.server.round if state else 0
        message = f"rank {dead} of the start died: {left} go on after round {done} ({how})"
        log.warning("%s; %.2f s to recover", message, time.monotonic() - started)
    return state, history


def _take_over_folder(comm: Communicator, run: Run) -> None:
    """Lock and log go to the new rank 0. Raises FolderBusy on all ranks where the old one still lives somewhere."""
    runtime.start_log(run.folder.path, comm.rank)

    def lock() -> None:
        if not run.owner:
            # Also when a signal has come: nothing is saved without it.
            _hold(run.held, Lock(run.folder, run_folder.lock_seconds()))
            run.owner = True

    on_root(comm, lock)


def _mended(
    built: Federation, run: Run, state: State | None, history: list[Record]
) -> tuple[State | None, list[Record], str]:
    """State and history to go on from, and in words where that is. Raises RankLost."""
    comm, folder = built.comm, run.folder
    loaded: list[Loaded] = []

    def read() -> str:
        if checkpoint.listed(folder.checkpoints):
            found, refused = checkpoint.newest(folder.checkpoints)
            loaded.append(found)
            for reason in refused:
                log.warning("refused a checkpoint: %s", reason)
        return loaded[0].path.name if loaded else ""

    name = on_root(comm, read)
    if built.config.on_rank_failure == "continue" and state is not None:
        saved = (loaded[0].server.round, loaded[0].path) if loaded else None
        found = recovery.take_over(built, state, history, saved, run.watchdog.progress)
        if found is not None:
            taken, losses = found
            state.become(taken)  # also when yet another rank dies below: what is lost is counted once
            if comm.rank == 0:
                log.warning("%s", losses)
            if name != checkpoint.path_of(folder.checkpoints, state.server.round).name and state.server.round:
                _save_now(FolderSaver(built, folder, run.created, run.watchdog.progress), state, history)
            return state, history, "nothing is played again"
    if not name:
        return None, [], "from the start: nothing was saved"
    state, history, _ = _restore(built, loaded[0] if loaded else None, run.watchdog.progress)
    return state, history, f"rewound to {name}"


def _save_now(saver: FolderSaver, state: State, history: list[Record]) -> None:
    try:
        saver.save(state, history)
        saver.wait()
    except FeddipError:
        saver.close()  # nothing else may write that file at the same time
        raise


def _finish(built: Federation, run: Run, state: State, history: list[Record]) -> None:
    # Rank 0's history counts: the others' begins where the run was resumed.
    pruned = built.comm.broadcast(history[-1]["test_accuracy"] if history else None)
    if pruned is None:  # resumed with as many rounds as are done, the last of which was not evaluated
        pruned = scoring.score_model(built, server.pruned(state.server.weights, state.server.mask)).top1
    memory = scoring.score_model(built, state.server.weights)
    if built.comm.rank != 0:
        run.watchdog.enter("wait")
        return
    folder = run.folder
    summary = summarise(built, history, pruned, memory.top1, state.server.mask)
    try:
        hdf5.write_text(folder.finished, json.dumps(summary, indent=2) + "\n")
    except OSError as error:
        raise hdf5.cannot_write(error, folder.finished) from None
    log.info("finished after round %d", state.server.round)
    run.watchdog.enter("draw")
    terminal.show_summary(summary, folder.path, _draw(built, folder, history))


def _draw(built: Federation, folder: RunFolder, history: Sequence[Record]) -> Path | None:
    from feddip_mpi.report import plots

    c = built.config
    title = f"{c.method}: {c.model.name} on {built.dataset.name}, {c.clients} clients, seed {c.seed}"
    try:
        plots.run_figure(list(history), title, folder.plot)
    except InputError as error:  # matplotlib is an extra: the run is complete without a picture
        log.warning("no plot: %s", error)
        return None
    except Exception as error:  # of matplotlib's own, such as fonts that it cannot read
        log.warning("no plot: %s: %s", type(error).__name__, error)
        return None
    return folder.plot
