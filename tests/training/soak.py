"""Kill training runs at random moments, and hold what comes of them to the undisturbed ones.

    PYTHONPATH=tests python tests/training/soak.py --kills 20

Runs of a tiny model, in one process and shared out over two, are killed by SIGKILL: at random
moments, every third time while a state is being written; of two processes one, or both. After each
kill the same command goes on. A run that ends, and both end often, must have the losses and weights
of the undisturbed one bit for bit. The last line is the verdict, the exit status says the same.

Processes are forked from one that has imported everything: a start costs a tenth of a second.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import signal
import socket
import sys
import tempfile
import time
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path

import tiny_runs
import torch

from mono_internvl.distributed import process_group
from mono_internvl.runs.provenance import commit, today, versions
from mono_internvl.training.loop import train_stage
from mono_internvl.training.parallel import Parallel

STAGE = tiny_runs.tiny_stage(batch_size=2, steps=30, checkpoint_every=3, keep_last=2)
WAYS: dict[int, Parallel] = {1: "ddp", 2: "fsdp"}
_PATIENCE_S = 300
_OTHERS_END_S = 2.0
"""How long one process outlives another, as `torchrun` lets it."""
_FORK = multiprocessing.get_context("fork")


def main() -> int:
    """Parse, kill, judge."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=20, help="with one process, and with two")
    parser.add_argument("--processes", type=int, choices=tuple(WAYS), help="with these alone")
    parser.add_argument("--seed", type=int, help="of the moments; a new one unless given")
    options = parser.parse_args()
    seed = random.randrange(1 << 30) if options.seed is None else options.seed
    commit()  # of what is run, whatever is committed meanwhile
    with tempfile.TemporaryDirectory() as folder:
        worlds = [options.processes] if options.processes else list(WAYS)
        soaks = [soak(Path(folder), world, options.kills, seed + world) for world in worlds]
    kills, writing = sum(s.kills for s in soaks), sum(s.while_writing for s in soaks)
    wrong = [line for s in soaks for line in s.wrong]
    numbers = {1: "one process", 2: "two"}
    named = " and ".join(f"with {numbers[s.world]}" for s in soaks)
    for what, value in (
        (f"kills, every third of them while a state is written, {named}", kills),
        (
            "losses and weights of killed runs that are not the undisturbed ones to the bit",
            len(wrong),
        ),
    ):
        print(row(what, value, f"make soak KILLS={options.kills} SEED={seed}"))
    print("\n".join(wrong), end="\n" if wrong else "")
    many = f"{kills} kills ({writing} while a state was written), seed {seed}"
    ended = ", ".join(f"{s.runs} runs in {s.world} process(es)" for s in soaks)
    print(f"soak: {'FAILED' if wrong else 'PASSED'}: {many}; {ended}")
    return 1 if wrong else 0


@dataclass
class Soak:
    """What came of the kills of one number of processes."""

    world: int
    kills: int = 0
    while_writing: int = 0
    runs: int = 0
    wrong: list[str] = field(default_factory=list)


def soak(folder: Path, world: int, kills: int, seed: int) -> Soak:
    """Kill runs in so many processes until there were so many kills."""
    root = folder / f"{world}-processes"
    root.mkdir(parents=True)
    _join([_fork(_prepare, root)])
    random.seed(seed)
    began = time.monotonic()
    _join(_start(world, root, root / "undisturbed"), root / "log.txt")
    took_s = time.monotonic() - began
    found = Soak(world)
    while found.kills < kills or found.runs == 0:
        run = root / f"run-{found.runs}"
        while True:
            processes = _start(world, root, run)
            is_aimed = found.kills % 3 == 2
            if found.kills >= kills:
                _join(processes, root / "log.txt")
            if not _wait(processes, run, took_s, is_aimed):
                break
            found.kills += 1
            found.while_writing += _is_writing(run)
            _kill(processes)
        _join(processes, root / "log.txt")
        found.runs += 1
        found.wrong += _differences(root / "undisturbed", run)
        print(f"{world} process(es): {found.kills} kills, {found.runs} runs ended", flush=True)
    return found


def _wait(processes: list[BaseProcess], run: Path, took_s: float, is_aimed: bool) -> bool:
    """Wait for the moment of a kill; False if the run ends before it."""
    until = time.monotonic() + random.uniform(0.05, 0.8) * took_s
    while all(process.is_alive() for process in processes):
        if is_aimed and _is_writing(run):
            time.sleep(random.uniform(0, 0.01))
            return True
        if not is_aimed and time.monotonic() > until:
            return True
        time.sleep(0.0005)
    return False


def _is_writing(run: Path) -> bool:
    return any(run.glob(".*.new.tmp"))


def _kill(processes: list[BaseProcess]) -> None:
    """All of them, or one, and the others when they had time to end by themselves."""
    victims = random.choice([processes, [random.choice(processes)]])
    for process in victims:
        process.kill()
    until = time.monotonic() + _OTHERS_END_S
    for process in processes:
        process.join(max(0.0, until - time.monotonic()))
        process.kill()
        process.join()
    assert any(process.exitcode == -signal.SIGKILL for process in processes)


def _differences(undisturbed: Path, run: Path) -> list[str]:
    """What is not the same, to the bit, one line each."""
    old, new = (tiny_runs.metric_rows(folder / "metrics.jsonl") for folder in (undisturbed, run))
    wrong = [
        f"{run.name}: step {a['step']}: {a} became {b}"
        for a, b in zip(old, new, strict=False)
        if json.dumps(a) != json.dumps(b)
    ]
    if len(old) != len(new):
        wrong.append(f"{run.name}: {len(new)} rows, expected {len(old)}")
    file = Path("checkpoint") / "model.safetensors"
    if (undisturbed / file).read_bytes() != (run / file).read_bytes():
        wrong.append(f"{run.name}: other weights")
    return wrong[:3]


def _start(world: int, root: Path, run: Path) -> list[BaseProcess]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return [_fork(_train, rank, world, port, root, run) for rank in range(world)]


def _fork(function: object, *arguments: object) -> BaseProcess:
    process = _FORK.Process(target=function, args=arguments)  # type: ignore[arg-type]
    process.start()
    return process


def _join(processes: list[BaseProcess], log: Path | None = None) -> None:
    for process in processes:
        process.join(_PATIENCE_S)
        if process.exitcode != 0:
            for other in processes:
                other.kill()
            if log is not None and log.exists():
                print("\n".join(log.read_text(errors="replace").splitlines()[-30:]))
            raise SystemExit(f"soak: FAILED: a process ended with {process.exitcode}")


def _prepare(root: Path) -> None:
    torch.set_num_threads(1)
    tiny_runs.write_checkpoint(root / "start" / "tiny")
    tiny_runs.write_data(root / "data")


def _train(rank: int, world: int, port: int, root: Path, run: Path) -> None:
    log = os.open(root / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    with process_group():
        train_stage(STAGE, root / "start" / "tiny", root / "data", run, parallel=WAYS[world])


def row(what: str, value: float, command: str) -> str:
    """A line of `results/rows.jsonl`."""
    return json.dumps(
        {
            "group": "training",
            "what": what,
            "value": value,
            "unit": "",
            "command": command,
            "commit": commit(),
            "device": os.environ.get("DEVICE", "cpu"),
            "versions": versions(),
            "date": today(),
        }
    )


if __name__ == "__main__":
    sys.exit(main())
