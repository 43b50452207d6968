"""Questions become requests; what a model cannot read is refused by file and line."""

from __future__ import annotations

from collections.abc import Sequence

from mono_internvl.data.records import MOST_CHARACTERS_OF_TOKEN, count_characters
from mono_internvl.errors import ImageError, PromptError, SampleError
from mono_internvl.evaluation.protocol import Protocol
from mono_internvl.generation.request import Request
from mono_internvl.generation.sampling import Sampling
from mono_internvl.processing.processor import MonoInternVLProcessor
from mono_internvl.processing.prompts import Turn

Outcome = str | SampleError
"""What a question came to: the answer, or why it could not be asked."""


class PromptEncoder:
    """Encodes prompts one by one and refuses, by file and line, what a model cannot read.

    Args:
        processor: Of the model.
        most_tokens: Of prompt and answer.
        protocol: Longest answer and most tiles.
    """

    def __init__(self, processor: MonoInternVLProcessor, most_tokens: int, protocol: Protocol):
        self.processor, self.max_tiles = processor, protocol.max_tiles
        self.max_tiles_later = protocol.max_tiles_of_later_images
        self.most, self.max_new_tokens = most_tokens, protocol.max_new_tokens

    def check_text(self, turns: Sequence[Turn], where: str) -> None:
        """Refuse text that is too long whatever its images are; they are not opened.

        Raises:
            SampleError: With file and line.
        """
        if count_characters(turns) > self.most * MOST_CHARACTERS_OF_TOKEN:
            raise self._too_long(where, f"{count_characters(turns):,} characters")
        text = "\n".join(turn.text for turn in turns)
        if len(text.encode("utf-8", "replace")) <= self.most - self.max_new_tokens:
            return  # a token has at least a byte
        try:
            num_tokens = len(self.processor.tokenizer.encode_plain(text).ids)
        except PromptError as error:
            raise SampleError(f"{where}: {error}") from error
        self._check(num_tokens, where)

    def encode(self, turns: Sequence[Turn], where: str, answer_start: str = "") -> Request:
        """A prompt with its images, to be answered greedily.

        Args:
            turns: The conversation up to the answer.
            where: Place of the record, for messages.
            answer_start: What the answer begins with.

        Raises:
            SampleError: It is refused, an image is damaged, or it is too long.
        """
        try:
            encoded = self.processor.encode_prompt(
                turns, max_tiles=self._limits(turns), answer_start=answer_start
            )
        except (ImageError, PromptError) as error:
            raise SampleError(f"{where}: {error}") from error
        ids = encoded["input_ids"][0]
        self._check(len(ids), where)
        return Request(
            ids,
            encoded.get("pixel_values"),
            Sampling(max_new_tokens=self.max_new_tokens),
            stop_ids=frozenset(self.processor.stop_token_ids),
            feature_order=encoded.get("feature_order"),
        )

    def _limits(self, turns: Sequence[Turn]) -> int | list[int] | None:
        """Most tiles of every image, or of each."""
        if self.max_tiles_later is None or self.max_tiles is None:
            return self.max_tiles
        later = sum(len(turn.images) for turn in turns) - 1
        return [self.max_tiles, *[self.max_tiles_later] * later]

    def _check(self, num_tokens: int, where: str) -> None:
        if num_tokens + self.max_new_tokens > self.most:
            raise self._too_long(where, f"{num_tokens:,} tokens")

    def _too_long(self, where: str, size: str) -> SampleError:
        return SampleError(
            f"{where}: the question has {size} but the model reads {self.most:,} tokens with an "
            f"answer of {self.max_new_tokens}; shorten it, or ask with a lower max_tiles",
            reason="too long",
        )
