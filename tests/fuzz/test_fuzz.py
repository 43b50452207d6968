"""A few cases of every fuzzing target, from a fixed seed; `make fuzz` runs them for an hour."""

from pathlib import Path

import pytest
from fuzz_targets import TARGETS
from fuzzing import fuzz

CASES = {"checkpoints": 150, "processors": 200, "tokenizers": 250, "requests": 250}
SECONDS = 7.0  # of a target: less than 60 s for all, on a slow machine with fewer cases


@pytest.mark.parametrize("target", TARGETS)
def test_fuzzed_input_is_read_or_refused(target: str, tmp_path: Path) -> None:
    seeds = [str(seed) for seed in range(CASES.get(target, 800))]
    outcome = fuzz(target, tmp_path, seeds, SECONDS)
    assert not outcome.failures, "\n".join(f"{seed}: {t}" for seed, t in outcome.failures[:3])
    assert outcome.read > 0 and outcome.refused > 0
