"""Tensors of families that store or scale them in their own way, as Llama's that compute the same.

A decoder that differs from Llama's by what its weights can say gets no knob: fused projections are
taken apart, multipliers multiplied into weights, the rows of turned heads put in order. Each
function takes the family's configuration and one stored tensor, and gives tensors by Llama's names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

Unpack = Callable[[Any, str, Tensor], Iterator[tuple[str, Tensor]]]

MULTIPLIERS = (
    "embedding_multiplier",
    "logits_scaling",
    "residual_multiplier",
    "attention_multiplier",
)
"""Granite's: of the embedding, of both branches of a layer, of attention; logits are divided."""


def phi3_tensors(config: Any, key: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Phi-3: query, key and value in one projection, gate and up in another."""
    width = head_width(config)
    q, kv = config.num_attention_heads * width, config.num_key_value_heads * width
    yield from _split(key, tensor, "qkv_proj", {"q_proj": q, "k_proj": kv, "v_proj": kv}) or (
        _gate_and_up(config, key, tensor)
    )


def granite_tensors(config: Any, key: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Granite: its four multipliers become part of the weights."""
    head = 1 / config.logits_scaling
    if config.tie_word_embeddings:  # the head is the embedding, which is multiplied
        head /= config.embedding_multiplier
    by_name = {
        "embed_tokens": config.embedding_multiplier,
        "q_proj": config.attention_multiplier * head_width(config) ** 0.5,
        "o_proj": config.residual_multiplier,
        "down_proj": config.residual_multiplier,
    }
    factor = head if key == "model.norm.weight" else by_name.get(key.split(".")[-2], 1.0)
    yield key, tensor if factor == 1.0 else tensor.float() * factor


def glm_tensors(config: Any, key: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """GLM: gate and up in one projection; pairs that turn stand together, in part of each head."""
    name = key.split(".")[-2]
    if name in ("q_proj", "k_proj"):
        width = head_width(config)
        turned = int(width * config.rope_parameters["partial_rotary_factor"])
        firsts = [*range(0, turned, 2), *range(turned, width, 2)]  # what does not turn goes behind
        order = torch.tensor([*firsts, *(index + 1 for index in firsts)])
        if len(tensor) % width == 0:
            tensor = tensor.unflatten(0, (-1, width))[:, order].flatten(0, 1)
        yield key, tensor
        return
    yield from _gate_and_up(config, key, tensor)


def head_width(config: Any) -> int:
    """Width of an attention head."""
    given = getattr(config, "head_dim", None)
    return int(given or config.hidden_size // config.num_attention_heads)


def _gate_and_up(config: Any, key: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
    rows = {"gate_proj": config.intermediate_size, "up_proj": config.intermediate_size}
    return _split(key, tensor, "gate_up_proj", rows) or [(key, tensor)]


def _split(
    key: str, tensor: Tensor, fused: str, rows: Mapping[str, int]
) -> list[tuple[str, Tensor]]:
    """The parts of a fused projection; none if it is another tensor, or of another height."""
    if f".{fused}." not in key or len(tensor) != sum(rows.values()):
        return []
    parts = tensor.split(list(rows.values()))
    return [(key.replace(fused, name), part) for name, part in zip(rows, parts, strict=True)]
