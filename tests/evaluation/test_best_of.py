"""Steps judged by going on from them, a critic that reads them in one pass, and the choice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch
from typer.testing import CliRunner

from mono_internvl.cli.app import app
from mono_internvl.compute import make_plan
from mono_internvl.errors import ConfigError, SampleError
from mono_internvl.evaluation.answer_formats import FORMATS
from mono_internvl.evaluation.best_of import choose
from mono_internvl.evaluation.critic import BAD, GOOD, Critic, critic_turns, score_of, split_steps
from mono_internvl.evaluation.questions import Question, read_records
from mono_internvl.evaluation.runner import Subject
from mono_internvl.evaluation.step_data import StepPlan
from mono_internvl.processing.prompts import ImagePart, Turn
from mono_internvl.runs.predictions import Prediction, read_predictions
from mono_internvl.training.loop import train_stage

TOLERANCE = 1e-5
"""Of probabilities in fp32: one padded pass over several answers against one step alone."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Records that are answered in two steps."""
    folder = tmp_path_factory.mktemp("data")
    records = [tiny_runs.image_record(folder, i) for i in range(6)]
    for record in records:
        said = f"it is {record['answer']}\n\nfinal answer: {record['answer']}"
        record["conversations"][1]["value"] = said
    (folder / "meta.json").write_text('{"steps": {"root": ".", "annotation": "steps.jsonl"}}')
    return tiny_runs.write_lines(folder / "steps.jsonl", records)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """A model that answers in two steps, not always right."""
    root = tmp_path_factory.mktemp("model")
    start = tiny_runs.write_checkpoint(root / "start")
    stage = tiny_runs.tiny_stage(data="meta.json", steps=60, batch_size=6)
    return train_stage(stage, start, data.parent, root / "run").checkpoint


@pytest.fixture(scope="module")
def subject(checkpoint: Path) -> Subject:
    return Subject.load(checkpoint, make_plan("cpu", "fp32", attention="sdpa", threads=1))


@pytest.mark.parametrize(
    ("text", "most", "steps"),
    [
        ("a\n\nb\n\n\n\nc\n", 12, ["a", "b", "\nc"]),
        ("a\n\nb\n\nc\n\nd\n\ne", 2, ["a\n\nb\n\nc", "d\n\ne"]),
        ("a\nb", 12, ["a\nb"]),
        (" \n\n ", 12, []),
    ],
)
def test_answers_are_split_at_paragraphs_into_equal_groups(
    text: str, most: int, steps: list[str]
) -> None:
    assert [s.strip() for s in split_steps(text, most)] == [s.strip() for s in steps]


def test_critic_is_shown_the_images_the_question_and_a_step_a_turn(data: Path) -> None:
    question = next(iter(read_records(data)))
    turns = critic_turns(question.prompt, ["one", "two"], [GOOD, BAD])
    assert [turn.role for turn in turns] == ["system", *["user", "assistant"] * 2]
    image, *texts = turns[1].parts
    assert isinstance(image, ImagePart)
    shown = "".join(map(str, texts))
    assert shown == "\n### Question:\nwhat colour is this?\n\n### Solution Process:\none"
    assert [turn.text for turn in turns[2:]] == ["+", "two", "-"]
    text = critic_turns([Turn("user", ("how many?",))], ["one"], [GOOD])[1].text
    assert text == "### Question:\nhow many?\n\n### Solution Process:\none"


@torch.inference_mode()
def _alone(subject: Subject, question: Question, steps: list[str]) -> float:
    """The probability of "+" behind the last step, of a pass over its own chat alone."""
    ids = []
    for mark in (GOOD, BAD):
        turns = critic_turns(question.prompt, steps, [*[GOOD] * (len(steps) - 1), mark])
        sample = subject.processor.encode_conversation(turns, max_tiles=1)
        ids.append(sample.input_ids)
    (place,) = (ids[0] != ids[1]).nonzero().flatten().tolist()
    logits = subject.model(ids[0][None, :place], pixel_values=sample.pixel_values).logits[0, -1]
    return float(logits[[int(one[place]) for one in ids]].softmax(0)[0])


def test_critic_scores_all_steps_of_all_answers_in_one_pass(
    monkeypatch: pytest.MonkeyPatch, subject: Subject, data: Path
) -> None:
    question = next(iter(read_records(data)))
    answers = ["it is red\n\nso\n\nfinal answer: red", "blue", " ", "it is red\n\nblue", "blue"]
    passes: list[int] = []
    forward = subject.model.model.forward

    def counted(*arguments: Any, **named: Any) -> Any:
        passes.append(len(arguments[0]))
        return forward(*arguments, **named)

    monkeypatch.setattr(subject.model.model, "forward", counted)
    found = Critic(subject, max_tiles=1).step_scores(question.prompt, answers, "x:1")
    assert passes == [3], "one pass; equal answers once, the empty one not at all"
    monkeypatch.undo()
    assert [len(one) for one in found] == [3, 1, 0, 2, 1] and found[1] == found[4]
    for answer, scores in zip(answers, found, strict=True):
        steps = split_steps(answer)
        for count, score in enumerate(scores, start=1):
            assert score == pytest.approx(_alone(subject, question, steps[:count]), abs=TOLERANCE)
    assert score_of(found[0]) == pytest.approx(sum(found[0]) / 3) and score_of([]) == 0


def test_critic_refuses_what_it_cannot_read(subject: Subject, data: Path) -> None:
    question = next(iter(read_records(data)))
    with pytest.raises(SampleError, match=r"x:1: .* tokens of question and answer"):
        Critic(subject, max_tiles=1).step_scores(question.prompt, ["red " * 600], "x:1")


def _answers(*texts: str) -> list[Prediction]:
    truth = "final answer: 3"
    return [
        Prediction({"kind": "k"}, "q", text, float(text.endswith(truth)), False, None, draw)
        for draw, text in enumerate(texts)
    ]


def test_choice_is_by_first_draw_vote_critic_and_chance() -> None:
    form = FORMATS["marked"]
    answers = _answers(
        "final answer: 2", "a\n\nfinal answer: 3", "final answer: 5", "b. Final answer: 5.", "?"
    )
    steps = [[0.9], [0.2, 0.9], [0.5, 0.3], [0.1], []]
    chosen = choose(answers, steps, form, seed=1)
    assert chosen["greedy"].draw == 0 and chosen["any"].draw == 1
    assert chosen["vote"].draw == 2, "5 and 5. are one result, its first answer is taken"
    assert chosen["critic"].draw == 0
    assert chosen["random"] == choose(answers, steps, form, seed=1)["random"]
    assert {choose(answers, None, form, seed=s)["random"].draw for s in range(40)} == set(range(5))
    tied = choose(_answers("final answer: 2", "final answer: 3"), [[0.5], [0.5]], form, seed=0)
    assert tied["vote"].draw == tied["critic"].draw == 0, "the first of equals"
    assert "critic" not in choose(answers, None, form, seed=0)


def _invoke(*words: object) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_steps_train_a_critic_that_chooses(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "steps"
    words = ("data", "steps", "--model", checkpoint, "--data", data, "--out", out, "--samples", 3)
    more = ("--continuations", 4, "--max-new-tokens", 24, "--format", "marked", "--json")
    counts = json.loads(_invoke(*words, *more))
    chats = [json.loads(line) for line in (out / "steps.jsonl").read_text().splitlines()]
    assert counts["questions"] == 6 and counts["answers"] == len(chats) >= 6
    for chat in chats:
        marks = [turn["value"] for turn in chat["conversations"][2::2]]
        assert marks == ["+" if ratio > 0 else "-" for ratio in chat["right_continuations"]]
        assert all(ratio in (0, 0.25, 0.5, 0.75, 1) for ratio in chat["right_continuations"])
    assert any(len(chat["right_continuations"]) == 2 for chat in chats)
    before = {file.name: file.read_bytes() for file in out.glob("*.json*")}
    _invoke(*words, *more)
    assert {file.name: file.read_bytes() for file in out.glob("*.json*")} == before
    stage = tiny_runs.tiny_stage(data="meta.json", steps=2, batch_size=4, max_tokens=500)
    critic = train_stage(stage, checkpoint, out, tmp_path / "critic").checkpoint
    asked = ("evaluate", "--model", checkpoint, "--data", data, "--format", "marked")
    best = (*asked, "--best-of", 4, "--critic", critic, "--out", tmp_path / "best", "--json")
    found = json.loads(_invoke(*best))
    assert set(found["scores"]) == {"greedy", "random", "vote", "critic", "any"}
    assert found["items"] == {"colour": 6} and found["protocol"]["drawing"]["greedy_first"]
    assert found["scores"]["any"]["colour"] >= max(s["colour"] for s in found["scores"].values())
    chosen = read_predictions(Path(found["predictions"]))
    assert len(chosen) == 6 and all(one.draw in range(4) for one in chosen)
    scores = tmp_path / "best" / "critic.jsonl"
    kept = scores.read_text()
    scores.write_text(kept[: len(kept) * 2 // 3])  # as a kill leaves it
    assert json.loads(_invoke(*best)) == found and scores.read_text() == kept
    greedy = json.loads(_invoke(*asked, "--out", tmp_path / "greedy.jsonl", "--json"))
    assert greedy["scores"] == found["scores"]["greedy"], "draw 0 is the greedy answer"


def test_best_of_refusals_are_in_words(checkpoint: Path, data: Path) -> None:
    for words, said in (
        (("--critic", checkpoint), "without --best-of"),
        (("--best-of", "2", "--blind"), "images that are seen"),
        (("--best-of", "2", "--format", "boxed"), "format='boxed'"),
    ):
        line = ["evaluate", "--model", str(checkpoint), "--data", str(data), *map(str, words)]
        result = CliRunner().invoke(app, line)
        assert said in str(result.exception), words
    with pytest.raises(ConfigError, match="continuations=0"):
        StepPlan(continuations=0)
    with pytest.raises(ConfigError, match="threshold=1"):
        StepPlan(threshold=1)
