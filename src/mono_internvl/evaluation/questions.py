"""Records as questions: what is asked, what is hidden, and in which order."""

from __future__ import annotations

import dataclasses
import json
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from mono_internvl.data.order import mix
from mono_internvl.data.records import Record
from mono_internvl.data.sources import open_source
from mono_internvl.errors import SampleError
from mono_internvl.evaluation.protocol import Protocol
from mono_internvl.processing.image_files import load_image
from mono_internvl.processing.prompts import ImagePart, Turn


@dataclass(frozen=True)
class Question:
    """One record to ask.

    Attributes:
        sample: Its conversation; the last turn is the true answer.
        is_blind: Whether its images are hidden: what remains is what the question gives away.
        draw: Where several answers are drawn, which of them; None where there is one.
        answer_start: What the answer begins with; the model goes on from there.
    """

    sample: Record
    is_blind: bool = False
    draw: int | None = None
    answer_start: str = ""

    @property
    def record(self) -> dict[str, Any]:
        """The raw record; its `kind` says which mean it counts in."""
        return self.sample.fields

    @property
    def kind(self) -> str:
        """What is asked for."""
        return str(self.record["kind"])

    @property
    def prompt(self) -> tuple[Turn, ...]:
        """The conversation up to the answer, with hidden images if it is blind."""
        turns = self.sample.turns[:-1]
        return _hide_images(turns) if self.is_blind else turns

    @property
    def text(self) -> str:
        """The last question, without its images."""
        return self.sample.turns[-2].text.lstrip("\n")

    def without_images(self) -> Question:
        """The same question, asked blind."""
        return dataclasses.replace(self, is_blind=True)

    def draws(self, count: int) -> list[Question]:
        """The same question so many times, for answers to choose from."""
        return [dataclasses.replace(self, draw=number) for number in range(count)]

    def seed(self) -> int:
        """Of this draw: a function of what is asked and of its number alone."""
        asked = json.dumps([self.record, self.is_blind, self.answer_start], sort_keys=True)
        return mix(zlib.crc32(asked.encode()), self.draw or 0)


def read_records(file: Path) -> Iterator[Question]:
    """The records of any source; image paths are relative to the folder that it lies in.

    Args:
        file: As `annotation` in a meta file: JSON lines, a JSON array, shards, ...

    Raises:
        SampleError: A record is malformed or has no `kind`.
    """
    source = open_source(file)
    for index in range(len(source)):
        found = source.record(index)
        if found.document is not None:
            raise SampleError(
                f"{found.where}: a text without question and answer; write them as `conversations`"
            )
        kind = found.fields.get("kind")
        if not isinstance(kind, str):
            raise SampleError(f"{found.where}: kind={kind!r}; expected the name of a kind")
        yield Question(found)


def with_suffix(question: Question, protocol: Protocol) -> tuple[Turn, ...]:
    """The conversation up to the answer, the protocol's suffix behind the last question."""
    *before, last = question.prompt
    if not protocol.prompt_suffix:
        return question.prompt
    return (*before, Turn(last.role, (*last.parts, protocol.prompt_suffix)))


def first_of_each_kind(questions: Iterable[Question], count: int | None) -> list[Question]:
    """The first `count` questions of each kind; None is all."""
    seen: dict[str, int] = defaultdict(int)
    chosen = []
    for question in questions:
        seen[question.kind] += 1
        if count is None or seen[question.kind] <= count:
            chosen.append(question)
    return chosen


def in_order(questions: Sequence[Question]) -> list[int]:
    """By kind and length of the true answer, but questions on the same images one after another."""
    keys = [(question.kind, len(question.sample.turns[-1].text)) for question in questions]
    first: dict[Any, tuple[str, int]] = {}  # images -> least key of a question on them
    images = [q.sample.images or q.sample.where or number for number, q in enumerate(questions)]
    for key, shown in zip(keys, images, strict=True):
        first[shown] = min(key, first.get(shown, key))
    numbers = {shown: number for number, shown in enumerate(dict.fromkeys(images))}
    return sorted(
        range(len(questions)), key=lambda i: (first[images[i]], numbers[images[i]], keys[i])
    )


def _hide_images(turns: Sequence[Turn]) -> tuple[Turn, ...]:
    """The same turns with every image at its mean colour."""
    return tuple(Turn(turn.role, tuple(map(_hidden, turn.parts))) for turn in turns)


def _hidden(part: str | ImagePart) -> str | ImagePart:
    if isinstance(part, str):
        return part
    image = load_image(part.source)
    mean = image.resize((1, 1), Image.Resampling.BOX).getpixel((0, 0))
    return ImagePart(Image.new("RGB", image.size, mean))


def shares(questions: Sequence[Question], processes: int) -> list[list[Question]]:
    """Questions dealt out to processes, those on the same images to the same one."""
    dealt: list[list[Question]] = [[] for _ in range(processes)]
    process_of: dict[Any, int] = {}
    for number, question in enumerate(questions):
        shown = question.sample.images or question.sample.where or number
        dealt[process_of.setdefault(shown, len(process_of) % processes)].append(question)
    return dealt
