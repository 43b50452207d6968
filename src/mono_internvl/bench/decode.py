"""`bench decode`: one token after another behind a long context; `bench prefix`: shared images."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, StaticCache

from mono_internvl.attention.blocked import BLOCKED
from mono_internvl.bench.models import Setting, plain_llama, prompt_of, random_model, twin
from mono_internvl.bench.rows import BenchRow
from mono_internvl.bench.timing import Subject, measure
from mono_internvl.generation.engine import PREFIX_BYTES, Engine
from mono_internvl.generation.request import Request
from mono_internvl.generation.sampling import Sampling

STEPS = 8
"""Tokens of one run."""
QUESTIONS, QUESTION_TOKENS, ANSWER_TOKENS = 3, 24, 8

LLAMA_DYNAMIC = "Llama of transformers, dynamic cache"
LLAMA_BLOCKED = "Llama of transformers, dynamic cache, blocked"
LLAMA_STATIC = "Llama of transformers, static cache"
OURS_SDPA, OURS = "ours v1, sdpa", "ours v1, blocked"
STATIC, GRAPH = "ours v1, static cache", "ours v1, static cache, CUDA graph"
WITHOUT, WITH = "image read for each question", "image read once"


def bench_decode(setting: Setting) -> list[BenchRow]:
    """Seconds of a token, batch 1, behind a context as long as the size's prompt.

    Keys and values of the context are random; filling the cache is not timed. Llama's head gets a
    row in two dimensions, the honest way.
    """
    size, dtype, device = setting.size, setting.dtype, setting.device
    ours = random_model(size, "v1", dtype, device, "sdpa")
    blocked, llama = twin(ours, BLOCKED), plain_llama(ours)
    llama_blocked = plain_llama(ours, BLOCKED)
    text = ours.config.text_config
    context = torch.randn(
        1, size.kv_heads, size.tokens, text.head_dim, dtype=dtype, device=device
    )  # of every layer
    token = torch.full((1, 1), 5, device=device)

    def of_ours(model: Any, cache: Cache) -> Tensor:
        return model(token, past_key_values=cache, logits_to_keep=1).logits  # type: ignore[no-any-return]

    def of_llama(model: Any, cache: Cache) -> Tensor:
        x = model.model(token, past_key_values=cache, use_cache=True).last_hidden_state
        return nn.functional.linear(x[:, -1], model.lm_head.weight).float()

    def subject(
        name: str,
        model: Any,
        step: Callable[[Any, Cache], Tensor],
        is_static: bool,
        attention: str,
        peer: str | None = None,
    ) -> Subject:
        caches: list[Cache] = []

        def fill() -> None:
            caches.clear()
            most = size.tokens + STEPS
            cache = (
                StaticCache(config=llama.config, max_cache_len=most)
                if is_static
                else DynamicCache(config=llama.config)
            )
            with torch.inference_mode():
                for layer in range(size.layers):
                    cache.update(context, context, layer)
            caches.append(cache)

        @torch.inference_mode()
        def run() -> None:
            for _ in range(STEPS):
                step(model, caches[0])

        notes = {"attention": attention, "context_tokens": size.tokens}
        return Subject(name, run, notes, before=fill, units=STEPS, peer=peer)

    return measure(
        "decode",
        [
            subject(LLAMA_DYNAMIC, llama, of_llama, False, "sdpa"),
            subject(LLAMA_STATIC, llama, of_llama, True, "sdpa"),
            subject(LLAMA_BLOCKED, llama_blocked, of_llama, False, BLOCKED),
            subject(OURS_SDPA, ours, of_ours, False, "sdpa", peer=LLAMA_DYNAMIC),
            subject(OURS, blocked, of_ours, False, BLOCKED, peer=LLAMA_BLOCKED),
        ],
        setting,
        baseline=LLAMA_DYNAMIC,
        unit="s/token",
    )


def bench_graph(setting: Setting) -> list[BenchRow]:
    """Seconds of a token with a static cache: launched operator by operator, or as a CUDA graph.

    A graph holds all steps of a run; on a CPU there is none, and both subjects are the same.
    """
    size, dtype, device = setting.size, setting.dtype, setting.device
    ours = random_model(size, "v1", dtype, device, "sdpa")
    text = ours.config.text_config
    context = torch.randn(1, size.kv_heads, size.tokens, text.head_dim, dtype=dtype, device=device)
    token = torch.full((1, 1), 5, device=device)
    cache = StaticCache(config=text, max_cache_len=size.tokens + STEPS)

    @torch.inference_mode()
    def fill() -> None:
        """Start anew in the same memory, where a graph expects it."""
        cache.reset()
        for layer in range(size.layers):
            cache.update(context, context, layer)

    @torch.inference_mode()
    def run() -> None:
        for _ in range(STEPS):
            ours(token, past_key_values=cache, logits_to_keep=1)

    def subject(name: str, is_captured: bool) -> Subject:
        notes = {"attention": "sdpa", "context_tokens": size.tokens, "cuda_graph": is_captured}
        return Subject(name, run, notes, before=fill, units=STEPS, is_captured=is_captured)

    return measure(
        "decode: static cache",
        [subject(STATIC, False), subject(GRAPH, device.type == "cuda")],
        setting,
        baseline=STATIC,
        unit="s/token",
    )


def bench_prefix(setting: Setting) -> list[BenchRow]:
    """Three questions on one image, answered in a batch: read with each, or read once."""
    size, dtype, device = setting.size, setting.dtype, setting.device
    model = random_model(size, "v1", dtype, device, BLOCKED)
    one = prompt_of(size, model.config, dtype, device)
    seen = one.input_ids[:, : size.text_before + size.visual_tokens]
    generator = torch.Generator().manual_seed(1)
    asked = torch.randint(
        3, size.vocabulary - 9, (QUESTIONS, QUESTION_TOKENS), generator=generator
    ).to(device)
    sampling = Sampling(max_new_tokens=ANSWER_TOKENS)
    requests = [Request(torch.cat((seen[0], ids)), one.pixel_values, sampling) for ids in asked]

    def answer(prefix_bytes: int) -> None:
        Engine(model, prefix_bytes=prefix_bytes).generate(requests)

    notes = {
        "attention": BLOCKED,
        "questions": QUESTIONS,
        "question_tokens": QUESTION_TOKENS,
        "answer_tokens": ANSWER_TOKENS,
    }
    return measure(
        "prefix",
        [
            Subject(WITHOUT, functools.partial(answer, 0), notes),
            Subject(WITH, functools.partial(answer, PREFIX_BYTES), notes),
        ],
        setting,
        baseline=WITHOUT,
    )
