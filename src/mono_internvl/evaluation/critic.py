"""A critic of steps: a model that says after every step of an answer whether all is right so far.

To the critic a question and an answer are a chat: the question with the first step, then a step a
turn; its answers are "+" or "-". All steps of an answer are scored in one pass: every earlier one
stands there with a "+", and a step's score is the probability of "+" of the two. An answer's score
is the mean over its steps.

Legend: N answers, T tokens, R steps of all of them, D width.

Source: `tools/reasoning_data_pipeline` of OpenGVLab/InternVL at 2410d1d (splitting); scoring as
    VisualPRM's checkpoint does it (arXiv 2503.10291).
Differs: the system message is our own.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from statistics import fmean

import torch
from torch import Tensor

from mono_internvl.errors import ConfigError, ImageError, PromptError, SampleError
from mono_internvl.evaluation.runner import Subject
from mono_internvl.generation.context import most_tokens
from mono_internvl.processing.encoding import Sample
from mono_internvl.processing.prompts import ImagePart, Turn
from mono_internvl.processing.tiling import feature_order

GOOD, BAD = "+", "-"
MAX_STEPS = 12
SYSTEM = (
    "Read the question and its solution step by step. After each step answer + if everything up to "
    "there is right, and - if it is not. Answer nothing else."
)
_BETWEEN = "\n\n"


def split_steps(text: str, max_steps: int = MAX_STEPS) -> list[str]:
    """The steps of an answer: its paragraphs, joined in equal groups where there are too many.

    Args:
        text: The answer.
        max_steps: Most steps.
    """
    parts = [part for part in text.strip().split(_BETWEEN) if part.strip()]
    size = max(1, -(-len(parts) // max_steps))
    return [_BETWEEN.join(parts[i : i + size]) for i in range(0, len(parts), size)]


def joined(steps: Sequence[str]) -> str:
    """The beginning of an answer that ends with a step."""
    return _BETWEEN.join(steps)


def critic_turns(
    question: Sequence[Turn], steps: Sequence[str], marks: Sequence[str]
) -> list[Turn]:
    """What a critic reads and says.

    Args:
        question: The turns up to the answer; its images and texts go into the first one here.
        steps: Of the answer.
        marks: What is said to each, "+" or "-"; those without one are left out.
    """
    asked = [part for turn in question if turn.role == "user" for part in turn.parts]
    images = list(takewhile(lambda part: isinstance(part, ImagePart), asked))
    rest = asked[len(images) :]
    if rest and isinstance(rest[0], str):
        rest[0] = rest[0].lstrip("\n")
    line_break = "\n" if images else ""
    first = [*images, f"{line_break}### Question:\n", *rest, "\n\n### Solution Process:\n"]
    turns = [Turn("system", (SYSTEM,))]
    for number, (step, mark) in enumerate(zip(steps, marks, strict=False)):
        turns.append(Turn("user", (step,) if number else (*first, step)))
        turns.append(Turn("assistant", (mark,)))
    return turns


class Critic:
    """Scores the steps of answers with a checkpoint that was trained to.

    Args:
        subject: The checkpoint.
        max_tiles: Most tiles of an image; the processor's own if None.
    """

    def __init__(self, subject: Subject, max_tiles: int | None = None) -> None:
        self.subject, self.max_tiles = subject, max_tiles
        self.most = most_tokens(subject.model.config)

    @torch.inference_mode()
    def step_scores(
        self, question: Sequence[Turn], answers: Sequence[str], where: str
    ) -> list[list[float]]:
        """The probability that all is right so far, for each step of each answer.

        Args:
            question: The turns up to the answer.
            answers: To this question; equal ones are read once, an empty one has no steps.
            where: Place of the record, for messages.

        Raises:
            SampleError: An image cannot be read, or an answer is too long for the critic.
            ConfigError: The tokenizer has no token of its own for "+" or "-".
        """
        texts = list(dict.fromkeys(text for text in answers if split_steps(text)))
        if not texts:
            return [[] for _ in answers]
        samples, places = self._encoded(question, texts, where)
        device = self.subject.model.device
        is_bf16 = self.subject.plan.precision == "bf16"
        with torch.autocast(device.type, torch.bfloat16, enabled=is_bf16):
            logits = self._logits(samples, places)
        scores = logits.float().softmax(-1)[:, 0].split([len(one) for one in places])
        found = {text: some.tolist() for text, some in zip(texts, scores, strict=True)}
        return [found.get(text, []) for text in answers]

    def _encoded(
        self, question: Sequence[Turn], texts: Sequence[str], where: str
    ) -> tuple[list[Sample], list[list[tuple[int, int, int]]]]:
        """Samples with a "+" behind every step; of each step its place, and ids of "+" and "-"."""
        processor = self.subject.processor
        samples: list[Sample] = []
        places = []
        for text in texts:
            steps = split_steps(text)
            good, bad = (critic_turns(question, steps, [m] * len(steps)) for m in (GOOD, BAD))
            try:
                if samples:  # the images are read once for all answers
                    sample = processor.encode_with_images_of(samples[0], good)
                else:
                    sample = processor.encode_conversation(
                        good, max_tiles=self.max_tiles, share_budget=False
                    )
                other = processor.encode_with_images_of(sample, bad).input_ids
            except (ImageError, PromptError) as error:
                raise SampleError(f"{where}: {error}") from error
            ids = sample.input_ids
            if len(ids) > self.most:
                raise SampleError(
                    f"{where}: {len(ids):,} tokens of question and answer, but the critic reads "
                    f"{self.most:,}; draw shorter answers, or lower max_tiles",
                    reason="too long",
                )
            differs = (ids != other).nonzero().flatten() if len(ids) == len(other) else ids[:0]
            if len(differs) != len(steps):
                raise ConfigError(
                    f"the critic's tokenizer has no token of its own for {GOOD!r} or {BAD!r}; use "
                    "a checkpoint whose tokenizer has"
                )
            samples.append(sample)
            places.append([(int(at), int(ids[at]), int(other[at])) for at in differs])
        return samples, places

    def _logits(
        self, samples: Sequence[Sample], places: Sequence[Sequence[tuple[int, int, int]]]
    ) -> Tensor:
        """(R, 2) logits of "+" and "-" after every step, in one pass over all answers."""
        model = self.subject.model
        device = model.device
        rows = [sample.input_ids for sample in samples]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)  # (N, T)
        length = ids.shape[1]
        num_visual = int((rows[0] == self.subject.processor.image_token_id).sum())
        pixels, order = samples[0].pixel_values, None
        if pixels is not None:
            one = feature_order(samples[0].layouts)
            if one is None:
                one = torch.arange(num_visual)
            order = one.repeat(len(samples)).to(device)
            pixels = pixels.to(device)
        kept = [n * length + at - 1 for n, some in enumerate(places) for at, _, _ in some]
        pairs = torch.tensor([[good, bad] for some in places for _, good, bad in some])
        x = model.model(
            ids.to(device),
            pixel_values=pixels,
            feature_order=order,
            rows_to_keep=torch.tensor(kept, device=device),
            return_dict=True,
        ).last_hidden_state  # (R, D)
        logits: Tensor = model.lm_head(x)  # (R, V)
        return logits.gather(1, pairs.to(device))


def score_of(step_scores: Sequence[float]) -> float:
    """An answer's score: the mean over its steps; 0 without any."""
    return fmean(step_scores) if step_scores else 0.0
