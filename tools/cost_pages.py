"""Memory and time of the 2B model on machines at hand: computed, not measured.

Operations and bytes are counted from the configuration (`costs.inference`,
`costs.training`); the rate and the bandwidth of a machine are assumed, and shown. A product
is taken to run at the rate, a generated token to wait for the weights that it reads.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from pathlib import Path

import torch

from mono_internvl.checkpoints.presets import mono_internvl_2b
from mono_internvl.costs.inference import parameter_table, prompt_costs, skeleton
from mono_internvl.costs.info import trainable_parameters
from mono_internvl.costs.training import SampleShape, step_flops
from mono_internvl.processing.tiling import InternVLTiling
from mono_internvl.recipes import PUBLISHED
from mono_internvl.reports.markdown import table
from mono_internvl.training.recipe import Stage
from mono_internvl.training.rules import apply_rules

UTILIZATION = 0.4
"""Part of a GPU's peak rate by data sheet that products of a training step are taken to reach."""
VISUAL, TEXT = 768, 256
"""Tokens of the prompt: an image of two tiles and a thumbnail, and a question."""
SFT_SAMPLES = 665_000
"""Conversations of LLaVA-665k, which the official fine-tuning script takes."""
_GB, _DAY = 1e9, 86_400


@dataclass(frozen=True)
class Machine:
    """What a machine is assumed to do.

    Attributes:
        name: For the table.
        dtype: Of weights, cache and products.
        rate: Multiplications and additions per second that large products reach.
        bandwidth: Bytes per second that weights are read with.
    """

    name: str
    dtype: torch.dtype
    rate: float
    bandwidth: float


CORES = (
    Machine("one CPU core with AVX2", torch.float32, 80e9, 15e9),
    Machine("one CPU core with AVX512_BF16", torch.bfloat16, 200e9, 15e9),
)
"""Rates of one core of a server: 78 to 82 and 205 to 220 GFLOP/s in products of 1,024 rows."""
GPUS = (
    Machine("A100 80 GB", torch.bfloat16, UTILIZATION * 312e12, 2.0e12),
    Machine("H100 80 GB", torch.bfloat16, UTILIZATION * 989e12, 3.35e12),
)
"""Dense bf16 rates of the SXM modules by data sheet, times `UTILIZATION`, and their bandwidths."""


def inference_block(_: Path) -> str:
    """Memory and time of one answer, a line for a machine."""
    config = mono_internvl_2b()
    rows = []
    for machine in (*CORES, *GPUS):
        costs = prompt_costs(config, VISUAL, TEXT, machine.dtype)
        read = (costs.decode.decoder_linear + costs.decode.head) // 2 * machine.dtype.itemsize
        memory = costs.weight_bytes + costs.kv_cache_bytes
        rows.append(
            (
                machine.name,
                str(machine.dtype).removeprefix("torch."),
                f"{memory / _GB:.1f} GB",
                _seconds(costs.prefill.total / machine.rate),
                _seconds((read + costs.kv_cache_bytes) / machine.bandwidth),
                f"{_rate(machine)}, {machine.bandwidth / _GB:,.0f} GB/s",
            )
        )
    head = ("2B, one image, 1,024 tokens", "dtype", "weights and cache", "first token")
    body = table((*head, "each further token", "assumed"), rows, numbers=False)
    return f"{body}\nComputed, not measured.\n"


def training_block(_: Path) -> str:
    """Memory of the training state and time of each stage, a line for a stage."""
    stages = [
        *(
            ("evip-2b", stage, stage.batch_size * stage.steps)
            for stage in PUBLISHED["evip-2b"].stages
        ),
        ("sft", PUBLISHED["sft"].stages[0], SFT_SAMPLES),
    ]
    rows = []
    for recipe, stage, samples in stages:
        flops = sample_flops(stage)
        days = [samples * flops / machine.rate / _DAY for machine in GPUS]
        rows.append(
            (
                f"`{recipe}` {stage.name}",
                f"{samples / 1e6:,.3g} M of {stage.max_tokens:,} tokens",
                f"{state_bytes(recipe, stage) / _GB:.0f} GB",
                f"{flops / 1e12:.1f} TFLOP",
                *(f"{count:,.0f}" if count >= 10 else f"{count:.1f}" for count in days),
            )
        )
    names = (f"{machine.name.split()[0]} days" for machine in GPUS)
    head = ("stage", "samples", "weights, gradients, moments", "a sample", *names)
    rates = ", ".join(f"{machine.name} {_rate(machine)}" for machine in GPUS)
    slow = " or ".join(f"{_seconds(flops / core.rate)} on {core.name}" for core in CORES)
    return (
        f"{table(head, rows)}\nComputed, not measured: fp32 state, every sample as long as the "
        f"stage allows, {100 * UTILIZATION:.0f} % of the peak rate by data sheet ({rates}); "
        f"activations come on top of the memory. One sample of `sft` takes {slow}.\n"
    )


@functools.cache
def sample_flops(stage: Stage) -> int:
    """Operations of one sample of a stage on 2B, forward and backward, as long as it may be."""
    config = mono_internvl_2b()
    side = config.force_image_size
    tiling = InternVLTiling(side, max_tiles=stage.max_tiles, use_thumbnail=config.use_thumbnail)
    tokens_per_side = math.isqrt(config.num_image_tokens_per_tile)
    visual = tiling.layout(stage.max_tiles * side, side, tokens_per_side).num_tokens
    text = stage.max_tokens - visual
    model = skeleton(config)
    groups = apply_rules(model, config, stage)
    trainable = [name for group in groups for name in group.names]
    return step_flops(config, trainable, SampleShape(visual, text, text - 2)).total


def state_bytes(recipe: str, stage: Stage) -> int:
    """Bytes of fp32 weights and, of what is trainable, a gradient and two moments of AdamW."""
    config = mono_internvl_2b()
    trainable = trainable_parameters(config, PUBLISHED[recipe])[stage.name]
    return 4 * parameter_table(config).total + 12 * trainable


def _seconds(value: float) -> str:
    return f"{value:.1f} s" if value >= 1 else f"{1e3 * value:.3g} ms"


def _rate(machine: Machine) -> str:
    is_tera = machine.rate >= 1e12
    return f"{machine.rate / (1e12 if is_tera else 1e9):.0f} {'T' if is_tera else 'G'}FLOP/s"
