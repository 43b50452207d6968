"""Samples of known lengths put into rows of one capacity.

All samples of a step are packed together, over all processes, so that a step holds the published
number of samples and nothing is carried from step to step: rows are a function of the step, and a
run resumes by its number. See docs/data.md for why this is not left to a packing iterator.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import Literal

Packing = Literal["none", "best_fit"]


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Best fit, longest sample first: each goes where least room is left behind it.

    Args:
        lengths: Tokens of each sample, at most `capacity`.
        capacity: Tokens of a row.

    Returns:
        Numbers of the samples of each row, fullest row first; within a row as they were given.

    Raises:
        ValueError: A sample is longer than a row.
    """
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (left over, row), sorted
    for sample in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[sample]
        if length > capacity:
            raise ValueError(f"a sample of {length} tokens for rows of {capacity}")
        place = bisect_left(room, (length, -1))
        if place == len(room):
            rows.append([])
            left, row = capacity, len(rows) - 1
        else:
            left, row = room.pop(place)
        rows[row].append(sample)
        if left > length:
            insort(room, (left - length, row))
    filled = [sum(lengths[sample] for sample in row) for row in rows]
    order = sorted(range(len(rows)), key=lambda i: (-filled[i], i))
    return [sorted(rows[i]) for i in order]
