"""What a process says on stdout and stderr. A reader that has gone, or a full disk, ends no run and keeps no job from its end."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import TextIO


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
