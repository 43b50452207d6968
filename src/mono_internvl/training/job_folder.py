"""A folder that a long job works in: one process at a time, fixed settings, whole files."""

from __future__ import annotations

import fcntl
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mono_internvl.errors import ConfigError, TrainingStateError

LOCK_PATIENCE_S = 5.0


@contextmanager
def exclusive(run: Path) -> Iterator[None]:
    """Hold a run folder against a second process.

    A process whose parent was killed may need a moment to go, so this waits for it a little.

    Raises:
        TrainingStateError: Another one has it and keeps it, or it cannot be made.
    """
    try:
        run.mkdir(parents=True, exist_ok=True)
        lock = (run / ".lock").open("w")
    except OSError as error:
        raise TrainingStateError(
            f"{run}: not a folder to write to ({error}); choose another output folder"
        ) from error
    with lock:
        until = time.monotonic() + LOCK_PATIENCE_S
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if time.monotonic() >= until:
                    raise TrainingStateError(
                        f"{run}: another process trains here; wait for it or choose another "
                        "output folder"
                    ) from error
                time.sleep(0.05)
        yield


def write_whole(file: Path, text: str) -> None:
    """Write a text file that is there whole or not at all; a line break ends it."""
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text(text.removesuffix("\n") + "\n", encoding="utf-8")
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
