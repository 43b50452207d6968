"""Which parameters learn: the contract of every recipe, and what one step changes."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch
from torch import Tensor, nn

from mono_internvl.checkpoints.presets import preset
from mono_internvl.cli.recipes import RECIPES
from mono_internvl.configuration.model import (
    MonoInternVLConfig,
    MonoInternVLTextConfig,
    MonoInternVLVisionConfig,
)
from mono_internvl.configuration.options import EXPERT_PRESETS
from mono_internvl.errors import RecipeError
from mono_internvl.miniature.recipes import LANGUAGE_MODEL, MINIATURE, VISION
from mono_internvl.miniature.recipes_plus_plus import plus_plus
from mono_internvl.model.modeling import MonoInternVLForConditionalGeneration
from mono_internvl.recipes.evip_plus_plus import RATIO_TO_EVIP
from mono_internvl.recipes.groups import ATTENTION
from mono_internvl.training.loop import train_stage
from mono_internvl.training.recipe import Recipe, Rule, Stage
from mono_internvl.training.rules import always_frozen, apply_rules

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
        return preset("v1_5" if "plus-plus" in recipe.name else "v1")
    experts = EXPERT_PRESETS["v1_5" if "plus-plus" in recipe.name else "v1"]
    return MonoInternVLConfig(
        text_config=MonoInternVLTextConfig(vocab_size=1300, **LANGUAGE_MODEL),
        vision_config=MonoInternVLVisionConfig(**VISION),
        visual_experts=() if "language" in recipe.name else experts,
    )


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_recipe_covers_its_model_without_dead_rules(name: str) -> None:
    recipe = RECIPES[name]
    config = _config_of(recipe)
    with torch.device("meta"):
        model = MonoInternVLForConditionalGeneration(config)
    if not name.startswith("miniature"):
        attention_experts = 301_989_888 if "plus-plus" in name else 0
        assert sum(p.numel() for p in model.parameters()) == 3_111_355_392 + attention_experts
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


@pytest.mark.parametrize(
    "recipe", ["evip-plus-plus-2b", "miniature-plus-plus", "miniature-plus-plus-42"]
)
def test_evip_plus_plus_leaves_the_text_side_alone_until_s2(recipe: str) -> None:
    model = _tiny(("ffn", "qkv", "o"))
    found = {}
    for stage in RECIPES[recipe].stages:
        apply_rules(model, model.config, stage)
        found[stage.name] = _learning(model)
    everything = {name for name, _ in model.named_parameters()}
    unread = r"class_embedding|layers\.1\.(mlp|self_attn\.[qo]_proj)_visual"
    never = {n for n in everything if re.search(unread, n)}
    sees = {n for n in everything if re.search(r"vision_embedder|projector|_visual\.", n)} - never
    assert found["s11"] == found["s12"] == found["s13"] == sees
    assert found["s2"] == everything - never
    assert len(never) == 1 + 3 + 2
    in_last_layer = {n for n in sees if "layers.1." in n}
    assert {n.split(".")[-2] for n in in_last_layer} == {"k_proj_visual", "v_proj_visual"}


def test_evip_plus_plus_has_the_samples_that_are_known() -> None:
    evip, plus = RECIPES["evip-2b"].stages, RECIPES["evip-plus-plus-2b"].stages
    samples = [stage.steps * stage.batch_size for stage in plus]
    assert samples[0] + samples[1] == pytest.approx(400e6, rel=1e-4)
    assert samples[2] == pytest.approx(150e6, rel=1e-4)
    before = sum(stage.steps * stage.batch_size for stage in evip[:3])
    assert sum(samples[:3]) / before == pytest.approx(RATIO_TO_EVIP, abs=0.005)
    assert plus[3] == evip[3]
    for ours, theirs in zip(plus[:3], evip[:3], strict=True):
        same = {"title": "", "rules": (Rule(".*", None),), "steps": 1}
        assert dataclasses.replace(ours, **same) == dataclasses.replace(theirs, **same)
        assert ours.rules[0].learning_rate == theirs.rules[0].learning_rate


@pytest.mark.parametrize("share", [1.0, 0.42])
def test_miniature_plus_plus_differs_in_what_it_says_alone(share: float) -> None:
    ours = plus_plus(MINIATURE, share)
    assert ours.stages[-1] == MINIATURE.stages[-1]
    for mine, theirs in zip(ours.stages, MINIATURE.stages, strict=True):
        assert mine.data == theirs.data and mine.batch_size == theirs.batch_size
        assert set(mine.rules) <= set(theirs.rules)
        if theirs.name != "s2":
            assert mine.steps == round(share * theirs.steps)
    dropped = [
        r
        for a, b in zip(ours.stages, MINIATURE.stages, strict=True)
        for r in b.rules
        if r not in a.rules
    ]
    assert [rule.pattern for rule in dropped] == [ATTENTION]


def _stage(*rules: Rule, **fields: Any) -> Stage:
    return tiny_runs.tiny_stage(rules=rules, **fields)


@pytest.mark.parametrize(
    ("rules", "complaint"),
    [
        ((Rule("self_attn", 1e-3),), "no rule covers parameter .*vision_embedder"),
        ((Rule("no_such_part", 1e-3), Rule(".*", None)), "'no_such_part' decides no parameter"),
        ((Rule(".*", 1e-3), Rule("self_attn", None)), "'self_attn' decides no parameter"),
        ((Rule("(", 1e-3),), r"bad pattern '\('"),
        ((Rule(".*", None),), "nothing is trainable"),
        ((Rule("class_embedding", 1e-3), Rule(".*", 1e-3)), "class_embedding' decides no"),
    ],
    ids=["uncovered", "misspelt", "hidden", "bad_pattern", "all_frozen", "always_frozen"],
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
def test_always_frozen_is_exactly_what_gets_no_gradient(visual_experts: tuple[str, ...]) -> None:
    model = _tiny(visual_experts)
    _loss(model).backward()
    silent = {
        name
        for name, p in model.named_parameters()
        if p.grad is None or not bool(p.grad.count_nonzero())
    }
    patterns = [rule.pattern for rule in always_frozen(model.config)]
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
