"""Ask a model the records of an evaluation file and keep every answer.

Generation is greedy and free; scores come from `metrics.score`. `blind` asks the same with every
image replaced by its mean colour: what remains is what the question alone gives away.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from mono_internvl.configuration.labels import IGNORED_LABEL
from mono_internvl.data.records import Record
from mono_internvl.data.sources import JsonlSource
from mono_internvl.errors import ImageError, PromptError, SampleError
from mono_internvl.evaluation.metrics import mean_score, score
from mono_internvl.evaluation.prompts import Outcome, PromptEncoder
from mono_internvl.generation.context import most_tokens
from mono_internvl.generation.engine import Engine
from mono_internvl.generation.request import Generation
from mono_internvl.model.modeling import MonoInternVLForConditionalGeneration
from mono_internvl.processing.image_files import load_image
from mono_internvl.processing.processor import MonoInternVLProcessor
from mono_internvl.processing.prompts import ImagePart, Turn
from mono_internvl.runs.json_lines import to_line


@dataclass(frozen=True)
class Question:
    """One record to ask.

    Attributes:
        record: The raw record; its `kind` says how it is scored.
        sample: Its conversation; the last turn is the true answer.
    """

    record: dict[str, Any]
    sample: Record

    @property
    def kind(self) -> str:
        """What is asked for."""
        return str(self.record["kind"])

    @property
    def prompt(self) -> tuple[Turn, ...]:
        """The conversation up to the answer."""
        return self.sample.turns[:-1]

    def predict(self, text: str, is_blind: bool) -> Prediction:
        """The prediction of an answer."""
        return Prediction(self.record, text, score(self.record, text), is_blind)


@dataclass(frozen=True)
class Prediction:
    """One answer.

    Attributes:
        record: The raw record.
        text: What the model said, grounding tokens kept.
        score: In [0, 1].
        is_blind: Whether the image was hidden.
    """

    record: dict[str, Any]
    text: str
    score: float
    is_blind: bool

    def to_row(self) -> dict[str, Any]:
        """The record with what was said, as one line of a predictions file."""
        question = self.record["conversations"][-2]["value"]
        return {
            **self.record,
            "question": question.removeprefix("<image>\n"),
            "prediction": self.text,
            "score": self.score,
            "blind": self.is_blind,
        }


def read_questions(
    file: Path, root: Path | None = None, per_kind: int | None = None
) -> list[Question]:
    """The records of an evaluation file, the first `per_kind` of each kind if given.

    Args:
        file: JSON lines; each a conversation with `kind` and what its scorer needs.
        root: Folder that image paths are relative to; the file's own unless given.
        per_kind: Most records of a kind.

    Raises:
        SampleError: A record is malformed, has no `kind` or not what that needs to be scored, or
            cannot be written down with its answer.
    """
    source = JsonlSource(file, root or file.parent)
    seen: dict[str, int] = defaultdict(int)
    questions = []
    for index in range(len(source)):
        found = source.record(index)
        record, kind = found.fields, found.fields.get("kind")
        if not isinstance(kind, str):
            raise SampleError(f"{found.where}: kind={kind!r}; expected the name of a way to score")
        seen[kind] += 1
        if per_kind is None or seen[kind] <= per_kind:
            question = Question(record, found)
            try:
                to_line(question.predict("", False).to_row())
            except ValueError as error:
                raise SampleError(f"{found.where}: {error}; correct the record") from error
            questions.append(question)
    return questions


@torch.inference_mode()
def answer_all(
    model: MonoInternVLForConditionalGeneration,
    processor: MonoInternVLProcessor,
    questions: Sequence[Question],
    *,
    blind: bool = False,
    batch_size: int = 64,
    max_new_tokens: int = 96,
    max_tiles: int | None = None,
    precision: str = "bf16",
    on_batch: Callable[[int], None] | None = None,
) -> list[Prediction]:
    """Greedy answers, many at a time; an image is read once for all questions on it.

    Args:
        model: In eval mode, on any device.
        processor: Of the same checkpoint.
        questions: What to ask; the predictions come in this order.
        blind: Hide the images.
        batch_size: Most questions that are answered at a time.
        max_new_tokens: Longest answer.
        max_tiles: Most tiles per image; the processor's own unless given.
        precision: "bf16" autocasts over fp32 weights.
        on_batch: Told the number of answers so far.

    Raises:
        SampleError: A record cannot be asked: an image is damaged, or it is too long.
        CheckpointError: The model's logits are not numbers.
    """
    found: dict[int, Prediction] = {}
    for outcomes in ask_all(
        model,
        processor,
        questions,
        blind=blind,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        max_tiles=max_tiles,
        precision=precision,
    ):
        for number, outcome in outcomes.items():
            if isinstance(outcome, SampleError):
                raise outcome
            found[number] = questions[number].predict(outcome, blind)
        if on_batch is not None:
            on_batch(len(found))
    return [found[number] for number in range(len(questions))]


@torch.inference_mode()
def ask_all(
    model: MonoInternVLForConditionalGeneration,
    processor: MonoInternVLProcessor,
    questions: Sequence[Question],
    *,
    blind: bool = False,
    batch_size: int = 64,
    max_new_tokens: int = 96,
    max_tiles: int | None = None,
    precision: str = "bf16",
    known: Container[int] = (),
) -> Iterator[dict[int, Outcome]]:
    """As `answer_all`, but some answers at a time, as they are there, by question's number.

    A record that cannot be asked comes as its error; the others are asked.

    Args:
        known: Numbers of questions to leave out.
    """
    encoder = PromptEncoder(processor, most_tokens(model.config), max_new_tokens, max_tiles)
    engine = Engine(model, max_rows=batch_size)
    asked: dict[Generation, int] = {}
    refused: dict[int, Outcome] = {}

    def submissions() -> Iterator[None]:
        """One more question in the engine's queue each time."""
        for number in _order(questions):
            question = questions[number]
            if number in known:
                continue
            try:
                prompt = _hide_images(question.prompt) if blind else question.prompt
                asked[engine.submit(encoder.encode(prompt, question.sample.where))] = number
            except (ImageError, PromptError) as error:
                refused[number] = SampleError(f"{question.sample.where}: {error}")
            except SampleError as error:
                refused[number] = error
            else:
                yield

    queue = submissions()
    while True:
        answers: dict[int, Outcome] = {}
        # Autocast casts the weights once, as long as it lasts.
        with torch.autocast(model.device.type, torch.bfloat16, enabled=precision == "bf16"):
            while len(answers) < batch_size:
                if not engine.num_waiting:
                    deque(islice(queue, batch_size), maxlen=0)
                if not asked:
                    break
                for ended in engine.step():
                    text = processor.decode_answer(ended.result.ids, keep_grounding=True)
                    answers[asked.pop(ended)] = text
        if answers or refused:
            yield {**refused, **answers}
            refused.clear()
        if not answers:
            return


def _order(questions: Sequence[Question]) -> list[int]:
    """By kind and length of the true answer, but questions on the same images one after another."""
    keys = [(question.kind, len(question.sample.turns[-1].text)) for question in questions]
    first: dict[Any, tuple[str, int]] = {}  # images -> least key of a question on them
    images = [question.sample.images or number for number, question in enumerate(questions)]
    for key, shown in zip(keys, images, strict=True):
        first[shown] = min(key, first.get(shown, key))
    numbers = {shown: number for number, shown in enumerate(dict.fromkeys(images))}
    return sorted(
        range(len(questions)), key=lambda i: (first[images[i]], numbers[images[i]], keys[i])
    )


def mean_scores(predictions: Iterable[Prediction]) -> dict[str, tuple[float, int]]:
    """Score (`metrics.mean_score`) and number of records of every kind."""
    by_kind: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for one in predictions:
        row = {**one.record, "prediction": one.text, "score": one.score}
        by_kind[one.record["kind"]].append(row)
    return {kind: (mean_score(rows), len(rows)) for kind, rows in by_kind.items()}


@torch.inference_mode()
def perplexity(
    model: MonoInternVLForConditionalGeneration,
    processor: MonoInternVLProcessor,
    conversations: Sequence[Sequence[dict[str, Any]]],
) -> float:
    """exp of the mean cross entropy, in fp32, over the answer tokens of text conversations."""
    model.eval()
    total, count = 0.0, 0
    for messages in conversations:
        sample = processor.encode_conversation(messages)
        labels = sample.labels[None].to(model.device)
        num = int((labels[:, 1:] != IGNORED_LABEL).sum())
        out = model(sample.input_ids[None].to(model.device), labels=labels, logits_to_keep=None)
        total, count = total + float(out.loss) * num, count + num
    return float(torch.tensor(total / max(1, count)).exp())


def write_predictions(file: Path, predictions: Iterable[Prediction]) -> None:
    """One JSON line per prediction; the file is there whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text("".join(to_line(p.to_row()) for p in predictions), encoding="utf-8")
    partial.replace(file)


def _hide_images(turns: Sequence[Turn]) -> list[Turn]:
    """The same turns with every image at its mean colour."""
    return [Turn(turn.role, tuple(_hidden(part) for part in turn.parts)) for turn in turns]


def _hidden(part: str | ImagePart) -> str | ImagePart:
    if isinstance(part, str):
        return part
    image = load_image(part.source)
    mean = image.resize((1, 1), Image.Resampling.BOX).getpixel((0, 0))
    return ImagePart(Image.new("RGB", image.size, mean))
