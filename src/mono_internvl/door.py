"""The door of the command line: what a user's line runs into ends in one line and exit code 1.

What this package raises on purpose says what to do. What the system raises (a full disk, a folder
that is none, a name that cannot be written, too little memory) is a user's to mend as well. All
else is a fault of the program and keeps its traceback.
"""

import contextlib
import io
import os
import sys
from collections.abc import Callable
from typing import TextIO

import typer

from mono_internvl.errors import MonoInternVLError

_NEXT_STEP = "--debug shows where"


def pass_through(command: Callable[[], object], *, is_debug: bool = False) -> int:
    """Run a command; errors of its user become one line on standard error.

    Args:
        command: Prints its result; may end with `SystemExit`.
        is_debug: Raise the error instead.

    Returns:
        The exit code: 1 after such an error, 130 after Ctrl-C, else the command's own.
    """
    _open_streams()
    try:
        code = _exit_code(command)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever read has gone, `| head` for example
        _discard(sys.stdout)
        return 1
    except Exception as error:
        if is_debug or (message := one_line(error)) is None:
            raise
        with contextlib.suppress(OSError):
            typer.secho(f"error: {message}", fg=typer.colors.RED, err=True)
        _discard(sys.stdout)
        return 1


def one_line(error: Exception) -> str | None:
    """What to tell a user about an error; None where it is a fault of the program."""
    if isinstance(error, MonoInternVLError):
        message = str(error)
    elif isinstance(error, UnicodeError):
        message = f"{error}; give text in the encoding of this terminal or file, UTF-8 is safe"
    elif isinstance(error, OSError):
        names = [str(name) for name in (error.filename, error.filename2) if name is not None]
        what = error.strerror or str(error) or type(error).__name__
        message = f"{' -> '.join(names) or 'reading or writing'}: {what}; {_NEXT_STEP}"
    elif _is_out_of_memory(error):
        message = f"not enough memory ({str(error) or type(error).__name__:.200}); {_NEXT_STEP}"
    elif type(error).__name__ == "SafetensorError":  # weights that the disk did not take
        message = f"{error}; {_NEXT_STEP}"
    else:
        return None
    # No lone surrogates: the line must be printable everywhere.
    return " ".join(message.encode("utf-8", "backslashreplace").decode().split())


def _is_out_of_memory(error: Exception) -> bool:
    is_allocator = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    return isinstance(error, MemoryError) or is_allocator or "OutOfMemory" in type(error).__name__


def _exit_code(command: Callable[[], object]) -> int:
    try:
        command()
    except SystemExit as end:
        if isinstance(end.code, str):
            raise
        return end.code or 0
    return 0


def _open_streams() -> None:
    """Closed streams read and write nothing; a terminal shows what it cannot write as `\\u4e2d`."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _discard(stream: TextIO) -> None:
    """Let what could not be written go, so that the interpreter does not try again at its end."""
    try:
        stream.flush()
    except OSError:
        with contextlib.suppress(OSError, ValueError):
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, stream.fileno())
            os.close(nothing)
