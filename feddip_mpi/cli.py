"""The command line: parse, call, exit code. Nothing is imported for a command but what it needs."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING

import click

from feddip_mpi import __version__
from feddip_mpi.errors import FeddipError, InputError, Stopped

if TYPE_CHECKING:
    from feddip_mpi.collectives import Communicator

EXIT_CODES = """\b
Exit codes: 0 done; 2 wrong input, nothing started; 3 a damaged file;
4 training diverged; 5 ranks disagree; 75 stopped by a signal after
saving (resume goes on); others are failures."""

_SETTINGS = click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key, e.g. --set sparsity.final=0.95."
)


@click.group(context_settings={"help_option_names": ["-h", "--help"]}, epilog=EXIT_CODES)
@click.version_option(__version__, prog_name="feddip-mpi")
def cli() -> None:
    """Train neural networks federatedly over MPI and prune them while they train (FedDIP)."""


@cli.command()
@click.argument("config")
@_SETTINGS
@click.option("--out", metavar="DIR", help="Run folder; must be new or empty.  [default: runs/NAME-DATE-TIME]")
def train(config: str, overrides: tuple[str, ...], out: str | None) -> None:
    """Start a run: mpirun -n 4 feddip-mpi train configs/quickstart.yaml"""
    from feddip_mpi import session

    _under_mpi(lambda comm: session.train(comm, config, overrides, out))


@cli.command()
@click.argument("folder", metavar="DIR")
@_SETTINGS
def resume(folder: str, overrides: tuple[str, ...]) -> None:
    """Go on with a run from its newest good checkpoint, on any number of ranks."""
    from feddip_mpi import session

    _under_mpi(lambda comm: session.resume(comm, folder, overrides))


def _under_mpi(work: Callable[[Communicator], None]) -> None:
    """Run on every rank. An error that all ranks share ends each with its exit code; any other one ends the job."""
    from feddip_mpi import collectives, runtime

    runtime.prepare_mpi()
    comm = collectives.world()
    try:
        work(comm)
    except FeddipError as error:
        # `Communicator.check` raised the same error everywhere: rank 0 speaks, every rank ends by itself.
        if comm.rank == 0:
            _complain(error)
        comm.free()
        sys.exit(error.exit_code)
    except BaseException:
        traceback.print_exc()
        print(f"rank {comm.rank} failed: ending all ranks", file=sys.stderr)
        comm.abort(1)
    comm.free()


def _complain(error: FeddipError) -> None:
    label = "stopped" if isinstance(error, Stopped) else "error"
    print(f"{label}: {error}", file=sys.stderr, flush=True)


def main() -> None:
    """Entry point of the console script and of `python -m feddip_mpi`."""
    try:
        cli(standalone_mode=False)
    except click.exceptions.Abort:
        sys.exit(130)
    except click.ClickException as error:
        error.show()
        sys.exit(InputError.exit_code)
    except FeddipError as error:
        _complain(error)
        sys.exit(error.exit_code)
    sys.exit(0)
