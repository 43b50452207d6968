"""What is asked of the engine, what it gives, and an answer on its way.

Legend: T tokens of the prompt, S tile side.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from mono_internvl.errors import ConfigError, PromptError
from mono_internvl.generation.sampling import GREEDY, LARGEST_SEED, Sampling

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"

FinishReason = Literal["stop", "length", "cancelled"]
Scored = tuple[tuple[int, float], ...]
"""Tokens, each with the logarithm of its probability."""


@dataclass(frozen=True, eq=False)
class Request:
    """One prompt to answer.

    Attributes:
        input_ids: (T,) ids; `<IMG_CONTEXT>` stands for the visual tokens.
        pixel_values: (tiles, 3, S, S), its tiles in order.
        sampling: How tokens are chosen, how many at most, and the seed.
        stop_ids: Ids that end the answer; none of them becomes part of it.
        stop_strings: Texts that end the answer, and are cut off; they need `decode`.
        decode: Text of generated ids; the text of a growing answer must only grow, but for
            whitespace and an unfinished character at its end.
        on_text: Gets the text piece by piece, as far as later tokens cannot change it.
        has_logprobs: Whether the logarithms of the chosen tokens' probabilities are wanted.
        num_alternatives: With them, how many of the likeliest tokens in the place of each.
        visual_token_mask: (T,) bool, where the visual tokens go; wherever `<IMG_CONTEXT>` stands
            unless given. A prompt that repeats a *generated* one says so.
        feature_order: (visual tokens,) int64, which feature of the tiles stands at each; tile after
            tile unless given.
        is_continued: Whether a later prompt will go on from this one and its answer: their keys and
            values are kept.

    Raises:
        PromptError: The prompt is empty.
        ConfigError: A text is wanted, but there is no `decode`.
    """

    input_ids: Tensor | Sequence[int]
    pixel_values: Tensor | None = None
    sampling: Sampling = GREEDY
    stop_ids: Collection[int] = ()
    stop_strings: Sequence[str] = ()
    decode: Callable[[list[int]], str] | None = None
    on_text: Callable[[str], object] | None = None
    has_logprobs: bool = False
    num_alternatives: int = 0
    visual_token_mask: Tensor | None = None
    feature_order: Tensor | None = None
    is_continued: bool = False

    def __post_init__(self) -> None:
        if len(self.input_ids) == 0:
            raise PromptError("input_ids: empty; expected at least one token")
        if self.decode is None and (self.stop_strings or self.on_text is not None):
            name = "stop_strings" if self.stop_strings else "on_text"
            raise ConfigError(f"{name} without decode: the engine knows ids only; pass decode, too")
        if self.num_alternatives < 0 or (self.num_alternatives and not self.has_logprobs):
            raise ConfigError(
                f"num_alternatives={self.num_alternatives}, has_logprobs={self.has_logprobs}; "
                "expected 0 or more, and has_logprobs=True for more than 0"
            )
        if "" in self.stop_strings:
            raise ConfigError("stop_strings: one is empty, and would end every answer; drop it")

    def samples(self, n: int) -> list[Request]:
        """The same request n times, each with a seed of its own: answers to choose from.

        The engine reads their prompt once.

        Args:
            n: How many. Seeds count on from that of the request; None stays torch's own state.

        Raises:
            ConfigError: n is below 1.
        """
        if n < 1:
            raise ConfigError(f"n={n}; expected at least 1 sample")
        seed = self.sampling.seed
        seeds = [None if seed is None else (seed + i) % (LARGEST_SEED + 1) for i in range(n)]
        return [replace(self, sampling=replace(self.sampling, seed=one)) for one in seeds]


@dataclass(frozen=True)
class Result:
    """An answer.

    Attributes:
        ids: Generated ids, without the one that ended the answer.
        text: Of the ids, up to a stop string; None without `decode`.
        finish_reason: "stop" if the model ended it, "length" if it had to be cut, "cancelled".
        logprobs: One per id if they were wanted, of the model's own distribution.
        num_prompt: Tokens of the prompt.
        num_cached: How many of them were not read again.
        alternatives: As `logprobs`, the likeliest tokens in the place of each id, likeliest first.
    """

    ids: tuple[int, ...]
    text: str | None
    finish_reason: FinishReason
    logprobs: tuple[float, ...] | None
    num_prompt: int
    num_cached: int
    alternatives: tuple[Scored, ...] | None = None


class Generation:
    """A request on its way; its `result` is there when it has ended.

    Attributes:
        request: What was asked.
        ids: Generated so far.
        finish_reason: None until it has ended.
        generator: Random state of this request alone; None takes torch's own.
        num_cached: Tokens of the prompt that were not read again.
    """

    def __init__(self, request: Request) -> None:
        self.request = request
        self.ids: list[int] = []
        self.finish_reason: FinishReason | None = None
        self.num_cached = 0
        seed = request.sampling.seed
        self.generator = None if seed is None else torch.Generator().manual_seed(seed)
        self._logprobs: list[float] = []
        self._alternatives: list[Scored] = []
        self._text = None
        if request.decode is not None:
            self._text = TextStream(request.decode, request.stop_strings)

    def cancel(self) -> None:
        """End it as it is; from any thread. One that has ended is left as it is."""
        self.finish_reason = self.finish_reason or "cancelled"

    def scored(self, begin: int) -> list[tuple[int, float, Scored]]:
        """From place `begin` on, each id with its logarithm and the likeliest tokens there."""
        kept = zip(
            self.ids[begin:], self._logprobs[begin:], self._alternatives[begin:], strict=True
        )
        return list(kept)

    @property
    def result(self) -> Result:
        """What it came to.

        Raises:
            PromptError: It has not ended yet.
        """
        if self.finish_reason is None:
            raise PromptError("the answer has not ended yet; call the engine's `step` until it has")
        return Result(
            tuple(self.ids),
            None if self._text is None else self._text.whole(self.ids),
            self.finish_reason,
            tuple(self._logprobs) if self.request.has_logprobs else None,
            len(self.request.input_ids),
            self.num_cached,
            tuple(self._alternatives) if self.request.has_logprobs else None,
        )

    def take(self, token: int, logprob: float | None = None, alternatives: Scored = ()) -> None:
        """Add the next token; ends the answer where it is to end, and hands out its text."""
        request = self.request
        if token in request.stop_ids:
            self._end("stop")
            return
        self.ids.append(token)
        if logprob is not None:
            self._logprobs.append(logprob)
            self._alternatives.append(alternatives)
        if self._text is not None and (request.stop_strings or request.on_text is not None):
            self._say(self._text.push(self.ids))
            if self._text.is_stopped:
                self.finish_reason = "stop"
                return
        if len(self.ids) >= request.sampling.max_new_tokens:
            self._end("length")

    def _end(self, reason: FinishReason) -> None:
        self.finish_reason = reason
        if self._text is not None and self.request.on_text is not None:
            self._say(self._text.finish(self.ids))

    def _say(self, piece: str) -> None:
        if piece and self.request.on_text is not None:
            self.request.on_text(piece)


class TextStream:
    """Text of a growing answer, handed out as far as later tokens cannot change it.

    Args:
        decode: Text of ids.
        stop_strings: The text ends before the first of them.
    """

    def __init__(
        self, decode: Callable[[list[int]], str], stop_strings: Sequence[str] = ()
    ) -> None:
        self.text = ""
        self.is_stopped = False
        self._decode = decode
        self._stops = tuple(stop_strings)

    def push(self, ids: list[int]) -> str:
        """New text that is certain: no end that whitespace, a character or a stop may change."""
        text = self.whole(ids)
        if not self.is_stopped:
            text = text.rstrip(REPLACEMENT).rstrip()
            text = text[: len(text) - self._begun_stop(text)]
        return self._advance(text)

    def finish(self, ids: list[int]) -> str:
        """What is left; `text` then is the whole answer."""
        return self._advance(self.whole(ids))

    def whole(self, ids: list[int]) -> str:
        """The text of the ids, up to a stop string."""
        text = self._decode(ids)
        ends = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        self.is_stopped = bool(ends)
        return text[: min(ends)] if ends else text

    def _begun_stop(self, text: str) -> int:
        """Length of the longest end of the text that a stop string begins with."""
        begun = (n for stop in self._stops for n in range(1, len(stop)) if text.endswith(stop[:n]))
        return max(begun, default=0)

    def _advance(self, text: str) -> str:
        new, self.text = text[len(self.text) :], max(text, self.text, key=len)
        return new
