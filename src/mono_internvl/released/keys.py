"""Released checkpoints: the one key table, strict verification, and where files come from.

The table maps module paths both ways. From it follow the conversion that transformers runs while it
loads and saves, the verification that runs before any weight is touched, and the released name of a
parameter or gradient. Only safetensors files are read.

Source: parameter names of OpenGVLab/Mono-InternVL at 5b17ab4. Names of parts that were never
released (`*_ve` of attention and norms, `q_norm`, `k_norm`, `image_marks`) are ours.
"""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming

from mono_internvl.configuration.model import MonoInternVLConfig
from mono_internvl.configuration.released_fields import RELEASED_MODEL_TYPE
from mono_internvl.errors import CheckpointError, ConfigError
from mono_internvl.released.weight_files import WeightFiles
from mono_internvl.runs.files import read_json

# Released module path -> ours. Paths of a decoder layer are relative to it; a tuple is the
# interleaved wqkv, which splits into three.
TOP_LEVEL: dict[str, str] = {
    "vision_model.embeddings": "model.vision_embedder",
    "vision_model.encoder": "model.vision_tower",  # its parts are named as in the released files
    "mlp1.0": "model.projector.norm",
    "mlp1.1": "model.projector.fc1",
    "mlp1.3": "model.projector.fc2",
    "image_marks": "model.projector.marks",
    "language_model.model.tok_embeddings": "model.language_model.embed_tokens",
    "language_model.model.norm": "model.language_model.norm",
    "language_model.output": "lm_head",
}
WEIGHT_DTYPES = ("F64", "F32", "F16", "BF16")
"""Types of stored weights, in safetensors' names."""

LAYERS = ("language_model.model.layers", "model.language_model.layers")
IN_LAYER: dict[str, str | tuple[str, str, str]] = {
    "attention.wqkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention.wqkv_ve": (
        "self_attn.q_proj_visual",
        "self_attn.k_proj_visual",
        "self_attn.v_proj_visual",
    ),
    "attention.wo": "self_attn.o_proj",
    "attention.wo_ve": "self_attn.o_proj_visual",
    "attention.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w3": "mlp.up_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward_ve.w1": "mlp_visual.gate_proj",
    "feed_forward_ve.w3": "mlp_visual.up_proj",
    "feed_forward_ve.w2": "mlp_visual.down_proj",
    "attention_norm": "input_layernorm",
    "attention_norm_ve": "input_layernorm_visual",
    "ffn_norm": "post_attention_layernorm",
    "ffn_norm_ve": "post_attention_layernorm_visual",
}


# ------------------------------------------------------------------------ the interleaved wqkv


def split_wqkv(
    wqkv: Tensor, kv_heads: int, group: int, head_dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Take the fused projection apart.

    Args:
        wqkv: (kv_heads * (group + 2) * head_dim, ...): per key-value head its `group` query heads
            in order, then one key head, then one value head.
        kv_heads: Key-value heads.
        group: Query heads per key-value head.
        head_dim: Rows of one head.

    Returns:
        q (kv_heads * group * head_dim, ...), k and v (kv_heads * head_dim, ...), contiguous.
    """
    parts = wqkv.unflatten(0, (kv_heads, group + 2, head_dim))
    q, k, v = parts.split((group, 1, 1), dim=1)
    return q.flatten(0, 2).contiguous(), k.flatten(0, 2).contiguous(), v.flatten(0, 2).contiguous()


def fuse_wqkv(q: Tensor, k: Tensor, v: Tensor, kv_heads: int, head_dim: int) -> Tensor:
    """The inverse of `split_wqkv`."""
    parts = [x.unflatten(0, (kv_heads, -1, head_dim)) for x in (q, k, v)]
    return torch.cat(parts, dim=1).flatten(0, 2)


def _heads(config: MonoInternVLConfig) -> tuple[int, int, int]:
    text = config.get_text_config()
    return (
        text.num_key_value_heads,
        text.num_attention_heads // text.num_key_value_heads,
        text.head_dim,
    )


class SplitWqkv(ConversionOps):
    """`split_wqkv` as a step of transformers' weight loading."""

    def convert(
        self,
        input_dict: dict[str, Any],
        target_patterns: list[str],
        config: Any = None,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        (tensors,) = input_dict.values()
        wqkv = tensors[0] if isinstance(tensors, list) else tensors
        return dict(zip(target_patterns, split_wqkv(wqkv, *_heads(config)), strict=True))

    @property
    def reverse_op(self) -> ConversionOps:
        return FuseWqkv()


class FuseWqkv(ConversionOps):
    """`fuse_wqkv` as a step of transformers' weight saving."""

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        config: Any = None,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        q, k, v = (
            tensors[0] if isinstance(tensors, list) else tensors
            for tensors in (input_dict[pattern] for pattern in source_patterns)
        )
        kv_heads, _, head_dim = _heads(config)
        return {target_patterns[0]: fuse_wqkv(q, k, v, kv_heads, head_dim)}

    @property
    def reverse_op(self) -> ConversionOps:
        return SplitWqkv()


def register_conversion() -> None:
    """Teach transformers the table, so that `from_pretrained` and `save_pretrained` follow it."""

    def pattern(path: str) -> str:
        return re.escape(path + ".")

    transforms: list[WeightRenaming | WeightConverter] = []
    for released, ours in {**TOP_LEVEL, LAYERS[0]: LAYERS[1]}.items():
        transforms.append(WeightRenaming(pattern(released), pattern(ours)))
    for released, own in IN_LAYER.items():
        if isinstance(own, tuple):
            targets = [pattern(path) for path in own]
            transforms.append(WeightConverter(pattern(released), targets, operations=[SplitWqkv()]))
        else:
            transforms.append(WeightRenaming(pattern(released), pattern(own)))
    register_checkpoint_conversion_mapping(
        MonoInternVLConfig.model_type, transforms, overwrite=True
    )


# ------------------------------------------------------------------------------ names by table

_OURS_TO_RELEASED: dict[str, tuple[str, int]] = {
    path: (released, place)
    for released, own in IN_LAYER.items()
    for place, path in enumerate(own if isinstance(own, tuple) else (own,))
}


def released_name(name: str) -> tuple[str, int | None]:
    """The released key of one of our parameters.

    Returns:
        The key, and for a part of a fused wqkv its place (0 query, 1 key, 2 value), else None.

    Raises:
        CheckpointError: The table has no row for it.
    """
    module, _, leaf = name.rpartition(".")
    if match := re.fullmatch(re.escape(LAYERS[1]) + r"\.(\d+)\.(.+)", module):
        index, path = match.groups()
        if path in _OURS_TO_RELEASED:
            released, place = _OURS_TO_RELEASED[path]
            fused = isinstance(IN_LAYER[released], tuple)
            return f"{LAYERS[0]}.{index}.{released}.{leaf}", place if fused else None
    for released, own in TOP_LEVEL.items():
        if f"{name}.".startswith(f"{own}."):
            return released + name.removeprefix(own), None
    raise CheckpointError(f"no released name for parameter {name!r}; add a row to the key table")


def to_released(
    tensors: Mapping[str, Tensor | None], config: MonoInternVLConfig
) -> dict[str, Tensor]:
    """Parameters or gradients under their released names, wqkv fused; None is left out."""
    out: dict[str, Tensor] = {}
    fused: dict[str, dict[int, Tensor]] = {}
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        key, place = released_name(name)
        if place is None:
            out[key] = tensor
        else:
            fused.setdefault(key, {})[place] = tensor
    kv_heads, _, head_dim = _heads(config)
    for key, parts in fused.items():
        out[key] = fuse_wqkv(parts[0], parts[1], parts[2], kv_heads, head_dim)
    return out


# ------------------------------------------------------------------------------ verification


def read_config(folder: Path) -> MonoInternVLConfig:
    """The configuration of a checkpoint folder.

    Raises:
        CheckpointError: There is no config.json, or it is no JSON object.
        ConfigError: It is of another architecture or asks for what is not implemented.
    """
    file = folder / "config.json"
    stored = read_json(file)
    if stored.get("model_type") not in (RELEASED_MODEL_TYPE, MonoInternVLConfig.model_type):
        raise ConfigError(
            f"{file}: model_type={stored.get('model_type')!r} is not supported; expected "
            f"{RELEASED_MODEL_TYPE!r}, the layout of the released checkpoints; "
            "`mono-internvl init --llm` makes one of a language model"
        )
    config: MonoInternVLConfig = MonoInternVLConfig.from_dict(stored, name_or_path=str(folder))
    return config


def expected_shapes(model: nn.Module, config: MonoInternVLConfig) -> dict[str, tuple[int, ...]]:
    """Released key -> shape of every tensor a checkpoint of this model must hold.

    Args:
        model: With its language-model head or without; the checkpoint holds the head in any case.
        config: Of the model.
    """
    text = config.text_config
    shapes = {name: p.shape for name, p in model.named_parameters(remove_duplicate=False)}
    if not any(name.startswith("model.") for name in shapes):
        shapes = {f"model.{name}": shape for name, shape in shapes.items()}
    shapes["lm_head.weight"] = torch.Size((text.vocab_size, text.hidden_size))
    if config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    meta = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    return {key: tuple(tensor.shape) for key, tensor in to_released(meta, config).items()}


def verify_checkpoint(
    weights: WeightFiles, model: nn.Module, config: MonoInternVLConfig, folder: Path
) -> None:
    """Hold the stored tensors against what the configuration asks for, before any is loaded.

    Args:
        weights: Read from the headers.
        model: With its language-model head or without.
        config: Of the model.
        folder: Named in messages.

    Raises:
        CheckpointError: A tensor is missing, unexpected, mis-shaped or of a type that weights do
            not have; says which, how many, and the nearest name.
    """
    stored, expected = weights.tensors, expected_shapes(model, config)
    missing = [key for key in expected if key not in stored]
    unexpected = [key for key in stored if key not in expected]
    shapes = [key for key in expected if key in stored and stored[key].shape != expected[key]]
    dtypes = [key for key in expected if key in stored and stored[key].dtype not in WEIGHT_DTYPES]
    problems = []
    if missing:
        near = difflib.get_close_matches(missing[0], unexpected or list(stored), n=1)
        hint = f" (nearest stored name: {near[0]})" if near else ""
        problems.append(f"{len(missing)} missing, first {missing[0]} {expected[missing[0]]}{hint}")
    if unexpected:
        near = difflib.get_close_matches(unexpected[0], missing or list(expected), n=1)
        hint = f" (nearest expected name: {near[0]})" if near else ""
        problems.append(f"{len(unexpected)} unexpected, first {unexpected[0]}{hint}")
    if shapes:
        key = shapes[0]
        problems.append(
            f"{len(shapes)} of another shape, first {key}: stored {stored[key].shape}, "
            f"expected {expected[key]}"
        )
    if dtypes:
        problems.append(
            f"{len(dtypes)} of a type that is not read, first {dtypes[0]}: "
            f"{stored[dtypes[0]].dtype}, expected {', '.join(WEIGHT_DTYPES)}"
        )
    if problems:
        raise CheckpointError(
            f"{folder}: {'; '.join(problems)}. Expected {len(expected)} tensors for the "
            f"configuration in config.json (visual experts: "
            f"{', '.join(config.visual_experts) or 'none'}); use weights and config.json of one "
            "checkpoint"
        )


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes in name order: equal digests, equal weights."""
    sha = hashlib.sha256()
    for key in sorted(tensors):
        tensor = tensors[key].detach().contiguous().cpu()
        sha.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()
