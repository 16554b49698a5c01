"""The command line: parse, call, exit code. Nothing is imported for a command but what it needs."""

from __future__ import annotations

import contextlib
import functools
import gc
import io
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from feddip_mpi import __version__, output
from feddip_mpi.errors import FeddipError, InputError, RankLost, Stopped
from feddip_mpi.stopping import StopFlag

if TYPE_CHECKING:
    from feddip_mpi.collectives import Communicator

EXIT_CODES = """\b
Exit codes: 0 done; 2 wrong input, nothing lost; 3 a damaged file;
4 training diverged; 5 ranks disagree; 6 a rank died; 7 another job has
the run folder; 75 stopped by a signal after saving (resume goes on);
others are failures."""

_PATIENCE_SECONDS = 2.0
_COLLECT_AFTER = gc.get_threshold()
_COLLECT_AFTER_WHILE_IMPORTING = 50_000  # objects that can hold others


def _tell_twice(context: click.Context, parameter: click.Parameter, overrides: tuple[str, ...]) -> tuple[str, ...]:
    """Batch scripts put what they are given behind a `--set` of their own: the last one counts, but not silently."""
    last: dict[str, str] = {}
    for item in overrides:
        key = item.partition("=")[0].strip()
        if last.setdefault(key, item) != item:
            _tell(f"--set {last[key]}: gives way to --set {item}; of several for one key the last counts")
        last[key] = item
    return overrides


def _tell(text: str) -> None:
    from feddip_mpi import runtime
    from feddip_mpi.report import terminal

    if runtime.launched_rank() == 0:
        terminal.note(text)


_SETTINGS = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    callback=_tell_twice,
    help="Override a key, e.g. --set sparsity.final=0.95; of several for one key the last counts.",
)
_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON for machines instead of tables.")
_PLOT = click.option("--plot", metavar="FILE", help="Also draw it: FILE ends in .png, .pdf or .svg.")


@click.group(context_settings={"help_option_names": ["-h", "--help"]}, epilog=EXIT_CODES)
@click.version_option(__version__, prog_name="feddip-mpi")
def cli() -> None:
    """Train neural networks federatedly over MPI and prune them while they train (FedDIP)."""


@cli.command()
@click.argument("config")
@_SETTINGS
@click.option("--out", metavar="DIR", help="Run folder; must be new or empty.  [default: runs/NAME-DATE-TIME]")
def train(config: str, overrides: tuple[str, ...], out: str | None) -> None:
    """Start a run.

    mpirun -n 4 feddip-mpi train configs/quickstart.yaml
    """
    stop = StopFlag.installed()  # before an import that takes seconds: the default action of these signals is the end
    from feddip_mpi import session

    _under_mpi(lambda comm: session.train(comm, config, overrides, out, stop))


@cli.command()
@click.argument("folder", metavar="DIR")
@_SETTINGS
def resume(folder: str, overrides: tuple[str, ...]) -> None:
    """Go on with a run from its newest good checkpoint.

    On any number of ranks; --set rounds=N extends a finished run.
    """
    stop = StopFlag.installed()  # as in `train`
    from feddip_mpi import session

    _under_mpi(lambda comm: session.resume(comm, folder, overrides, stop))


@cli.command()
@click.argument("checkpoint")
@_SETTINGS
@click.option(
    "--batch-size", type=click.IntRange(min=1), help="Images per batch.  [default: the run's eval.batch_size]"
)
@_JSON
def evaluate(checkpoint: str, overrides: tuple[str, ...], batch_size: int | None, as_json: bool) -> None:
    """Test a saved model, truly pruned, on the data it was trained on.

    CHECKPOINT is a file or a run folder; mpirun -n P shares the test images among P ranks.
    """
    from feddip_mpi import reevaluate
    from feddip_mpi.report import terminal

    settings = (*overrides, *([f"eval.batch_size={batch_size}"] if batch_size else []))

    def work(comm: Communicator) -> None:
        result = reevaluate.evaluate(comm, checkpoint, settings)
        if comm.rank == 0:
            (terminal.print_json if as_json else reevaluate.show)(result)

    _under_mpi(work)


@cli.command()
@click.argument("checkpoint")
@click.option("--config", "only_config", is_flag=True, help="Print the configuration alone, as YAML.")
@_JSON
def inspect(checkpoint: str, only_config: bool, as_json: bool) -> None:
    """Show what a checkpoint (file or run folder) holds."""
    from feddip_mpi.report import inspection, terminal

    if only_config:
        terminal.say(inspection.config_text(Path(checkpoint)).rstrip())
    else:
        (terminal.print_json if as_json else inspection.show)(inspection.describe(Path(checkpoint)))


@cli.command()
@click.argument("paths", metavar="CHECKPOINT...", nargs=-1, required=True)
def verify(paths: tuple[str, ...]) -> None:
    """Check checkpoints (files or run folders) for damage."""
    from feddip_mpi.report import inspection

    inspection.verify(paths)


@cli.command()
@click.argument("checkpoint")
@click.argument("file")
@click.option(
    "--format",
    "form",
    type=click.Choice(["safetensors", "torch", "sparse", "small"]),
    help="Default by the ending: .safetensors, .pt or .pth, .sparse.safetensors, .small.safetensors.",
)
@click.option("--force", is_flag=True, help="Replace FILE if it exists.")
def export(checkpoint: str, file: str, form: str | None, force: bool) -> None:
    """Write the pruned model to a file of its own.

    The newest checkpoint is taken where CHECKPOINT is a run folder; FILE can be read without this package.

    safetensors and torch: every tensor dense, zeros included, for load_state_dict. sparse: only the weights that are left, for
    storing and sending; it is read back dense. small: the network without the channels that prunetrain removed. The command
    prints how to read what it wrote.
    """
    from feddip_mpi import checkpoint as checkpoints
    from feddip_mpi import export as exporting
    from feddip_mpi.report import terminal

    loaded, refused = checkpoints.find(Path(checkpoint))
    terminal.warn_refused(refused)
    terminal.say(exporting.report(exporting.export(loaded, Path(file), form, force)))


@cli.command()
@click.argument("config")
@_SETTINGS
@_PLOT
@click.option("--every", type=click.IntRange(min=1), metavar="N", help="Show every Nth round.  [default: what fits]")
@_JSON
def plan(config: str, overrides: tuple[str, ...], plot: str | None, every: int | None, as_json: bool) -> None:
    """Show what a run will do, round by round."""
    from feddip_mpi import config as configs
    from feddip_mpi.report import planning, plots, terminal

    settings = configs.load(config, overrides)
    layout, rows = planning.make(settings)
    if as_json:
        terminal.print_json(rows)
    else:
        planning.show(settings, layout, rows, every)
    if plot:
        plots.plan_figure(rows, planning.title(settings), plot)
        terminal.note(f"drawn: {plot}")


@cli.command()
@click.argument("config", required=False)
@_SETTINGS
@_PLOT
def data(config: str | None, overrides: tuple[str, ...], plot: str | None) -> None:
    """Show the data found and, with CONFIG, its partition."""
    from feddip_mpi import config as configs
    from feddip_mpi.report import datasets, plots, terminal

    settings = configs.load(config, overrides) if config else configs.parse("", overrides)
    if plot and not config:
        raise InputError("--plot draws a partition: name a CONFIG")
    datasets.show_places(settings.data)
    if config:
        dataset, histogram = datasets.load(settings)
        datasets.show_partition(settings, dataset, histogram)
        if plot:
            plots.partition_figure(histogram, dataset.class_names, plot)
            terminal.note(f"drawn: {plot}")


@cli.command()
@click.argument("target", required=False, metavar="[CONFIG or DIR]")
@_SETTINGS
@_JSON
def doctor(target: str | None, overrides: tuple[str, ...], as_json: bool) -> None:
    """Show what each rank runs on and what is wrong there.

    mpirun -n 4 feddip-mpi doctor
    """
    from feddip_mpi import doctor as doctors

    _under_mpi(lambda comm: doctors.examine(comm, target, overrides, as_json))


@cli.command()
@click.argument("target", metavar="CONFIG or DIR")
@_SETTINGS
@click.option("--ranks", default="1,2,4", metavar="P,P,...", help="Rank counts.  [default: 1,2,4]")
@click.option("--kind", type=click.Choice(["strong", "weak", "both"]), default="both", help="[default: both]")
@click.option(
    "--out", metavar="DIR", help="Folder of the study; one that exists is gone on with.  [default: runs/study-NAME]"
)
@click.option("--repeats", type=click.IntRange(1, 99), default=1, metavar="N", help="Runs of each cell.  [default: 1]")
@click.option("--rounds", type=click.IntRange(min=1), default=12, metavar="N", help="Of each run.  [default: 12]")
@click.option(
    "--warm-up", type=click.IntRange(min=0), default=2, metavar="N", help="First rounds not counted.  [default: 2]"
)
@click.option(
    "--per-rank", type=click.IntRange(min=1), default=1, metavar="K", help="weak: participants a rank.  [default: 1]"
)
@click.option(
    "--launcher",
    default="",
    metavar="COMMAND",
    help='As in "mpirun -n {ranks}".  [default: srun in a job, else mpirun]',
)
@click.option("--ranks-per-node", type=click.IntRange(min=1), metavar="N", help="For the cost model and the scripts.")
@click.option(
    "--cores", type=click.IntRange(min=1), metavar="N", help="That all ranks share, where they are simulated hosts."
)
@click.option("--note", default="", metavar="TEXT", help="Stands on everything shown and drawn.")
@click.option("--scripts", is_flag=True, help="Write submit.sh for Slurm in place of running.")
@click.option("--collect", is_flag=True, help="Report what is there, run nothing; with a DIR this is the default.")
@_JSON
def study(
    target: str,
    overrides: tuple[str, ...],
    ranks: str,
    kind: str,
    out: str | None,
    repeats: int,
    rounds: int,
    warm_up: int,
    per_rank: int,
    launcher: str,
    ranks_per_node: int | None,
    cores: int | None,
    note: str,
    scripts: bool,
    collect: bool,
    as_json: bool,
) -> None:
    """Measure how a run scales, and predict more ranks.

    strong: the same run on each number of ranks. weak: --per-rank participants for each rank; nothing else grows.
    Runs are started here, without mpirun before this command; finished ones are kept. Tables, CSV, JSON, LaTeX and
    pictures go to the folder.

    feddip-mpi study CONFIG --ranks 1,2,4,8
    """
    from feddip_mpi import study as studies

    settings = studies.Settings(
        ranks=studies.rank_counts(ranks),
        kinds=("strong", "weak") if kind == "both" else (kind,),
        repeats=repeats,
        rounds=rounds,
        warm_up=warm_up,
        per_rank=per_rank,
        launcher=launcher,
        cores=cores,
        ranks_per_node=ranks_per_node,
        note=note,
        scripts=scripts,
    )
    studies.work(target, overrides, settings, out, collect, as_json)


@cli.command()
@click.argument("grid")
@click.option("--out", metavar="DIR", help="Folder of the run folders, one a cell.  [default: runs/NAME]")
@click.option("--jobs", type=click.IntRange(min=1), default=1, metavar="N", help="Cells at once.  [default: 1]")
@click.option(
    "--launcher", default="", metavar="WORDS", help='Before each command, e.g. "mpirun -n 4".  [default: 1 rank]'
)
@click.option("--slurm", "for_slurm", is_flag=True, help="Write a Slurm array instead of running.")
@click.option("--dry-run", "dry", is_flag=True, help="Show cells, states and the estimate; run nothing but the trial.")
@click.option("--no-trial", is_flag=True, help="Estimate no time where no cell has a round yet.")
def sweep(grid: str, out: str | None, jobs: int, launcher: str, for_slurm: bool, dry: bool, no_trial: bool) -> None:
    """Run all cells of a grid that are not finished.

    Cells are ordinary run folders. The same command, given again, skips what is finished and resumes what is not.
    """
    from feddip_mpi.sweep import command

    command.sweep(grid, out, jobs, launcher, for_slurm, dry, not no_trial)


@cli.command()
@click.argument("folders", metavar="DIR...", nargs=-1, required=True)
@click.option("--out", metavar="REPORT", required=True, help="Folder of the report: new, or that of an earlier report.")
def report(folders: tuple[str, ...], out: str) -> None:
    """Compare finished runs: a page, figures and tables.

    DIR is a run folder or a folder of run folders. Runs that differ in their seed alone are taken together.
    """
    from feddip_mpi.report import page

    page.report(folders, out)


@cli.command()
@click.argument("folder", metavar="DIR")
@click.option("--once", is_flag=True, help="Show the state once and end.")
def watch(folder: str, once: bool) -> None:
    """Show a running job: numbers, time left, whether it lives.

    Ends when the run is finished. Reads files only: it may be started on any node that sees them, and stopped any time.
    """
    from feddip_mpi.report import watching

    watching.watch(folder, once)


@cli.group()
def bench() -> None:
    """Measure what a part of the program costs here."""


@bench.command("exchange")
@click.option("--model", metavar="NAME", help="Weights of this model (a name, or package.module:function).")
@click.option("--size", type=int, metavar="N", help="Weights, all prunable, in place of a model.  [default: 2000000]")
@click.option("--sparsity", type=float, multiple=True, metavar="S", help="Share of zeros; repeatable.  [default: 0.95]")
@click.option(
    "--values", multiple=True, metavar="KIND", help="fp32, fp16, bf16, int8, int4; repeatable.  [default: int8]"
)
@click.option(
    "--modes",
    multiple=True,
    metavar="MODE",
    help="allgatherv, sharded, node, dense, dense-allreduce, values+int32; repeatable.  [default: what makes sense here]",
)
@click.option("--regrow", type=float, default=0.0, metavar="SHARE", help="Off-mask values sent, of the kept weights.")
@click.option("--download", default="fp32", metavar="KIND", help="How `sharded` hands sums on.  [default: fp32]")
@click.option("--clients", type=int, default=1, metavar="K", help="Participants a rank.  [default: 1]")
@click.option("--entropy", is_flag=True, help="Compress the values with zstandard.")
@click.option("--no-overlap", is_flag=True, help="Send only when everything is encoded.")
@click.option("--repeats", type=int, default=5, metavar="N", help="After one to warm up.  [default: 5]")
@click.option("--seconds", type=float, default=12.0, metavar="BUDGET", help="Stop measuring after it.  [default: 12]")
@click.option("--out", metavar="DIR", help="New or empty.  [default: runs/bench-exchange-DATE]")
@_JSON
def bench_exchange(
    model: str | None,
    size: int | None,
    sparsity: tuple[float, ...],
    values: tuple[str, ...],
    modes: tuple[str, ...],
    regrow: float,
    download: str,
    clients: int,
    entropy: bool,
    no_overlap: bool,
    repeats: int,
    seconds: float,
    out: str | None,
    as_json: bool,
) -> None:
    """Time the exchange of a round in all its modes.

    From updates and residuals to the averaged result on every rank, beside a dense Allreduce and an Allgatherv of
    values with indices; then what the same network would take on more ranks.

    mpirun -n 4 feddip-mpi bench exchange --model alexnet
    """
    from feddip_mpi.bench import exchange
    from feddip_mpi.bench.options import Options

    options = Options(
        model=model,
        size=size,
        sparsity=sparsity or Options.sparsity,
        values=values or Options.values,
        modes=modes,
        regrow=regrow,
        download=download,
        clients=clients,
        compress=entropy,
        overlap=not no_overlap,
        repeats=repeats,
        seconds=seconds,
    )
    _under_mpi(lambda comm: exchange.run(comm, options, out, as_json))


def _under_mpi(work: Callable[[Communicator], None]) -> None:
    """Run on every rank. An error that all ranks share ends each with its exit code; any other one ends the job.

    Where MPI is fault tolerant, an error that is none of this program's (no memory, say) ends its rank alone.
    """
    from feddip_mpi import collectives, runtime

    gc.freeze()  # what was imported stays: no collection need look at it again
    gc.set_threshold(*_COLLECT_AFTER)  # cycles of later objects may hold tensors
    runtime.prepare_mpi()
    comm = collectives.world(runtime.ranks_per_node(), runtime.fault_tolerant())
    code = 0
    try:
        work(comm)
    except RankLost as lost:  # every survivor has it, each for itself
        words = f"rank {comm.world_ranks[comm.rank]}: {lost}"
        comm.abort(lost.exit_code, lambda: output.note(words))
    except FeddipError as error:
        if not error.shared and comm.size > 1:  # the others know nothing of it and wait for this rank
            comm.abort(
                error.exit_code, functools.partial(_complain, error, f"rank {comm.rank} failed: ending all ranks")
            )
        if comm.rank == 0:
            _complain(error)
        # Every rank ends by itself, but none before rank 0 has spoken: an exit code may end the job on the spot.
        with contextlib.suppress(RankLost):
            comm.barrier()
        code = error.exit_code
    except KeyboardInterrupt:
        comm.abort(130, lambda: output.note("interrupted: the last checkpoint is untouched"))
    except BaseException:
        ends = "it ends, the others go on without it" if comm.fault_tolerant and comm.size > 1 else "ending all ranks"
        words = f"rank {comm.world_ranks[comm.rank]} failed: {ends}"
        comm.fail(1, lambda: output.note(f"{traceback.format_exc()}{words}"))
    comm.leave(code)
    if code:
        sys.exit(code)


def _complain(error: FeddipError, more: str = "") -> None:
    """Say what is wrong, and `more`, on stderr; the first also in run.log, where rank 0 has begun one."""
    from feddip_mpi import runtime

    output.note(f"{_kind(error)}: {error}")
    runtime.log.info("%s: %s", _kind(error), error)
    if more:
        output.note(more)


def _kind(error: FeddipError) -> str:
    return "stopped" if isinstance(error, Stopped) else "error"


def main() -> None:
    """Entry point of the console script and of `python -m feddip_mpi`."""
    # Importing PyTorch makes some 10^5 objects. Walking through them, while more come and at the end, takes a third of the time
    # of a process that does nothing else.
    gc.set_threshold(_COLLECT_AFTER_WHILE_IMPORTING)
    # The console script leaves the current folder out, and with it your own module:function.
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        cli(standalone_mode=False)
    except click.exceptions.Abort:
        sys.exit(130)
    except click.ClickException as error:
        _let_first_rank_speak()
        shown = io.StringIO()
        _with_way_out(error).show(shown)
        output.note(shown.getvalue().rstrip())
        sys.exit(InputError.exit_code)
    except FeddipError as error:
        _let_first_rank_speak()
        _complain(error)
        sys.exit(error.exit_code)
    finally:
        output.settle()
        gc.freeze()  # it all goes with the process
    sys.exit(0)


def _with_way_out(error: click.ClickException) -> click.ClickException:
    """An option that there is not, but a key of that name: `--set` takes it."""
    context = getattr(error, "ctx", None)
    if not isinstance(error, click.NoSuchOption) or context is None:
        return error
    if all(parameter.name != "overrides" for parameter in context.command.params):
        return error
    from feddip_mpi import config as configs

    name = error.option_name.lstrip("-").replace("-", "_")
    keys = [key for key, *_ in configs.fields() if f".{key}".endswith(f".{name}")]
    if not keys:
        return error
    value = _value_of(error.option_name, sys.argv)
    ways = " or ".join(f"--set {key}={value}" for key in keys)
    return click.UsageError(
        f"No such option '{error.option_name}', but a key of the configuration: use {ways}", context
    )


def _value_of(option: str, words: Sequence[str]) -> str:
    """What stands behind an option: 5 for `--rounds 5` and `--rounds=5`."""
    for word, following in zip(words, [*words[1:], "VALUE"], strict=True):
        if word.startswith(f"{option}="):
            return word.partition("=")[2]
        if word == option and not following.startswith("--"):
            return following
    return "VALUE"


def _let_first_rank_speak() -> None:
    """An error before MPI starts: all ranks have it, and mpirun ends them all as soon as one has ended with a code.

    Rank 0 says it; the others wait to be ended. Who still runs afterwards (the launcher does not end others, or this
    rank alone has the error) says it too.
    """
    from feddip_mpi import runtime

    if runtime.launched_rank() > 0:
        time.sleep(_PATIENCE_SECONDS)
