"""Pieces of a rendered conversation -> ids and labels.

Shapes: B batch, T tokens, N tiles of all images, S side of a tile in px.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mono_internvl.configuration.labels import IGNORED_LABEL
from mono_internvl.errors import ConfigError, PromptError
from mono_internvl.processing.prompts import (
    GROUNDING_TOKENS,
    IMAGE_CONTEXT,
    IMAGE_END,
    IMAGE_START,
    Piece,
)
from mono_internvl.processing.tiling import TokenLayout
from mono_internvl.processing.tokenizer import MonoInternVLTokenizer


@dataclass(frozen=True)
class Sample:
    """A training sample.

    Attributes:
        input_ids: int64 (T,).
        labels: int64 (T,); `IGNORED_LABEL` outside of answers, never set at position 0. Unshifted:
            the label of a position is its own id.
        pixel_values: float32 (N, 3, S, S), or None without images.
        layouts: For each image how it is cut and laid out.
        rejected: The same images and question with the answer that is to be less likely; without
            pixels of its own. None unless the record is a pair.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    pixel_values: torch.Tensor | None
    layouts: tuple[TokenLayout, ...]
    rejected: "Sample | None" = None

    @property
    def num_tiles(self) -> tuple[int, ...]:
        """For each image its tiles, the thumbnail counted."""
        return tuple(layout.num_tiles for layout in self.layouts)


def encode_pieces(
    tokenizer: MonoInternVLTokenizer,
    pieces: Sequence[Piece],
    layouts: Sequence[TokenLayout],
    *,
    add_bos: bool = True,
    continues: bool = False,
) -> tuple[list[int], list[int]]:
    """Ids and labels of a rendered conversation.

    Neighbouring text is tokenized as one stretch, and only control pieces become control ids. A
    token is learned if it holds a character of a learned piece.

    Args:
        tokenizer: Has the control tokens by name.
        pieces: The conversation.
        layouts: For each image slot what stands in it.
        add_bos: Whether BOS comes first.
        continues: Whether the pieces go on with a conversation that is encoded already.

    Returns:
        Ids (T,) and labels (T,), the label at position 0 never set: nothing predicts it.

    Raises:
        PromptError: If slots and `layouts` differ in number.
    """
    slots = sum(piece.kind == "image" for piece in pieces)
    if slots != len(layouts):
        raise PromptError(
            f"{slots} image placeholders but {len(layouts)} images; "
            "write one placeholder for each image"
        )
    encoder = _Encoder(tokenizer, continues)
    if add_bos and tokenizer.bos_token_id is not None:
        encoder.add_bos(tokenizer.bos_token_id)
    start, context, end = map(tokenizer.control_id, (IMAGE_START, IMAGE_CONTEXT, IMAGE_END))
    rest = iter(layouts)
    for piece in pieces:
        if piece.kind == "text":
            encoder.add_text(piece.text, piece.is_learned)
        elif piece.kind == "control":
            encoder.add_ids([tokenizer.control_id(piece.text)], piece.is_learned)
        else:
            layout = next(rest)
            encoder.add_ids([start, *[context] * layout.num_tokens, end], is_learned=False)
    return encoder.finish()


def pad_left(rows: Sequence[list[int]], pad_token_id: int | None) -> dict[str, torch.Tensor]:
    """Rows of ids as a batch for generation, padded on the left.

    Returns:
        `input_ids` and `attention_mask`, int64 (B, T).

    Raises:
        ConfigError: If rows differ in length and there is no padding token.
    """
    longest = max(map(len, rows))
    if pad_token_id is None and any(len(row) != longest for row in rows):
        raise ConfigError("tokenizer.pad_token: none; set one to encode a batch of several lengths")
    ids = [[pad_token_id or 0] * (longest - len(row)) + row for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def count_images(images: Any) -> int:
    """Images in any nesting of lists."""
    return sum(map(count_images, images)) if isinstance(images, (list, tuple)) else 1


def check_placeholders(texts: Sequence[str], images: Any) -> None:
    """Hold the `<IMG_CONTEXT>` of rendered prompts against their images.

    Raises:
        PromptError: With both numbers.
    """
    wanted = sum(text.count(IMAGE_CONTEXT) for text in texts)
    given = 0 if images is None else count_images(images)
    if wanted != given:
        raise PromptError(
            f"{wanted} {IMAGE_CONTEXT} placeholders but {given} images; "
            "write one placeholder for each image"
        )


def decode_answer(
    tokenizer: MonoInternVLTokenizer, ids: Any, turn_end_id: int, keep_grounding: bool
) -> str:
    """The text of a generated answer up to its end; see `MonoInternVLProcessor.decode_answer`."""
    values = [int(index) for index in (ids.tolist() if hasattr(ids, "tolist") else ids)]
    if turn_end_id in values:
        values = values[: values.index(turn_end_id)]
    if keep_grounding:
        dropped = {
            index
            for token, index in tokenizer.control_tokens.items()
            if token not in GROUNDING_TOKENS
        }
        values = [index for index in values if index not in dropped]
    return str(tokenizer.decode(values, skip_special_tokens=not keep_grounding)).strip()


class TileLimits:
    """Hands out `max_tiles`, given once for all images or once for each of them in order.

    Args:
        max_tiles: What the caller gave.
        default: Used where the caller gave None.
    """

    def __init__(self, max_tiles: int | Sequence[int] | None, default: int) -> None:
        if max_tiles is None or isinstance(max_tiles, int):
            self._common: int | None = default if max_tiles is None else max_tiles
            self._each: list[int] = []
        else:
            self._common, self._each = None, list(max_tiles)
        self._position = 0

    def take(self, num_images: int) -> list[int]:
        """The limits of the next images.

        Raises:
            PromptError: If there are more images than limits.
        """
        self._position += num_images
        if self._common is not None:
            return [self._common] * num_images
        if self._position > len(self._each):
            self._fail()
        return self._each[self._position - num_images : self._position]

    def check_used_up(self) -> None:
        """Refuses limits without an image.

        Raises:
            PromptError: With both numbers.
        """
        if self._common is None and self._position != len(self._each):
            self._fail()

    def _fail(self) -> None:
        raise PromptError(
            f"max_tiles has {len(self._each)} values for {self._position} images; "
            "give one number or one for each image"
        )


class _Encoder:
    """Collects ids and labels; text is held back until a control token ends its stretch."""

    def __init__(self, tokenizer: MonoInternVLTokenizer, continues: bool) -> None:
        self._tokenizer, self._continues = tokenizer, continues
        self._ids: list[int] = []
        self._labels: list[int] = []
        self._text = ""
        self._learned: list[tuple[int, int]] = []

    def add_bos(self, index: int) -> None:
        """Tokenizers put BOS in front of the ids: the text behind it still is the first."""
        self._ids, self._labels = [index], [IGNORED_LABEL]

    def add_text(self, text: str, is_learned: bool) -> None:
        if is_learned:
            self._learned.append((len(self._text), len(self._text) + len(text)))
        self._text += text

    def add_ids(self, ids: list[int], is_learned: bool) -> None:
        self._flush()
        self._ids += ids
        self._labels += ids if is_learned else [IGNORED_LABEL] * len(ids)
        self._continues = True

    def finish(self) -> tuple[list[int], list[int]]:
        self._flush()
        return self._ids, [IGNORED_LABEL, *self._labels[1:]] if self._labels else []

    def _flush(self) -> None:
        if not self._text:
            return
        encoding = self._tokenizer.encode_plain(self._text, continues=self._continues)
        for index, (start, end) in zip(encoding.ids, encoding.spans, strict=True):
            # A dummy prefix covers no character: it belongs to the one that follows it.
            stop = max(end, start + 1)
            is_learned = any(start < last and stop > first for first, last in self._learned)
            self._ids.append(index)
            self._labels.append(index if is_learned else IGNORED_LABEL)
        self._text, self._learned = "", []
