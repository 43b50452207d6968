"""A folder that a long job works in: one process at a time, fixed settings, whole files."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import threading
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from mono_internvl.errors import CheckpointError, ConfigError, TrainingStateError

LOCK_PATIENCE_S = 5.0


@contextmanager
def exclusive(run: Path) -> Iterator[None]:
    """Hold a run folder against a second process.

    A process whose parent was killed may need a moment to go, so this waits for it a little.

    Raises:
        TrainingStateError: Another one has it and keeps it, or it cannot be made.
    """
    lock = FileLock(run / ".lock", timeout=LOCK_PATIENCE_S, poll_interval=0.05)
    try:
        run.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise TrainingStateError(
            f"{run}: another process trains here; wait for it or choose another output folder"
        ) from error
    except OSError as error:
        raise TrainingStateError(
            f"{run}: not a folder to write to ({error}); choose another output folder"
        ) from error
    try:
        yield
    finally:
        lock.release()


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to write a checkpoint to; it becomes `out` at the end, or goes if something raises.

    Raises:
        CheckpointError: It cannot be made or filled, or `out` is there meanwhile.
    """
    partial = out.with_name(f".{out.name}.{uuid.uuid4().hex[:8]}.partial")  # of this process alone
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise CheckpointError(
            f"{out}: cannot be written ({error}); give a folder that can be made"
        ) from error
    try:
        yield partial
        partial.rename(out)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{out}: not written ({error}); make room on the disk, or give another folder"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def resumable(run: Path) -> Iterator[None]:
    """Within, Ctrl-C and SIGTERM say that the same command goes on from what a run folder holds."""
    note = os.fsencode(f"\nstopped; the same command goes on from what {run} holds\n")
    process = os.getpid()

    def say() -> None:
        with contextlib.suppress(OSError):
            os.write(2, note)  # unbuffered: the signal may have come within another write

    def terminate(number: int, frame: object) -> None:
        if os.getpid() == process:  # not in one that was forked
            say()
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    is_ours = threading.current_thread() is threading.main_thread()
    is_ours = is_ours and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    if is_ours:
        signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    except KeyboardInterrupt:
        say()
        raise
    finally:
        if is_ours:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def write_whole(file: Path, content: str | bytes) -> None:
    """Write a file that is there whole or not at all; a line break ends a text."""
    if isinstance(content, str):
        content = (content.removesuffix("\n") + "\n").encode("utf-8")
    partial = file.with_name(f".{file.name}.partial")
    partial.write_bytes(content)
    partial.replace(file)


def begin(file: Path, settings: Mapping[str, Any]) -> None:
    """Hold a run folder to the settings it was begun with, or write them down.

    Args:
        file: Keeps the settings, in the run folder.
        settings: Of this call; what is not named here may differ.

    Raises:
        ConfigError: It was begun with others.
    """
    if file.exists():
        check_settings(file, settings, f"choose another --out folder or delete {file.parent}")
    else:
        write_whole(file, json.dumps(dict(settings), indent=2))


def check_settings(file: Path, expected: Mapping[str, Any], next_step: str) -> None:
    """Compare settings that a run has written down with those expected of it.

    Raises:
        ConfigError: The file is not there, damaged, or has another value.
    """
    try:
        found = dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{file}: not readable ({error}); {next_step}") from error
    for name, value in expected.items():
        if found.get(name) != value:
            raise ConfigError(
                f"{file}: begun with {name}={found.get(name)!r}, expected {value!r}; {next_step}"
            )
