"""Small files of a checkpoint folder: read whole, but never more than such a file can hold.

What libraries raise of damaged ones becomes an error of ours (`reading`). Also how a folder gets
new files: written beside, moved into place when they are complete.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mono_internvl.errors import CheckpointError, MonoInternVLError

MAX_JSON_BYTES = 64 << 20
"""Largest settings file or shard index that is read; a released one has some 100 kB."""

MAX_TOKENIZER_BYTES = 256 << 20
"""Largest tokenizer file that is read; vocabularies of 250,000 tokens have 35 MB."""

MAX_TEMPLATE_BYTES = 1 << 20
"""Largest chat template that is read; known ones have up to 20 kB."""

_SCRATCH = "partial"


@contextmanager
def reading(what: str, kind: type[MonoInternVLError] = CheckpointError) -> Iterator[None]:
    """Turns whatever is raised while foreign data are read into one line of our own.

    A damaged file makes the libraries that read it raise anything, a panic of Rust code included,
    which Python does not count among the ordinary exceptions.

    Args:
        what: File or folder, for the message.
        kind: Of the error.

    Raises:
        MonoInternVLError: Of that kind; an error that is ours already stays as it is.
    """
    try:
        yield
    except MonoInternVLError:
        raise
    except Exception as error:
        raise kind(_line_of(what, error)) from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise kind(_line_of(what, error)) from error


def _line_of(what: str, error: BaseException) -> str:
    said = " ".join(str(error).split())[:300]
    return f"{what}: {type(error).__name__}: {said}; restore the file, or correct it"


def read_bytes(file: Path, most: int) -> bytes:
    """The contents of a regular file.

    Args:
        file: To read.
        most: Bytes that it may have.

    Raises:
        CheckpointError: It is no file, cannot be read, or is larger.
    """
    try:
        if not file.is_file():  # a pipe would never end
            raise CheckpointError(f"{file}: is no file; restore it from the checkpoint")
        if (size := file.stat().st_size) > most:
            raise CheckpointError(
                f"{file}: {size} bytes; expected at most {most}, restore the file from the "
                "checkpoint"
            )
        return file.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error}); restore the file") from error


def read_json(file: Path | None) -> dict[str, Any]:
    """The object in a JSON file; an empty one where there is no file.

    Raises:
        CheckpointError: It cannot be read, or is no JSON object.
    """
    if file is None:
        return {}
    try:
        value = json.loads(read_bytes(file, MAX_JSON_BYTES))
    except (ValueError, RecursionError) as error:  # ValueError: not JSON, or not UTF-8
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{file}: not valid JSON ({error}); restore the file") from error
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{file}: {type(value).__name__}; expected a JSON object, restore the file"
        )
    return value


@contextmanager
def scratch_folder(place: Path, name: str) -> Iterator[Path]:
    """A new hidden folder for files that are not complete yet; it goes when the context ends.

    It is locked while its process lives, so that what killed ones left is told from what others
    are at, and removed.

    Args:
        place: Folder to make it in: on the disk that the files will be moved on.
        name: Of what is made; whoever makes the same at that time has a folder of their own.

    Raises:
        OSError: It cannot be made.
    """
    for other in place.glob(f".{name}.*.{_SCRATCH}"):
        if (lock := _lock(other)) is not None:
            shutil.rmtree(other, ignore_errors=True)
            os.close(lock)
    lock = None
    while lock is None:  # until no other process has taken it for abandoned
        scratch = Path(tempfile.mkdtemp(prefix=f".{name}.", suffix=f".{_SCRATCH}", dir=place))
        lock = _lock(scratch)
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        os.close(lock)


def _lock(folder: Path) -> int | None:
    """A descriptor that holds the lock of a folder; None if it is gone or somebody else's."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if folder.exists():
            return descriptor
    except OSError:
        pass
    os.close(descriptor)
    return None


def make_readable(file: Path, like: Path) -> None:
    """Give a file the permissions of another, new one: safetensors writes for its owner alone."""
    file.chmod(like.stat().st_mode & 0o777)
