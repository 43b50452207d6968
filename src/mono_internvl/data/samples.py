"""A raw record becomes a sample: roles checked, images found, placeholders counted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from mono_internvl.data.sources import JsonlSource, Record
from mono_internvl.errors import SampleError

IMAGE_PLACEHOLDER = "<image>"
MOST_CHARACTERS_OF_TOKEN = 256
"""No vocabulary has a token of more; text beyond that many per token need not be tokenized."""
_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}


@dataclass(frozen=True)
class Sample:
    """A conversation with its images, ready for the processor.

    Attributes:
        messages: Turns in transformers' form: role and content parts, images as file paths.
        images: The image files, in the order of their placeholders.
        record_id: The record's `id`, or its place.
        where: `file:line` for messages.
        max_tiles: Most tiles per image for this record, or None for the stage's.
    """

    messages: list[dict[str, Any]]
    images: tuple[Path, ...]
    record_id: str
    where: str
    max_tiles: int | None = None


def read_sample(source: JsonlSource, index: int) -> Sample:
    """Validate record `index` of a source.

    Placeholders stand for images in order; a single image without one goes in front of the first
    user turn. A first assistant turn is dropped, as the released code does.

    Raises:
        SampleError: Naming file and line, what was found and what was expected.
    """
    record = source.record(index)
    images = _image_paths(record, source.image_root)
    turns = _turns(record)
    counts = [text.count(IMAGE_PLACEHOLDER) for _, text in turns]
    if images and sum(counts) == 0 and len(images) == 1:
        first = next(i for i, (role, _) in enumerate(turns) if role == "user")
        turns[first] = ("user", f"{IMAGE_PLACEHOLDER}\n{turns[first][1]}")
        counts[first] = 1
    if sum(counts) != len(images):
        raise SampleError(
            f"{record.where}: {sum(counts)} <image> placeholders but {len(images)} "
            f"image{'s' if len(images) != 1 else ''}; fix the record or set on_bad_sample='skip'"
        )
    if any(count and role != "user" for count, (role, _) in zip(counts, turns, strict=True)):
        raise SampleError(f"{record.where}: an <image> placeholder outside a human turn")
    remaining = iter(images)
    for number, (role, text) in enumerate(turns):
        if role == "user" and not text.strip():
            raise SampleError(
                f"{record.where}: question {number} is empty; write one, or remove the record"
            )
    messages = [{"role": role, "content": _content(text, remaining)} for role, text in turns]
    return Sample(
        messages, images, str(record.value.get("id", index)), record.where, source.max_tiles
    )


def count_characters(messages: Iterable[Mapping[str, Any]]) -> int:
    """Characters of all texts of messages."""
    return sum(
        len(content)
        if isinstance(content, str)
        else sum(len(part.get("text", "")) for part in content)
        for content in (message["content"] for message in messages)
    )


def _image_paths(record: Record, root: Path) -> tuple[Path, ...]:
    value = record.value.get("image")
    names = [] if value is None or value == "" else value if isinstance(value, list) else [value]
    if not all(isinstance(name, str) for name in names):
        raise SampleError(
            f"{record.where}: image={_shortened(repr(value))}; expected a path or a list of paths"
        )
    paths = tuple(root / name for name in names)
    for path in paths:
        try:
            is_there = path.is_file()
        except OSError:  # a name too long to be one, such as a data URI
            is_there = False
        if not is_there:
            raise SampleError(
                f"{record.where}: image {_shortened(str(path))} does not exist; check the "
                "source's root, and give the path of a file",
                reason="image missing",
            )
    return paths


def _turns(record: Record) -> list[tuple[str, str]]:
    conversation = record.value.get("conversations")
    if not isinstance(conversation, list) or not conversation:
        raise SampleError(
            f"{record.where}: conversations={_shortened(repr(conversation))}; expected a list of "
            "turns"
        )
    turns = []
    for number, turn in enumerate(conversation):
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
            raise SampleError(f"{record.where}: turn {number} lacks a text 'value'")
        role = turn.get("from")
        if not isinstance(role, str) or role not in _ROLES:
            raise SampleError(
                f"{record.where}: turn {number} is from {_shortened(repr(role))}; "
                f"expected one of {', '.join(_ROLES)}"
            )
        turns.append((_ROLES[role], turn["value"]))
    first = next((i for i, (role, _) in enumerate(turns) if role != "system"), 0)
    if turns[first][0] == "assistant":
        del turns[first]
    speakers = [role for role, _ in turns if role != "system"]
    if speakers[:1] != ["user"] or any(a == b for a, b in pairwise(speakers)):
        raise SampleError(f"{record.where}: roles {speakers}; expected human and gpt by turns")
    if speakers[-1] != "assistant":
        raise SampleError(f"{record.where}: the last turn is the human's; nothing to learn from it")
    return turns


def _shortened(text: str) -> str:
    """At most 200 characters of a value in a message."""
    return text if len(text) <= 200 else f"{text[:199]}…"


def _content(text: str, images: Iterator[Path]) -> str | list[dict[str, Any]]:
    """Message content: its images, and the text whose placeholders say where they stand."""
    taken = [{"type": "image", "image": next(images)} for _ in range(text.count(IMAGE_PLACEHOLDER))]
    return [*taken, {"type": "text", "text": text}] if taken else text
