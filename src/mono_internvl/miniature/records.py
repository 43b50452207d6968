"""Records in the InternVL form: JSONL conversations and the meta file that lists them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

Record: TypeAlias = dict[str, object]
"""One line of a JSONL file; its keys are the file format."""


@dataclass(frozen=True)
class Dataset:
    """Records under a name, as one line of a meta file.

    Attributes:
        name: name of the data set and of its JSONL file.
        records: the records.
        repeat_time: how often one pass over the meta file repeats them.
    """

    name: str
    records: Sequence[Record]
    repeat_time: int = 1


def make_record(
    kind: str,
    turns: Sequence[tuple[str, str]],
    image: str | None = None,
    **extra: object,
) -> Record:
    """Build a record; `<image>` goes in front of the first question if there is an image.

    Args:
        kind: what the record asks for; decides how it is scored.
        turns: (question, answer) pairs.
        image: path below the data root, or None for text.
        **extra: further keys, such as `boxes` or `attributes`.

    Returns:
        The record, with the last answer also under `answer`; `write_dataset` adds the id.
    """
    conversations = []
    for index, (question, answer) in enumerate(turns):
        prefix = "<image>\n" if image is not None and index == 0 else ""
        conversations.append({"from": "human", "value": prefix + question})
        conversations.append({"from": "gpt", "value": answer})
    record: Record = {"id": ""}
    if image is not None:
        record["image"] = image
    return {**record, "conversations": conversations, "kind": kind, "answer": turns[-1][1], **extra}


def write_jsonl(path: Path, prefix: str, records: Iterable[Record]) -> int:
    """Write records, one a line, each with the id `prefix-number`.

    Args:
        path: the file.
        prefix: first part of the ids.
        records: the records.

    Returns:
        The number of lines.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    count = 0
    with path.open("w", encoding="utf-8") as file:
        for count, record in enumerate(records, start=1):
            named = {**record, "id": f"{prefix}-{count - 1:06d}"}
            file.write(json.dumps(named, ensure_ascii=False) + "\n")
    return count


def write_meta(root: Path, stage: str, datasets: Sequence[Dataset]) -> Path:
    """Write the data sets of a stage and the meta file that lists them.

    Args:
        root: the data root; images are below it.
        stage: name of the meta file and of the folder of its annotations.
        datasets: the data sets.

    Returns:
        Path of the meta file. Its paths are relative to the folder that holds it, so that the
        whole root can be moved.
    """
    meta = {}
    for dataset in datasets:
        annotation = Path("annotations") / stage / f"{dataset.name}.jsonl"
        length = write_jsonl(root / annotation, f"{stage}-{dataset.name}", dataset.records)
        meta[dataset.name] = {
            "root": ".",
            "annotation": annotation.as_posix(),
            "data_augment": False,
            "repeat_time": dataset.repeat_time,
            "length": length,
        }
    path = root / f"{stage}.json"
    path.write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
    return path


def texts_of(records: Iterable[Record]) -> Iterable[str]:
    """Yield everything that is said in records, turn by turn, without image placeholders."""
    for record in records:
        conversations = record["conversations"]
        assert isinstance(conversations, list)
        for turn in conversations:
            yield turn["value"].removeprefix("<image>\n")
