"""Pairs of a model's own answers: what is right, what is left out, and that it goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
from typer.testing import CliRunner

from mono_internvl.cli.app import app
from mono_internvl.compute import make_plan
from mono_internvl.data.sources import read_meta
from mono_internvl.errors import ConfigError, SampleError
from mono_internvl.evaluation import runner
from mono_internvl.evaluation.answer_formats import FORMATS
from mono_internvl.evaluation.benchmarks.records import RECORDS
from mono_internvl.evaluation.drawing import draw_answers
from mono_internvl.evaluation.pairs import PairPlan, _Sorted, make_pairs
from mono_internvl.evaluation.protocol import Drawing, Protocol
from mono_internvl.evaluation.questions import Question, read_records
from mono_internvl.evaluation.runner import Subject
from mono_internvl.processing.processor import MonoInternVLProcessor
from mono_internvl.processing.prompts import Turn
from mono_internvl.runs.predictions import Prediction, read_predictions
from mono_internvl.training.loop import train_stage

PROTOCOL = Protocol(max_new_tokens=8, precision="fp32", attention="sdpa")
WARM = PROTOCOL.drawn(Drawing(temperature=1.5))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_runs.write_data(tmp_path_factory.mktemp("data"))
    records = [tiny_runs.image_record(folder, i) for i in range(4)]
    records += [tiny_runs.text_record(i) for i in range(2, 4)]
    return tiny_runs.write_lines(folder / "questions.jsonl", records)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """A model that has half learnt its answers."""
    root = tmp_path_factory.mktemp("model")
    start = tiny_runs.write_checkpoint(root / "start")
    stage = tiny_runs.tiny_stage(steps=30, batch_size=8)
    return train_stage(stage, start, data.parent, root / "run").checkpoint


def _said(text: str, score: float) -> Prediction:
    return Prediction({"kind": "colour"}, "what?", text, score, False)


def test_answers_are_sorted_by_score_result_and_entailment() -> None:
    marked = FORMATS["marked"]
    sort = _Sorted.of(
        [
            _said("seen. Final answer: Red", 1.0),
            _said("seen. Final answer: Red", 1.0),
            _said("Final answer: dark red", 0.0),
            _said("so. FINAL ANSWER:\n blue ", 0.9),
            _said("it is red", 0.0),
            _said("Final answer: ", 0.0),
        ],
        marked,
    )
    assert (sort.num_right, sort.num_wrong, sort.num_unreadable) == (2, 2, 2)
    assert sort.pairs() == [("seen. Final answer: Red", "so. FINAL ANSWER:\n blue")]
    assert [bad for _, bad in sort.format_pairs()] == ["it is red", "Final answer:"]
    assert FORMATS["whole"].extract(" red ") == "red" and FORMATS["whole"].extract(" ") is None
    assert marked.extract("Final answer: a. Final answer: b") == "b"


def test_format_asks_behind_the_images_and_scores_the_result(data: Path) -> None:
    asked = FORMATS["final"].of(RECORDS)
    question = asked.questions(data)[0]
    image, text = asked.prompt(question, PROTOCOL)[-1].parts
    assert not isinstance(image, str) and isinstance(text, str)
    assert text.startswith("\nYour task") and text.endswith("Question:\n\nwhat colour is this?")
    assert asked.predict(question, "I see. Final answer: red", PROTOCOL).score == 1
    assert asked.predict(question, "red", PROTOCOL).score == 0
    assert FORMATS["whole"].of(RECORDS) is RECORDS


def test_draws_share_a_prompt_and_differ(
    monkeypatch: pytest.MonkeyPatch, checkpoint: Path, data: Path, tmp_path: Path
) -> None:
    subject = Subject.load(checkpoint, make_plan("cpu", "fp32", attention="sdpa", threads=1))
    encoded: list[str] = []
    encode = runner.PromptEncoder.encode

    def noted(self: Any, turns: Any, where: str, answer_start: str = "") -> Any:
        encoded.append(where)
        return encode(self, turns, where, answer_start)

    monkeypatch.setattr(runner.PromptEncoder, "encode", noted)
    questions = list(read_records(data))
    greedy_first = PROTOCOL.drawn(Drawing(temperature=1.5, greedy_first=True))
    found = draw_answers(subject, RECORDS, greedy_first, questions, 6, tmp_path / "a.jsonl")
    assert len(encoded) == len(set(encoded)) == len(questions), "one prompt for six answers"
    greedy = runner.ask(subject, RECORDS, PROTOCOL, questions, out=tmp_path / "greedy.jsonl")
    assert [answers[0].text for answers in found] == [one.text for one in greedy]
    assert any(len({one.text for one in answers}) > 2 for answers in found)
    assert [one.draw for one in found[0]] == list(range(6))
    assert read_predictions(tmp_path / "a.jsonl") == [a for answers in found for a in answers]
    alone = draw_answers(subject, RECORDS, greedy_first, questions[2:3], 6, tmp_path / "b.jsonl")
    assert [one.text for one in alone[0]] == [one.text for one in found[2]], "whoever is beside it"
    with pytest.raises(ConfigError, match="holds other answers"):
        draw_answers(subject, RECORDS, greedy_first, questions[:2], 6, tmp_path / "a.jsonl")


def test_answer_goes_on_from_its_start(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    subject = Subject.load(checkpoint, make_plan("cpu", "fp32", attention="sdpa", threads=1))
    (question,) = [q for q in read_records(data) if q.record["id"] == "text-3"]
    whole = runner.ask(subject, RECORDS, PROTOCOL, [question], out=tmp_path / "a.jsonl")[0].text
    for start in ("one", "one two"):
        begun = Question(question.sample, answer_start=start)
        prompt = MonoInternVLProcessor.from_pretrained(checkpoint).encode_prompt(
            question.prompt, answer_start=start
        )
        answered = (*question.prompt, Turn("assistant", (start,)))
        sample = subject.processor.encode_conversation(answered)
        ids = prompt["input_ids"][0].tolist()
        assert ids == sample.input_ids[: len(ids)].tolist(), "as a whole conversation begins"
        (said,) = runner.ask(subject, RECORDS, PROTOCOL, [begun], out=tmp_path / f"{start}.jsonl")
        assert said.text.startswith(start)
        if whole.startswith(f"{start} "):
            assert said.text.startswith(f"{start} "), "the space between both is kept"


def test_pairs_are_written_once_and_train(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "pairs"
    command = f"data pairs --model {checkpoint} --data {data} --out {out} --samples 8 --dropout"
    words = [*command.split(), "--per-question", "2", "--max-new-tokens", "8", "--json"]
    result = CliRunner().invoke(app, words, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    counts = json.loads(result.stdout)
    assert counts["questions"] == 6 and counts["right"] + counts["wrong"] > 40
    found = [json.loads(line) for line in (out / "correctness.jsonl").read_text().splitlines()]
    assert 0 < len(found) == counts["pairs"]["correctness"] <= 12
    truths = {json.loads(line)["id"]: json.loads(line)["answer"] for line in data.open()}
    for pair in found:
        truth = truths[pair["id"].rpartition("-")[0]]
        assert pair["chosen"] == truth and truth not in pair["rejected"]
    sources = read_meta(out / "meta.json")
    assert all(source.record(0).rejected for source in sources)
    before = {file.name: file.read_bytes() for file in out.glob("*.json*")}
    (out / "correctness.jsonl").unlink()
    again = CliRunner().invoke(app, words, catch_exceptions=False)
    assert again.exit_code == 0
    assert {file.name: file.read_bytes() for file in out.glob("*.json*")} == before
    refused = CliRunner().invoke(app, [*words, "--format", "marked"])
    assert refused.exit_code != 0


def test_pairs_are_refused_in_words(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="samples=0; expected"):
        PairPlan(samples=0)
    with pytest.raises(ConfigError, match="format='boxed'; expected one of whole"):
        PairPlan(format="boxed")
    with pytest.raises(SampleError, match="no pair among the answers"):
        make_pairs(
            checkpoint,
            data,
            tmp_path / "none",
            benchmark=RECORDS,
            protocol=PROTOCOL,
            plan=PairPlan(samples=1),
            device="cpu",
        )


def test_dropout_pair_begins_with_half_of_the_truth(
    checkpoint: Path, data: Path, tmp_path: Path
) -> None:
    record = tiny_runs.image_record(data.parent, 0)
    truth = "one two three red"
    record["conversations"][1]["value"] = record["answer"] = truth
    file = tiny_runs.write_lines(data.parent / "long.jsonl", [record] * 2)
    out = tmp_path / "pairs"
    plan = PairPlan(samples=1, dropout=True)
    counts = make_pairs(
        checkpoint, file, out, benchmark=RECORDS, protocol=PROTOCOL, plan=plan, device="cpu"
    )
    assert counts.pairs["dropout"] == 2
    for line in (out / "dropout.jsonl").read_text().splitlines():
        pair = json.loads(line)
        assert pair["chosen"] == truth and pair["rejected"].startswith("one two")
        assert pair["image"] == record["image"] and "<image>" in pair["conversations"][0]["value"]
