"""A GGUF file as the folder of a language model: config.json, safetensors, tokenizer, template.

What follows is the ordinary way from a language model to a monolithic one; nothing there knows of
GGUF. Whatever a field says that the folder cannot say is refused by name.

Source: llama.cpp's converter (names of fields and tensors, the order of query and key rows) and its
vocabulary code (what the name of a pre-tokenizer means).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from mono_internvl.checkpoints.gguf_files import GGUF_SUFFIX, GgufFile, read_gguf
from mono_internvl.checkpoints.gguf_tokenizers import write_tokenizer
from mono_internvl.configuration.checks import MOST_OF_TEXT, check_integer
from mono_internvl.errors import CheckpointError, ConfigError
from mono_internvl.processing.templates import JINJA_FORM
from mono_internvl.released.weight_files import INDEX, WEIGHTS
from mono_internvl.runs.files import reading

# Architecture in the file -> architecture in config.json; `model_type` is the same word.
_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_FIELDS = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
    "vocab_size": "vocab_size",
}
_ROPE_FIELDS = {
    "rope.scaling.type": "rope_type",
    "rope.scaling.factor": "factor",
    "rope.scaling.original_context_length": "original_max_position_embeddings",
}
_HEAD_WIDTHS = ("rope.dimension_count", "attention.value_length")
_NEEDED = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "max_position_embeddings",
    "rms_norm_eps",
)
_TENSORS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ROPE_FACTORS = "rope_freqs.weight"
# Scalings of Llama 3.1 to 3.3: the file holds what they make of the frequencies, not their names.
_LLAMA3 = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_LLAMA3_FACTORS = (8.0, 32.0)
# A quantised tensor becomes fp32, which holds its values exactly.
_KEPT = {"F16": torch.float16, "BF16": torch.bfloat16}


def find_gguf(path: Path) -> Path | None:
    """The GGUF file that a path names: itself, or the only one of a folder without safetensors.

    Raises:
        CheckpointError: The folder has several.
    """
    if path.is_file() and path.suffix == GGUF_SUFFIX:
        return path
    if not path.is_dir() or any((path / name).is_file() for name in (WEIGHTS, INDEX)):
        return None
    found = sorted(path.glob(f"*{GGUF_SUFFIX}"))
    if len(found) > 1:
        names = ", ".join(file.name for file in found[:6])
        raise CheckpointError(f"{path}: {len(found)} GGUF files ({names}); name one of them")
    return found[0] if found else None


def write_language_model(file: Path, folder: Path) -> None:
    """Write what a GGUF file holds as the checkpoint of a language model.

    F16 and BF16 tensors keep their type; others become fp32. One layer is in memory at a time.

    Args:
        file: GGUF.
        folder: Is there, and empty.

    Raises:
        CheckpointError: The file is damaged or incomplete.
        ConfigError: It holds something that is not carried over; named.
    """
    stored = read_gguf(file)
    with reading(f"{file}: not a readable language model"):
        config = _config(stored)
        _check_sizes(stored, config)
        parts = _parts(stored, config)
        write_tokenizer(stored, folder)
    for part, names in parts.items():
        tensors = {key: _tensor(stored, name, config) for key, name in names.items()}
        save_file(tensors, folder / part, metadata={"format": "pt"})
    weight_map = {key: part for part, names in parts.items() for key in names}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    template = stored.metadata.get("tokenizer.chat_template")
    if isinstance(template, str) and template:
        (folder / JINJA_FORM).write_text(template, encoding="utf-8")


def _config(stored: GgufFile) -> dict[str, Any]:
    kind = stored.metadata.get("general.architecture")
    if kind not in _ARCHITECTURES:
        raise ConfigError(
            f"{stored.path}: a GGUF file of architecture {kind!r:.40}; {', '.join(_ARCHITECTURES)} "
            "are read, of other language models give the safetensors folder"
        )
    own = {k.removeprefix(f"{kind}."): v for k, v in stored.metadata.items() if k.startswith(kind)}
    known = {*_FIELDS, *_ROPE_FIELDS, *_HEAD_WIDTHS}
    for field, value in own.items():
        is_plain = isinstance(value, int | float) or field in _ROPE_FIELDS
        if field not in known or not is_plain:
            raise ConfigError(
                f"{stored.path}: {kind}.{field}={value!r:.60} is not carried over; give the "
                "model's safetensors folder"
            )
    config: dict[str, Any] = {"model_type": kind, "architectures": [_ARCHITECTURES[kind]]}
    config |= {name: _decimal(own[field]) for field, name in _FIELDS.items() if field in own}
    config.setdefault("vocab_size", len(stored.metadata.get("tokenizer.ggml.tokens", ())))
    missing = [name for name in _NEEDED if name not in config]
    if missing:
        raise CheckpointError(f"{stored.path}: says nothing of {missing[0]}; restore the file")
    for name, most in MOST_OF_TEXT.items():
        if name in config:
            check_integer(f"{stored.path}: {name}", config[name], most=most)
    config.setdefault("rope_theta", 10_000.0)
    config.setdefault("num_key_value_heads", config["num_attention_heads"])
    width = config.setdefault("head_dim", config["hidden_size"] // config["num_attention_heads"])
    for field in _HEAD_WIDTHS:
        if own.get(field, width) != width:
            raise ConfigError(
                f"{stored.path}: {kind}.{field}={own[field]}; expected {width}, the width of a head"
            )
    config["rope_scaling"] = _rope_scaling(stored, own, config)
    config["tie_word_embeddings"] = "output.weight" not in stored.tensors
    if kind != "qwen2":  # whose three biases go without saying
        config["attention_bias"] = "blk.0.attn_q.bias" in stored.tensors
    for name in ("bos", "eos", "padding"):
        index = stored.metadata.get(f"tokenizer.ggml.{name}_token_id")
        config[f"{name.replace('padding', 'pad')}_token_id"] = index
    return config


def _decimal(value: int | float) -> int | float:
    """A number as its author wrote it: the file holds floats in 4 bytes, 1e-5 as 9.99999975e-06."""
    return float(f"{value:.7g}") if isinstance(value, float) else value


def _rope_scaling(
    stored: GgufFile, own: Mapping[str, Any], config: Mapping[str, Any]
) -> dict[str, Any] | None:
    rope = {name: own[field] for field, name in _ROPE_FIELDS.items() if field in own}
    if rope.get("rope_type", "none") == "none":
        rope = {}
    if _ROPE_FACTORS not in stored.tensors:
        return rope or None
    factors = torch.from_numpy(stored.dequantised(_ROPE_FACTORS))
    plain = _frequencies(config, {"rope_type": "linear", "factor": 1.0})
    for factor in _LLAMA3_FACTORS:
        scaling = {**_LLAMA3, "factor": factor}
        scaled = plain / _frequencies(config, scaling)
        if not rope and factors.shape == scaled.shape and torch.allclose(factors, scaled, 1e-3):
            return scaling
    raise ConfigError(
        f"{stored.path}: {_ROPE_FACTORS} holds factors of rotary frequencies that are not those of "
        "Llama 3.1 to 3.3; give the model's safetensors folder"
    )


def _frequencies(config: Mapping[str, Any], scaling: Mapping[str, Any]) -> torch.Tensor:
    """(d / 2,) rotary frequencies of a head."""
    rope = {"rope_theta": config["rope_theta"], **scaling}
    llama = LlamaConfig(head_dim=config["head_dim"], rope_parameters=rope)
    return ROPE_INIT_FUNCTIONS[scaling["rope_type"]](llama, torch.device("cpu"))[0]


def _check_sizes(stored: GgufFile, config: Mapping[str, Any]) -> None:
    """Hold what config.json will ask memory for to what the file has."""
    width, last = config["hidden_size"], config["num_hidden_layers"] - 1
    heads = config["num_attention_heads"] * config["head_dim"]
    expected = {
        "token_embd.weight": (config["vocab_size"], width),
        f"blk.{last}.ffn_down.weight": (width, config["intermediate_size"]),
        f"blk.{last}.attn_q.weight": (heads, width),
    }
    for name, shape in expected.items():
        found = stored.tensors.get(name)
        if found is None or found.shape != shape:
            raise CheckpointError(
                f"{stored.path}: tensor {name} {'is missing' if found is None else found.shape}; "
                f"its fields ask for {shape}, restore the file"
            )


def _parts(stored: GgufFile, config: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """One file for each layer and one for the rest: file -> key -> name in the GGUF file."""
    parts: dict[str, dict[str, str]] = {}
    for name in stored.tensors:
        if name == _ROPE_FACTORS:
            continue
        head, _, suffix = name.rpartition(".")
        key = _TENSORS.get(head)
        part = "model-rest"
        if key is None and head.startswith("blk."):
            _, layer, kind = head.split(".", 2)
            if layer.isdecimal() and int(layer) < config["num_hidden_layers"]:
                part = f"model-{int(layer):05}"
                if kind in _LAYER_TENSORS:
                    key = f"model.layers.{int(layer)}.{_LAYER_TENSORS[kind]}"
        if key is None or suffix not in ("weight", "bias"):
            raise CheckpointError(
                f"{stored.path}: unexpected tensor {name:.60}; expected those of a "
                f"{config['model_type']} model"
            )
        parts.setdefault(f"{part}.safetensors", {})[f"{key}.{suffix}"] = name
    return parts


def _tensor(stored: GgufFile, name: str, config: Mapping[str, Any]) -> torch.Tensor:
    values = stored.dequantised(name)
    heads = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}
    field = heads.get(name.split(".")[-2])
    if config["model_type"] == "llama" and field is not None:
        values = _halves_apart(values, config[field], f"{stored.path}: {name}")
    return torch.from_numpy(values).to(_KEPT.get(stored.kind_name(name), torch.float32))


def _halves_apart(rows: np.ndarray, heads: int, name: str) -> np.ndarray:
    """Undo llama.cpp's order of a Llama's query and key rows, which puts rotary pairs together."""
    if len(rows) % (2 * heads):
        raise CheckpointError(f"{name}: {len(rows)} rows for {heads} heads; restore the file")
    pairs = rows.reshape(heads, -1, 2, *rows.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows.shape)
