"""Tiny language models in GGUF files, written as llama.cpp's converter writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from transformers import PreTrainedModel, PreTrainedTokenizerFast

CHATML = (
    "{%- for m in messages -%}{{- '<s>' + m['role'] + '\n' + m['content'] + '</s>\n' -}}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{- '<s>assistant\n' -}}{%- endif -%}"
)
_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def gguf_name(key: str) -> str:
    name, suffix = key.rsplit(".", 1)
    if name.startswith("model.layers."):
        _, _, layer, rest = name.split(".", 3)
        return f"blk.{layer}.{_NAMES[rest]}.{suffix}"
    return f"{_NAMES[name]}.{suffix}"


def _pairs_together(rows: np.ndarray, heads: int) -> np.ndarray:
    halves = rows.reshape(heads, 2, -1, *rows.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows.shape)


def write_gguf(
    file: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    kind: Kind = Kind.F32,
    *,
    pre: str = "gpt-2",
    fields: dict[str, Any] | None = None,
    tensors: dict[str, np.ndarray] | None = None,
    leave_out: tuple[str, ...] = (),
) -> Path:
    """Write a model: matrices in `kind`, vectors in fp32.

    Args:
        file: To write.
        model: Llama, Qwen2 or Qwen3 of transformers.
        tokenizer: Byte-level.
        kind: Of the matrices.
        pre: Name of the pre-tokenizer.
        fields: More metadata, or other values.
        tensors: More tensors.
        leave_out: Metadata and tensors that are not written.
    """
    config, name = model.config, model.config.model_type
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    special = {row["content"] for row in backend["added_tokens"] if row["special"]}
    metadata: dict[str, Any] = {
        f"{name}.context_length": config.max_position_embeddings,
        f"{name}.block_count": config.num_hidden_layers,
        f"{name}.embedding_length": config.hidden_size,
        f"{name}.feed_forward_length": config.intermediate_size,
        f"{name}.attention.head_count": config.num_attention_heads,
        f"{name}.attention.head_count_kv": config.num_key_value_heads,
        f"{name}.attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        f"{name}.rope.freq_base": float(config.rope_parameters["rope_theta"]),
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": [token for token, _ in vocabulary],
        "tokenizer.ggml.token_type": [3 if token in special else 1 for token, _ in vocabulary],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in backend["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.chat_template": CHATML,
    }
    if (width := getattr(config, "head_dim", None)) is not None:
        metadata[f"{name}.attention.key_length"] = width
    writer = gguf.GGUFWriter(file, name)
    for key, value in (metadata | (fields or {})).items():
        if key in leave_out:
            continue
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_uint32(key, value)
    stored = {gguf_name(key): tensor for key, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        stored.pop("output.weight", None)
    for key, tensor in stored.items():
        values = tensor.to(torch.float32).numpy()
        heads = config.num_attention_heads if ".attn_q." in key else config.num_key_value_heads
        if name == "llama" and (".attn_q." in key or ".attn_k." in key):
            values = _pairs_together(values, heads)
        if key in leave_out:
            continue
        if values.ndim == 1 or kind == Kind.F32:
            writer.add_tensor(key, values)
        else:
            writer.add_tensor(key, gguf.quantize(values, kind), raw_dtype=kind)
    for key, values in (tensors or {}).items():
        writer.add_tensor(key, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file
