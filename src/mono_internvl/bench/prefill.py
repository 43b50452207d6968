"""`bench prefill`: image and question up to the first logits, against a plain language model."""

from __future__ import annotations

import functools

import torch

from mono_internvl.bench.models import (
    Size,
    last_logits_of_llama,
    last_logits_of_ours,
    make_dense,
    plain_llama,
    prompt_of,
    random_model,
)
from mono_internvl.bench.rows import BenchRow
from mono_internvl.bench.timing import Subject, measure

LLAMA = "Llama of transformers, same weights, head on one row"


def bench_prefill(
    size: Size,
    *,
    dtype: torch.dtype,
    device: torch.device,
    rounds: int,
    command: str,
    with_variants: bool = True,
) -> list[BenchRow]:
    """Time to the logits of the last row, cache filled.

    Args:
        size: Model and prompt.
        dtype: Of weights and activations.
        device: Where.
        rounds: Interleaved runs of each subject.
        command: For the rows.
        with_variants: Also the 1.5 variant, which needs weights of its own.

    Returns:
        Rows of Llama (the baseline), ours, ours 1.5, and the dense way with sdpa and as the
        official code runs it (eager attention, logits of every row).
    """
    subjects = prefill_subjects(size, dtype, device, with_variants)
    return measure(
        "prefill",
        subjects,
        baseline=LLAMA,
        rounds=rounds,
        device=device,
        command=command,
        shapes=size.shapes,
        layers=size.layers,
        dtype=dtype,
    )


def prefill_subjects(
    size: Size, dtype: torch.dtype, device: torch.device, with_variants: bool = True
) -> list[Subject]:
    """The subjects of `bench_prefill`; all but the 1.5 variant share their weights."""
    ours = random_model(size, "v1", dtype, device, "sdpa")
    prompt = prompt_of(size, ours.config, dtype, device)
    llama, dense = plain_llama(ours), make_dense(ours)
    dense_eager = make_dense(ours)
    dense_eager.set_attn_implementation("eager")

    def subject(name: str, model: object, attention: str, **options: object) -> Subject:
        run = functools.partial(last_logits_of_ours, model, prompt, **options)  # type: ignore[arg-type]
        return Subject(name, run, {"attention": attention, "last_layer_skip": False})

    subjects = [
        Subject(
            LLAMA,
            functools.partial(last_logits_of_llama, llama, prompt.input_ids),
            {"attention": "sdpa"},
        ),
        subject("ours v1", ours, "sdpa"),
        subject("dense v1, sdpa", dense, "sdpa"),
        subject("dense v1, as the official code runs", dense_eager, "eager", logits_to_keep=0),
    ]
    if with_variants:
        newer = random_model(size, "v1.5", dtype, device, "sdpa")
        subjects.insert(2, subject("ours v1.5", newer, "sdpa"))
    return subjects
