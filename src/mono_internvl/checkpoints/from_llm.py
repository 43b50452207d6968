"""From a plain language model to a monolithic one, and back.

The text weights are copied, every visual expert starts as a copy of its text expert, and the
vocabulary grows by the nine visual tokens. Only patch embedding and projector start fresh.

Source: arXiv 2410.08202, sections 3.1 and 4.2: visual experts are initialised from the pre-trained
FFNs.
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

from mono_internvl.checkpoints.llm_families import (
    SHARED_FIELDS,
    family_of,
    read_text_config,
    stored_name,
    unpacked,
)
from mono_internvl.configuration.model import MonoInternVLConfig, MonoInternVLVisionConfig
from mono_internvl.errors import CheckpointError, ConfigError
from mono_internvl.model.modeling import MonoInternVLForConditionalGeneration
from mono_internvl.processing.prompts import IMAGE_CONTEXT, VISUAL_TOKENS
from mono_internvl.processing.tokenizer import MonoInternVLTokenizer, load_tokenizer
from mono_internvl.released.keys import split_wqkv
from mono_internvl.released.weight_files import iterate_tensors

_READ = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class MonolithicStart:
    """Where EViP starts: a monolithic model that still says exactly what its language model said.

    Attributes:
        model: In eval mode; text experts from the language model, visual experts copied from them.
        tokenizer: The language model's, with the nine visual tokens at its end.
    """

    model: MonoInternVLForConditionalGeneration
    tokenizer: MonoInternVLTokenizer


def monolithic_from_llm(
    llm_folder: str | Path,
    *,
    vision: MonoInternVLVisionConfig,
    visual_experts: Sequence[str] = ("ffn",),
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    more_tokens: Sequence[str] = (),
    **config_fields: Any,
) -> MonolithicStart:
    """Make a monolithic model from a language model of a known family.

    The new model is made in `dtype`, and its weights are read one tensor at a time.

    Args:
        llm_folder: With config.json (`llm_families.FAMILIES`), safetensors (in one file or several)
            and `tokenizer.json` or `tokenizer.model`.
        vision: Tile and patch size and width of the patch embedding.
        visual_experts: Which parts of each layer get a visual copy.
        seed: Of the patch embedding's and the projector's initial weights; the global random
            state is left alone.
        dtype: Of the new model's weights.
        more_tokens: Control tokens that the vocabulary gets before the nine visual ones, if it does
            not have them: those of a chat template that the language model was not trained on.
        **config_fields: More fields of `MonoInternVLConfig` (`max_dynamic_patch`, ...).

    Returns:
        The model and the tokenizer that belongs to it.

    Raises:
        ConfigError: The language model asks for something our decoder does not do, or its tokenizer
            holds visual tokens already; the message names it.
        CheckpointError: The weights are incomplete or of another shape.
    """
    folder = Path(llm_folder)
    text = read_text_config(folder)
    tokenizer = load_tokenizer(folder)
    num_old_tokens = _num_ids(tokenizer)
    if num_old_tokens > text.vocab_size:
        raise ConfigError(
            f"{folder}: the tokenizer has {num_old_tokens} tokens but vocab_size is "
            f"{text.vocab_size}; take the tokenizer that the language model was trained with"
        )
    _append_tokens(tokenizer, more_tokens, folder)
    # Rows past the tokenizer's last id (padding to a round number) stand for nothing and go.
    text.vocab_size = _num_ids(tokenizer)
    if text.pad_token_id is not None and not 0 <= text.pad_token_id < num_old_tokens:
        text.pad_token_id = None  # -1 and the like: no token
    config = MonoInternVLConfig(
        text_config=text,
        vision_config=vision,
        visual_experts=tuple(visual_experts),
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_CONTEXT),
        **config_fields,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = MonoInternVLForConditionalGeneration._from_config(config, dtype=dtype)
    _load_text_weights(model, folder, num_old_tokens)
    copy_text_to_visual(model)
    return MonolithicStart(model.eval(), tokenizer)


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
    part = text.rope_parameters.get("partial_rotary_factor")
    if part is not None:
        raise ConfigError(f"partial_rotary_factor={part}: Llama turns all of a head")
    if text.qk_norm or text.qkv_bias != text.o_bias or text.sliding_layers or text.no_rope_layers:
        raise ConfigError(
            f"qk_norm={text.qk_norm}, qkv_bias={text.qkv_bias}, o_bias={text.o_bias}, "
            f"sliding_layers={text.sliding_layers}, no_rope_layers={text.no_rope_layers}: Llama "
            "has no query and key norms, one attention_bias for all four projections, equal layers"
        )
    llama = LlamaConfig(
        vocab_size=text.vocab_size,
        attention_bias=text.qkv_bias,
        rope_parameters=dict(text.rope_parameters),
        architectures=["LlamaForCausalLM"],
        dtype=model.dtype,
        **{name: getattr(text, name) for name in SHARED_FIELDS},
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


def _num_ids(tokenizer: PreTrainedTokenizerFast) -> int:
    """One more than the highest id; ids may have gaps."""
    return int(max(tokenizer.get_vocab().values())) + 1


def _append_tokens(
    tokenizer: PreTrainedTokenizerFast, more_tokens: Sequence[str], folder: Path
) -> None:
    vocabulary = tokenizer.get_vocab()
    present = [token for token in VISUAL_TOKENS if token in vocabulary]
    if present:
        raise ConfigError(
            f"{folder}: the tokenizer has {present[0]} already; expected a plain language model "
            "without visual tokens"
        )
    first = _num_ids(tokenizer)
    new = [*(token for token in more_tokens if token not in vocabulary), *VISUAL_TOKENS]
    added = [AddedToken(token, special=True, normalized=False) for token in new]
    tokenizer.add_tokens(added, special_tokens=True)
    ids = tokenizer.convert_tokens_to_ids(new)
    if ids != list(range(first, first + len(new))):
        raise ConfigError(
            f"{folder}: the tokenizer gave the new tokens the ids {ids}; expected them to follow "
            f"its last id, {first - 1}"
        )


@torch.no_grad()
def _load_text_weights(
    model: MonoInternVLForConditionalGeneration, folder: Path, num_old_tokens: int
) -> None:
    stored_config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    family, text = family_of(stored_config, str(folder)), model.config.text_config
    heads = text.num_key_value_heads, text.num_attention_heads // text.num_key_value_heads
    parameters = dict(model.named_parameters())
    wanted: dict[str, dict[int | None, nn.Parameter]] = {}
    for name, parameter in parameters.items():
        if name.startswith(("model.language_model.", "lm_head.")) and "_visual." not in name:
            key, place = stored_name(name, family)
            wanted.setdefault(key, {})[place] = parameter
    table, _ = stored_name("model.language_model.embed_tokens.weight", family)
    head, _ = stored_name("lm_head.weight", family)
    for key, tensor in unpacked(stored_config, family, iterate_tensors(folder)):
        if key == head and model.config.tie_word_embeddings:
            continue
        if key not in wanted:
            raise CheckpointError(
                f"{folder}: unexpected tensor {key}; expected a {family.architecture} checkpoint"
            )
        if tensor.dtype not in _READ:
            raise CheckpointError(
                f"{folder}: {key} is {tensor.dtype}; expected floating-point weights, quantised "
                "ones cannot be read"
            )
        targets = wanted.pop(key)
        if key in (table, head):
            tensor = _with_mean_rows(tensor[:num_old_tokens], text.vocab_size)
        rows = sum(parameter.shape[0] for parameter in targets.values())
        expected = (rows, *next(iter(targets.values())).shape[1:])
        if tensor.shape != expected:
            raise CheckpointError(
                f"{folder}: {key} has shape {tuple(tensor.shape)}, config.json asks for {expected}"
            )
        if None in targets:
            targets[None].copy_(tensor)
            continue
        for place, part in enumerate(split_wqkv(tensor, *heads, text.head_dim)):
            targets[place].copy_(part)
    if wanted:
        raise CheckpointError(f"{folder}: {len(wanted)} tensors missing, first {min(wanted)}")


def _with_mean_rows(rows: Tensor, count: int) -> Tensor:
    """(V, D) -> (count, D): the new rows are the mean of the old ones, taken in fp32."""
    mean = rows.float().mean(dim=0, keepdim=True).to(rows.dtype)
    return torch.cat((rows, mean.expand(count - len(rows), -1)))


def _llama_name(name: str) -> str:
    return name.replace("model.language_model.", "model.", 1)
