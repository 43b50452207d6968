"""Fuzzing: only errors of our own, in bounded time and memory.

`make fuzz` runs every target in turn, for FUZZ_SECONDS together, from FUZZ_SEED on; the suite runs
a few cases of each (`test_fuzz.py`). One case is repeated by `make fuzz FUZZ_CASE="TARGET SEED"`.
"""

from __future__ import annotations

import faulthandler
import itertools
import os
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from fuzz_targets import TARGETS

from mono_internvl.errors import MonoInternVLError

CASE_CPU_S = 20
"""CPU time of a case; those that work take milliseconds."""

CASE_WALL_S = 300
"""Wall time of a case, for one that waits for something; then the process ends with a trace."""

MAX_MB = 1500
"""Memory that a case may take beyond what was taken before."""


class TooSlow(BaseException):
    """A case ran out of its time; no `except Exception` may catch it."""


@dataclass
class Outcome:
    """What became of the cases of a target."""

    read: int = 0
    refused: int = 0
    failures: list[tuple[str, str]] = field(default_factory=list)


def run_case(target: str, seed: str, case: object, outcome: Outcome) -> None:
    """One case: counted as read, as refused by an error of ours, or as a failure with its trace."""
    before = _peak_mb()
    signal.setitimer(signal.ITIMER_PROF, CASE_CPU_S)
    faulthandler.dump_traceback_later(CASE_WALL_S, exit=True)
    try:
        case(random.Random(f"{target}:{seed}"))  # type: ignore[operator]
        outcome.read += 1
    except MonoInternVLError:
        outcome.refused += 1
    except KeyboardInterrupt:
        raise
    except BaseException:  # a panic of Rust code, too
        outcome.failures.append((seed, traceback.format_exc(limit=-8)))
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        faulthandler.cancel_dump_traceback_later()
    if (grown := _peak_mb() - before) > MAX_MB:
        outcome.failures.append((seed, f"took {grown} MB, more than {MAX_MB}\n"))


def fuzz(target: str, folder: Path, seeds: Iterable[str], seconds: float) -> Outcome:
    """Cases of a target, until the seeds or the seconds are used up."""
    outcome, current = Outcome(), folder / "current"
    place = folder / target
    place.mkdir(parents=True)
    signal.signal(signal.SIGPROF, _stop)
    case = TARGETS[target](place)
    end = time.monotonic() + seconds
    for seed in seeds:
        if time.monotonic() > end:
            break
        current.write_text(f"{target} {seed}\n")  # for a case that takes the process with it
        run_case(target, seed, case, outcome)
    return outcome


def _stop(number: int, frame: FrameType | None) -> None:
    raise TooSlow(f"more than {CASE_CPU_S} s of CPU time")


def _peak_mb() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def main() -> int:
    """Run all targets, or one case; the exit status is 1 where something failed."""
    chosen, seeds, seconds = list(TARGETS), None, float(os.environ.get("FUZZ_SECONDS", "3600"))
    if case := os.environ.get("FUZZ_CASE"):
        target, seed = case.split()
        chosen, seeds = [target], [seed]
    first = int(os.environ.get("FUZZ_SEED", "0"))
    failed = 0
    with tempfile.TemporaryDirectory(prefix="fuzz-", ignore_cleanup_errors=True) as folder:
        print(f"a case that ends the process is named in {folder}/current", flush=True)
        for target in chosen:
            own = seeds or map(str, itertools.count(first))
            outcome = fuzz(target, Path(folder), own, seconds / len(chosen))
            failed += len(outcome.failures)
            print(
                f"{target}: {outcome.read} read, {outcome.refused} refused, "
                f"{len(outcome.failures)} failed",
                flush=True,
            )
            for seed, trace in outcome.failures[:20]:
                print(f"--- FUZZ_CASE='{target} {seed}'\n{trace}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
