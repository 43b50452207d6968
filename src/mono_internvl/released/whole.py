"""Loading and saving a whole checkpoint: what is verified is what is loaded, and saving replaces.

Every model class of this package loads through here, whichever Auto class asked for it.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import re
import weakref
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import GenerationConfig, PreTrainedModel

from mono_internvl.configuration.model import MonoInternVLConfig
from mono_internvl.errors import CheckpointError, ConfigError
from mono_internvl.released.keys import read_config, verify_checkpoint
from mono_internvl.released.weight_files import (
    INDEX,
    WEIGHTS,
    read_weight_files,
    resolve_checkpoint,
    safetensors_files,
)
from mono_internvl.runs.files import make_readable, read_json, scratch_folder

logger = logging.getLogger(__name__)

# Options of transformers that name other files than the checkpoint's own, or other names in them.
_OTHER_FILES = ("subfolder", "variant", "gguf_file", "state_dict", "key_mapping")
GENERATION_CONFIG = "generation_config.json"
_SHARD = re.compile(r"model(-\w+)?-\d{5}-of-\d{5}\.safetensors")


class WholeCheckpointModel(PreTrainedModel):
    """A model that is loaded as one verified whole, or not at all."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a checkpoint in the released layout, all of it or nothing.

        The weight files are settled once; their headers are held against the configuration, and
        exactly these files are loaded. Adapters, pickles and other weights beside them are not.

        Args:
            pretrained_model_name_or_path: Folder or hub id (`revision`, `cache_dir`, `token` and
                `local_files_only` as usual); only safetensors files are read.
            *args: As `PreTrainedModel.from_pretrained`.
            **kwargs: As there: `dtype`, `device_map`, `attn_implementation`, ...; and fields of the
                configuration, as `image_attention`.

        Raises:
            CheckpointError: A tensor is missing, unexpected or mis-shaped, before loading or after.
            ConfigError: config.json, or an option, asks for what is not implemented.
        """
        source = {k: kwargs.pop(k) for k in ("revision", "cache_dir", "token") if k in kwargs}
        local = kwargs.pop("local_files_only", False)
        _check_options(cls, kwargs)
        name = pretrained_model_name_or_path
        folder = resolve_checkpoint(name, local_files_only=local, **source)
        config = copy.deepcopy(kwargs.pop("config", None)) or read_config(folder)
        config.change(config.take_fields(kwargs))
        weights = read_weight_files(folder)
        with torch.device("meta"):
            skeleton = cls(copy.deepcopy(config))
        verify_checkpoint(weights, skeleton, config, folder)
        if (folder / "adapter_config.json").is_file():
            logger.warning(
                "%s: adapter_config.json beside the weights is not applied; load the adapter with "
                "PEFT, from a folder of its own",
                folder,
            )
        kwargs.setdefault("generation_config", _generation_config(folder, config))
        view = weights.view()
        is_info_asked = kwargs.pop("output_loading_info", False)
        kwargs.update(use_safetensors=True, output_loading_info=True, config=config)
        try:
            model, info = super().from_pretrained(view.name, *args, **kwargs)
        except SafetensorError as error:
            raise CheckpointError(f"{folder}: cannot be read ({error}); copy it again") from error
        finally:
            if kwargs.get("device_map") is None:  # nothing is read later
                view.cleanup()
        if kwargs.get("device_map") is not None:  # parts left on the disk are read when needed
            weakref.finalize(model, view.cleanup)
        _check_all_loaded(folder, info, is_quantized=kwargs.get("quantization_config") is not None)
        model.name_or_path = model.config.name_or_path = str(name)
        return (model, info) if is_info_asked else model

    @classmethod
    def without_weights(cls, folder: Path, attention: str) -> Any:
        """The model that a folder's configuration describes: fp32, on the CPU, its weights unset.

        Args:
            folder: Of a checkpoint, whether or not its weights are there.
            attention: Attention implementation.

        Raises:
            ConfigError: config.json asks for what is not implemented.
        """
        config = read_config(folder)
        generation = _generation_config(folder, config)
        with torch.device("meta"):
            model = cls._from_config(config, dtype=torch.float32, attn_implementation=attention)
        model = model.to_empty(device="cpu").eval()
        model.tie_weights()
        model.generation_config = generation
        return model

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any
    ) -> None:
        """As transformers does it; what was saved there before is replaced as a whole.

        Everything is written beside first. A process that is killed leaves the earlier weights, or
        the new ones; shards and an index of an earlier save go last.

        Args:
            save_directory: Folder; made if it is not there.
            *args: As `PreTrainedModel.save_pretrained`.
            **kwargs: As there.

        Raises:
            CheckpointError: `save_directory` is a file or cannot be written, or weights are
                quantised.
        """
        folder = Path(save_directory)
        if not getattr(self, "_hf_peft_config_loaded", False):  # else the adapter alone is saved
            _check_not_quantised(self, folder)
        is_main = args[0] if args else kwargs.get("is_main_process", True)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not is_main:  # takes part in gathering, writes nothing
                super().save_pretrained(folder, *args, **kwargs)
                return
            with scratch_folder(folder, "saving") as scratch:
                kwargs.setdefault("repo_id", folder.name)
                super().save_pretrained(scratch, *args, **kwargs)
                _replace_checkpoint(scratch, folder)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{folder}: cannot be written ({error}); make room, or give another folder"
            ) from error


def _check_options(cls: type[PreTrainedModel], kwargs: dict[str, Any]) -> None:
    if cls.config_class is not MonoInternVLConfig:
        raise ConfigError(
            f"{cls.__name__} has no checkpoint of its own; load the model, and take its "
            "`model.language_model`"
        )
    for name in _OTHER_FILES:
        if kwargs.pop(name, None):
            raise ConfigError(
                f"{name} is not supported: a checkpoint is one folder with {WEIGHTS} or {INDEX}; "
                "give that folder"
            )
    kwargs.pop("adapter_kwargs", None)
    config = kwargs.get("config")
    if config is not None and not isinstance(config, MonoInternVLConfig):
        raise ConfigError(
            f"config is a {type(config).__name__}; expected a MonoInternVLConfig, read one with "
            "MonoInternVLConfig.from_pretrained"
        )


def _generation_config(folder: Path, config: MonoInternVLConfig) -> GenerationConfig:
    file = folder / GENERATION_CONFIG
    if not file.is_file():
        return GenerationConfig.from_model_config(config)
    try:
        return GenerationConfig.from_dict(read_json(file))
    except (TypeError, ValueError, AttributeError) as error:
        if isinstance(error, CheckpointError):
            raise
        said = " ".join(str(error).split())
        raise CheckpointError(f"{file}: {said}; correct the file, or remove it") from error


def _check_all_loaded(folder: Path, info: Any, *, is_quantized: bool) -> None:
    """Hold transformers' own report to the promise: nothing keeps random weights."""
    problems = {
        what: sorted(map(str, info[what]))
        for what in ("missing_keys", "mismatched_keys", "error_msgs")
        if info.get(what)
    }
    if problems:
        what, first = next((what, names[0]) for what, names in problems.items())
        hint = (
            "load without quantization_config and quantise the loaded model"
            if is_quantized
            else "report it, with the versions of this package and of transformers"
        )
        raise CheckpointError(
            f"{folder}: not loaded whole, {what}: {len(problems[what])}, first {first}; {hint}"
        )


def _check_not_quantised(model: PreTrainedModel, folder: Path) -> None:
    """Refuse what the released layout has no place for: packed weights, scales, split wqkv."""
    for name, parameter in model.named_parameters():
        kind = type(parameter)
        is_packed = kind.__module__.partition(".")[0] in ("torchao", "bitsandbytes")
        if is_packed or not parameter.is_floating_point():
            raise CheckpointError(
                f"{folder}: not written, {name} is quantised ({kind.__name__}); a checkpoint holds "
                "floating-point weights, save the model before quantising it and quantise it again "
                "after loading"
            )


def _replace_checkpoint(new: Path, folder: Path) -> None:
    """Move a new checkpoint into a folder that may hold an earlier one.

    At every moment one index, or without one the single file, says what the weights are. The one
    rename, or removal, that changes what it says comes after all new files are there.
    """
    files = {file.name for file in new.iterdir()}
    old = _weights_of(folder)
    if files & {WEIGHTS, INDEX}:
        clashing = {name for name in files & old if name != WEIGHTS}
        if clashing:  # shards of the earlier save have these names: they stay whole until the end
            _rename_shards(new, tag=new.name.split(".")[2])
            files = {file.name for file in new.iterdir()}
    for file in new.glob("*.safetensors"):
        make_readable(file, like=next(new.glob("*config.json")))
    switch = next((name for name in (INDEX, WEIGHTS) if name in files), None)
    for name in sorted(files, key=lambda name: (name == switch, not name.endswith(".safetensors"))):
        (new / name).replace(folder / name)
    if switch is None:  # an adapter alone
        return
    if switch == WEIGHTS:
        (folder / INDEX).unlink(missing_ok=True)
    shards = {file.name for file in folder.iterdir() if _SHARD.fullmatch(file.name)}
    for name in (old | shards | {WEIGHTS}) - files:
        (folder / name).unlink(missing_ok=True)


def _weights_of(folder: Path) -> set[str]:
    """Names of the weight files that a folder's index, or the lack of one, names."""
    try:
        return {file.name for file in safetensors_files(folder)}
    except CheckpointError:  # none, or damaged
        return set()


def _rename_shards(folder: Path, tag: str) -> None:
    """Give the shards of a new checkpoint names that no earlier one has."""
    index = read_json(folder / INDEX)
    renamed = {}
    for name in set(index["weight_map"].values()):
        renamed[name] = name.replace("model-", f"model-{tag}-", 1)
        (folder / name).rename(folder / renamed[name])
    index["weight_map"] = {key: renamed[name] for key, name in index["weight_map"].items()}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
