"""A raw record becomes a `Record`: roles checked, placeholders replaced by images.

This is the only place where records in the InternVL or LLaVA form are understood; training and
evaluation take what it returns.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

from mono_internvl.errors import ConfigError, ImageError, SampleError
from mono_internvl.processing.prompts import IMAGE_PLACEHOLDER, ImagePart, Turn
from mono_internvl.processing.video import (
    DEFAULT_FRAMES,
    EVENLY,
    VIDEO_PLACEHOLDER,
    FrameSampling,
    VideoFrame,
    with_frames,
)

MOST_CHARACTERS_OF_TOKEN = 256
"""No vocabulary has a token of more; text beyond that many per token need not be tokenized."""
CAPTION_PROMPT = "Provide a one-sentence caption for the image."
"""What a caption answers unless its source says otherwise.

Source: stage S1.1 of arXiv 2410.08202, which asks all of its pairs this.
"""
_ANY_PLACEHOLDER = re.compile(f"{IMAGE_PLACEHOLDER}|{VIDEO_PLACEHOLDER}")
_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}


class ImageRef(Protocol):
    """An encoded image that is read when it is needed, and anew each time.

    Hashable, and equal for the same image. `str` of it is its name in messages.
    """

    def read(self, size: int = -1, /) -> bytes:
        """The encoded image; of a longer one than `size` bytes, if that is given, the beginning.

        Raises:
            ImageError: It cannot be read.
        """
        ...

    def version(self) -> tuple[int, ...]:
        """What differs once the image has been changed, told without reading it."""
        ...


@dataclass(frozen=True)
class Record:
    """A conversation with its images, ready for the processor.

    Attributes:
        turns: Who says what, images in their places; a user's first but for the system's, and an
            assistant's last.
        record_id: The record's `id`, or its index.
        where: Its place, such as `file:line`, for messages.
        fields: The raw JSON object.
        max_tiles: Most tiles per image for this record, or None for the stage's.
        document: A text that is learnt as a whole; then there are no turns.
        augmentation: Where its images are augmented, what the draws are made from; None elsewhere.
        rejected: Of a pair, the answer that is to be less likely than the last turn's.
    """

    turns: tuple[Turn, ...]
    record_id: str
    where: str
    fields: dict[str, Any]
    max_tiles: int | None = None
    document: str | None = None
    augmentation: int | None = None
    rejected: str | None = None

    @property
    def num_characters(self) -> int:
        """Of all of its texts."""
        return count_characters(self.turns) + len(self.document or "") + len(self.rejected or "")

    @property
    def rejected_turns(self) -> tuple[Turn, ...] | None:
        """Of a pair, the conversation with the rejected answer; None elsewhere."""
        if self.rejected is None:
            return None
        return (*self.turns[:-1], Turn("assistant", (self.rejected,)))

    @property
    def images(self) -> tuple[ImageRef, ...]:
        """The images in order."""
        return tuple(image for turn in self.turns for image in turn.images)


def parse_record(
    value: Any,
    index: int,
    where: str,
    open_image: Callable[[str], ImageRef],
    max_tiles: int | None = None,
    *,
    augments: bool = False,
    open_video: Callable[[str, FrameSampling], Sequence[VideoFrame]] | None = None,
) -> Record:
    """Validate a raw record.

    Placeholders stand for images in order; a single image without one goes in front of the first
    user turn, and so does a single video. A first assistant turn is dropped, as the released code
    does. With a video every image is one tile.

    Args:
        value: `{"id", "image", "conversations": [{"from", "value"}, ...], ...}`; a document,
            `{"text"}`; or a pair, `{"image", "question", "chosen", "rejected"}`, in which a
            conversation that ends with a question may stand in the place of `question`. Beside
            `image` there may be `video`, and `frames` or `fps` of it.
        index: Its id where it has none.
        where: Its place, for messages.
        open_image: From a name in `image` to the image.
        max_tiles: Of its source.
        augments: Whether its images are augmented.
        open_video: From a name in `video` to its frames; None where there can be none.

    Raises:
        SampleError: Naming its place, what was found and what was expected.
    """
    if not isinstance(value, dict):
        raise SampleError(f"{where}: a JSON {type(value).__name__}; expected an object")
    if isinstance(value.get("text"), str) and "conversations" not in value:
        return _document(value, index, where)
    images: list[ImageRef] = [open_image(name) for name in _names(value, "image", where)]
    rejected = _rejected(value, where) if {"chosen", "rejected"} <= value.keys() else None
    turns = _speeches(value if rejected is None else _with_chosen(value), where)
    num_places = sum(text.count(IMAGE_PLACEHOLDER) for _, text in turns)
    if num_places == 0 and len(images) == 1:
        first = next(i for i, (role, _) in enumerate(turns) if role == "user")
        turns[first] = ("user", f"{IMAGE_PLACEHOLDER}\n{turns[first][1]}")
    elif num_places != len(images):
        raise SampleError(
            f"{where}: {num_places} {IMAGE_PLACEHOLDER} placeholders but {len(images)} "
            f"image{'s' if len(images) != 1 else ''}; fix the record or set on_bad_sample='skip'",
            reason="placeholders",
        )
    if clips := _clips(value, where, open_video):
        images, max_tiles = _show_videos(turns, images, clips, where), 1
    remaining = iter(images)
    parsed = []
    for number, (role, text) in enumerate(turns):
        if role != "user" and IMAGE_PLACEHOLDER in text:
            raise SampleError(
                f"{where}: an {IMAGE_PLACEHOLDER} placeholder outside a human turn",
                reason="placeholders",
            )
        if role != "system" and not text.strip():
            what = "question" if role == "user" else "answer"
            raise SampleError(
                f"{where}: {what} {number} is empty; write one, or remove the record",
                reason=f"empty {what}",
            )
        parsed.append(Turn(role, tuple(_parts(text, remaining))))
    return Record(
        tuple(parsed),
        str(value.get("id", index)),
        where,
        value,
        max_tiles,
        augmentation=0 if augments else None,
        rejected=rejected,
    )


def _rejected(value: dict[str, Any], where: str) -> str:
    """The rejected answer of a pair."""
    chosen, rejected = value["chosen"], value["rejected"]
    for name, text in (("chosen", chosen), ("rejected", rejected)):
        if not isinstance(text, str) or not text.strip() or IMAGE_PLACEHOLDER in text:
            raise SampleError(
                f"{where}: {name}={shortened(repr(text))}; expected an answer in words",
                reason="no pair",
            )
    if chosen.strip() == rejected.strip():
        raise SampleError(
            f"{where}: chosen and rejected are the same; there is nothing to prefer, remove it",
            reason="no pair",
        )
    return str(rejected)


def _with_chosen(value: dict[str, Any]) -> dict[str, Any]:
    """A pair as a conversation that ends with the chosen answer."""
    before = value.get("conversations", [{"from": "human", "value": value.get("question")}])
    before = before if isinstance(before, list) else []
    return {"conversations": [*before, {"from": "gpt", "value": value["chosen"]}]}


def _document(value: dict[str, Any], index: int, where: str) -> Record:
    if _names(value, "image", where) or _names(value, "video", where):
        raise SampleError(
            f"{where}: a text with images but without conversations; write it as a conversation, "
            "or as image and caption into tar shards"
        )
    text = value["text"]
    if not text.strip():
        raise SampleError(
            f"{where}: text is empty; write one, or remove the record", reason="nothing to learn"
        )
    return Record((), str(value.get("id", index)), where, value, document=text)


def to_conversation(record: Record) -> dict[str, Any]:
    """A record in the form that `parse_record` reads, images left out: what shards are made of."""
    if record.document is not None:
        return {"id": record.record_id, "text": record.document}
    names = {role: name for name, role in _ROLES.items()}
    of_pair = {}
    if record.rejected is not None:
        of_pair = {"chosen": record.turns[-1].text, "rejected": record.rejected}
    turns = [
        {
            "from": names[turn.role],
            "value": "".join(
                part if isinstance(part, str) else IMAGE_PLACEHOLDER for part in turn.parts
            ),
        }
        for turn in record.turns[: -1 if of_pair else None]
    ]
    return {"id": record.record_id, "conversations": turns, **of_pair}


def count_characters(turns: Iterable[Turn]) -> int:
    """Characters of all texts of turns."""
    return sum(len(turn.text) for turn in turns)


def _names(record: dict[str, Any], field: str, where: str) -> list[str]:
    value = record.get(field)
    names = [] if value is None or value == "" else value if isinstance(value, list) else [value]
    if not all(isinstance(name, str) for name in names):
        raise SampleError(
            f"{where}: {field}={shortened(repr(value))}; expected a path or a list of paths"
        )
    return names


def _clips(
    record: dict[str, Any],
    where: str,
    open_video: Callable[[str, FrameSampling], Sequence[VideoFrame]] | None,
) -> list[Sequence[VideoFrame]]:
    """The frames of every video of a record."""
    names = _names(record, "video", where)
    if names and open_video is None:
        raise SampleError(
            f"{where}: a video in shards or tables; name its file in a JSON lines source",
            reason="video in a store",
        )
    try:
        fps = record.get("fps")
        count = record.get("frames", DEFAULT_FRAMES if fps is None else None)
        sampling = FrameSampling(count, fps) if names else EVENLY
        return [open_video(name, sampling) for name in names if open_video is not None]
    except ImageError as error:
        raise SampleError(f"{where}: {error}", reason=error.reason) from error
    except ConfigError as error:
        raise SampleError(f"{where}: {error}") from error


def _show_videos(
    turns: list[tuple[str, str]],
    images: Sequence[ImageRef],
    clips: Sequence[Sequence[VideoFrame]],
    where: str,
) -> list[ImageRef]:
    """Writes lines of frames in the places of videos; all images, frames among them, in order."""
    num_places = sum(text.count(VIDEO_PLACEHOLDER) for _, text in turns)
    if num_places == 0 and len(clips) == 1:
        first = next(i for i, (role, _) in enumerate(turns) if role == "user")
        turns[first] = ("user", f"{VIDEO_PLACEHOLDER}\n{turns[first][1]}")
    elif num_places != len(clips):
        raise SampleError(
            f"{where}: {num_places} {VIDEO_PLACEHOLDER} placeholders but {len(clips)} "
            f"video{'s' if len(clips) != 1 else ''}; fix the record or set on_bad_sample='skip'",
            reason="placeholders",
        )
    shown: list[ImageRef] = []
    pictures, rest = iter(images), iter(clips)
    for number, (role, text) in enumerate(turns):
        counts = []
        for mark in _ANY_PLACEHOLDER.findall(text):
            frames = [next(pictures)] if mark == IMAGE_PLACEHOLDER else next(rest)
            shown += frames
            counts += [] if mark == IMAGE_PLACEHOLDER else [len(frames)]
        turns[number] = (role, with_frames(text, counts))
    return shown


def _speeches(record: dict[str, Any], where: str) -> list[tuple[str, str]]:
    """Role and text of each turn, a first assistant turn left out."""
    conversation = record.get("conversations")
    if not isinstance(conversation, list) or not conversation:
        raise SampleError(
            f"{where}: conversations={shortened(repr(conversation))}; expected a list of turns"
        )
    turns = []
    for number, turn in enumerate(conversation):
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
            raise SampleError(f"{where}: turn {number} lacks a text 'value'")
        role = turn.get("from")
        if not isinstance(role, str) or role not in _ROLES:
            raise SampleError(
                f"{where}: turn {number} is from {shortened(repr(role))}; "
                f"expected one of {', '.join(_ROLES)}",
                reason="unknown role",
            )
        if role == "system" and number:
            raise SampleError(f"{where}: turn {number} is the system's; only the first may be")
        turns.append((_ROLES[role], turn["value"]))
    first = 1 if turns[0][0] == "system" else 0
    if turns[first:] and turns[first][0] == "assistant":
        del turns[first]
    speakers = [role for role, _ in turns[first:]]
    if speakers[:1] != ["user"] or any(a == b for a, b in pairwise(speakers)):
        raise SampleError(f"{where}: roles {speakers}; expected human and gpt by turns")
    if speakers[-1] != "assistant":
        raise SampleError(f"{where}: the last turn is the human's; nothing to learn from it")
    return turns


def _parts(text: str, images: Iterator[ImageRef]) -> Iterator[str | ImagePart]:
    """The text around its placeholders, and an image in the place of each."""
    first, *following = text.split(IMAGE_PLACEHOLDER)
    yield from [first] if first else []
    for part in following:
        yield ImagePart(next(images))
        yield from [part] if part else []


def shortened(text: str) -> str:
    """At most 200 characters of a value in a message."""
    return text if len(text) <= 200 else f"{text[:199]}…"
