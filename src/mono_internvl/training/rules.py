"""Which parameters are trainable: a stage's rules on a model, with nothing left to chance."""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import nn

from mono_internvl.configuration.model import MonoInternVLConfig
from mono_internvl.errors import RecipeError
from mono_internvl.training.recipe import Rule, Stage


@dataclass(frozen=True)
class TrainableGroup:
    """Parameters that share a rate and a weight decay.

    Attributes:
        names: Of the parameters, in the model's order.
        learning_rate: Peak rate.
        weight_decay: 0 for vectors (norms, biases).
    """

    names: tuple[str, ...]
    learning_rate: float
    weight_decay: float


def always_frozen(config: MonoInternVLConfig) -> tuple[Rule, ...]:
    """Parameters whose outputs no loss ever reads; they are frozen before any other rule.

    The class embedding belongs to a class token that only a vision tower reads; of a tower, layers
    behind the hidden state that is asked for never run. In the last layer of the decoder, visual
    rows feed only their own logits, which are never labelled, so their feed-forward expert, and
    where they exist their query and output projections and their feed-forward norm, get exactly
    zero gradient; a plain optimizer would still shrink them by weight decay.
    """
    last = config.get_text_config().num_hidden_layers - 1
    layer = rf"language_model\.layers\.{last}\."
    rules = {
        "ffn": layer + r"mlp_visual\.",
        "qkv": layer + r"self_attn\.q_proj_visual\.",
        "o": layer + r"self_attn\.o_proj_visual\.",
        "norms": layer + r"post_attention_layernorm_visual\.",
    }
    vision, of_vision = config.vision_config, []
    num_run = vision.layers_until(config.select_layer) if vision.kind == "vit" else 0
    if num_run == 0:
        of_vision.append(r"vision_embedder\.class_embedding$")
    if vision.kind == "vit":
        unread = range(num_run, vision.num_hidden_layers)
        of_vision += [rf"vision_tower\.layers\.{index}\." for index in unread]
    of_decoder = [pattern for part, pattern in rules.items() if part in config.visual_experts]
    return tuple(Rule(pattern, None) for pattern in (*of_vision, *of_decoder))


def apply_rules(model: nn.Module, config: MonoInternVLConfig, stage: Stage) -> list[TrainableGroup]:
    """Set `requires_grad` of every parameter by the stage's rules.

    Returns:
        The trainable groups.

    Raises:
        RecipeError: A parameter that no rule covers, a rule that decides nothing, a bad pattern, or
            a stage in which nothing is trainable.
    """
    rules = (*always_frozen(config), *stage.rules)
    try:
        patterns = [re.compile(rule.pattern) for rule in rules]
    except re.error as error:
        raise RecipeError(
            f"stage {stage.name!r}: bad pattern {error.pattern!r}: {error}"
        ) from error
    decided = [0] * len(rules)
    groups: dict[tuple[float, float], list[str]] = {}
    for name, parameter in model.named_parameters():
        index = next((i for i, pattern in enumerate(patterns) if pattern.search(name)), None)
        if index is None:
            raise RecipeError(
                f"stage {stage.name!r}: no rule covers parameter {name}; "
                'end the rules with Rule(".*", None) to freeze the rest'
            )
        decided[index] += 1
        rate = rules[index].learning_rate
        parameter.requires_grad_(rate is not None)
        if rate is not None:
            decay = stage.weight_decay if parameter.ndim >= 2 else 0.0
            groups.setdefault((rate, decay), []).append(name)
    dead = [rule.pattern for rule, count in zip(rules, decided, strict=True) if not count]
    if dead:
        raise RecipeError(
            f"stage {stage.name!r}: rule {dead[0]!r} decides no parameter; it is misspelt, does "
            "not fit this model, or stands behind a rule that takes all it would"
        )
    if not groups:
        raise RecipeError(f"stage {stage.name!r}: every rule freezes, nothing is trainable")
    return [TrainableGroup(tuple(names), rate, decay) for (rate, decay), names in groups.items()]
