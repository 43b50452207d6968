"""Answers on disk as they are made, so that no bad record and no kill loses those before it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mono_internvl.distributed import barrier, rank
from mono_internvl.errors import ConfigError
from mono_internvl.evaluation.questions import Question
from mono_internvl.runs.json_lines import read_lines, to_line

_DIGEST_BYTES = 16


class AnswerJournal:
    """The answers of an evaluation that has not ended, in hidden files beside its predictions.

    Every process writes a file of its own and reads those of all, so that another number of
    processes goes on as well. Files of other settings do not count: that evaluation begins anew.

    Args:
        predictions: The file that the evaluation will write.
        settings: What answers depend on besides their questions.

    Attributes:
        answers: By key of their questions.

    Raises:
        ConfigError: `predictions` is no file, or cannot be written where it should be.
    """

    def __init__(self, predictions: Path, settings: Mapping[str, Any]):
        self.predictions, self.first_line = predictions, to_line(settings)
        own = str(rank()) if rank() else ""
        self.file = predictions.with_name(f".{predictions.name}.answers{own}")
        try:
            if predictions.exists() and not predictions.is_file():
                raise OSError("is no file")
            predictions.parent.mkdir(parents=True, exist_ok=True)
            self.answers = self.read()
            barrier()  # before anybody writes
            answers = self._read_file(self.file) if self.file.is_file() else {}
            rows = (to_line({key: text}) for key, text in answers.items())
            self.file.write_text(self.first_line + "".join(rows), encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"out={str(predictions)!r}: not a file to write to ({error}); choose another one"
            ) from error

    def read(self) -> dict[str, str]:
        """The answers of all processes that are on disk."""
        answers: dict[str, str] = {}
        for file in _journals(self.predictions):
            answers |= self._read_file(file)
        return answers

    def _read_file(self, file: Path) -> dict[str, str]:
        answers: dict[str, str] = {}
        lines = read_lines(file)
        if lines[:1] == [self.first_line.removesuffix("\n")]:
            for line in lines[1:]:
                try:
                    answers.update(json.loads(line))
                except ValueError:  # cut in two by a kill
                    continue
        return answers

    def add(self, answers: Mapping[str, str]) -> None:
        """Write answers down, by key of their questions."""
        with self.file.open("a", encoding="utf-8") as file:
            file.writelines(to_line({key: text}) for key, text in answers.items())


def remove_journals(predictions: Path) -> None:
    """Remove the journals of all processes beside a file of predictions."""
    for file in _journals(predictions):
        file.unlink()


def _journals(predictions: Path) -> list[Path]:
    name = f".{predictions.name}.answers"
    return sorted(
        f for f in predictions.parent.iterdir() if f.name.startswith(name) and f.is_file()
    )


def key_of(question: Question) -> str:
    """What a question is known by: its record, which version of its images, how it is asked."""
    images = [image.version() for image in question.sample.images]
    seen: list[Any] = [question.record, images, question.is_blind]
    if question.draw is not None or question.answer_start:
        seen += [question.draw, question.answer_start]
    text = json.dumps(seen, sort_keys=True).encode()
    return hashlib.blake2b(text, digest_size=_DIGEST_BYTES).hexdigest()
