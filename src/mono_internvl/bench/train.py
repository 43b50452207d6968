"""`bench train`: a step of S1.1 against the official way, and a step of every stage of a recipe."""

from __future__ import annotations

import dataclasses
import functools
import gc
import os
import resource
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mono_internvl.attention.blocked import BLOCKED
from mono_internvl.bench.limit import against_one_product, one_product, rate_of_one_product
from mono_internvl.bench.models import (
    Prompt,
    Setting,
    Size,
    make_dense,
    prompt_of,
    random_model,
    twin,
)
from mono_internvl.bench.rows import BenchRow
from mono_internvl.bench.timing import Subject, measure
from mono_internvl.configuration.labels import IGNORED_LABEL
from mono_internvl.costs.accelerators import peak_tflops_of
from mono_internvl.costs.training import SampleShape, step_flops
from mono_internvl.model.modeling import MonoInternVLForConditionalGeneration
from mono_internvl.training.optimizer import optimizer_of
from mono_internvl.training.recipe import Stage
from mono_internvl.training.recompute import enable_recompute
from mono_internvl.training.rules import apply_rules

OFFICIAL = "dense, eager attention, all logits, as the official code runs"
TEXT_LOGITS = "dense, eager attention, logits of labels only"
OURS = "ours v1, blocked, skip"
RECOMPUTE = "ours v1, blocked, skip, selective recompute"
BATCH = 2
TILE_PX, TILES, TEXT = 224, 6, 64
"""Two samples of 512 tokens, 384 of them visual."""
TOKENS_OF_STEP = {"cpu": 1024, "cuda": 8 * 1425}
"""By device type; 8 samples of S1.1 are what one of the paper's 256 accelerators has of a step."""


def training_size(size: Size) -> Size:
    """A size with the samples that a step is compared on: 512 tokens, 384 of them visual."""
    if size.name == "tiny":
        return size
    return dataclasses.replace(
        size, tile_px=TILE_PX, tiles=TILES, text_before=TEXT, text_after=TEXT
    )


def bench_train(setting: Setting, stages: Sequence[Stage]) -> Iterator[BenchRow]:
    """`bench_step` at the size's samples, then `bench_stages`."""
    yield from bench_step(dataclasses.replace(setting, size=training_size(setting.size)))
    yield from bench_stages(setting, stages)


def bench_step(setting: Setting) -> list[BenchRow]:
    """Forward and backward of S1.1 on two samples: seconds, tokens, peak memory.

    What learns is what S1.1 lets learn: patch embedding, projector and visual experts. Labels stand
    on the text after the image. Rows tell peak memory (`peak_bytes`: of the device, or the largest
    resident set of a forked process, weights included) and the share of the rate of a single large
    product that the products of the step reach (`share_of_gemm_rate`).
    """
    size, dtype, device = setting.size, setting.dtype, setting.device
    ours = random_model(size, "v1", dtype, device, BLOCKED).train()
    dense = make_dense(ours, "eager").train()
    recomputing = twin(ours, BLOCKED).train()
    enable_recompute(recomputing, "selective")
    for model in (ours, dense, recomputing):
        for name, p in model.named_parameters():
            p.requires_grad_(
                any(part in name for part in ("vision_embedder", "projector", "_visual"))
            )
    prompt = prompt_of(size, ours.config, dtype, device, batch=BATCH)
    labels = prompt.input_ids.clone()
    labels[:, : size.tokens - size.text_after] = -100
    steps: dict[str, tuple[Callable[[], None], str]] = {
        OFFICIAL: (functools.partial(_official_step, dense, prompt, labels), "eager"),
        TEXT_LOGITS: (functools.partial(_step, dense, prompt, labels), "eager"),
        OURS: (functools.partial(_step, ours, prompt, labels), BLOCKED),
        RECOMPUTE: (functools.partial(_step, recomputing, prompt, labels), BLOCKED),
    }
    subjects = []
    for name, (run, attention) in steps.items():
        # Whoever asks for the loss of labelled rows alone has the last layer skip the others.
        notes = {"attention": attention, "last_layer_skip": name != OFFICIAL}
        subjects.append(Subject(name, run, {**notes, "peak_bytes": peak_bytes(run, device)}))
    subjects.append(one_product(setting))
    shapes = {**size.shapes, "batch": BATCH}
    rows = measure("train", subjects, setting, baseline=OFFICIAL, shapes=shapes)
    tokens = BATCH * size.tokens
    return [
        dataclasses.replace(
            row, notes={**row.notes, "tokens_per_second": round(tokens / row.p50, 1)}
        )
        for row in against_one_product(rows)
    ]


def stage_size(size: Size, stage: Stage) -> Size:
    """A size with samples as long as a stage lets them be, the thumbnail among the tiles.

    Where a tile has fewer than 256 visual tokens, the text shrinks alike.
    """
    tile_px = TILE_PX if size.name == "middle" else size.tile_px
    per_tile = (tile_px // 28) ** 2
    tiles = stage.max_tiles + 1
    text = max(8, stage.max_tokens * per_tile // 256 - tiles * per_tile)
    return dataclasses.replace(
        size, tile_px=tile_px, tiles=tiles, text_before=text // 4, text_after=text - text // 4
    )


def bench_stages(setting: Setting, stages: Sequence[Stage]) -> Iterator[BenchRow]:
    """A whole optimizer step of each stage as the training loop makes it, one micro-batch each.

    Weights and optimizer are fp32; bf16 is autocast. Samples are as long as the stage allows, and
    as many as fit into `TOKENS_OF_STEP`, at least one. A row tells tokens per second, peak memory,
    the operations that the step owes (`owed_gflop`, see `model.training_costs`), and their rate as
    a share of one large product's in the same run (`owed_share_of_gemm_rate`) and, where the device
    is known, of its peak by data sheet (`mfu`).

    Args:
        setting: Size, dtype of the products, device and rounds.
        stages: What to run; rules, sample length, rates and recomputation are read.
    """
    for stage in stages:
        size = stage_size(setting.size, stage)
        step = _StageStep(dataclasses.replace(setting, size=size), stage)
        peak = peak_bytes(step.run, setting.device)
        subject = Subject(f"{stage.name}: {stage.title}", step.run)
        gemm = one_product(setting)
        model_sizes = {
            name: value
            for name, value in size.shapes.items()
            if name not in ("batch", "tokens", "visual_tokens")
        }
        row, roof = measure(
            "train: stages", [subject, gemm], setting, baseline=subject.name, shapes=model_sizes
        )
        rate = step.owed_gflop / row.p50
        notes = {
            "samples": step.batch,
            "tokens": size.tokens,
            "visual_tokens": size.visual_tokens,
            "attention": setting.attention,
            "recompute": stage.recompute,
            "weights": "float32",
            "tokens_per_second": round(step.batch * size.tokens / row.p50, 1),
            "peak_bytes": peak,
            "owed_gflop": round(step.owed_gflop, 3),
            "owed_share_of_gemm_rate": round(rate / rate_of_one_product([roof]), 3),
        }
        peak_rate = _peak_gflops(row.device) if setting.dtype == torch.bfloat16 else None
        if peak_rate is not None:
            notes |= {"mfu": round(rate / peak_rate, 4), "peak_tflops": peak_rate / 1e3}
        yield dataclasses.replace(row, notes=notes, baseline=None, ratio=None)


class _StageStep:
    """A model, an optimizer and a micro-batch of a stage."""

    def __init__(self, setting: Setting, stage: Stage) -> None:
        size, device = setting.size, setting.device
        self.batch = max(1, TOKENS_OF_STEP[device.type] // size.tokens)
        self.model = random_model(size, "v1", torch.float32, device, setting.attention).train()
        if stage.recompute != "none":
            enable_recompute(self.model, stage.recompute)
        groups = apply_rules(self.model, self.model.config, stage)
        self.optimizer = optimizer_of(self.model, groups, stage)
        self.learned = [p for p in self.model.parameters() if p.requires_grad]
        self.clip_norm = stage.clip_norm
        self.prompt = prompt_of(size, self.model.config, torch.float32, device, batch=self.batch)
        labelled = size.text_after - 2  # what closes the image has no label
        self.labels = self.prompt.input_ids.clone()
        self.labels[:, : size.tokens - labelled] = IGNORED_LABEL
        self.precision = torch.autocast(
            device.type, torch.bfloat16, enabled=setting.dtype == torch.bfloat16
        )
        names = [name for group in groups for name in group.names]
        text = size.text_before + size.text_after
        sample = SampleShape(size.visual_tokens, text, labelled)
        self.owed_gflop = step_flops(self.model.config, names, sample).total * self.batch / 1e9

    def run(self) -> None:
        with self.precision:
            loss = self.model(
                input_ids=self.prompt.input_ids,
                pixel_values=self.prompt.pixel_values,
                labels=self.labels,
                logits_to_keep=None,
            ).loss
        loss.backward()
        nn.utils.clip_grad_norm_(self.learned, self.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def _peak_gflops(device: str) -> float | None:
    peak = peak_tflops_of(device)
    return None if peak is None else 1e3 * peak


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
        gc.collect()  # models of earlier comparisons do not count
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
