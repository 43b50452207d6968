"""Mutated records and requests: an answer, or an error of our own, in bounded time."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
from mutations import mutated

from mono_internvl import ChatSession, load
from mono_internvl.data.batches import BatchPlan, BatchStream
from mono_internvl.data.sources import JsonlSource
from mono_internvl.errors import MonoInternVLError
from mono_internvl.evaluation.benchmarks.records import RECORDS


def mutated_line(record: dict[str, Any], rng: random.Random) -> bytes:
    """A line of an annotation: a mutated record, at times with its bytes damaged too."""
    line = bytearray(json.dumps(mutated(record, rng), default=str).encode())
    if rng.random() < 0.2:
        for _ in range(rng.randint(1, 3)):
            line[rng.randrange(len(line))] = rng.randrange(256)
    return bytes(line)


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> ChatSession:
    return load(tiny_runs.write_checkpoint(tmp_path_factory.mktemp("start") / "tiny"), device="cpu")


@pytest.mark.parametrize("seed", range(80))
def test_mutated_record_trains_or_is_refused(
    session: ChatSession, tmp_path: Path, seed: int
) -> None:
    rng = random.Random(seed)
    records = [tiny_runs.image_record(tmp_path, 0), tiny_runs.text_record(3)]
    file = tmp_path / "a.jsonl"
    file.write_bytes(mutated_line(records[seed % 2], rng) + b"\n")
    try:
        stream = BatchStream(
            [JsonlSource(file, tmp_path)],
            lambda record: session.processor.encode_conversation(record.turns),
            BatchPlan(batch_size=1, max_tokens=256, pad_token_id=0, image_token_id=1),
            seed=0,
        )
        assert stream[0].num_tokens > 0
    except MonoInternVLError as error:
        assert str(file) in str(error)
    try:
        (question,) = RECORDS.questions(file)
        RECORDS.predict(question, "red", RECORDS.protocol).to_row()
    except MonoInternVLError as error:
        assert str(file) in str(error)


REQUEST: dict[str, Any] = {
    "question": "what colour is this?",
    "images": ["images/0.png"],
    "max_tiles": 1,
    "temperature": 1.0,
    "top_p": 0.9,
    "top_k": 5,
    "repetition_penalty": 1.1,
    "max_new_tokens": 2,
    "seed": 3,
}


@pytest.mark.parametrize("seed", range(80))
def test_mutated_request_is_answered_or_refused(
    monkeypatch: pytest.MonkeyPatch, session: ChatSession, tmp_path: Path, seed: int
) -> None:
    tiny_runs.image_record(tmp_path, 0)
    monkeypatch.chdir(tmp_path)
    session.reset()
    request = {name: mutated(value, random.Random(seed)) for name, value in REQUEST.items()}
    chosen = random.Random(seed + 1).sample(list(REQUEST), 2)
    options = {name: request[name] if name in chosen else REQUEST[name] for name in REQUEST}
    if options["max_new_tokens"] == 10**30:
        options["max_new_tokens"] = 2  # it is answered, for as long as the context is
    try:
        session.ask(options.pop("question"), **options)
    except MonoInternVLError as error:
        assert str(error)
