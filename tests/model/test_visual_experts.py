"""Experts where you want them: every set starts as the language model, and keeps its names."""

from itertools import combinations
from pathlib import Path

import pytest
import torch
from tiny_models import (
    ALL_EXPERTS,
    image_ids,
    randomize,
    text_ids,
    tile_pixels,
    tiny_config,
    tiny_model,
)

from mono_internvl.checkpoints.from_llm import copy_text_to_visual
from mono_internvl.checkpoints.presets import PRESET_NOTES, preset
from mono_internvl.configuration.options import parse_visual_experts, visual_expert_set
from mono_internvl.costs.inference import parameter_table
from mono_internvl.errors import ConfigError
from mono_internvl.model.modeling import MonoInternVLForConditionalGeneration
from mono_internvl.released.weight_files import read_headers

Model = MonoInternVLForConditionalGeneration
SETS = [s for size in range(1, 5) for s in combinations(ALL_EXPERTS, size)]
EVERY_SET = pytest.mark.parametrize("experts", SETS, ids="+".join)
STORED = {
    "ffn": ("feed_forward_ve.w1", "feed_forward_ve.w2", "feed_forward_ve.w3"),
    "qkv": ("attention.wqkv_ve",),
    "o": ("attention.wo_ve",),
    "norms": ("attention_norm_ve", "ffn_norm_ve"),
}


def _fresh(experts: tuple[str, ...]) -> tuple[Model, Model]:
    """A freshly made model with these experts, and its decoder without any."""
    plain, model = tiny_model(()), tiny_model(experts)
    randomize(plain, seed=4)
    model.load_state_dict(plain.state_dict(), strict=False)
    copy_text_to_visual(model)
    return model, plain


@EVERY_SET
@torch.no_grad()
def test_fresh_model_equals_plain_decoder(experts: tuple[str, ...]) -> None:
    model, plain = _fresh(experts)
    text = text_ids(13)
    assert torch.equal(model(text).logits, plain(text).logits)
    mixed = torch.cat((text_ids(4, 1), image_ids(2), text_ids(6, 2), image_ids(1)), dim=1)
    images = {"pixel_values": tile_pixels(3)}
    ours, theirs = (m(mixed, **images).logits for m in (model, plain))
    assert torch.allclose(ours, theirs, atol=1e-5, rtol=0), (ours - theirs).abs().max()


@EVERY_SET
@torch.no_grad()
def test_each_part_of_a_set_is_used_by_visual_tokens_alone(experts: tuple[str, ...]) -> None:
    model, _ = _fresh(experts)
    mixed = torch.cat((text_ids(4, 1), image_ids(2), text_ids(6, 2)), dim=1)
    images = {"pixel_values": tile_pixels(2)}
    text_before, before = model(text_ids(9)).logits, model(mixed, **images).logits
    first_layer = {
        n: p for n, p in model.named_parameters() if "layers.0." in n and "_visual." in n
    }
    assert len(first_layer) == sum({"ffn": 3, "qkv": 3, "o": 1, "norms": 2}[e] for e in experts)
    for name, p in first_layer.items():
        kept = p.clone()
        p.mul_(1.5)
        assert (model(mixed, **images).logits - before).abs().max() > 1e-3, name
        assert torch.equal(model(text_ids(9)).logits, text_before), name
        p.copy_(kept)


@EVERY_SET
def test_names_on_disk_are_the_fixed_ones(tmp_path: Path, experts: tuple[str, ...]) -> None:
    model = tiny_model(experts, qkv_bias=True, qk_norm=True)
    model.save_pretrained(tmp_path)
    layer = "language_model.model.layers.0."
    stored = {k.removeprefix(layer) for k in read_headers(tmp_path) if k.startswith(layer)}
    visual = {key for key in stored if "_ve." in key}
    expected = {f"{name}.weight" for part in experts for name in STORED[part]}
    assert visual == expected | ({"attention.wqkv_ve.bias"} if "qkv" in experts else set())
    assert {"attention.wqkv.bias", "attention.q_norm.weight", "attention.k_norm.weight"} <= stored
    again = Model.from_pretrained(tmp_path)
    assert again.config.visual_experts == experts
    for name, p in model.named_parameters():
        assert torch.equal(again.get_parameter(name), p), name


def test_presets_v1_and_v1_5_hold_what_they_should() -> None:
    v1, v1_5 = (parameter_table(preset(name)) for name in ("v1", "v1_5"))
    assert preset("v1").to_dict() == preset("mono-internvl-2b").to_dict()
    assert preset("v1_5").visual_experts == ("ffn", "qkv", "o")  # norms are shared
    assert v1.groups.visual_experts == 1_207_959_552
    assert v1_5.groups.visual_experts - v1.groups.visual_experts == 301_989_888
    assert v1_5.activated_text == v1.activated_text
    assert v1_5.activated_visual == v1.activated_visual
    assert "reconstruction" in PRESET_NOTES["v1_5"]


@pytest.mark.parametrize(
    ("typed", "experts"),
    [
        ("ffn", ("ffn",)),
        ("attention", ("qkv", "o")),
        ("qkvo, ffn", ("ffn", "qkv", "o")),
        ("norms,qkv", ("qkv", "norms")),
        ("v1", ("ffn",)),
        ("v1_5", ("ffn", "qkv", "o")),
        ("none", ()),
    ],
)
def test_typed_expert_sets_are_understood(typed: str, experts: tuple[str, ...]) -> None:
    assert parse_visual_experts(typed) == experts


def test_aliases_are_written_in_full() -> None:
    config = tiny_config(("attention", "ffn"))
    assert config.visual_experts == ("ffn", "qkv", "o")
    assert config.to_dict()["visual_experts"] == ["ffn", "qkv", "o"]


@pytest.mark.parametrize("typed", ["", "head", "ffn,v1", "none,ffn"])
def test_unknown_expert_sets_are_refused(typed: str) -> None:
    with pytest.raises(ConfigError, match="expert"):
        parse_visual_experts(typed)
    with pytest.raises(ConfigError, match="list of names"):
        visual_expert_set("ffn")
