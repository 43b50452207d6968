"""Asking a model: answers in their order, blind means blind, files that can be scored again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_runs
import torch
from PIL import Image
from typer.testing import CliRunner

from mono_internvl.cli.app import app
from mono_internvl.errors import ConfigError, SampleError
from mono_internvl.evaluation import runner as run_module
from mono_internvl.evaluation.evaluate import evaluate, rescore
from mono_internvl.evaluation.runner import (
    Prediction,
    Question,
    answer_all,
    mean_scores,
    perplexity,
    read_questions,
    write_predictions,
)
from mono_internvl.generation.engine import Engine
from mono_internvl.generation.request import Generation, Request
from mono_internvl.model.modeling import MonoInternVLForConditionalGeneration
from mono_internvl.processing.image_files import load_image
from mono_internvl.processing.processor import MonoInternVLProcessor
from mono_internvl.processing.prompts import ImagePart, Turn
from mono_internvl.training.loop import train_stage


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures, texts, and `questions.jsonl`: nine of one, six of the other, mixed."""
    folder = tiny_runs.write_data(tmp_path_factory.mktemp("data"), images=18)
    records = [tiny_runs.image_record(folder, i) for i in range(9)]
    for place in range(6):
        records.insert(2 * place, tiny_runs.text_record(place))
    tiny_runs.write_lines(folder / "questions.jsonl", records)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """A model that tells three colours apart."""
    root = tmp_path_factory.mktemp("model")
    start = tiny_runs.write_checkpoint(root / "start")
    stage = tiny_runs.tiny_stage(steps=80, batch_size=8, data="images.json")
    return train_stage(stage, start, data, root / "run").checkpoint


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> MonoInternVLForConditionalGeneration:
    found: MonoInternVLForConditionalGeneration = (
        MonoInternVLForConditionalGeneration.from_pretrained(
            checkpoint, dtype=torch.float32, attn_implementation="eager"
        )
    )
    return found


@pytest.fixture(scope="module")
def processor(checkpoint: Path) -> MonoInternVLProcessor:
    found: MonoInternVLProcessor = MonoInternVLProcessor.from_pretrained(checkpoint)
    return found


@pytest.fixture(scope="module")
def questions(data: Path) -> list[Question]:
    return read_questions(data / "questions.jsonl")


OPTIONS: dict[str, Any] = {"max_new_tokens": 12, "precision": "fp32"}


@pytest.fixture(scope="module")
def answers(
    model: MonoInternVLForConditionalGeneration,
    processor: MonoInternVLProcessor,
    questions: list[Question],
) -> list[Prediction]:
    return answer_all(model, processor, questions, **OPTIONS)


def test_answers_come_in_the_order_of_the_questions(
    answers: list[Prediction], questions: list[Question]
) -> None:
    assert [a.record["id"] for a in answers] == [q.record["id"] for q in questions]
    colours = [a for a in answers if a.record["kind"] == "colour"]
    assert [a.text for a in colours] == [a.record["answer"] for a in colours]
    assert [a.score for a in colours] == [1.0] * 9
    assert not any(a.is_blind for a in answers)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_batching_changes_no_answer(
    model: MonoInternVLForConditionalGeneration,
    processor: MonoInternVLProcessor,
    questions: list[Question],
    answers: list[Prediction],
    batch_size: int,
) -> None:
    told: list[int] = []
    others = answer_all(
        model, processor, questions, batch_size=batch_size, on_batch=told.append, **OPTIONS
    )
    assert [a.text for a in others] == [a.text for a in answers]
    assert told[-1] == len(questions)
    assert told == sorted(set(told))


def test_shares_of_processes_make_up_the_whole(
    model: MonoInternVLForConditionalGeneration,
    processor: MonoInternVLProcessor,
    questions: list[Question],
    answers: list[Prediction],
) -> None:
    shares = [answer_all(model, processor, questions[rank::2], **OPTIONS) for rank in range(2)]
    together = {a.record["id"]: a.text for share in shares for a in share}
    assert together == {a.record["id"]: a.text for a in answers}


def test_blind_shows_the_mean_colour(
    monkeypatch: pytest.MonkeyPatch,
    model: MonoInternVLForConditionalGeneration,
    processor: MonoInternVLProcessor,
    questions: list[Question],
) -> None:
    shown: list[list[dict[str, Any]]] = []

    def encode(prompt: list[dict[str, Any]], **options: Any) -> Any:
        shown.append(prompt)
        return original(prompt, **options)

    original = processor.encode_prompt
    monkeypatch.setattr(processor, "encode_prompt", encode)
    pictures = [q for q in questions if q.kind == "colour"]
    found = answer_all(model, processor, pictures, blind=True, **OPTIONS)
    assert all(a.is_blind for a in found)
    for prompt in shown:
        (image,) = prompt[-1].images
        assert isinstance(image, Image.Image)
        assert image.size == (tiny_runs.TILE_PX, tiny_runs.TILE_PX)
        assert len(image.getcolors() or ()) == 1
    means = {tuple(p[-1].images[0].getpixel((0, 0))) for p in shown}
    true = [np.asarray(load_image(q.sample.images[0])).reshape(-1, 3).mean(0) for q in pictures]
    assert all(min(np.abs(np.array(m) - t).max() for t in true) <= 1 for m in means)


def test_blind_leaves_text_and_the_question_alone() -> None:
    text = [Turn("user", ("say one",))]
    assert run_module._hide_images(text) == text
    image = Image.new("RGB", (4, 4), (9, 9, 9))
    turn = Turn("user", (ImagePart(image), "what?"))
    (hidden,) = run_module._hide_images([turn])
    assert hidden.text == "what?" and hidden.images[0] is not image
    assert turn.images == (image,)


def test_prediction_file_scores_to_the_same_numbers(
    answers: list[Prediction], tmp_path: Path
) -> None:
    file = tmp_path / "made" / "predictions.jsonl"
    write_predictions(file, answers)
    expected = {kind: mean for kind, (mean, _) in mean_scores(answers).items()}
    assert rescore(file) == expected
    row = json.loads(file.read_text().splitlines()[1])
    assert row["question"] == "what colour is this?"
    assert {"prediction", "score", "blind", "answer", "kind"} <= row.keys()
    file.write_text("{}\n")
    with pytest.raises(SampleError, match=r"predictions\.jsonl:1"):
        rescore(file)


def test_mean_scores_are_per_kind() -> None:
    made = [Prediction({"kind": k}, "", s, False) for k, s in (("a", 1), ("b", 0.5), ("a", 0))]
    assert mean_scores(made) == {"a": (0.5, 2), "b": (0.5, 1)}


def test_read_questions_takes_the_first_of_each_kind(data: Path, tmp_path: Path) -> None:
    few = read_questions(data / "questions.jsonl", per_kind=2)
    assert [q.record["id"] for q in few] == ["text-0", "image-0", "text-1", "image-1"]
    assert few[1].prompt[-1].role == "user"
    turns = tiny_runs.text_record(0)["conversations"]
    file = tiny_runs.write_lines(tmp_path / "a.jsonl", [{"conversations": turns}])
    with pytest.raises(SampleError, match=r"a\.jsonl:1: kind=None"):
        read_questions(file)


def test_perplexity_is_the_mean_over_answer_tokens(
    model: MonoInternVLForConditionalGeneration,
    processor: MonoInternVLProcessor,
    questions: list[Question],
) -> None:
    talks = [q.sample.turns for q in questions if q.kind == "copying"]
    total, count = 0.0, 0
    with torch.inference_mode():
        for messages in talks:
            sample = processor.encode_conversation(messages)
            log_p = model(sample.input_ids[None]).logits[0].log_softmax(-1)
            for place in range(1, len(sample.labels)):
                if sample.labels[place] != -100:
                    total -= float(log_p[place - 1, sample.labels[place]])
                    count += 1
    assert perplexity(model, processor, talks) == pytest.approx(np.exp(total / count), rel=1e-4)


def test_evaluate_writes_what_it_returns(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    file = data / "questions.jsonl"
    seen = evaluate(checkpoint, file, device="cpu", out=tmp_path / "a.jsonl", max_new_tokens=12)
    assert seen.items == {"colour": 9, "copying": 6}
    assert seen.scores["colour"] == 1.0
    assert rescore(seen.predictions) == seen.scores
    hidden = evaluate(
        checkpoint, file, device="cpu", out=tmp_path / "b.jsonl", blind=True, per_kind=3
    )
    assert (hidden.is_blind, hidden.items) == (True, {"colour": 3, "copying": 3})
    with pytest.raises(ConfigError, match="precision='fp8'"):
        evaluate(checkpoint, file, precision="fp8")


def test_evaluate_verb_prints_scores(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    words = ["evaluate", "--model", str(checkpoint), "--data", str(data / "questions.jsonl")]
    words += ["--per-kind", "2", "--device", "cpu", "--out", str(tmp_path / "p.jsonl")]
    said = CliRunner().invoke(app, words)
    assert said.exit_code == 0, said.output
    assert "colour               100.0 %  of 2" in said.output
    found = CliRunner().invoke(app, [*words, "--json", "--blind"])
    assert json.loads(found.stdout)["is_blind"] is True
    assert len((tmp_path / "p.jsonl").read_text().splitlines()) == 4


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Lengths of the prompts that a model is asked."""
    lengths: list[int] = []

    class Counting(Engine):
        def submit(self, request: Request) -> Generation:
            lengths.append(len(request.input_ids))
            return super().submit(request)

    monkeypatch.setattr(run_module, "Engine", Counting)
    return lengths


def _ask(checkpoint: Path, file: Path, out: Path, **options: Any) -> Any:
    return evaluate(checkpoint, file, device="cpu", out=out, max_new_tokens=12, **options)


def _records(data: Path) -> list[dict[str, Any]]:
    """Those of `questions.jsonl`, fit for a file elsewhere."""
    records = [json.loads(line) for line in (data / "questions.jsonl").read_text().splitlines()]
    return [
        {**record, "image": str(data / record["image"])} if "image" in record else record
        for record in records
    ]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"conversations": [{"from": "human", "value": "say " * 4000}]}, "tokens but the model"),
        ({"conversations": [{"from": "human", "value": "say " * 500}]}, "tokens but the model"),
        ({"answer": None}, "no `answer`"),
        ({"weight": float("nan")}, "JSON compliant"),
    ],
)
def test_evaluate_checks_every_record_before_it_asks(
    checkpoint: Path,
    data: Path,
    tmp_path: Path,
    asked: list[int],
    change: dict[str, Any],
    complaint: str,
) -> None:
    records = _records(data)
    bad = {**records[0], **change}
    if "conversations" in change:
        bad["conversations"] = [*change["conversations"], records[0]["conversations"][-1]]
    file = tiny_runs.write_lines(tmp_path / "q.jsonl", [*records, bad])
    with pytest.raises(SampleError, match=rf"q\.jsonl:16: .*({complaint})"):
        _ask(checkpoint, file, tmp_path / "p.jsonl")
    assert asked == [] and not (tmp_path / "p.jsonl").exists()


@pytest.mark.parametrize("out", [".", "file/p.jsonl", "/dev/null", "/proc/x", "n" * 300])
def test_evaluate_checks_out_before_it_asks(
    checkpoint: Path, data: Path, tmp_path: Path, asked: list[int], out: str
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="not a file to write to"):
        _ask(checkpoint, data / "questions.jsonl", tmp_path / out)
    assert asked == []


def test_evaluate_keeps_the_answers_beside_a_damaged_image(
    checkpoint: Path, data: Path, tmp_path: Path, asked: list[int]
) -> None:
    records = _records(data)
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\n")
    pictures = [record for record in records if "image" in record]
    whole, pictures[0]["image"] = Path(pictures[0]["image"]), str(broken)
    file, out = tiny_runs.write_lines(tmp_path / "q.jsonl", records), tmp_path / "p.jsonl"
    with pytest.raises(SampleError, match=r"1 of 15 records .* first .*q\.jsonl:2: .*broken\.png"):
        _ask(checkpoint, file, out)
    ids = [json.loads(line)["id"] for line in out.read_text().splitlines()]
    assert ids == [r["id"] for r in records if r is not pictures[0]]
    asked.clear()
    broken.write_bytes(whole.read_bytes())
    assert _ask(checkpoint, file, out).items == {"colour": 9, "copying": 6}
    assert len(asked) == 1, "only what was left is asked"
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_evaluate_goes_on_after_a_kill(
    checkpoint: Path,
    data: Path,
    tmp_path: Path,
    asked: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file, out = data / "questions.jsonl", tmp_path / "p.jsonl"
    whole = _ask(checkpoint, file, tmp_path / "whole.jsonl", batch_size=4)
    asked.clear()
    engine = run_module.Engine

    class Killed(engine):  # type: ignore[misc, valid-type]
        def submit(self, request: Request) -> Generation:
            if len(asked) == 12:
                raise KeyboardInterrupt
            return super().submit(request)

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "Engine", Killed)
        with pytest.raises(KeyboardInterrupt):
            _ask(checkpoint, file, out, batch_size=4)
    journal = tmp_path / ".p.jsonl.answers"
    answered = sum(len(json.loads(line)) for line in journal.read_text().splitlines()[1:])
    assert answered >= 4
    journal.write_text(journal.read_text() + '{"cut')
    asked.clear()
    again = _ask(checkpoint, file, out, batch_size=4)
    assert len(asked) == 15 - answered
    assert again.scores == whole.scores
    assert out.read_text() == (tmp_path / "whole.jsonl").read_text()


def test_evaluate_other_settings_ask_anew(
    checkpoint: Path, data: Path, tmp_path: Path, asked: list[int]
) -> None:
    journal = tmp_path / ".p.jsonl.answers"
    journal.write_text('{"model": "another"}\n{"aa": "stale"}\n')
    assert _ask(checkpoint, data / "questions.jsonl", tmp_path / "p.jsonl").items["colour"] == 9
    assert len(asked) == 15 and not journal.exists()


def test_evaluate_refuses_what_needs_more_memory_than_there_is(
    checkpoint: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Small(Engine):
        def __init__(self, model: MonoInternVLForConditionalGeneration, **options: Any) -> None:
            super().__init__(model, kv_bytes=10 * Engine(model).bytes_per_token, **options)

    monkeypatch.setattr(run_module, "Engine", Small)
    with pytest.raises(SampleError, match=r"15 of 15 records.*questions\.jsonl:\d+: .*kv_bytes"):
        _ask(checkpoint, data / "questions.jsonl", tmp_path / "p.jsonl")


def test_predictions_with_line_separators_score_to_the_same_numbers(tmp_path: Path) -> None:
    record = {**tiny_runs.text_record(0), "note": "a\u2028b\ud800"}
    file = tmp_path / "p.jsonl"
    write_predictions(file, [Prediction(record, "one\x85", 1.0, False)] * 2)
    assert rescore(file) == {"copying": 1.0}
    for bad in (b"\xff\xfe", b""):
        file.write_bytes(bad)
        if bad:
            with pytest.raises(SampleError, match="not a readable predictions file"):
                rescore(file)
