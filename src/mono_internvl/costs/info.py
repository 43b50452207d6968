"""`mono-internvl info`: what a model is made of, what a prompt costs, what a recipe trains."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from mono_internvl.configuration.model import MonoInternVLConfig
from mono_internvl.costs.inference import (
    Costs,
    ParameterCounts,
    parameter_table,
    prompt_costs,
    skeleton,
    tiles_of,
)
from mono_internvl.errors import ConfigError
from mono_internvl.model.layers import slides
from mono_internvl.processing.images import MonoInternVLImageProcessor
from mono_internvl.training.recipe import Recipe
from mono_internvl.training.rules import apply_rules

TOKENS_FORM = "visual=768,text=256 or image=1344x1008,text=256"
_IMAGE_SIZE = re.compile(r"([1-9]\d{0,5})x([1-9]\d{0,5})")


@dataclass(frozen=True)
class ModelInfo:
    """A model in numbers.

    Attributes:
        parameters: In total, activated per token, and by part.
        config: What the configuration says, for people.
        trainable: Stage of the recipe -> parameters that learn in it; None without a recipe.
        costs: Of one prompt; None where none was asked for.
    """

    parameters: ParameterCounts
    config: Mapping[str, Any]
    trainable: Mapping[str, int] | None = None
    costs: Costs | None = None


def describe(
    config: MonoInternVLConfig, tokens: str | None = None, recipe: Recipe | None = None
) -> ModelInfo:
    """Count what can be counted without weights.

    Args:
        config: Of the model.
        tokens: A prompt, as `visual=768,text=256`; a part left out is 0. Or with the size of images
            in px, as `image=1344x1008,text=256`.
        recipe: Its stages are held against the model's parameters.

    Raises:
        ConfigError: `tokens` cannot be read, or its visual tokens are no whole tiles.
        RecipeError: The rules of the recipe do not fit the model.
    """
    costs = None
    if tokens is not None:
        visual, text, sizes = parse_tokens(tokens)
        cutter, tiles = MonoInternVLImageProcessor.from_config(config), None
        if sizes:
            layouts = [cutter.layout_of(*size) for size in sizes]
            tiles = tiles_of(config, visual) + sum(layout.num_tiles for layout in layouts)
            visual += sum(layout.num_tokens for layout in layouts)
        costs = prompt_costs(config, visual, text, config.dtype or torch.bfloat16, tiles)
    return ModelInfo(
        parameters=parameter_table(config),
        config=_summary(config),
        trainable=None if recipe is None else trainable_parameters(config, recipe),
        costs=costs,
    )


def parse_tokens(tokens: str) -> tuple[int, int, list[tuple[int, int]]]:
    """Visual and text tokens of `visual=768,text=256`, in any order, and sizes of `image=448x448`.

    Returns:
        Visual tokens, text tokens, and (width, height) of images, px.

    Raises:
        ConfigError: A part is none of the three, or `visual` or `text` stands there twice.
    """
    counts: dict[str, int] = {}
    sizes = []
    for part in tokens.split(","):
        name, _, number = (word.strip() for word in part.partition("="))
        if name == "image" and (size := _IMAGE_SIZE.fullmatch(number)):
            sizes.append((int(size[1]), int(size[2])))
        elif name not in ("visual", "text") or name in counts or not number.isdecimal():
            raise ConfigError(f"tokens={tokens!r}: {part!r}; expected e.g. {TOKENS_FORM}")
        else:
            counts[name] = int(number)
    return counts.get("visual", 0), counts.get("text", 0), sizes


def trainable_parameters(config: MonoInternVLConfig, recipe: Recipe) -> dict[str, int]:
    """Parameters that learn in each stage of a recipe, by the rules that training applies."""
    model, counts = skeleton(config), {}
    for stage in recipe.stages:
        apply_rules(model, config, stage)
        counts[stage.name] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return counts


def _summary(config: MonoInternVLConfig) -> dict[str, Any]:
    text, vision = config.text_config, config.vision_config
    layers = range(text.num_hidden_layers)
    # Shown where they are not as in the released models.
    options = {
        "tiling": (config.tiling, "internvl"),
        "image_attention": (config.image_attention, "causal"),
        "visual_position_step": (config.visual_position_step, 1.0),
        "visual_position_steps": (list(config.visual_position_steps), []),
        "sliding_window": (text.sliding_window, None),
        "sliding_layers": (sum(slides(text, layer) for layer in layers), 0),
        "layers_without_rope": (list(text.no_rope_layers or ()).count(0), 0),
    }
    tower = {
        "vision_layers": vision.num_hidden_layers,
        "vision_width": vision.hidden_size,
        "vision_heads": vision.num_attention_heads,
    }
    return {
        "layers": text.num_hidden_layers,
        "width": text.hidden_size,
        "ffn_width": text.intermediate_size,
        "heads": text.num_attention_heads,
        "kv_heads": text.num_key_value_heads,
        "vocabulary": text.vocab_size,
        "max_tokens": text.max_position_embeddings,
        "rope": text.rope_parameters,
        "visual_experts": list(config.visual_experts),
        **(tower if vision.kind == "vit" else {}),
        "tile_px": config.force_image_size,
        "visual_tokens_per_tile": config.num_image_tokens_per_tile,
        "max_tiles": config.max_dynamic_patch,
        **{name: value for name, (value, usual) in options.items() if value != usual},
    }
