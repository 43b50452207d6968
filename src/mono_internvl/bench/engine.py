"""`bench engine`: several requests at once in the generation engine, against one after another."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from mono_internvl.bench.models import Setting, prompt_of, random_model
from mono_internvl.bench.rows import BenchRow
from mono_internvl.bench.timing import Subject, measure
from mono_internvl.generation.engine import Engine
from mono_internvl.generation.request import Request
from mono_internvl.generation.sampling import Sampling

REQUESTS = 8
TILE_PX, TEXT_BEFORE, TEXT_AFTER = 224, 8, 24
"""An image of one small tile, 64 visual tokens, and 32 text tokens."""
ANSWER_TOKENS = 64

ONE_BY_ONE, TOGETHER = "generate, one request after another", "engine, all requests at once"


def bench_engine(setting: Setting) -> list[BenchRow]:
    """Seconds of an answer's token, reading of the prompts included, of requests on own images."""
    dtype, device = setting.dtype, setting.device
    size, answer = setting.size, ANSWER_TOKENS
    if size.name == "tiny":
        answer = 4
    else:
        size = dataclasses.replace(
            size, tile_px=TILE_PX, tiles=1, text_before=TEXT_BEFORE, text_after=TEXT_AFTER
        )
    model = random_model(size, "v1", dtype, device, setting.attention)
    prompts = prompt_of(size, model.config, dtype, device, batch=REQUESTS)
    images = prompts.pixel_values.split(size.tiles)

    @torch.inference_mode()
    def one_by_one() -> None:
        for ids, pixels in zip(prompts.input_ids, images, strict=True):
            model.generate(
                ids[None],
                pixel_values=pixels,
                attention_mask=torch.ones_like(ids[None]),
                max_new_tokens=answer,
                do_sample=False,
                eos_token_id=None,
            )

    def together() -> None:
        sampling = Sampling(max_new_tokens=answer)
        Engine(model, max_rows=REQUESTS).generate(
            [
                Request(ids, pixels, sampling)
                for ids, pixels in zip(prompts.input_ids, images, strict=True)
            ]
        )

    notes = {"attention": setting.attention, "answer_tokens": answer}

    def subject(name: str, run: Callable[[], None]) -> Subject:
        return Subject(name, run, notes, units=float(REQUESTS * answer))

    return measure(
        "engine",
        [subject(ONE_BY_ONE, one_by_one), subject(TOGETHER, together)],
        setting,
        baseline=ONE_BY_ONE,
        shapes={**size.shapes, "batch": REQUESTS},
        unit="s/token",
    )
