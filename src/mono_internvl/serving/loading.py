"""From a checkpoint to a conversation in one call."""

from pathlib import Path

import torch

from mono_internvl.compute import choose_device
from mono_internvl.errors import ConfigError
from mono_internvl.generation.sampling import GREEDY, Sampling
from mono_internvl.model.blocked_attention import BLOCKED
from mono_internvl.model.modeling import MonoInternVLForConditionalGeneration
from mono_internvl.model.processing import MonoInternVLProcessor
from mono_internvl.model.weight_files import resolve_checkpoint
from mono_internvl.serving.session import ChatSession

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load(
    model: str | Path,
    *,
    device: str = "auto",
    dtype: str = "auto",
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    system: str | None = None,
    max_tiles: int | None = None,
    sampling: Sampling = GREEDY,
    experts: str = "auto",
) -> ChatSession:
    """Load a checkpoint and open a conversation with it.

    Args:
        model: Checkpoint folder or hub id.
        device: "auto" (CUDA if there is any, else CPU), "cpu", "cuda" or "cuda:1".
        dtype: "auto" (bfloat16 on CUDA, else the checkpoint's), "float32", "bfloat16", "float16".
        revision: Branch, tag or commit of a hub id.
        cache_dir: Where hub files are kept.
        local_files_only: Never ask the network.
        system: As in `ChatSession`.
        max_tiles: As in `ChatSession`.
        sampling: As in `ChatSession`.
        experts: Expert path, see `MonoInternVLPreTrainedModel.set_expert_path`.

    Raises:
        CheckpointError: The checkpoint cannot be had, or is incomplete.
        ConfigError: Device or dtype is unknown or not there.
        ExpertPathUnavailable: There is no such expert path.
    """
    place = choose_device(device)
    if dtype not in ("auto", *DTYPES):
        raise ConfigError(f"dtype={dtype!r}; expected auto, {', '.join(DTYPES)}")
    kind = "bfloat16" if dtype == "auto" and place.type == "cuda" else dtype
    folder = resolve_checkpoint(
        model, revision=revision, cache_dir=cache_dir, local_files_only=local_files_only
    )
    processor = MonoInternVLProcessor.from_pretrained(folder)
    loaded = MonoInternVLForConditionalGeneration.from_pretrained(
        folder, dtype=DTYPES.get(kind, "auto"), expert_path=experts
    )
    if place.type == "cpu" and loaded.dtype == torch.bfloat16:
        loaded.set_attn_implementation(BLOCKED)  # sdpa is slow there
    return ChatSession(
        loaded.to(place), processor, system=system, max_tiles=max_tiles, sampling=sampling
    )
