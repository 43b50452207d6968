"""A record as tokens and pixels, and how long it will be, which needs no pixels."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from PIL import Image

from mono_internvl.configuration.labels import IGNORED_LABEL
from mono_internvl.data.order import mix
from mono_internvl.data.records import MOST_CHARACTERS_OF_TOKEN, Record
from mono_internvl.data.sources import Measure
from mono_internvl.errors import ImageError, PromptError, SampleError
from mono_internvl.processing.encoding import Sample
from mono_internvl.processing.image_files import image_size, load_image
from mono_internvl.processing.images import share_tiles
from mono_internvl.processing.processor import MonoInternVLProcessor
from mono_internvl.processing.prompts import ImagePart, Turn

_QUALITIES = range(75, 101)


@dataclass(frozen=True)
class RecordEncoder:
    """Encodes records as a stage asks for.

    Attributes:
        processor: Of the model.
        max_tiles: Most tiles of a sample whose record says nothing.
    """

    processor: MonoInternVLProcessor
    max_tiles: int

    def __call__(self, record: Record) -> Sample:
        """Ids, labels and pixels.

        Raises:
            ImageError, PromptError: The record cannot be encoded.
        """
        if record.document is not None:
            return self.processor.encode_document(record.document)
        turns: Sequence[Turn] = record.turns
        if record.augmentation is not None:
            turns = _augmented(turns, record.augmentation)
        max_tiles = record.max_tiles or self.max_tiles
        sample = self.processor.encode_conversation(turns, max_tiles=max_tiles)
        if (other := record.rejected_turns) is None:
            return sample
        return replace(sample, rejected=self.processor.encode_with_images_of(sample, other))

    @cached_property
    def tokenized_by(self) -> str:
        """Digest of what counts text tokens, see `MeasuredSource`."""
        return self.processor.text_digest()

    def measure(self, record: Record) -> Measure:
        """What the length of a record is made of: texts are tokenized, headers of images read.

        Raises:
            ImageError, PromptError: The record cannot be encoded.
        """
        if record.document is not None:
            return Measure(len(self(record).input_ids), ())
        return Measure(
            self.processor.count_text_tokens(record.turns),
            tuple(image_size(image) for image in record.images),
            record.max_tiles,
        )

    def length(self, measure: Measure) -> int:
        """Tokens of a sample of these texts and images."""
        limit = share_tiles(measure.max_tiles or self.max_tiles, len(measure.image_sizes))
        layout_of = self.processor.image_processor.layout_of
        layouts = [layout_of(*size, max_tiles=limit) for size in measure.image_sizes]
        return measure.text_tokens + sum(layout.num_tokens for layout in layouts)


def check_characters(record: Record, max_tokens: int) -> None:
    """Refuse a record whose texts cannot fit, before they are tokenized.

    Raises:
        SampleError: They cannot.
    """
    if record.num_characters > max_tokens * MOST_CHARACTERS_OF_TOKEN:
        raise SampleError(
            f"{record.where}: {record.num_characters:,} characters are more than max_tokens="
            f"{max_tokens} can hold; shorten the record, or skip bad samples",
            reason="too long",
        )


def check_length(length: int, where: str, max_tokens: int) -> None:
    """Refuse a sample of too many tokens.

    Raises:
        SampleError: It is too long.
    """
    if length > max_tokens:
        raise SampleError(
            f"{where}: {length} tokens, more than max_tokens="
            f"{max_tokens}; raise max_tokens, lower max_tiles, or skip bad samples",
            reason="too long",
        )


def encode_checked(encode: Callable[[Record], Sample], record: Record, max_tokens: int) -> Sample:
    """The sample of a record that fits and that something is learnt from.

    Args:
        encode: A record to ids, labels and pixels, such as a `RecordEncoder`.
        record: To encode.
        max_tokens: Most tokens of the sample.

    Raises:
        SampleError: It cannot be encoded, is too long, or has no label.
    """
    check_characters(record, max_tokens)
    try:
        sample = encode(record)
    except (ImageError, PromptError) as error:
        raise as_sample_error(error, record.where) from error
    for one in (sample, sample.rejected):
        if one is None:
            continue
        check_length(len(one.input_ids), record.where, max_tokens)
        if not (one.labels != IGNORED_LABEL).any():
            raise SampleError(
                f"{record.where}: no answer token to learn from", reason="nothing to learn"
            )
    return sample


def as_sample_error(error: ImageError | PromptError, where: str) -> SampleError:
    """What an encoder raised, as an error of the record."""
    reason = error.reason if isinstance(error, ImageError) else "prompt refused"
    return SampleError(f"{where}: {error}", reason=reason)


def _augmented(turns: Sequence[Turn], draw: int) -> list[Turn]:
    """Turns with every image once more compressed, as `data_augment` of the released code does.

    Source: the training transform of the released code: one JPEG of a random quality, 75 to 100.
    Differs: of the whole image, where the released code compresses every tile.
    """
    number = 0
    out = []
    for turn in turns:
        parts: list[str | ImagePart] = []
        for part in turn.parts:
            if isinstance(part, ImagePart):
                quality = _QUALITIES[mix(draw, number) % len(_QUALITIES)]
                part, number = ImagePart(_recompressed(part.source, quality)), number + 1
            parts.append(part)
        out.append(replace(turn, parts=tuple(parts)))
    return out


def _recompressed(source: object, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    load_image(source).save(buffer, "JPEG", quality=quality)  # type: ignore[arg-type]
    buffer.seek(0)
    return Image.open(buffer)
