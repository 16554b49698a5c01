"""What a process says on stdout and stderr. A reader that has gone, or a full disk, ends no run and keeps no job from its end."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import TextIO, cast


def say(text: str) -> None:
    """A line on stdout, seen at once also through a pipe."""
    _show(sys.stdout, f"{text}\n")


def note(text: str) -> None:
    """A line on stderr, so that stdout stays what was asked for."""
    _write(sys.stderr, f"{text}\n")


def flush() -> None:
    """Let out what others have written."""
    for stream in (sys.stdout, sys.stderr):
        _write(stream, "")


def settle() -> None:
    """The last thing before this process ends: for text that cannot be written Python would end it with code 120."""
    for stream in (sys.stdout, sys.stderr):
        if _write(stream, "") is not None:
            _leave(stream)


def stdout() -> TextIO:
    """stdout as it is now, for what wants a file: writing to it is as `say`."""
    return cast(TextIO, _Stdout())


class _Stdout:
    def __init__(self) -> None:
        self._stream, self.encoding = sys.stdout, getattr(sys.stdout, "encoding", None) or "utf-8"

    def write(self, text: str) -> int:
        _show(self._stream, text)
        return len(text)

    def flush(self) -> None:
        _show(self._stream, "")

    def isatty(self) -> bool:
        return self._stream is not None and self._stream.isatty()


def _show(stream: TextIO, text: str) -> None:
    """Where text cannot be written, what is still said there goes nowhere: numbers and log go to their files."""
    failed = _write(stream, text)
    if failed is not None:
        _leave(stream)
        if not isinstance(failed, BrokenPipeError):  # who says `| head` has seen enough
            note(f"stdout: cannot be written ({failed}); nothing more is said there")


def _write(stream: TextIO | None, text: str) -> Exception | None:
    """Returns what went wrong. A letter that the stream's encoding lacks is written as its escape."""
    if stream is None:  # closed before this program began
        return None
    try:
        try:
            stream.write(text)
        except UnicodeEncodeError:
            stream.write(text.encode(stream.encoding, "backslashreplace").decode(stream.encoding))
        stream.flush()
    except (OSError, ValueError) as error:  # ValueError: closed
        return error
    return None


def _leave(stream: TextIO) -> None:
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
