"""Functions for other processes; apart, so that little is imported there."""

import json
import os
import time
from pathlib import Path

import torch

from mono_internvl.distributed import barrier, rank, world_size
from mono_internvl.errors import RecipeError


def fail_in_second() -> None:
    """The second process fails while the first waits for it."""
    if rank() == 1:
        raise RecipeError("the second process does not like its recipe")
    barrier()


def note_process(file: Path | None, other: Path | None = None) -> None:
    """Write down who runs this, then wait for the note of another task, if one is named."""
    if file is None:
        raise RecipeError("no such task")
    note = {"pid": os.getpid(), "world_size": world_size(), "threads": torch.get_num_threads()}
    file.write_text(json.dumps(note))
    until = time.monotonic() + 120
    while other is not None and not other.exists() and time.monotonic() < until:
        time.sleep(0.01)
