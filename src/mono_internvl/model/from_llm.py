"""From a plain language model to a monolithic one, and back.

The text weights are copied, every visual expert starts as a copy of its text expert, and the
vocabulary grows by the nine visual tokens. Only patch embedding and projector start fresh.

Source: arXiv 2410.08202, section 3.2: visual experts are initialised from the pre-trained FFNs.
Differs: the released code leaves the embedding rows of new tokens at random values; here the rows
of both embedding and head are the mean of the old ones.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken
from torch import Tensor, nn
from transformers import LlamaConfig, PreTrainedTokenizerFast

from mono_internvl.errors import CheckpointError, ConfigError
from mono_internvl.model.checkpoint import iterate_tensors
from mono_internvl.model.configuration import (
    ROPE_TYPES,
    MonoInternVLConfig,
    MonoInternVLTextConfig,
    MonoInternVLVisionConfig,
)
from mono_internvl.model.modeling import MonoInternVLForConditionalGeneration
from mono_internvl.model.prompts import IMAGE_CONTEXT, VISUAL_TOKENS

# What Llama and our decoder call by the same name.
_SHARED_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
    "attention_dropout",
)
# What is translated, and what says nothing about the mathematics.
_UNDERSTOOD_FIELDS = frozenset(
    (
        *_SHARED_FIELDS,
        *("vocab_size", "attention_bias", "mlp_bias", "rope_parameters", "rope_theta"),
        *("rope_scaling", "pretraining_tp", "model_type", "architectures", "use_cache", "dtype"),
        *("torch_dtype", "transformers_version", "_name_or_path"),
    )
)
_ROPE_FIELDS = frozenset(("rope_type", "type", "rope_theta", "factor"))


@dataclass(frozen=True)
class MonolithicStart:
    """Where EViP starts: a monolithic model that still says exactly what its language model said.

    Attributes:
        model: In eval mode; text experts from the language model, visual experts copied from them.
        tokenizer: The language model's, with the nine visual tokens at its end.
    """

    model: MonoInternVLForConditionalGeneration
    tokenizer: PreTrainedTokenizerFast


def monolithic_from_llama(
    llm_folder: str | Path,
    *,
    vision: MonoInternVLVisionConfig,
    visual_experts: Sequence[str] = ("ffn",),
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    **config_fields: Any,
) -> MonolithicStart:
    """Make a monolithic model from a language model of the Llama architecture.

    Args:
        llm_folder: With `config.json` (`model_type: llama`), safetensors and `tokenizer.json`.
        vision: Tile and patch size and width of the patch embedding.
        visual_experts: Which parts of each layer get a visual copy.
        seed: Of the patch embedding's and the projector's initial weights; the global random
            state is left alone.
        dtype: Of the new model's weights.
        **config_fields: More fields of `MonoInternVLConfig` (`max_dynamic_patch`, ...).

    Returns:
        The model and the tokenizer that belongs to it.

    Raises:
        ConfigError: The language model asks for something our decoder does not do, or its tokenizer
            holds visual tokens already; the message names it.
        CheckpointError: The weights are incomplete or of another shape.
    """
    folder = Path(llm_folder)
    text = text_config_from_llama(folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    num_old_tokens = len(tokenizer)
    if num_old_tokens > text.vocab_size:
        raise ConfigError(
            f"{folder}: the tokenizer has {num_old_tokens} tokens but vocab_size is "
            f"{text.vocab_size}; take the tokenizer that the language model was trained with"
        )
    _append_visual_tokens(tokenizer, folder)
    # Rows past the tokenizer's last id (padding to a round number) stand for nothing and go.
    text.vocab_size = len(tokenizer)
    config = MonoInternVLConfig(
        text_config=text,
        vision_config=vision,
        visual_experts=tuple(visual_experts),
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_CONTEXT),
        **config_fields,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = MonoInternVLForConditionalGeneration(config)
    _load_text_weights(model, folder, num_old_tokens)
    copy_text_to_visual(model)
    return MonolithicStart(model.to(dtype).eval(), tokenizer)


def text_config_from_llama(folder: Path) -> MonoInternVLTextConfig:
    """Our decoder's configuration for a Llama checkpoint.

    Raises:
        CheckpointError: There is no readable config.json.
        ConfigError: A field asks for what our decoder does not do.
    """
    file = folder / "config.json"
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{file}: not a readable config.json ({error})") from error
    if stored.get("model_type") != "llama":
        raise ConfigError(
            f"{file}: model_type={stored.get('model_type')!r}; expected 'llama', the one "
            "language-model family that can be converted"
        )
    defaults = LlamaConfig().to_dict()
    for name, value in stored.items():
        harmless = value is None or value is False or value == defaults.get(name)
        if name not in _UNDERSTOOD_FIELDS and not harmless:
            raise ConfigError(f"{file}: {name}={value!r} is not something this decoder does")
    if stored.get("mlp_bias"):
        raise ConfigError(f"{file}: mlp_bias=True; the experts of this decoder have no bias")

    _check_rope(stored.get("rope_parameters") or stored.get("rope_scaling") or {}, file)
    llama = LlamaConfig.from_dict(stored)
    rope = {k: v for k, v in llama.rope_parameters.items() if k in _ROPE_FIELDS and k != "type"}
    return MonoInternVLTextConfig(
        vocab_size=llama.vocab_size,
        qkv_bias=llama.attention_bias,
        o_bias=llama.attention_bias,
        rope_parameters=rope,
        **{name: getattr(llama, name) for name in _SHARED_FIELDS},
    )


def _check_rope(rope: dict[str, Any], file: Path) -> None:
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in ROPE_TYPES:
        raise ConfigError(
            f"{file}: rope_type={rope_type!r} is not implemented; known: {', '.join(ROPE_TYPES)}"
        )
    unknown = sorted(name for name in rope.keys() - _ROPE_FIELDS if rope[name] is not None)
    if unknown:
        raise ConfigError(f"{file}: rope parameter {unknown[0]}={rope[unknown[0]]!r} is not known")


@torch.no_grad()
def copy_text_to_visual(model: nn.Module) -> None:
    """Give every visual expert the weights of the text module that it is a copy of, in place.

    A visual module is recognised by its suffix `_visual`, so that whatever `visual_experts` names
    is covered: feed-forward, projections, norms.
    """
    for name, module in model.named_modules():
        if name.endswith("_visual"):
            text = model.get_submodule(name.removesuffix("_visual"))
            module.load_state_dict(text.state_dict())


def export_llama(
    model: MonoInternVLForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    folder: str | Path,
) -> None:
    """Write the language model of a model without visual experts as a plain Llama checkpoint.

    The patch embedding and the projector are left out.

    Args:
        model: With `visual_experts=()`.
        tokenizer: Saved beside the weights as it is.
        folder: Made if it is not there.

    Raises:
        ConfigError: Llama cannot say what this model does.
    """
    config, text = model.config, model.config.text_config
    if config.visual_experts:
        raise ConfigError(
            f"visual_experts={config.visual_experts}: Llama has no visual experts; "
            "export a model that was made with visual_experts=()"
        )
    if text.qk_norm or text.qkv_bias != text.o_bias:
        raise ConfigError(
            f"qk_norm={text.qk_norm}, qkv_bias={text.qkv_bias}, o_bias={text.o_bias}: Llama has no "
            "query and key norms, and one attention_bias for all four projections"
        )
    llama = LlamaConfig(
        vocab_size=text.vocab_size,
        attention_bias=text.qkv_bias,
        rope_parameters=dict(text.rope_parameters),
        architectures=["LlamaForCausalLM"],
        dtype=model.dtype,
        **{name: getattr(text, name) for name in _SHARED_FIELDS},
    )
    tensors = {
        _llama_name(name): p.detach().cpu().contiguous()
        for name, p in model.named_parameters()
        if name.startswith(("model.language_model.", "lm_head."))
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    llama.save_pretrained(folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save_pretrained(folder)


def _append_visual_tokens(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    vocabulary = tokenizer.get_vocab()
    present = [token for token in VISUAL_TOKENS if token in vocabulary]
    if present:
        raise ConfigError(
            f"{folder}: the tokenizer has {present[0]} already; expected a plain language model "
            "without visual tokens"
        )
    added = [AddedToken(token, special=True, normalized=False) for token in VISUAL_TOKENS]
    tokenizer.add_tokens(added, special_tokens=True)


@torch.no_grad()
def _load_text_weights(
    model: MonoInternVLForConditionalGeneration, folder: Path, num_old_tokens: int
) -> None:
    parameters = dict(model.named_parameters())
    wanted = {
        _llama_name(name): name
        for name in parameters
        if name.startswith(("model.language_model.", "lm_head.")) and "_visual." not in name
    }
    for key, tensor in iterate_tensors(folder):
        if key == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        if key not in wanted:
            raise CheckpointError(f"{folder}: unexpected tensor {key}; expected a Llama checkpoint")
        parameter = parameters[wanted.pop(key)]
        if key in ("model.embed_tokens.weight", "lm_head.weight"):
            tensor = _with_mean_rows(tensor[:num_old_tokens])
        if tensor.shape != parameter.shape:
            raise CheckpointError(
                f"{folder}: {key} has shape {tuple(tensor.shape)}, config.json asks for "
                f"{tuple(parameter.shape)}"
            )
        parameter.copy_(tensor)
    if wanted:
        raise CheckpointError(f"{folder}: {len(wanted)} tensors missing, first {min(wanted)}")


def _with_mean_rows(rows: Tensor) -> Tensor:
    """(V, D) -> (V + 9, D): the new rows are the mean of the old ones, taken in fp32."""
    mean = rows.float().mean(dim=0, keepdim=True).to(rows.dtype)
    return torch.cat((rows, mean.expand(len(VISUAL_TOKENS), -1)))


def _llama_name(name: str) -> str:
    return name.replace("model.language_model.", "model.", 1)
