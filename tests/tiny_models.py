"""Tiny models with random weights, big enough to be wrong."""

from typing import Any

import torch
from torch import Tensor

from mono_internvl.configuration.model import (
    MonoInternVLConfig,
    MonoInternVLTextConfig,
    MonoInternVLVisionConfig,
)
from mono_internvl.model.modeling import MonoInternVLForConditionalGeneration

VOCAB, IMAGE_SIZE, TOKENS_PER_TILE = 128, 56, 4
IMAGE_TOKEN = VOCAB - 7
ALL_EXPERTS = ("ffn", "qkv", "o", "norms")


def tiny_config(visual_experts: tuple[str, ...] = ("ffn",), **text: Any) -> MonoInternVLConfig:
    """A monolithic configuration of a few thousand weights; `text` overrides decoder fields."""
    fields: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
    }
    return MonoInternVLConfig(
        text_config=MonoInternVLTextConfig(**{**fields, **text}),
        vision_config=MonoInternVLVisionConfig(hidden_size=32, image_size=IMAGE_SIZE),
        visual_experts=visual_experts,
    )


def randomize(model: torch.nn.Module, seed: int = 0) -> None:
    """Give every weight a value that matters: norms near 1, biases not 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(1 + 0.1 * noise if "norm" in name and p.dim() == 1 else 0.15 * noise)


def tiny_model(
    visual_experts: tuple[str, ...] = ("ffn",), attention: str = "eager", **text: Any
) -> MonoInternVLForConditionalGeneration:
    """A tiny model in eval mode."""
    config = tiny_config(visual_experts, **text)
    config._attn_implementation = attention
    model = MonoInternVLForConditionalGeneration(config).eval()
    model.set_attn_implementation(attention)
    randomize(model)
    return model


def text_ids(length: int, seed: int = 0) -> Tensor:
    """(1, length) ids of ordinary tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB - 9, (1, length), generator=generator)


def image_ids(tiles: int = 1) -> Tensor:
    """(1, 2 + 4 * tiles) ids of one image."""
    context = [IMAGE_TOKEN] * (TOKENS_PER_TILE * tiles)
    return torch.tensor([[IMAGE_TOKEN - 2, *context, IMAGE_TOKEN - 1]])


def tile_pixels(tiles: int = 1, seed: int = 0) -> Tensor:
    """(tiles, 3, S, S) pixels."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tiles, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)


def tile_after_tile(is_visual: Tensor, per_tile: int = TOKENS_PER_TILE) -> Tensor:
    """(visual tokens, 2) tile and feature of it, of visual tokens that stand tile after tile."""
    order = torch.arange(int(is_visual.sum()))
    return torch.stack((order // per_tile, order % per_tile), dim=1)
