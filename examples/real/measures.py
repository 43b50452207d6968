"""What is measured of a checkpoint besides its free answers: likelihoods, and its language."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mono_internvl.configuration.labels import IGNORED_LABEL
from mono_internvl.data.records import parse_record
from mono_internvl.evaluation.perplexity import perplexity
from mono_internvl.evaluation.questions import Question
from mono_internvl.evaluation.runner import Subject
from mono_internvl.miniature.english import load_english
from mono_internvl.processing.prompts import Conversation, Turn

_BATCH = 64
_PARAGRAPHS = 40
LANGUAGE = (
    ("What is the capital of France?", "Paris"),
    ("What is the capital of Japan?", "Tokyo"),
    ("What is the capital of Spain?", "Madrid"),
    ("What colour is the sky on a clear day?", "blue"),
    ("What colour is grass?", "green"),
    ("How many days are in a week?", "seven|7"),
    ("How many months are in a year?", "twelve|12"),
    ("What is the opposite of hot?", "cold"),
    ("Which planet do we live on?", "Earth"),
    ("What do bees make?", "honey"),
    ("What is frozen water called?", "ice"),
    ("Which animal says meow?", "cat"),
    ("Translate to French: hello", "bonjour"),
    ("Name the largest ocean.", "Pacific"),
    ("What is 2 + 2?", "4|four"),
    ("Who wrote Romeo and Juliet?", "Shakespeare"),
)
"""Questions of plain language and what a right answer contains."""


@torch.inference_mode()
def answer_losses(subject: Subject, conversations: Sequence[Conversation]) -> list[float]:
    """Nats of each conversation's last answer, its end included.

    Args:
        subject: Who is asked.
        conversations: With their answers.
    """
    processor, model, found = subject.processor, subject.model, []
    is_bf16 = subject.plan.precision == "bf16"
    for first in range(0, len(conversations), _BATCH):
        turns = conversations[first : first + _BATCH]
        samples = [processor.encode_conversation(one, max_tiles=1) for one in turns]
        length = max(len(sample.input_ids) for sample in samples)
        ids = torch.zeros(len(samples), length, dtype=torch.int64)
        labels = torch.full_like(ids, IGNORED_LABEL)
        for row, sample in enumerate(samples):
            ids[row, : len(sample.input_ids)] = sample.input_ids
            labels[row, : len(sample.labels)] = sample.labels
        pixels = torch.cat([s.pixel_values for s in samples if s.pixel_values is not None])
        device = model.device
        with torch.autocast(device.type, torch.bfloat16, enabled=is_bf16):
            out = model(input_ids=ids.to(device), pixel_values=pixels.to(device))
        logits, targets = out.logits[:, :-1].float().cpu(), labels[:, 1:]
        for row in range(len(samples)):
            learnt = (targets[row] != IGNORED_LABEL).nonzero()[:, 0]
            chosen = logits[row, learnt].log_softmax(-1)
            found.append(-float(chosen.gather(1, targets[row, learnt, None]).sum()))
    return found


def mean_losses(subject: Subject, questions: Sequence[Question]) -> dict[str, float]:
    """Nats of the true answers with the image and with it hidden."""
    seen = [question.sample.turns for question in questions]
    hidden = [(*q.without_images().prompt, q.sample.turns[-1]) for q in questions]
    return {
        name: sum(answer_losses(subject, turns)) / max(1, len(turns))
        for name, turns in (("seen", seen), ("blind", hidden))
    }


def best_of_candidates(
    subject: Subject, questions: Sequence[Question], names: Sequence[str], count: int = 20
) -> float:
    """How often the true name is the likeliest of `count`, the others drawn by the seed 0."""
    right = 0
    for number, question in enumerate(questions):
        truth = str(question.record["answer"])
        others = [name for name in names if name != truth]
        drawn = random.Random(number).sample(others, min(count - 1, len(others)))
        turns = [
            (*question.prompt, Turn(question.sample.turns[-1].role, (name,)))
            for name in (truth, *drawn)
        ]
        losses = answer_losses(subject, turns)
        right += losses.index(min(losses)) == 0
    return right / max(1, len(questions))


def english_perplexity(subject: Subject) -> float:
    """On English that was cut out of the documentation of Python's standard library."""
    records = [
        parse_record(
            {
                "id": str(number),
                "conversations": [
                    {"from": "human", "value": "Write."},
                    {"from": "gpt", "value": paragraph[:600]},
                ],
            },
            number,
            f"english[{number}]",
            _no_image,
        ).turns
        for number, paragraph in enumerate(load_english("heldout")[:_PARAGRAPHS])
    ]
    return perplexity(subject.model, subject.processor, records)


def _no_image(name: str) -> Any:
    raise ValueError(f"{name}: text alone has no image")


@torch.inference_mode()
def same_text_logits(subject: Subject, start: Path) -> bool:
    """Whether logits of texts equal those of the starting checkpoint bit for bit, in fp32."""
    before = Subject.load(start, subject.plan).model
    for question, _ in LANGUAGE:
        ids = subject.processor.tokenizer(question, return_tensors="pt").input_ids
        ids = ids.to(subject.model.device)
        if not torch.equal(subject.model(ids).logits, before(ids).logits):
            return False
    return True


def language_records() -> list[dict[str, Any]]:
    """`LANGUAGE` as records."""
    return [
        {
            "id": f"language-{number}",
            "kind": "language",
            "metric": "contains",
            "answer": answer,
            "conversations": [
                {"from": "human", "value": question},
                {"from": "gpt", "value": answer.split("|")[0]},
            ],
        }
        for number, (question, answer) in enumerate(LANGUAGE)
    ]
