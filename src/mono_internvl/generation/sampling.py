"""How an answer's tokens are chosen: the options, and the choice for a batch.

Legend: B requests, V vocabulary.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
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


def choose_tokens(
    logits: Tensor,
    samplings: Sequence[Sampling],
    contexts: Sequence[Sequence[int]],
    generators: Sequence[torch.Generator | None],
) -> list[int]:
    """The next token of every request; requests with like options are worked out together.

    A random choice is one number of the request's own generator, looked up in its cumulated
    probabilities: neighbours in the batch neither draw from it nor move it.

    Args:
        logits: (B, V) fp32.
        samplings: Options of each.
        contexts: Prompt and generated ids of each; read where there is a repetition penalty.
        generators: Random states, on the CPU; None takes torch's own.
    """
    alike: dict[Sampling, list[int]] = {}
    for index, sampling in enumerate(samplings):
        alike.setdefault(replace(sampling, seed=None, max_new_tokens=1), []).append(index)
    chosen = [0] * len(samplings)
    for sampling, which in alike.items():
        some = logits if len(alike) == 1 else logits[torch.tensor(which, device=logits.device)]
        steps = sampling.logits_processors()
        if steps:
            some = steps(_padded([contexts[n] for n in which], sampling, logits.device), some)
        if sampling.temperature > 0:
            found = _draw(some, [generators[n] for n in which])
        else:
            found = some.max(-1).indices  # the first of equals, as argmax; several times faster
        for index, token in zip(which, found.tolist(), strict=True):
            chosen[index] = token
    return chosen


def _padded(contexts: Sequence[Sequence[int]], sampling: Sampling, device: torch.device) -> Tensor:
    """Contexts side by side, filled up with their own first id; of no length if nobody reads them.

    A token's penalty does not depend on how often it is there.
    """
    if sampling.repetition_penalty == 1:
        return torch.zeros(len(contexts), 0, dtype=torch.int64, device=device)
    length = max(len(ids) for ids in contexts)
    rows = [[*ids, *[ids[0]] * (length - len(ids))] for ids in contexts]
    return torch.tensor(rows, device=device)


def _draw(logits: Tensor, generators: Sequence[torch.Generator | None]) -> Tensor:
    """(B,) tokens, drawn by the probabilities of (B, V) logits."""
    total = logits.double().softmax(-1).cumsum(-1)  # (B, V)
    # In single precision a number stays so far below 1 that its product is below the whole sum.
    uniform = torch.cat([torch.rand(1, generator=generator) for generator in generators])
    wanted = uniform.to(logits.device, torch.float64)[:, None] * total[:, -1:]
    return torch.searchsorted(total, wanted, right=True).squeeze(1)
