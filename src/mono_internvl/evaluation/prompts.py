"""Questions become batches whose memory is bounded: one long prompt does not widen all others.

Legend: B prompts, T tokens of the longest, S tile side.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mono_internvl.data.samples import MOST_CHARACTERS_OF_TOKEN, count_characters
from mono_internvl.errors import ImageError, PromptError, SampleError
from mono_internvl.model.encoding import pad_left
from mono_internvl.model.processing import MonoInternVLProcessor

_TOKENS_PER_PROMPT = 2048  # on average over a full batch, padding included
_SLACK_TOKENS = 256  # prompts that differ by less are padded without a thought


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt by its question's number.

    Attributes:
        number: Of the question.
        ids: Tokens.
        pixel_values: (tiles, 3, S, S), or None without images.
    """

    number: int
    ids: list[int]
    pixel_values: Tensor | None


class PromptEncoder:
    """Encodes prompts one by one and refuses, by file and line, what a model cannot read.

    Args:
        processor: Of the model.
        most_tokens: Of prompt and answer.
        max_new_tokens: Longest answer.
        max_tiles: Most tiles per image; the processor's own unless given.
    """

    def __init__(
        self,
        processor: MonoInternVLProcessor,
        most_tokens: int,
        max_new_tokens: int,
        max_tiles: int | None,
    ):
        self.processor, self.max_tiles = processor, max_tiles
        self.most, self.max_new_tokens = most_tokens, max_new_tokens

    def check_text(self, messages: Sequence[dict[str, Any]], where: str) -> None:
        """Refuse text that is too long whatever its images are; they are not opened.

        Raises:
            SampleError: With file and line.
        """
        if count_characters(messages) > self.most * MOST_CHARACTERS_OF_TOKEN:
            raise self._too_long(where, f"{count_characters(messages):,} characters")
        text = "\n".join(
            part if isinstance(part, str) else part.get("text", "")
            for message in messages
            for part in (
                [message["content"]] if isinstance(message["content"], str) else message["content"]
            )
        )
        if len(text.encode("utf-8", "replace")) <= self.most - self.max_new_tokens:
            return  # a token has at least a byte
        try:
            num_tokens = len(self.processor.tokenizer.encode_plain(text).ids)
        except PromptError as error:
            raise SampleError(f"{where}: {error}") from error
        self._check(num_tokens, where)

    def encode(self, number: int, messages: Sequence[dict[str, Any]], where: str) -> EncodedPrompt:
        """A prompt with its images.

        Raises:
            SampleError: It is refused, an image is damaged, or it is too long.
        """
        try:
            encoded = self.processor.encode_prompt(messages, max_tiles=self.max_tiles)
        except (ImageError, PromptError) as error:
            raise SampleError(f"{where}: {error}") from error
        ids: list[int] = encoded["input_ids"][0].tolist()
        self._check(len(ids), where)
        return EncodedPrompt(number, ids, encoded.get("pixel_values"))

    def collate(self, prompts: Sequence[EncodedPrompt]) -> dict[str, Tensor]:
        """`input_ids` and `attention_mask` (B, T), padded on the left; `pixel_values` if any."""
        rows = [prompt.ids for prompt in prompts]
        pixels = [prompt.pixel_values for prompt in prompts if prompt.pixel_values is not None]
        images = {"pixel_values": torch.cat(pixels)} if pixels else {}
        return {**pad_left(rows, self.processor.tokenizer.pad_token_id), **images}

    def _check(self, num_tokens: int, where: str) -> None:
        if num_tokens + self.max_new_tokens > self.most:
            raise self._too_long(where, f"{num_tokens:,} tokens")

    def _too_long(self, where: str, size: str) -> SampleError:
        return SampleError(
            f"{where}: the question has {size} but the model reads {self.most:,} tokens with an "
            f"answer of {self.max_new_tokens}; shorten it, or ask with a lower max_tiles",
            reason="too long",
        )


def batches(prompts: Iterable[EncodedPrompt], batch_size: int) -> Iterator[list[EncodedPrompt]]:
    """Cut prompts, in their order, into batches of bounded padded size.

    Args:
        prompts: Encoded when they are asked for.
        batch_size: Most prompts; fewer where they are long or differ much in length.
    """
    batch: list[EncodedPrompt] = []
    for prompt in prompts:
        lengths = [len(other.ids) for other in (*batch, prompt)]
        is_wide = max(lengths) * len(lengths) > batch_size * _TOKENS_PER_PROMPT
        is_uneven = max(lengths) > 2 * min(lengths) + _SLACK_TOKENS
        if batch and (len(batch) == batch_size or is_wide or is_uneven):
            yield batch
            batch = []
        batch.append(prompt)
    if batch:
        yield batch


Outcome = str | SampleError
"""What a question came to: the answer, or why it could not be asked."""
