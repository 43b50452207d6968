"""Answers on disk as they are made, so that no bad record and no kill loses those before it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mono_internvl.errors import ConfigError
from mono_internvl.evaluation.runner import Question
from mono_internvl.runs.json_lines import read_lines, to_line

_DIGEST_BYTES = 16


class AnswerJournal:
    """The answers of an evaluation that has not ended, in a hidden file beside its predictions.

    One that was begun with the same settings is gone on with; another one is begun anew.

    Args:
        predictions: The file that the evaluation will write.
        settings: What answers depend on besides their questions.

    Attributes:
        answers: By key of their questions.

    Raises:
        ConfigError: `predictions` is no file, or cannot be written where it should be.
    """

    def __init__(self, predictions: Path, settings: Mapping[str, Any]):
        self.file = predictions.with_name(f".{predictions.name}.answers")
        self.answers: dict[str, str] = {}
        try:
            if predictions.exists() and not predictions.is_file():
                raise OSError("is no file")
            predictions.parent.mkdir(parents=True, exist_ok=True)
            self._begin(to_line(settings))
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"out={str(predictions)!r}: not a file to write to ({error}); choose another one"
            ) from error

    def _begin(self, first_line: str) -> None:
        lines = read_lines(self.file) if self.file.is_file() else []
        if lines[:1] == [first_line.removesuffix("\n")]:
            for line in lines[1:]:
                try:
                    self.answers.update(json.loads(line))
                except ValueError:  # cut in two by a kill
                    continue
        rows = (to_line({key: text}) for key, text in self.answers.items())
        self.file.write_text(first_line + "".join(rows), encoding="utf-8")

    def add(self, answers: Mapping[str, str]) -> None:
        """Write answers down, by key of their questions."""
        self.answers.update(answers)
        with self.file.open("a", encoding="utf-8") as file:
            file.writelines(to_line({key: text}) for key, text in answers.items())

    def close(self) -> None:
        """Remove the file: the predictions are written."""
        self.file.unlink()


def key_of(question: Question) -> str:
    """What a question is known by: its record, and size and time of its images."""
    seen = [question.record, [image.version() for image in question.sample.images]]
    text = json.dumps(seen, sort_keys=True).encode()
    return hashlib.blake2b(text, digest_size=_DIGEST_BYTES).hexdigest()
