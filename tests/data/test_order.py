"""The order of records: every record as often as promised, the same for any number of processes."""

from __future__ import annotations

import tracemalloc
from collections import Counter
from itertools import pairwise

import pytest

from mono_internvl.data.order import Mixture, batch_positions, mix, permuted


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 16, 17, 255, 256, 257, 1000, 4097])
@pytest.mark.parametrize("key", [0, 1, 2**63 + 5])
def test_permuted_is_a_bijection(length: int, key: int) -> None:
    assert sorted(permuted(i, length, key) for i in range(length)) == list(range(length))


def test_permuted_depends_on_key_and_moves_most_places() -> None:
    first = [permuted(i, 500, 1) for i in range(500)]
    second = [permuted(i, 500, 2) for i in range(500)]
    assert first != second
    for order in (first, second):
        assert sum(place == i for i, place in enumerate(order)) < 10
        neighbours = sum(abs(a - b) == 1 for a, b in pairwise(order))
        assert neighbours < 15


def test_permuted_places_are_uniform() -> None:
    landings = Counter(permuted(0, 8, key) for key in range(4000))
    assert len(landings) == 8
    assert all(400 < count < 600 for count in landings.values())


def test_mix_tells_order_and_values_apart() -> None:
    seen = {mix(a, b) for a in range(100) for b in range(100)}
    assert len(seen) == 10_000
    assert all(0 <= value < 2**64 for value in seen)


def test_mixture_covers_each_epoch_exactly() -> None:
    mixture = Mixture((7, 30, 1), (1.0, 1.0, 1.0), seed=3)
    everything = Counter((s, i) for s, n in enumerate((7, 30, 1)) for i in range(n))
    orders = []
    for epoch in range(3):
        start = epoch * len(mixture)
        orders.append([mixture.locate(start + i) for i in range(len(mixture))])
        assert Counter(orders[-1]) == everything
    assert orders[0] != orders[1] != orders[2]


def test_mixture_repeats_sources_by_fractions() -> None:
    mixture = Mixture((10, 8, 6), (0.5, 2.5, 1.0), seed=0)
    assert len(mixture) == 5 + 20 + 6
    counts = Counter(mixture.locate(i) for i in range(len(mixture)))
    assert {i: counts[0, i] for i in range(10)} == {i: int(i < 5) for i in range(10)}
    assert {i: counts[1, i] for i in range(8)} == {i: 3 if i < 4 else 2 for i in range(8)}
    assert {i: counts[2, i] for i in range(6)} == dict.fromkeys(range(6), 1)


def test_mixture_mixes_sources_throughout_an_epoch() -> None:
    mixture = Mixture((500, 500), (1.0, 1.0), seed=1)
    for start in range(0, 1000, 250):
        share = sum(mixture.locate(start + i)[0] for i in range(250)) / 250
        assert 0.38 < share < 0.62


@pytest.mark.parametrize("seed", [0, 9])
def test_batches_partition_their_window_by_size(seed: int) -> None:
    sizes = [(37 * i) % 64 for i in range(64)]
    batches = batch_positions(sizes, window_index=5, window_start=320, batch_size=8, seed=seed)
    assert [len(batch) for batch in batches] == [8] * 8
    assert sorted(p for batch in batches for p in batch) == list(range(320, 384))
    spans = sorted(
        (min(sizes[p - 320] for p in b), max(sizes[p - 320] for p in b)) for b in batches
    )
    assert all(high < low for (_, high), (low, _) in pairwise(spans))
    assert batches != sorted(batches, key=lambda b: sizes[b[0] - 320]), "long last is a bias"


def test_mixture_takes_no_memory_for_its_length() -> None:
    mixture = Mixture((10**12, 3 * 10**11), (1.0, 0.5), seed=0)
    tracemalloc.start()
    found = {mixture.locate(10**11 + i) for i in range(100)}
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(found) == 100
    assert peak < 200_000
