"""Sixteen clients at once against one after another: `make serve-load RUN=runs/quickstart`.

Every answer is held against the one that its question got when nobody else asked. Phases alternate,
so that other work on the machine slows both alike. Prints rows for `results/rows.jsonl`.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import threading
import time
from pathlib import Path
from typing import Any

from PIL import Image
from served import Address, Process, chat, data_uri, user

from mono_internvl.runs.provenance import commit, today, versions

CLIENTS, QUESTIONS, ROUNDS = 16, 120, 5
ALONE_SHARE = 0.25


def questions_of(run: Path) -> list[dict[str, Any]]:
    """Requests made of the held-out records of a quickstart."""
    requests = []
    with (run / "data" / "heldout.jsonl").open() as lines:
        for line, _ in zip(lines, range(QUESTIONS), strict=False):
            record = json.loads(line)
            uri = data_uri(Image.open(run / "data" / record["image"]))
            text = record["conversations"][0]["value"].removeprefix("<image>\n")
            requests.append(chat(user(text, uri), max_tokens=64))
    return requests


def text_of(address: Address, request: dict[str, Any]) -> str:
    status, _, answer = address.ask(request)
    assert status == 200, answer
    text: str = answer["choices"][0]["message"]["content"]
    return text


class Clients:
    """So many clients, for some seconds."""

    def __init__(self, address: Address, requests: list[Any], expected: list[str]) -> None:
        self._address, self._requests, self._expected = address, requests, expected
        self.answers = self.wrong = 0

    def run(self, count: int, seconds: float) -> float:
        """Answers per second."""
        end, before, began = time.monotonic() + seconds, self.answers, time.monotonic()
        threads = [
            threading.Thread(target=self._ask, args=(number * 7, end)) for number in range(count)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return (self.answers - before) / (time.monotonic() - began)

    def _ask(self, place: int, end: float) -> None:
        while time.monotonic() < end:
            place = (place + 1) % len(self._requests)
            try:
                text = text_of(self._address, self._requests[place])
            except Exception as error:
                text = repr(error)
            if text != self._expected[place]:
                self.wrong += 1
                print(f"{place}: {text!r}, expected {self._expected[place]!r}", file=sys.stderr)
            self.answers += 1


def main() -> int:
    run, seconds = Path(os.environ["RUN"]), float(os.environ.get("LOAD_SECONDS", "300"))
    server = Process(str(run / "model"), "--precision", "fp32")
    requests = questions_of(run)
    expected = [text_of(server, request) for request in requests]
    alone = Clients(server, requests, expected)
    together = Clients(server, requests, expected)
    ratios, cpu = [], []
    for _ in range(ROUNDS):
        before = server.cpu_s(), alone.answers
        slow = alone.run(1, ALONE_SHARE * seconds / ROUNDS)
        middle = server.cpu_s(), together.answers
        fast = together.run(CLIENTS, seconds / ROUNDS)
        ratios.append(fast / slow)
        cost = (middle[0] - before[0]) / (alone.answers - before[1])
        cpu.append(cost * (together.answers - middle[1]) / (server.cpu_s() - middle[0]))
        print(f"{slow:.1f} alone, {fast:.1f} together, {cpu[-1]:.2f} by CPU", file=sys.stderr)
    code = server.stop()
    wrong = alone.wrong + together.wrong
    command = f"make serve-load RUN=runs/quickstart LOAD_SECONDS={seconds:g}"
    for what, value, unit in (
        (f"{CLIENTS} clients: answers", together.answers, ""),
        (f"{CLIENTS} clients: answers that differ from those given one by one", wrong, ""),
        (f"answers per second, {CLIENTS} clients / one", statistics.median(ratios), "times"),
        (f"answers per CPU second of the server, {CLIENTS} / one", statistics.median(cpu), "times"),
    ):
        print(row(what, round(value, 2), unit, command))
    return 1 if wrong or code else 0


def row(what: str, value: float, unit: str, command: str) -> str:
    """A line of `results/rows.jsonl`."""
    return json.dumps(
        {
            "group": "serving",
            "what": what,
            "value": value,
            "unit": unit,
            "command": command,
            "commit": commit(),
            "device": os.environ.get("DEVICE", "cpu"),
            "versions": versions(),
            "date": today(),
        }
    )


if __name__ == "__main__":
    sys.exit(main())
