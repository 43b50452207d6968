"""The one way to evaluate: ask a checkpoint questions under a protocol, over all processes.

Each process of the group asks its share and writes answers down as they come; the first one merges
them, in the order of the questions. A killed call goes on with what is left.
"""

from __future__ import annotations

import dataclasses
import typing
from collections import deque
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch

from mono_internvl.checkpoints.loading import load_planned
from mono_internvl.compute import ComputePlan
from mono_internvl.distributed import barrier, gathered, own_device, rank, world_size
from mono_internvl.errors import ImageError, PromptError, SampleError
from mono_internvl.evaluation.journal import AnswerJournal, key_of, remove_journals
from mono_internvl.evaluation.prompts import Outcome, PromptEncoder
from mono_internvl.evaluation.protocol import Protocol
from mono_internvl.evaluation.questions import Question, in_order, shares
from mono_internvl.generation.context import most_tokens
from mono_internvl.generation.engine import Engine
from mono_internvl.generation.request import Generation, Request
from mono_internvl.model.modeling import MonoInternVLForConditionalGeneration
from mono_internvl.processing.processor import MonoInternVLProcessor
from mono_internvl.processing.prompts import Turn
from mono_internvl.released.weight_files import digest_of_checkpoint
from mono_internvl.runs.predictions import Prediction, write_predictions

BATCH_SIZE = 64
"""Most questions that are answered at a time; fewer where their keys and values need the memory."""


@dataclass(frozen=True)
class Subject:
    """A checkpoint that is asked.

    Attributes:
        model: With fp32 weights under autocast where the plan says "bf16".
        processor: Of the same checkpoint.
        plan: What it computes with.
        digest: Of the checkpoint.
    """

    model: MonoInternVLForConditionalGeneration
    processor: MonoInternVLProcessor
    plan: ComputePlan
    digest: str | None

    @classmethod
    def load(cls, folder: Path, plan: ComputePlan) -> Subject:
        """Load a checkpoint, in each process on a device of its own.

        Raises:
            CheckpointError: It is incomplete or does not fit its configuration.
        """
        plan = dataclasses.replace(plan, device=own_device(plan.device))
        model = load_planned(folder, plan, autocasts=True).eval()
        processor = MonoInternVLProcessor.from_pretrained(folder)
        return cls(model, processor, plan, digest_of_checkpoint(folder))


class Asked(typing.Protocol):
    """What a benchmark has to say to be asked.

    Attributes:
        name: Of it.
    """

    @property
    def name(self) -> str: ...

    @property
    def prompt(self) -> Callable[[Question, Protocol], tuple[Turn, ...]]:
        """The turns that ask a question under a protocol."""
        ...

    def predict(self, question: Question, text: str, protocol: Protocol) -> Prediction:
        """The answer to a question, scored if it is scored one by one."""
        ...


def ask(
    subject: Subject,
    benchmark: Asked,
    protocol: Protocol,
    *sets: Sequence[Question],
    out: Path,
    batch_size: int = BATCH_SIZE,
    on_answers: Callable[[int], None] | None = None,
    keeps_journal: bool = False,
) -> list[Prediction]:
    """Ask questions, write their scored answers to a file and return them.

    In a group of processes all of them call this, and all get all answers.

    Args:
        subject: Who is asked.
        benchmark: Whose questions these are.
        protocol: How they are asked.
        *sets: Questions, one set after another; only those of one set share a batch.
        out: File of the predictions, in the order of the questions.
        batch_size: Most questions that are answered at a time.
        on_answers: Told how many more questions this process is through with, known ones first.
        keeps_journal: Whether answers can be gone on with after the end too: this is one of several
            sets of questions, and whoever asks them removes the journals (`remove_journals`).

    Raises:
        SampleError: Records cannot be asked: an image is damaged, or they are too long. The file
            holds the others' answers, which another call does not ask again.
        CheckpointError: The model's logits are not numbers.
        ConfigError: `out` cannot be written, or the protocol asks for another precision.
    """
    protocol = protocol.planned(subject.plan)
    settings = {
        "model": subject.digest,
        "benchmark": benchmark.name,
        "protocol": protocol.to_dict(),
    }
    journal = AnswerJournal(out, settings)
    refused: list[str] = []
    for questions in sets:
        own = shares(questions, world_size())[rank()]
        keys = [key_of(question) for question in own]
        known = {number for number, key in enumerate(keys) if key in journal.answers}
        report = on_answers or (lambda count: None)
        report(len(known))
        for outcomes in _outcomes(subject, benchmark, protocol, own, batch_size, known):
            refused += [str(one) for one in outcomes.values() if isinstance(one, SampleError)]
            journal.add({keys[n]: one for n, one in outcomes.items() if isinstance(one, str)})
            report(len(outcomes))
    refused = [message for messages in gathered(refused) for message in messages]
    answers = journal.read()
    asked = [question for questions in sets for question in questions]
    predictions = [
        benchmark.predict(question, answers[key], protocol)
        for question, key in ((question, key_of(question)) for question in asked)
        if key in answers
    ]
    if rank() == 0:
        write_predictions(out, predictions)
    barrier()
    if refused:
        raise SampleError(
            f"{len(refused)} of {len(asked)} records could not be asked, first {refused[0]}; "
            f"{out} holds the answers to the others, which another call does not ask again"
        )
    if rank() == 0 and not keeps_journal:
        remove_journals(out)
    barrier()
    return predictions


@torch.inference_mode()
def _outcomes(
    subject: Subject,
    benchmark: Asked,
    protocol: Protocol,
    questions: Sequence[Question],
    batch_size: int,
    known: Container[int],
) -> Iterator[dict[int, Outcome]]:
    """Some outcomes at a time, as they are there, by question's number; known ones are left out.

    A record that cannot be asked comes as its error; the others are asked. An image is read once
    for all questions on it.
    """
    model, processor = subject.model, subject.processor
    encoder = PromptEncoder(processor, most_tokens(model.config), protocol)
    engine = Engine(model, max_rows=batch_size)
    asked: dict[Generation, int] = {}
    refused: dict[int, Outcome] = {}
    requests = _Requests(benchmark, protocol, encoder)

    def submissions() -> Iterator[None]:
        """One more question in the engine's queue each time."""
        for number in in_order(questions):
            question = questions[number]
            if number in known:
                continue
            try:
                asked[engine.submit(requests.of(question))] = number
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
        is_bf16 = protocol.precision == "bf16"
        with torch.autocast(model.device.type, torch.bfloat16, enabled=is_bf16):
            while len(answers) < batch_size:
                if not engine.num_waiting:
                    deque(islice(queue, batch_size), maxlen=0)
                if not asked:
                    break
                for ended in engine.step():
                    number = asked.pop(ended)
                    answers[number] = _answer_text(processor, ended, questions[number])
        if answers or refused:
            yield {**refused, **answers}
            refused.clear()
        if not answers:
            return


class _Requests:
    """Questions as requests; the draws of one question share its prompt.

    Args:
        benchmark: Whose prompts these are.
        protocol: How answers are chosen.
        encoder: Of prompts.
    """

    def __init__(self, benchmark: Asked, protocol: Protocol, encoder: PromptEncoder) -> None:
        self.benchmark, self.protocol, self.encoder = benchmark, protocol, encoder
        self._last: tuple[Question, Request] | None = None

    def of(self, question: Question) -> Request:
        """The request of a question.

        Raises:
            ImageError, PromptError, SampleError: It cannot be asked.
        """
        alike = dataclasses.replace(question, draw=None)
        if self._last is None or self._last[0] != alike:
            turns = self.benchmark.prompt(question, self.protocol)
            request = self.encoder.encode(turns, question.sample.where, question.answer_start)
            self._last = (alike, request)
        request, drawing = self._last[1], self.protocol.drawing
        if drawing is None:
            return request
        most = request.sampling.max_new_tokens
        sampling = drawing.sampling(question.draw or 0, most, question.seed())
        return dataclasses.replace(request, sampling=sampling)


def _answer_text(processor: MonoInternVLProcessor, ended: Generation, question: Question) -> str:
    """An answer, what it was made to begin with included."""
    ids = ended.result.ids
    if not question.answer_start:
        return processor.decode_answer(ids, keep_grounding=True)
    # Decoded behind the beginning: spaces and line breaks between both are part of the answer.
    before = torch.as_tensor(ended.request.input_ids).tolist()
    control = set(processor.tokenizer.control_tokens.values())
    start = 1 + max((place for place, token in enumerate(before) if token in control), default=-1)
    begun, whole = (
        processor.decode_answer([*before[start:], *more], keep_grounding=True) for more in ((), ids)
    )
    new = whole.removeprefix(begun) if whole.startswith(begun) else processor.decode_answer(ids)
    return question.answer_start + new
