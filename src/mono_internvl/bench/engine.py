"""`bench engine`: several requests at once in the generation engine, against one after another."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from mono_internvl.bench.models import Setting, prompt_of, random_model
from mono_internvl.bench.rows import BenchRow, Claim
from mono_internvl.bench.timing import Subject, measure
from mono_internvl.generation.engine import Engine
from mono_internvl.generation.few_rows import FewRows
from mono_internvl.generation.request import Request
from mono_internvl.generation.sampling import Sampling

REQUESTS = 8
TILE_PX, TEXT_BEFORE, TEXT_AFTER = 224, 8, 24
"""An image of one small tile, 64 visual tokens, and 32 text tokens."""
ANSWER_TOKENS = 64

ONE_BY_ONE, TOGETHER = "generate, one request after another", "engine, all requests at once"
ALONE = "engine, one request after another"

ONE_ROW, IN_ORDER, WEIGHTS_FIRST = "1 row", f"{REQUESTS} rows", f"{REQUESTS} rows, weights first"


def bench_engine(setting: Setting) -> Iterator[BenchRow | Claim]:
    """What a token costs in company, and in fp32 on a CPU, what its products cost.

    On a CPU, at the middle size, it is judged.
    """
    rows = _bench_tokens(setting)
    yield from rows
    if setting.device.type == "cpu" and setting.dtype == torch.float32:
        yield from _bench_products(setting)
    if setting.device.type == "cpu" and setting.size.name == "middle":
        yield target_of(rows)


def target_of(rows: Sequence[BenchRow]) -> Claim:
    """The claim that the rows of the engine are measured for."""
    together = next(row for row in rows if row.subject == TOGETHER)
    assert together.ratio is not None
    return Claim.judge(
        f"{REQUESTS} requests: tokens/s at once / one after another, {together.dtype}",
        ">=",
        3,
        1 / together.ratio,
        f"{together.shapes['tokens']} + {ANSWER_TOKENS} tokens, {together.layers} layers",
        together.device,
    )


def _bench_products(setting: Setting) -> list[BenchRow]:
    """A feed-forward matrix of every layer times one row, and times the rows of a batch."""
    size, generator = setting.size, torch.Generator().manual_seed(0)
    weights = [
        torch.nn.Parameter(
            torch.randn(size.ffn_width, size.width, generator=generator), requires_grad=False
        )
        for _ in range(size.layers)
    ]
    x = torch.randn(REQUESTS, size.width, generator=generator)

    def multiply(rows: Tensor, context: AbstractContextManager[object]) -> None:
        with context:
            for weight in weights:
                F.linear(rows, weight)

    def subject(name: str, rows: Tensor, context: AbstractContextManager[object]) -> Subject:
        return Subject(name, lambda: multiply(rows, context), units=float(size.layers))

    return measure(
        "engine: one product",
        [
            subject(ONE_ROW, x[:1], nullcontext()),
            subject(IN_ORDER, x, nullcontext()),
            subject(WEIGHTS_FIRST, x, FewRows()),
        ],
        dataclasses.replace(setting, rounds=10 * setting.rounds),
        baseline=ONE_ROW,
        shapes={"width": size.width, "ffn_width": size.ffn_width},
    )


def _bench_tokens(setting: Setting) -> list[BenchRow]:
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

    def by_engine(max_rows: int) -> None:
        sampling = Sampling(max_new_tokens=answer)
        Engine(model, max_rows=max_rows).generate(
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
        [
            subject(ONE_BY_ONE, one_by_one),
            subject(ALONE, partial(by_engine, 1)),
            subject(TOGETHER, partial(by_engine, REQUESTS)),
        ],
        setting,
        baseline=ONE_BY_ONE,
        shapes={**size.shapes, "batch": REQUESTS},
        unit="s/token",
    )
