"""A checkpoint in memory as a compute plan has it: dtype, device, attention, experts, int8."""

from __future__ import annotations

import logging
import math
from pathlib import Path

import torch
from torch import nn

from mono_internvl.compute import ComputePlan, choose_device, make_plan
from mono_internvl.errors import MissingDependency
from mono_internvl.model.modeling import MonoInternVLForConditionalGeneration
from mono_internvl.released.weight_files import read_headers


def plan_inference(
    folder: Path,
    *,
    device: str = "auto",
    precision: str = "auto",
    attention: str | None = None,
    experts: str = "auto",
    threads: int | None = None,
    autocasts: bool = False,
) -> ComputePlan:
    """The plan to answer with a checkpoint on this machine, in one process.

    On a CPU, "auto" does not round weights that are stored in fp32.

    Args:
        folder: Checkpoint; its headers are read.
        device: As in `make_plan`.
        precision: "auto", "bf16", "fp32" or "int8".
        attention: As in `make_plan`.
        experts: As in `make_plan`.
        threads: As PyTorch is set unless given.
        autocasts: Whether "bf16" is the caller's autocast over fp32 weights.

    Raises:
        CheckpointError: The checkpoint cannot be read.
        ConfigError: As in `make_plan`.
    """
    headers = read_headers(folder).values()
    is_fp32 = all(header.dtype == "F32" for header in headers)
    plan = make_plan(
        device,
        precision,
        attention=attention,
        experts=experts,
        threads=torch.get_num_threads() if threads is None else threads,
        fp32_bytes=sum(4 * math.prod(header.shape) for header in headers),
    )
    rounds = precision == "auto" and plan.precision == "bf16" and is_fp32 and not autocasts
    if rounds and choose_device(plan.device).type == "cpu":
        plan = plan.with_precision("fp32", reason="as the weights are stored")
    return plan


def load_planned(
    folder: Path, plan: ComputePlan, *, autocasts: bool = False
) -> MonoInternVLForConditionalGeneration:
    """Load a checkpoint as a plan says, and set the plan's threads.

    Args:
        folder: Checkpoint.
        plan: What to compute with.
        autocasts: Whether "bf16" is the caller's autocast over fp32 weights.

    Raises:
        CheckpointError: The checkpoint is incomplete or does not fit its configuration.
        MissingDependency: int8 is planned and torchao is not installed.
    """
    torch.set_num_threads(plan.threads)
    is_half = plan.precision == "int8" or (plan.precision == "bf16" and not autocasts)
    model: MonoInternVLForConditionalGeneration = (
        MonoInternVLForConditionalGeneration.from_pretrained(
            folder,
            dtype=torch.bfloat16 if is_half else torch.float32,
            attn_implementation=plan.attention,
            experts_implementation=plan.experts,
        )
    )
    if plan.precision == "int8":
        quantize_int8(model)
    return model.to(plan.device)  # type: ignore[arg-type]


def quantize_int8(model: nn.Module) -> None:
    """Linear weights to int8 with a scale for each row, everything else to fp32, in place.

    One layer at a time, so that the model never lies in memory in fp32. Quantizing what is loaded,
    and not while loading, is deliberate: transformers' own conversion of released keys does not
    reach the quantized parts of a fused projection.

    Raises:
        MissingDependency: torchao is not installed.
    """
    logging.getLogger("torchao").setLevel(logging.ERROR)  # on a CPU it misses its CUDA libraries
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError as error:
        raise MissingDependency(
            "precision='int8' needs the package 'torchao', which is not installed; pip install "
            "'mono-internvl[int8]', or take precision='fp32' with more memory"
        ) from error
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.data.float()
        if isinstance(module, nn.Linear):
            quantize_(module, Int8WeightOnlyConfig())
