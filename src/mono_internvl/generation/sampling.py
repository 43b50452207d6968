"""How an answer's tokens are chosen."""

import numbers
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import LogitsProcessorList
from transformers.generation.logits_process import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from mono_internvl.errors import ConfigError

LARGEST_SEED = 2**64 - 1  # of torch's generators
LEAST_TEMPERATURE = 1e-4
_WHOLE, _ANY = numbers.Integral, numbers.Real
_RANGES: tuple[tuple[str, type, Callable[[Any], bool], str], ...] = (
    (
        "temperature",
        _ANY,
        lambda x: x == 0 or LEAST_TEMPERATURE <= x < float("inf"),
        f"0 (greedy), or a number of at least {LEAST_TEMPERATURE:g}",
    ),
    ("top_p", _ANY, lambda x: 0 < x <= 1, "a number above 0 and at most 1"),
    ("top_k", _WHOLE, lambda x: x >= 0, "an integer, 0 (all) or more"),
    ("repetition_penalty", _ANY, lambda x: 0.01 <= x <= 100, "a number from 0.01 to 100"),
    ("max_new_tokens", _WHOLE, lambda x: x >= 1, "an integer of at least 1"),
    ("seed", _WHOLE, lambda x: 0 <= x <= LARGEST_SEED, "an integer from 0 to 2**64 - 1, or None"),
)
"""Field, type, range, and both in words."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen, and when an answer is long enough.

    Attributes:
        temperature: 0 takes the most likely token; of the other options the penalty still counts.
            Else at least 1e-4: far below, logits / temperature leave the range of fp32.
        top_p: Least share of probability to choose from; 1 for all.
        top_k: How many of the most likely tokens to choose from; 0 for all.
        repetition_penalty: Above 1 makes tokens that the conversation has already less likely;
            0.01 to 100.
        max_new_tokens: Longest answer, in tokens.
        seed: Of this answer's choices; None takes torch's own random state.

    Raises:
        ConfigError: A field is no number, or out of its range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    max_new_tokens: int = 512
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, kind, is_fine, expected in _RANGES:
            value = getattr(self, name)
            is_number = isinstance(value, kind) and not isinstance(value, bool)
            if (name != "seed" or value is not None) and not (is_number and is_fine(value)):
                raise ConfigError(f"{name}={value!r}; expected {expected}")

    def logits_processors(self) -> LogitsProcessorList:
        """What changes the logits before a token is chosen, in transformers' order."""
        steps = LogitsProcessorList()
        if self.repetition_penalty != 1:
            steps.append(RepetitionPenaltyLogitsProcessor(self.repetition_penalty))
        if self.temperature > 0:
            if self.temperature != 1:
                steps.append(TemperatureLogitsWarper(float(self.temperature)))
            if self.top_k:
                steps.append(TopKLogitsWarper(self.top_k))
            if self.top_p < 1:
                steps.append(TopPLogitsWarper(self.top_p))
        return steps


GREEDY = Sampling()
