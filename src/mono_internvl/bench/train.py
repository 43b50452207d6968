"""`bench train`: one step of pre-training, experts and eyes learning, the language model frozen."""

from __future__ import annotations

import dataclasses
import functools
import os
import resource
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mono_internvl.bench.models import Prompt, Size, make_dense, prompt_of, random_model, twin
from mono_internvl.bench.rows import BenchRow
from mono_internvl.bench.timing import Subject, measure
from mono_internvl.model.blocked_attention import BLOCKED
from mono_internvl.model.modeling import MonoInternVLForConditionalGeneration
from mono_internvl.training.recompute import checkpointing_options

OFFICIAL = "dense, eager attention, all logits, as the official code runs"
TEXT_LOGITS = "dense, eager attention, logits of labels only"
OURS = "ours v1, blocked, skip"
RECOMPUTE = "ours v1, blocked, skip, selective recompute"
GEMM = "one matrix product"
BATCH = 2


def bench_train(
    size: Size, *, dtype: torch.dtype, device: torch.device, rounds: int, command: str
) -> list[BenchRow]:
    """Forward and backward of S1.1 on two samples: seconds, tokens, peak memory.

    What learns is what S1.1 lets learn: patch embedding, projector and visual experts. Labels stand
    on the text after the image. Rows tell peak memory (`peak_bytes`: of the device, or the largest
    resident set of a forked process, weights included) and the share of the rate of a single large
    product that the products of the step reach (`share_of_gemm_rate`, what MFU is to a GPU).

    Args:
        size: Model and prompt.
        dtype: Of weights and activations.
        device: Where.
        rounds: Interleaved runs of each subject.
        command: For the rows.
    """
    ours = random_model(size, "v1", dtype, device, BLOCKED).train()
    dense = make_dense(ours, "eager").train()
    recomputing = twin(ours, BLOCKED).train()
    recomputing.gradient_checkpointing_enable(checkpointing_options("selective"))
    for model in (ours, dense, recomputing):
        for name, p in model.named_parameters():
            p.requires_grad_(
                any(part in name for part in ("vision_embedder", "projector", "_visual"))
            )
    prompt = prompt_of(size, ours.config, dtype, device, batch=BATCH)
    labels = prompt.input_ids.clone()
    labels[:, : size.tokens - size.text_after] = -100
    steps: dict[str, tuple[Callable[[], None], dict[str, Any]]] = {
        OFFICIAL: (functools.partial(_official_step, dense, prompt, labels), {}),
        TEXT_LOGITS: (functools.partial(_step, dense, prompt, labels), {}),
        OURS: (functools.partial(_step, ours, prompt, labels), {}),
        RECOMPUTE: (functools.partial(_step, recomputing, prompt, labels), {}),
    }
    subjects = [
        Subject(name, run, {"peak_bytes": peak_bytes(run, device)})
        for name, (run, _) in steps.items()
    ]
    a = torch.randn(1024, size.width, dtype=dtype, device=device)
    b = torch.randn(size.width, size.ffn_width, dtype=dtype, device=device)
    subjects.append(Subject(GEMM, functools.partial(torch.mm, a, b)))
    rows = measure(
        "train",
        subjects,
        baseline=OFFICIAL,
        rounds=rounds,
        device=device,
        command=command,
        shapes={**size.shapes, "batch": BATCH},
        layers=size.layers,
        dtype=dtype,
    )
    roof = next(row for row in rows if row.subject == GEMM)
    rate = (roof.gflop or 0.0) / roof.p50
    tokens = BATCH * size.tokens
    return [
        dataclasses.replace(
            row,
            notes={
                **row.notes,
                "tokens_per_second": round(tokens / row.p50, 1),
                "share_of_gemm_rate": round((row.gflop or 0.0) / row.p50 / rate, 3),
            },
        )
        for row in rows
        if row.subject != GEMM
    ]


def _step(model: MonoInternVLForConditionalGeneration, prompt: Prompt, labels: Tensor) -> None:
    model.zero_grad(set_to_none=True)
    loss = model(
        input_ids=prompt.input_ids,
        pixel_values=prompt.pixel_values,
        labels=labels,
        logits_to_keep=None,
    ).loss
    loss.backward()


def _official_step(
    model: MonoInternVLForConditionalGeneration, prompt: Prompt, labels: Tensor
) -> None:
    """Loss over the logits of all rows, as the official code takes it."""
    model.zero_grad(set_to_none=True)
    logits = model(
        input_ids=prompt.input_ids, pixel_values=prompt.pixel_values, use_cache=False
    ).logits
    F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()).backward()


def peak_bytes(run: Callable[[], object], device: torch.device) -> int | None:
    """Most memory while `run` runs once; None where it cannot be told.

    On a CPU a forked process runs it, so that what others left behind does not count; with more
    than one thread a fork is not safe.
    """
    if device.type == "cuda":
        run()
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return torch.cuda.max_memory_allocated(device)
    if torch.get_num_threads() > 1 or not hasattr(os, "fork"):
        return None
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            run()
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            os.write(writer, str(peak).encode())
            status = 0
        finally:
            os._exit(status)
    os.close(writer)
    with os.fdopen(reader) as answer:
        text = answer.read()
    os.waitpid(child, 0)
    return int(text) if text else None
