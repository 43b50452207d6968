"""How an answer's tokens are chosen."""

from dataclasses import dataclass

from transformers import LogitsProcessorList
from transformers.generation.logits_process import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from mono_internvl.errors import ConfigError


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen, and when an answer is long enough.

    Attributes:
        temperature: 0 takes the most likely token; of the other options the penalty still counts.
        top_p: Least share of probability to choose from; 1 for all.
        top_k: How many of the most likely tokens to choose from; 0 for all.
        repetition_penalty: Above 1 makes tokens that the conversation has already less likely.
        max_new_tokens: Longest answer, in tokens.
        seed: Of this answer's choices; None takes torch's own random state.

    Raises:
        ConfigError: A number is out of its range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    max_new_tokens: int = 512
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, is_fine, expected in (
            ("temperature", 0 <= self.temperature < float("inf"), "0 (greedy) or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("top_k", self.top_k >= 0, "0 (all) or more"),
            ("repetition_penalty", 0 < self.repetition_penalty < float("inf"), "above 0"),
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
        ):
            if not is_fine:
                raise ConfigError(f"{name}={getattr(self, name)}; expected {expected}")

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
