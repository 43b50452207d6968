"""The order of records as arithmetic: a pure function of seed and position, with nothing to save.

A mixture lays its sources one after another (a source repeated 2.5 times has 2.5 times its length)
and walks each epoch in a different pseudo-random order. Resuming is adding; another number of
processes sees the same global batches.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

_MASK = (1 << 64) - 1
_ROUNDS = 4


def mix(*values: int) -> int:
    """A 64-bit hash of integers (splitmix64 steps): all randomness in the data order."""
    state = 0x9E3779B97F4A7C15
    for value in values:
        state = (state ^ (value & _MASK)) * 0xBF58476D1CE4E5B9 & _MASK
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB & _MASK
        state ^= state >> 31
    return state


def permuted(index: int, length: int, key: int) -> int:
    """Where `index` goes under a pseudo-random permutation of range(length), without a table.

    A Feistel network over the smallest even number of bits that holds `length`, walked until it
    lands inside (fewer than four steps on average).

    Args:
        index: In range(length).
        length: Of the permuted range, at least 1.
        key: Selects the permutation.
    """
    if length == 1:
        return 0
    half = ((length - 1).bit_length() + 1) // 2
    low = (1 << half) - 1
    value = index
    while True:
        left, right = value >> half, value & low
        for number in range(_ROUNDS):
            left, right = right, left ^ (mix(key, number, right) & low)
        value = left << half | right
        if value < length:
            return value


@dataclass(frozen=True)
class Mixture:
    """Sources of given lengths, each repeated a given number of times, shuffled together.

    Attributes:
        lengths: Records of each source.
        repeats: How often each source is seen per epoch: 0.5 is its first half, 2 is twice.
        seed: Of the order.
    """

    lengths: tuple[int, ...]
    repeats: tuple[float, ...]
    seed: int

    @property
    def _ends(self) -> tuple[int, ...]:
        counts = (round(n * r) for n, r in zip(self.lengths, self.repeats, strict=True))
        return _running_sum(tuple(counts))

    def __len__(self) -> int:
        """Records of one epoch."""
        return self._ends[-1]

    def locate(self, position: int) -> tuple[int, int]:
        """Source and record at a position of the endless stream.

        Args:
            position: 0 is the first record of the first epoch.
        """
        epoch, offset = divmod(position, len(self))
        flat = permuted(offset, len(self), mix(self.seed, epoch))
        source = bisect_right(self._ends, flat)
        start = self._ends[source - 1] if source else 0
        return source, (flat - start) % self.lengths[source]


@lru_cache(maxsize=64)
def _running_sum(lengths: tuple[int, ...]) -> tuple[int, ...]:
    total, ends = 0, []
    for length in lengths:
        total += length
        ends.append(total)
    return tuple(ends)


def batch_positions(
    sizes: Sequence[int], window_index: int, window_start: int, batch_size: int, seed: int
) -> list[list[int]]:
    """Cut one window of the stream into batches of records of like size.

    Args:
        sizes: Size of each record of the window, in stream order (bytes will do).
        window_index: Number of the window; selects the order of its batches.
        window_start: Stream position of the first of them.
        batch_size: Records per batch; divides the window.
        seed: Of the order.

    Returns:
        The batches, each a list of stream positions.
    """
    by_size = sorted(range(len(sizes)), key=lambda i: (sizes[i], i))
    batches = [by_size[i : i + batch_size] for i in range(0, len(by_size), batch_size)]
    order = [permuted(i, len(batches), mix(seed, window_index, 1)) for i in range(len(batches))]
    return [[window_start + i for i in batches[b]] for b in order]
