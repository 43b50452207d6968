"""A process that evaluates and is killed five times, each time in a process of its own.

Started by test_suite; arguments: checkpoint, data root, output folder, a file for what was asked.
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

from mono_internvl.evaluation import runner
from mono_internvl.evaluation.journal import AnswerJournal
from mono_internvl.evaluation.suite import Suite, ask_suite

KILLS = (1, 3, 2, 4, 2)
"""After how many writes of answers each process is killed; it may end before."""


def evaluate(suite: Suite, asked: Path, kill_after: int | None) -> None:
    """Ask, noting every question that is answered; die in the middle of a write."""
    writes = 0
    add = AnswerJournal.add

    def add_and_die(self: AnswerJournal, answers: Any) -> None:
        nonlocal writes
        add(self, answers)
        with asked.open("a") as file:
            file.writelines(f"{key}\n" for key in answers)
        writes += 1
        if writes == kill_after:
            with self.file.open("a") as file:
                file.write('{"half a li')
                file.flush()
            os.kill(os.getpid(), signal.SIGKILL)

    AnswerJournal.add = add_and_die  # type: ignore[method-assign]
    ask_suite(suite)


def main() -> None:
    """Five children that are killed, then one that ends."""
    model, data_root, out, asked = sys.argv[1:]
    suite = Suite(
        model=model,
        names=("mme", "gqa", "chartqa"),
        data_root=Path(data_root),
        out=Path(out),
        device="cpu",
        precision="fp32",
        max_tiles=1,
        batch_size=1,
    )
    assert runner  # imported before any child is made, so that it is loaded once
    killed = 0
    for kill_after in (*KILLS, None):
        child = os.fork()
        if child == 0:
            evaluate(suite, Path(asked), kill_after)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        killed += os.WIFSIGNALED(status)
        if not os.WIFSIGNALED(status) and os.WEXITSTATUS(status):
            sys.exit(f"child ended with {status}")
    print(killed)


if __name__ == "__main__":
    main()
