"""Which parameters learn: the contract of every recipe, and what one step changes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch
from torch import Tensor, nn

from mono_internvl.errors import RecipeError
from mono_internvl.model.configuration import (
    MonoInternVLConfig,
    MonoInternVLTextConfig,
    MonoInternVLVisionConfig,
)
from mono_internvl.model.modeling import MonoInternVLForConditionalGeneration
from mono_internvl.recipes import RECIPES
from mono_internvl.recipes.miniature import LANGUAGE_MODEL, MINIATURE, VISION
from mono_internvl.training.loop import train_stage
from mono_internvl.training.recipe import Recipe, Rule, Stage
from mono_internvl.training.rules import apply_rules, never_learns

ALL_EXPERTS = ("ffn", "qkv", "o", "norms")


def _tiny(visual_experts: tuple[str, ...] = ("ffn",)) -> MonoInternVLForConditionalGeneration:
    text = {
        "vocab_size": 128,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    torch.manual_seed(0)
    config = MonoInternVLConfig(
        text_config=MonoInternVLTextConfig(**text),
        vision_config=MonoInternVLVisionConfig(hidden_size=16, image_size=56),
        visual_experts=visual_experts,
    )
    return MonoInternVLForConditionalGeneration(config)


def _config_of(recipe: Recipe) -> MonoInternVLConfig:
    if not recipe.name.startswith("miniature"):
        return MonoInternVLConfig()
    return MonoInternVLConfig(
        text_config=MonoInternVLTextConfig(vocab_size=1300, **LANGUAGE_MODEL),
        vision_config=MonoInternVLVisionConfig(**VISION),
        visual_experts=() if "language" in recipe.name else ("ffn",),
    )


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_recipe_covers_its_model_without_dead_rules(name: str) -> None:
    recipe = RECIPES[name]
    config = _config_of(recipe)
    with torch.device("meta"):
        model = MonoInternVLForConditionalGeneration(config)
    if not name.startswith("miniature"):
        assert sum(p.numel() for p in model.parameters()) == 3_111_355_392
    for stage in recipe.stages:
        groups = apply_rules(model, config, stage)
        named = [name for group in groups for name in group.names]
        assert len(named) == len(set(named))
        learning = {name for name, p in model.named_parameters() if p.requires_grad}
        assert learning == set(named)


def _learning(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("recipe", ["evip-2b", "miniature"])
def test_evip_stages_train_what_the_paper_says(recipe: str) -> None:
    model = _tiny()
    found = {}
    for stage in RECIPES[recipe].stages:
        apply_rules(model, model.config, stage)
        found[stage.name] = _learning(model)
    everything = {name for name, _ in model.named_parameters()}
    never = {n for n in everything if "class_embedding" in n or "layers.1.mlp_visual" in n}
    sees = {n for n in everything if re.search(r"vision_embedder|projector|mlp_visual", n)} - never
    attends = {n for n in everything if "self_attn" in n}
    assert found["s11"] == found["s12"] == sees
    assert found["s13"] == sees | attends
    assert found["s2"] == everything - never
    assert attends
    assert len(never) == 4


def _stage(*rules: Rule, **fields: Any) -> Stage:
    return tiny_runs.tiny_stage(rules=rules, **fields)


@pytest.mark.parametrize(
    ("rules", "complaint"),
    [
        ((Rule("self_attn", 1e-3),), "no rule covers parameter .*vision_embedder"),
        ((Rule("no_such_part", 1e-3), Rule(".*", None)), "'no_such_part' decides no parameter"),
        ((Rule(".*", 1e-3), Rule("self_attn", None)), "'self_attn' decides no parameter"),
        ((Rule("(", 1e-3),), r"bad pattern '\('"),
        ((Rule(".*", None),), "nothing would learn"),
        ((Rule("class_embedding", 1e-3), Rule(".*", 1e-3)), "class_embedding' decides no"),
    ],
    ids=["uncovered", "misspelt", "hidden", "bad_pattern", "all_frozen", "never_learns"],
)
def test_rules_that_do_not_fit_are_refused(rules: tuple[Rule, ...], complaint: str) -> None:
    model = _tiny()
    with pytest.raises(RecipeError, match=complaint):
        apply_rules(model, model.config, _stage(*rules))


def test_first_matching_rule_decides_and_vectors_do_not_decay() -> None:
    model = _tiny()
    rules = (Rule("norm", None), Rule("self_attn", 1e-4), Rule(".*", 1e-3))
    groups = apply_rules(model, model.config, _stage(*rules, weight_decay=0.1))
    parameters = dict(model.named_parameters())
    rate = {name: group.learning_rate for group in groups for name in group.names}
    decay = {name: group.weight_decay for group in groups for name in group.names}
    assert not any("norm" in name for name in rate)
    assert all((rate[name] == 1e-4) == ("self_attn" in name) for name in rate)
    assert all((decay[name] == 0.1) == (parameters[name].ndim >= 2) for name in rate)
    assert set(decay.values()) == {0.0, 0.1}


def _loss(model: MonoInternVLForConditionalGeneration) -> Tensor:
    """Of two rows, text, image, text; all text is learnt but the token that ends the image."""
    image = model.config.image_token_id
    ids = torch.randint(3, image - 3, (2, 14), generator=torch.Generator().manual_seed(1))
    ids[:, 4:8] = image
    labels = ids.clone()
    labels[:, 4:9] = -100
    pixels = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(2))
    loss: Tensor = model(ids, pixel_values=pixels, labels=labels).loss
    return loss


@pytest.mark.parametrize(
    "visual_experts", [("ffn",), ("ffn", "qkv"), ("ffn", "o"), ("ffn", "norms"), ALL_EXPERTS]
)
def test_never_learns_is_exactly_what_gets_no_gradient(visual_experts: tuple[str, ...]) -> None:
    model = _tiny(visual_experts)
    _loss(model).backward()
    silent = {
        name
        for name, p in model.named_parameters()
        if p.grad is None or not bool(p.grad.count_nonzero())
    }
    patterns = [rule.pattern for rule in never_learns(model.config)]
    named = {n for n, _ in model.named_parameters() if any(re.search(p, n) for p in patterns)}
    assert named == silent
    assert all(any(re.search(p, name) for name in named) for p in patterns)


@pytest.mark.parametrize("stage", MINIATURE.stages, ids=lambda stage: stage.name)
def test_one_step_changes_exactly_the_named_parameters(
    stage: Stage, start: Path, data: Path, tmp_path: Path
) -> None:
    one = tiny_runs.tiny_stage(rules=stage.rules, name=stage.name, steps=1, warmup_steps=1)
    result = train_stage(one, start, data, tmp_path / "run")
    load = MonoInternVLForConditionalGeneration.from_pretrained
    before, after = load(start), load(result.checkpoint)
    apply_rules(before, before.config, one)
    learning = _learning(before)
    old, new = dict(before.named_parameters()), dict(after.named_parameters())
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert changed == learning
    assert len(learning) < len(old)
