"""Every error the program raises on purpose, and the exit code that each one ends the process with."""


class FeddipError(Exception):
    """Base class. The message names the thing, its value, what is allowed and the way out.

    Attributes:
        shared: every rank raises this error together (`Communicator.check`), so each can end by itself.
    """

    exit_code = 1
    shared = False


class InputError(FeddipError):
    """Wrong configuration, command line or data: nothing was started, or it shows while a network trains; nothing is lost."""

    exit_code = 2


class UnrecordableError(InputError):
    """A client's step cannot become a CUDA graph. Torch does not find back from that: this rank's GPU computes nothing more."""


class DamagedFileError(FeddipError):
    """A file of ours exists but its content does not verify."""

    exit_code = 3


class UnreadableFileError(FeddipError):
    """A file of ours is there and cannot be read now, which says nothing about its content: nothing else may take its place."""


class NumericalError(FeddipError):
    """A loss or an update is NaN or infinite: training cannot go on from here."""

    exit_code = 4


class PeerError(FeddipError):
    """Ranks disagree: a replica drifted, or a message does not fit the round."""

    exit_code = 5


class RankLost(FeddipError):
    """A rank died. With a fault-tolerant MPI the others go on from here, as `on_rank_failure` says."""

    exit_code = 6


class FolderBusy(InputError):
    """Another job has the run folder, or a file server keeps the lock of one whose node died: trying again may help."""

    exit_code = 7


class Stopped(FeddipError):
    """A signal asked the run to stop; the state was saved and `resume` continues it (EX_TEMPFAIL)."""

    exit_code = 75


class Abandoned(Stopped):
    """A signal ended a round before its end: its work is dropped, the state is that before it, and nothing is lost."""
