"""PEFT adapters: the model they belong to, and that model with an adapter merged into it."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError

from mono_internvl.errors import CheckpointError, ConfigError, MissingDependency
from mono_internvl.model.modeling import MonoInternVLForConditionalGeneration
from mono_internvl.runs.files import read_json

ADAPTER_CONFIG = "adapter_config.json"


def base_of_adapter(folder: Path) -> str | None:
    """Folder or hub id of the model that an adapter was trained on; None if `folder` is a model.

    Raises:
        CheckpointError: The adapter does not say.
    """
    file = folder / ADAPTER_CONFIG
    if not file.is_file() or (folder / "config.json").is_file():
        return None
    base = read_json(file).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise CheckpointError(
            f"{file}: base_model_name_or_path={base!r}; write there the folder of the model that "
            "the adapter was trained on"
        )
    return base


def merge_adapter(
    model: MonoInternVLForConditionalGeneration, folder: Path
) -> MonoInternVLForConditionalGeneration:
    """The model with an adapter merged into its weights, in place.

    Raises:
        CheckpointError: The adapter does not fit the model, or its files are damaged.
        ConfigError: The weights are quantised: there is nothing to add to.
        MissingDependency: peft is not installed.
    """
    try:
        from peft import PeftModel
    except ImportError as error:
        raise MissingDependency(
            f"{folder}: an adapter, which needs peft; pip install peft"
        ) from error
    if any(type(p).__module__.startswith("torchao") for p in model.parameters()):
        raise ConfigError(
            f"{folder}: an adapter cannot be merged into int8 weights; take precision='bf16' or "
            "'fp32', or merge it first and load the result"
        )
    try:
        merged = PeftModel.from_pretrained(model, str(folder)).merge_and_unload()
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        said = " ".join(str(error).split())
        raise CheckpointError(
            f"{folder}: adapter not applied ({said:.300}); give the model it was trained on as "
            f"base_model_name_or_path in {ADAPTER_CONFIG}"
        ) from error
    result: MonoInternVLForConditionalGeneration = merged
    return result
