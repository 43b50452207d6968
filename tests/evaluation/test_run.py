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
from mono_internvl.compute import make_plan
from mono_internvl.distributed import run_processes
from mono_internvl.errors import ConfigError, SampleError
from mono_internvl.evaluation import questions as questions_module
from mono_internvl.evaluation import runner as run_module
from mono_internvl.evaluation.benchmark import Mean
from mono_internvl.evaluation.benchmarks.records import RECORDS
from mono_internvl.evaluation.evaluate import evaluate
from mono_internvl.evaluation.journal import key_of
from mono_internvl.evaluation.perplexity import perplexity
from mono_internvl.evaluation.protocol import Protocol
from mono_internvl.evaluation.questions import Question, first_of_each_kind, read_records
from mono_internvl.evaluation.runner import Subject, ask
from mono_internvl.generation.engine import Engine
from mono_internvl.generation.request import Generation, Request
from mono_internvl.model.modeling import MonoInternVLForConditionalGeneration
from mono_internvl.processing.image_files import load_image
from mono_internvl.processing.prompts import ImagePart, Turn
from mono_internvl.runs.predictions import Prediction, read_predictions, write_predictions
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


SHORT = Protocol(max_new_tokens=12, precision="fp32")


@pytest.fixture(scope="module")
def subject(checkpoint: Path) -> Subject:
    return Subject.load(checkpoint, make_plan("cpu", "fp32", processes=1))


@pytest.fixture(scope="module")
def questions(data: Path) -> list[Question]:
    return RECORDS.questions(data / "questions.jsonl")


@pytest.fixture(scope="module")
def answers(
    subject: Subject, questions: list[Question], tmp_path_factory: pytest.TempPathFactory
) -> list[Prediction]:
    out = tmp_path_factory.mktemp("answers") / "p.jsonl"
    return ask(subject, RECORDS, SHORT, questions, out=out)


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
    subject: Subject,
    questions: list[Question],
    answers: list[Prediction],
    tmp_path: Path,
    batch_size: int,
) -> None:
    out = tmp_path / "p.jsonl"
    others = ask(subject, RECORDS, SHORT, questions, out=out, batch_size=batch_size)
    assert others == answers == read_predictions(out)


def test_an_image_is_read_once_for_several_questions(
    subject: Subject, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the prompts about one image begin with, all its visual tokens, comes from the cache."""
    records = [tiny_runs.image_record(data, 0) for _ in range(4)]
    for number, record in enumerate(records):
        record["id"] = f"again-{number}"
        turns = record["conversations"]
        asked = {**turns[0], "value": f"{turns[0]['value']} {'really ' * number}"}
        record["conversations"] = [asked, *turns[1:]]
    tiny_runs.write_lines(data / "again.jsonl", records)
    submit = Engine.submit

    def watch(engine: Engine, request: Request) -> Generation:
        generation = submit(engine, request)
        generations.append(generation)
        return generation

    generations: list[Generation] = []
    monkeypatch.setattr(Engine, "submit", watch)
    questions = RECORDS.questions(data / "again.jsonl")
    ask(subject, RECORDS, SHORT, questions, out=tmp_path / "p.jsonl", batch_size=1)
    cached = [one.result.num_cached for one in generations]
    assert cached[0] == 0
    assert min(cached[1:]) >= subject.processor.tokens_per_tile


def test_sets_come_one_after_another(
    subject: Subject, questions: list[Question], answers: list[Prediction], tmp_path: Path
) -> None:
    sets = [questions[::-1], [q.without_images() for q in questions]]
    found = ask(subject, RECORDS, SHORT, *sets, out=tmp_path / "p.jsonl")
    assert found[:15] == answers[::-1]
    assert all(one.is_blind for one in found[15:])


def _ask_in_group(checkpoint: Path, file: Path, out: Path) -> None:
    own = Subject.load(checkpoint, make_plan("cpu", "fp32", processes=1))
    found = ask(own, RECORDS, SHORT, RECORDS.questions(file), out=out)
    assert len(found) == 15, "every process gets all answers"


def test_two_processes_give_the_file_of_one(
    checkpoint: Path, data: Path, answers: list[Prediction], tmp_path: Path
) -> None:
    out = tmp_path / "p.jsonl"
    run_processes(_ask_in_group, 2, checkpoint, data / "questions.jsonl", out)
    assert read_predictions(out) == answers
    assert [file.name for file in tmp_path.iterdir()] == ["p.jsonl"]


def test_processes_go_on_from_what_another_number_of_them_left(
    checkpoint: Path,
    data: Path,
    subject: Subject,
    questions: list[Question],
    answers: list[Prediction],
    asked: list[int],
    tmp_path: Path,
) -> None:
    out = tmp_path / "p.jsonl"
    settings = {
        "model": subject.digest,
        "benchmark": "records",
        "protocol": SHORT.planned(subject.plan).to_dict(),
    }
    for number, rank in ((4, ""), (9, "1"), (12, "2")):
        lines = [settings, {key_of(questions[number]): answers[number].text}]
        tiny_runs.write_lines(tmp_path / f".p.jsonl.answers{rank}", lines)
    assert ask(subject, RECORDS, SHORT, questions, out=out) == answers
    assert len(asked) == 12
    assert [file.name for file in tmp_path.iterdir()] == ["p.jsonl"]


def test_blind_shows_the_mean_colour(
    monkeypatch: pytest.MonkeyPatch,
    subject: Subject,
    questions: list[Question],
    tmp_path: Path,
) -> None:
    processor = subject.processor
    shown: list[list[dict[str, Any]]] = []

    def encode(prompt: list[dict[str, Any]], **options: Any) -> Any:
        shown.append(prompt)
        return original(prompt, **options)

    original = processor.encode_prompt
    monkeypatch.setattr(processor, "encode_prompt", encode)
    pictures = [q for q in questions if q.kind == "colour"]
    hidden = [question.without_images() for question in pictures]
    found = ask(subject, RECORDS, SHORT, hidden, out=tmp_path / "p.jsonl")
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
    assert questions_module._hide_images(text) == tuple(text)
    image = Image.new("RGB", (4, 4), (9, 9, 9))
    turn = Turn("user", (ImagePart(image), "what?"))
    (hidden,) = questions_module._hide_images([turn])
    assert hidden.text == "what?" and hidden.images[0] is not image
    assert turn.images == (image,)


def test_prediction_file_holds_what_was_asked_and_how(
    answers: list[Prediction], tmp_path: Path
) -> None:
    file = tmp_path / "made" / "predictions.jsonl"
    write_predictions(file, answers)
    found = read_predictions(file)
    assert found == answers
    assert [RECORDS.score(one.record, one.text) for one in found] == [a.score for a in answers]
    row = json.loads(file.read_text().splitlines()[1])
    assert row["question"] == "what colour is this?"
    assert row["protocol"]["max_new_tokens"] == 12 and row["protocol"]["attention"] == "sdpa"
    file.write_text("{}\n")
    with pytest.raises(SampleError, match=r"predictions\.jsonl:1"):
        read_predictions(file)


def test_mean_scores_are_per_kind() -> None:
    made = [
        Prediction({"kind": kind, "metric": "exact"}, "", "", score, False)
        for kind, score in (("a", 1.0), ("b", 0.5), ("a", 0.0))
    ]
    assert RECORDS.mean_scores(made) == {"a": Mean(0.5, 2), "b": Mean(0.5, 1)}


def test_first_of_each_kind(data: Path, tmp_path: Path) -> None:
    few = first_of_each_kind(RECORDS.questions(data / "questions.jsonl"), 2)
    assert [q.record["id"] for q in few] == ["text-0", "image-0", "text-1", "image-1"]
    assert few[1].prompt[-1].role == "user"
    turns = tiny_runs.text_record(0)["conversations"]
    file = tiny_runs.write_lines(tmp_path / "a.jsonl", [{"conversations": turns}])
    with pytest.raises(SampleError, match=r"a\.jsonl:1: kind=None"):
        RECORDS.questions(file)


def test_perplexity_is_the_mean_over_answer_tokens(
    subject: Subject, questions: list[Question]
) -> None:
    model, processor = subject.model, subject.processor
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
    seen = _ask(checkpoint, file, tmp_path / "a.jsonl")
    assert seen.items == {"colour": 9, "copying": 6}
    assert seen.scores["colour"] == 1.0
    means = RECORDS.mean_scores(read_predictions(seen.predictions))
    assert {kind: mean.score for kind, mean in means.items()} == seen.scores
    assert seen.protocol["max_new_tokens"] == 12 and seen.protocol["precision"] != "auto"
    hidden = evaluate(
        checkpoint, file, device="cpu", out=tmp_path / "b.jsonl", blind=True, per_kind=3
    )
    assert (hidden.is_blind, hidden.items) == (True, {"colour": 3, "copying": 3})
    with pytest.raises(ConfigError, match="precision='fp8'"):
        evaluate(checkpoint, file, protocol=Protocol(precision="fp8"))


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
    protocol = Protocol(max_new_tokens=12)
    return evaluate(checkpoint, file, device="cpu", out=out, protocol=protocol, **options)


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


def test_predictions_with_line_separators_are_read_again(tmp_path: Path) -> None:
    record = {**tiny_runs.text_record(0), "note": "a\u2028b\ud800"}
    file = tmp_path / "p.jsonl"
    made = [Prediction(record, "say it", "one\x85", 1.0, False)] * 2
    write_predictions(file, made)
    assert read_predictions(file) == made
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(SampleError, match="not a readable predictions file"):
        read_predictions(file)


def test_text_without_question_is_refused_by_its_line(tmp_path: Path) -> None:
    file = tmp_path / "heldout.jsonl"
    file.write_text('{"text": "plain words", "kind": "exact"}\n')
    with pytest.raises(SampleError, match=r"heldout.jsonl:1: a text without question and answer"):
        list(read_records(file))
