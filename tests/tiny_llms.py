"""Tiny language models of every family, in the files that their authors publish."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tiny_models import randomize
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.trainers import BpeTrainer
from transformers import (
    GlmConfig,
    GlmForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

from mono_internvl.released.keys import fuse_wqkv

TRAINED_LENGTH = 32
"""Positions that the tiny models were "trained" on; what is longer needs their rotary scaling."""


@dataclass(frozen=True)
class TinyLLM:
    """A version of a family at tiny size.

    Attributes:
        config_class: Of transformers.
        model_class: Of transformers; computes what ours has to compute.
        fields: What makes this version differ.
        rewrite: Turns the written files into another layout, where transformers has no class.
    """

    config_class: type[PreTrainedConfig]
    model_class: type[PreTrainedModel]
    fields: dict[str, Any] = field(default_factory=dict)
    rewrite: Callable[[Path, PreTrainedModel], None] | None = None

    def write(self, folder: Path, **fields: Any) -> PreTrainedModel:
        """Write config, weights in several files, and tokenizer; return the reference."""
        tokenizer = tiny_tokenizer()
        config = self.config_class(
            **{
                "vocab_size": len(tokenizer),
                "hidden_size": 64,
                "intermediate_size": 96,
                "num_hidden_layers": 4,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "max_position_embeddings": TRAINED_LENGTH,
                "pad_token_id": 2,
                "bos_token_id": 1,
                "eos_token_id": 2,
                "tie_word_embeddings": False,
                **self.fields,
                **fields,
            }
        )
        model = self.model_class(config).eval()
        randomize(model)
        model.save_pretrained(folder, max_shard_size="100KB")
        assert (folder / "model.safetensors.index.json").is_file()
        tokenizer.save_pretrained(folder)
        if self.rewrite is not None:
            self.rewrite(folder, model)
        return model


def _as_internlm3(folder: Path, model: PreTrainedModel) -> None:
    """InternLM3's own words in config.json; its tensors have Llama's names."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    rope = config.pop("rope_parameters")
    config |= {
        "model_type": "internlm3",
        "architectures": ["InternLM3ForCausalLM"],
        "auto_map": {"AutoModelForCausalLM": "modeling_internlm3.InternLM3ForCausalLM"},
        "rope_theta": rope.pop("rope_theta"),
        "rope_scaling": rope,
        "qkv_bias": config.pop("attention_bias"),
        "bias": config.pop("mlp_bias"),
    }
    del config["pretraining_tp"]
    file.write_text(json.dumps(config))


def _as_internlm2(folder: Path, model: PreTrainedModel) -> None:
    """InternLM2's layout: fused wqkv, its own names, older words in config.json."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    rope = config.pop("rope_parameters")
    theta, kind = rope.pop("rope_theta"), rope.pop("rope_type")
    config |= {
        "model_type": "internlm2",
        "architectures": ["InternLM2ForCausalLM"],
        "auto_map": {"AutoModelForCausalLM": "modeling_internlm2.InternLM2ForCausalLM"},
        "attn_implementation": "eager",
        "rope_theta": theta,
        "rope_scaling": None if kind == "default" else {"type": kind, **rope},
        "bias": config.pop("attention_bias"),
    }
    for name in ("mlp_bias", "head_dim"):
        del config[name]
    file.write_text(json.dumps(config))
    stored: dict[str, torch.Tensor] = {}
    for shard in folder.glob("*.safetensors"):
        stored |= load_file(shard)
        shard.unlink()
    (folder / "model.safetensors.index.json").unlink()
    save_file(internlm2_names(stored, model.config), folder / "model.safetensors")


def internlm2_names(llama: dict[str, torch.Tensor], config: Any) -> dict[str, torch.Tensor]:
    """Llama's tensors under InternLM2's names, the projections fused."""
    names = {
        "model.embed_tokens": "model.tok_embeddings",
        "lm_head": "output",
        "self_attn.o_proj": "attention.wo",
        "mlp.gate_proj": "feed_forward.w1",
        "mlp.up_proj": "feed_forward.w3",
        "mlp.down_proj": "feed_forward.w2",
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    out: dict[str, torch.Tensor] = {}
    for key, tensor in llama.items():
        if ".q_proj." in key:
            q, k, v = (llama[key.replace("q_proj", f"{x}_proj")] for x in "qkv")
            fused = fuse_wqkv(q, k, v, config.num_key_value_heads, config.head_dim)
            out[key.replace("self_attn.q_proj", "attention.wqkv")] = fused.contiguous()
        elif ".k_proj." not in key and ".v_proj." not in key:
            old = next((name for name in names if name in key), None)
            out[key.replace(old, names[old]) if old else key] = tensor
    return out


def _rope(kind: str, theta: float, **fields: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **fields}}


_LLAMA3 = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": TRAINED_LENGTH // 2,
}
_DYNAMIC = _rope("dynamic", 10_000.0, factor=2.0)

_MULTIPLIERS = {
    "embedding_multiplier": 12.0,
    "logits_scaling": 8.0,
    "residual_multiplier": 0.22,
    "attention_multiplier": 0.125,
}

TINY_LLMS: dict[str, TinyLLM] = {
    "glm-4-9b": TinyLLM(
        GlmConfig, GlmForCausalLM, {**_rope("default", 1e4), "head_dim": 32, "num_hidden_layers": 3}
    ),
    "granite3": TinyLLM(
        GraniteConfig,
        GraniteForCausalLM,
        {**_rope("default", 1e7), **_MULTIPLIERS, "tie_word_embeddings": True},
    ),
    "granite3-untied": TinyLLM(
        GraniteConfig,
        GraniteForCausalLM,
        {**_rope("default", 1e7), **_MULTIPLIERS, "attention_bias": True},
    ),
    "internlm2": TinyLLM(LlamaConfig, LlamaForCausalLM, _rope("default", 1e6), _as_internlm2),
    "internlm2.5": TinyLLM(
        LlamaConfig, LlamaForCausalLM, {**_DYNAMIC, "attention_bias": True}, _as_internlm2
    ),
    "internlm3": TinyLLM(
        LlamaConfig, LlamaForCausalLM, {**_DYNAMIC, "head_dim": 32}, _as_internlm3
    ),
    "llama2": TinyLLM(
        LlamaConfig, LlamaForCausalLM, {**_rope("default", 1e4), "num_key_value_heads": 4}
    ),
    "llama2-linear": TinyLLM(LlamaConfig, LlamaForCausalLM, _rope("linear", 1e4, factor=4.0)),
    "llama3.1": TinyLLM(
        LlamaConfig, LlamaForCausalLM, _rope("llama3", 500_000.0, factor=8.0, **_LLAMA3)
    ),
    "llama3.2": TinyLLM(
        LlamaConfig,
        LlamaForCausalLM,
        {
            **_rope("llama3", 500_000.0, factor=32.0, **_LLAMA3),
            "tie_word_embeddings": True,
            "head_dim": 32,
            "pad_token_id": None,
            "eos_token_id": [2, 3],
        },
    ),
    "mistral-v0.1": TinyLLM(
        MistralConfig, MistralForCausalLM, {**_rope("default", 1e4), "sliding_window": 9}
    ),
    "mistral-v0.3": TinyLLM(
        MistralConfig,
        MistralForCausalLM,
        {**_rope("default", 1e6), "sliding_window": None, "head_dim": 8},
    ),
    "phi3-4k": TinyLLM(Phi3Config, Phi3ForCausalLM, {**_rope("default", 1e4), "sliding_window": 9}),
    "phi4": TinyLLM(Phi3Config, Phi3ForCausalLM, _rope("default", 250_000.0)),
    "qwen2": TinyLLM(
        Qwen2Config,
        Qwen2ForCausalLM,
        {
            **_rope("default", 1e6),
            "tie_word_embeddings": True,
            "use_sliding_window": True,
            "sliding_window": 9,
            "max_window_layers": 2,
        },
    ),
    "qwen2.5": TinyLLM(
        Qwen2Config,
        Qwen2ForCausalLM,
        _rope("yarn", 1e6, factor=4.0, original_max_position_embeddings=TRAINED_LENGTH // 2),
    ),
    "qwen3": TinyLLM(
        Qwen3Config,
        Qwen3ForCausalLM,
        {**_rope("default", 1e6), "head_dim": 32, "tie_word_embeddings": True},
    ),
    "qwen3-yarn": TinyLLM(
        Qwen3Config, Qwen3ForCausalLM, {**_rope("yarn", 1e6, factor=2.0), "head_dim": 32}
    ),
    "smollm2": TinyLLM(
        LlamaConfig,
        LlamaForCausalLM,
        {**_rope("default", 1e5), "tie_word_embeddings": True, "num_key_value_heads": 1},
    ),
    "smollm3": TinyLLM(
        SmolLM3Config, SmolLM3ForCausalLM, {**_rope("default", 5e6), "tie_word_embeddings": True}
    ),
    "smollm3-sliding": TinyLLM(
        SmolLM3Config,
        SmolLM3ForCausalLM,
        {**_rope("yarn", 2e6, factor=2.0), "use_sliding_window": True, "sliding_window": 9},
    ),
}
"""Version -> how to make it; the name says which published models have this shape."""


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE(unk_token=None))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(["a red circle"], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
