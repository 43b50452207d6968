"""English, facts and text tasks."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest

from mono_internvl.errors import SampleError
from mono_internvl.miniature import english, facts, text_tasks
from mono_internvl.miniature.asking import QUESTION_KINDS, BalancedAsker
from mono_internvl.miniature.lexicon import sample_sign, sign_split, split_of
from mono_internvl.miniature.scenes import sample_chart, sample_scene


def said(record: dict[str, Any]) -> str:
    return "\n".join(turn["value"] for turn in record["conversations"])


def test_english_is_clean_small_and_disjoint() -> None:
    train, heldout = english.load_english("train"), english.load_english("heldout")
    assert not set(train) & set(heldout)
    assert len(set(train)) == len(train) > 5000
    assert 40_000 < sum(map(len, heldout)) <= english.HELDOUT_MAX_BYTES
    assert sum(map(len, train)) <= english.TRAIN_MAX_BYTES
    for text in (*train, *heldout):
        assert text.isascii() and "\n" not in text and ">>>" not in text
    assert (english.ASSETS / "LICENSE-PSF.txt").read_text().count("PYTHON SOFTWARE FOUNDATION")


def test_extract_paragraphs_keeps_prose_only() -> None:
    source = '''
def f(x):
    """Return the number of things that are in the box.

    >>> f(1)
    2

    The `box` may be empty, in which case nothing
    at all is returned.

    x = f(1) + g(2) * {3}
    """
'''
    assert english.extract_paragraphs(source) == [
        "Return the number of things that are in the box.",
        "The box may be empty, in which case nothing at all is returned.",
    ]


def test_load_english_refuses_unknown_split() -> None:
    with pytest.raises(ValueError, match="split"):
        english.load_english("test")


def test_facts_are_forty_and_forty_with_unique_questions() -> None:
    assert len(facts.facts_of(True)) == len(facts.facts_of(False)) == 40
    assert len({fact.question for fact in facts.FACTS}) == 80
    assert not {f.name for f in facts.facts_of(True)} & {f.name for f in facts.facts_of(False)}
    for fact in facts.FACTS:
        assert fact.statement == f"{fact.cloze} {fact.value}."
        assert fact.statement in facts.statements_of(fact.name)


def test_facts_have_no_common_answer() -> None:
    """Always giving the most frequent answer must not look like knowing."""
    most_common = Counter(fact.value for fact in facts.FACTS).most_common(1)[0][1]
    assert most_common <= 8


def test_copying_answers_stand_in_the_context() -> None:
    for record in text_tasks.copying_records(random.Random(0), "train", 400):
        turns = [turn["value"] for turn in record["conversations"]]
        spelled = "\n".join(" ".join(word) for word in turns[1].split())
        for answer in turns[1::2]:
            assert answer in turns[0] or spelled in turns[0]


def test_lookups_ask_for_every_thing_of_a_context_once() -> None:
    for record in text_tasks.lookup_records(random.Random(0), "train", 200):
        turns = [turn["value"] for turn in record["conversations"]]
        context = turns[0].split("\n")[0]
        answers = turns[1::2]
        assert 3 <= len(answers) == len(set(answers)) <= 6
        for answer in answers:
            assert answer in context


def test_reading_answers_change_with_the_context() -> None:
    """The same question has many answers, so a model that ignores its context fails."""
    records = text_tasks.reading_records(random.Random(0), "train", 3000)
    answers: dict[str, Counter[str]] = {}
    for record in records:
        question, answer, *_ = (turn["value"] for turn in record["conversations"])
        answers.setdefault(question.split("\n")[1], Counter())[answer] += 1
    for question in ("what is this?", "what colour is the circle?", "which bar is tallest?"):
        counts = answers[question]
        assert len(counts) >= 5
        assert max(counts.values()) < 0.35 * sum(counts.values())


def test_probes_cover_the_skills_and_are_heldout() -> None:
    probes = text_tasks.text_probes(count=40)
    assert {name: len(part) for name, part in probes.items()} == {
        "name_qa": 80,
        "fact_cloze": 80,
        "reading_qa": 40,
        "copying": 40,
    }
    rng = random.Random(5)
    trained = {said(r) for r in text_tasks.reading_records(rng, "train", 2000)}
    assert not trained & {said(record) for record in probes["reading_qa"]}


def test_signs_belong_to_their_split() -> None:
    rng = random.Random(0)
    for split in ("train", "validation", "heldout"):
        for _ in range(50):
            sign = sample_sign(rng, split)
            assert sign_split(sign) == split
            assert 3 <= len(sign) <= 5


def test_signs_of_the_english_are_never_held_out() -> None:
    """The language model reads them: `ANY` and `1970` are words and numbers of its English."""
    for sign in ("ANY", "1970"):
        assert sign in " ".join(english.load_english())
        assert sign_split(sign) == "train"


@pytest.mark.parametrize("split", ["validation", "heldout"])
def test_every_answer_can_be_asked_in_every_split(split: Any) -> None:
    rng = random.Random(0)
    for kind in QUESTION_KINDS:
        asker = BalancedAsker(kind, rng)
        make = sample_chart if kind == "chart" else sample_scene
        for _ in range(160):
            thing, question = asker.ask(lambda make=make: make(rng, split))  # type: ignore[misc]
            assert question.kind == kind
            assert split_of(thing.signature) == split or len(getattr(thing, "objects", [])) == 1


def test_asker_says_when_nothing_fits() -> None:
    rng = random.Random(0)
    scene = sample_scene(rng, "train", num_objects=1)
    asker = BalancedAsker("count", rng)
    with pytest.raises(SampleError, match="larger pool"):
        for _ in range(3):
            asker.ask(lambda: scene)
