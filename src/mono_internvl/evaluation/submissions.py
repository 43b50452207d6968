"""Files for the servers that score splits without public answers."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mono_internvl.evaluation.metrics.choices import first_letter
from mono_internvl.runs.folder import write_whole
from mono_internvl.runs.predictions import Prediction


def _number(text: Any) -> Any:
    return int(text) if str(text).isdigit() else text


def _rrc(found: Sequence[Prediction]) -> str:
    rows = [{"questionId": _number(one.record["id"]), "answer": one.text} for one in found]
    return json.dumps(rows, ensure_ascii=False)


def _evalai(found: Sequence[Prediction]) -> str:
    rows = [{"question_id": _number(one.record["id"]), "answer": one.text} for one in found]
    return json.dumps(rows, ensure_ascii=False)


def _mmvet(found: Sequence[Prediction]) -> str:
    return json.dumps({str(one.record["id"]): one.text for one in found}, ensure_ascii=False)


def _mmbench(found: Sequence[Prediction]) -> str:
    buffer = io.StringIO()
    table = csv.writer(buffer, delimiter="\t", lineterminator="\n")
    table.writerow(("index", "question", "A", "B", "C", "D", "prediction"))
    for one in found:
        truth = one.record["truth"]
        options = truth["options"]
        texts = [options.get(letter, "") for letter in "ABCD"]
        said = first_letter(one.text, options)
        table.writerow((truth["index"], truth["question"], *texts, said))
    return buffer.getvalue()


FORMS: dict[str, tuple[str, Callable[[Sequence[Prediction]], str]]] = {
    "rrc": (".json", _rrc),
    "evalai": (".json", _evalai),
    "mmvet": (".json", _mmvet),
    "mmbench": (".tsv", _mmbench),
}
"""Suffix and writer by name: RRC (DocVQA, InfographicVQA), EvalAI (VQAv2), MM-Vet's, MMBench's."""


def write_submission(form: str, folder: Path, name: str, found: Sequence[Prediction]) -> Path:
    """Write the file that a server takes."""
    suffix, write = FORMS[form]
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}{suffix}"
    write_whole(file, write(found))
    return file
