"""From a checkpoint to a conversation in one call."""

from pathlib import Path

from mono_internvl.checkpoints.adapters import base_of_adapter, merge_adapter
from mono_internvl.checkpoints.loading import load_planned, plan_inference
from mono_internvl.generation.sampling import GREEDY, Sampling
from mono_internvl.processing.processor import MonoInternVLProcessor
from mono_internvl.released.weight_files import resolve_checkpoint
from mono_internvl.serving.session import ChatSession


def load(
    model: str | Path,
    *,
    device: str = "auto",
    precision: str = "auto",
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    system: str | None = None,
    max_tiles: int | None = None,
    sampling: Sampling = GREEDY,
    experts: str = "auto",
    attention: str | None = None,
    threads: int | None = None,
) -> ChatSession:
    """Load a checkpoint and open a conversation with it.

    Args:
        model: Checkpoint folder or hub id; or a PEFT adapter, which is merged into the model that
            it names as its base.
        device: "auto" (an accelerator if there is any, else CPU), "cpu", "cuda", "cuda:1", "xpu"
            or "mps".
        precision: "auto", "bf16", "fp32", or "int8" on a CPU. "auto" is bf16 where the device
            multiplies it faster, else fp32, or int8 where fp32 weights do not fit in memory;
            weights stored in fp32 stay so on a CPU.
        revision: Branch, tag or commit of a hub id.
        cache_dir: Where hub files are kept.
        local_files_only: Never ask the network.
        system: As in `ChatSession`.
        max_tiles: As in `ChatSession`.
        sampling: As in `ChatSession`.
        experts: Implementation, see `set_experts_implementation` of the model.
        attention: Attention implementation; the plan's unless given.
        threads: Of PyTorch; as it is set unless given.

    Returns:
        A session whose `plan` says what was chosen.

    Raises:
        CheckpointError: The checkpoint cannot be had, or is incomplete.
        ConfigError: Device or precision is unknown or not there.
        MissingDependency: int8 was chosen and torchao is not installed.
        ExpertsUnavailable: There is no such implementation of the experts.
    """
    folder = resolve_checkpoint(
        model, revision=revision, cache_dir=cache_dir, local_files_only=local_files_only
    )
    adapter = None
    if (base := base_of_adapter(folder)) is not None:
        adapter = folder
        folder = resolve_checkpoint(base, cache_dir=cache_dir, local_files_only=local_files_only)
    plan = plan_inference(
        folder,
        device=device,
        precision=precision,
        attention=attention,
        experts=experts,
        threads=threads,
    )
    processor = MonoInternVLProcessor.from_pretrained(folder)
    loaded = load_planned(folder, plan)
    return ChatSession(
        loaded if adapter is None else merge_adapter(loaded, adapter),
        processor,
        system=system,
        max_tiles=max_tiles,
        sampling=sampling,
        plan=plan,
    )
