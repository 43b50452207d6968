"""What tests of the loop run in other processes; top-level, so that it can be sent there.

`python loop_processes.py RUN START DATA` trains `KILLED` as a process of `torchrun`'s.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import tiny_runs

from mono_internvl.distributed import run_processes
from mono_internvl.training.loop import train_stage
from mono_internvl.training.recipe import Stage

KILLED = tiny_runs.tiny_stage(batch_size=2, steps=60, checkpoint_every=10)
"""The stage that is killed and goes on in two processes."""


def train_each(
    runs: list[tuple[Stage, Path]], start: Path, data: Path, device: str = "cpu"
) -> None:
    """Train stages one after another, each from the same checkpoint."""
    for stage, run in runs:
        train_stage(stage, start, data, run, device=device)


def train_in(processes: int, stage: Stage, run: Path, start: Path, data: Path) -> None:
    """Train one stage in so many processes."""
    run_processes(train_each, processes, [(stage, run)], start, data)


def _train_in_background(processes: int, stage: Stage, run: Path, start: Path, data: Path) -> None:
    """As `train_in`, begun as a shell begins a job in the background."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    train_in(processes, stage, run, start, data)


def kill_in_the_middle(
    processes: int, stage: Stage, run: Path, start: Path, data: Path, rows: int
) -> None:
    """Start a training and send SIGKILL once a state and so many metric rows are there.

    Of several processes only the one that started them gets the signal.
    """
    # Forking saves an import where this process only starts others; autograd does not survive it.
    method = "spawn" if processes == 1 else "fork"
    training: BaseProcess = multiprocessing.get_context(method).Process(  # type: ignore[attr-defined]
        target=_train_in_background, args=(processes, stage, run, start, data)
    )
    training.start()
    until = time.monotonic() + 120
    metrics = run / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_bytes().count(b"\n") >= rows):
        assert time.monotonic() < until, "no progress"
        assert training.is_alive(), f"ended by itself with {training.exitcode}"
        time.sleep(0.001)
    assert training.pid is not None
    os.kill(training.pid, signal.SIGKILL)
    training.join()
    assert training.exitcode == -signal.SIGKILL


if __name__ == "__main__":
    run, start, data = map(Path, sys.argv[1:])
    train_in(1, KILLED, run, start, data)
