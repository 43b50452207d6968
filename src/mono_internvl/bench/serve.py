"""`bench serve`: several users at once, ours against the modular twin, as the paper's Table 6.

No engine stands behind it: the prompts of all users are read as one batch and answered in step. So
it compares the models, not the scheduling of a server.

Source: arXiv 2410.08202, table 6: 768, 1,792 and 3,840 image tokens and 256 text tokens, 120 tokens
to say, concurrency 16. On a CPU users and answer are fewer; the row says how many.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from transformers.cache_utils import DynamicCache

from mono_internvl.bench.models import Prompt, Setting, prompt_of, random_model
from mono_internvl.bench.rows import BenchRow
from mono_internvl.bench.timing import Subject, measure
from mono_internvl.model.modeling import MonoInternVLForConditionalGeneration

IMAGE_TILES = (3, 7, 15)
"""Tiles of Table 6's rows, of 256 visual tokens each."""
ON_GPU, ON_CPU = (16, 120), (2, 8)
"""Users, and tokens of an answer."""


FIRST, REST = "serve: first token", "serve: tokens after it"
MODULAR, OURS = "modular", "ours v1"


def bench_serve(setting: Setting, *, has_answers: bool = True) -> Iterator[BenchRow]:
    """Seconds to the first token of a batch of users, and of a token after it.

    On a CPU only the first of Table 6's rows is run.

    Args:
        setting: What to run with.
        has_answers: Whether tokens after the first are timed, too.
    """
    size, dtype, device = setting.size, setting.dtype, setting.device
    users, answer = ON_CPU if device.type == "cpu" else ON_GPU
    models = {
        MODULAR: random_model(size, "modular", dtype, device, setting.attention),
        OURS: random_model(size, "v1", dtype, device, setting.attention),
    }
    tiles = [size.tiles] if size.name == "tiny" else list(IMAGE_TILES)
    for count in tiles[:1] if device.type == "cpu" else tiles:
        shape = dataclasses.replace(size, tiles=count)
        prompt = prompt_of(shape, models[OURS].config, dtype, device, batch=users)
        first, rest = [], []
        notes = {"attention": setting.attention, "users": users, "answer_tokens": answer}
        for name, model in models.items():
            turn = _Turn(model, prompt, answer)
            first.append(Subject(name, turn.read, notes))
            rest.append(
                Subject(name, turn.answer, notes, before=turn.read, units=float(users * answer))
            )
        shapes = {**shape.shapes, "batch": users}
        yield from measure(FIRST, first, setting, baseline=MODULAR, shapes=shapes)
        if has_answers:
            yield from measure(REST, rest, setting, baseline=MODULAR, shapes=shapes, unit="s/token")


class _Turn:
    """One batch of prompts, and the answers to it."""

    def __init__(
        self, model: MonoInternVLForConditionalGeneration, prompt: Prompt, answer: int
    ) -> None:
        self.model, self.prompt, self.num_answer = model, prompt, answer
        self.cache: Any = None
        self.next: Any = None

    @torch.inference_mode()
    def read(self) -> None:
        self.cache = DynamicCache(config=self.model.config.text_config)
        out = self.model(
            self.prompt.input_ids,
            self.prompt.pixel_values,
            past_key_values=self.cache,
            logits_to_keep=1,
        )
        self.next = out.logits.argmax(-1)

    @torch.inference_mode()
    def answer(self) -> None:
        for _ in range(self.num_answer):
            out = self.model(self.next, past_key_values=self.cache, logits_to_keep=1)
            self.next = out.logits.argmax(-1)
