"""Parameter counts against the released checkpoint's and against a model's own."""

import pytest
import torch
from tiny_models import ALL_EXPERTS, tiny_config, tiny_model

from mono_internvl.errors import ConfigError
from mono_internvl.model.accounting import parameter_table
from mono_internvl.model.checkpoint import expected_shapes
from mono_internvl.model.modeling import MonoInternVLForConditionalGeneration
from mono_internvl.model.presets import PRESETS, preset


def test_preset_2b_has_the_released_parameters() -> None:
    counts = parameter_table(preset("mono-internvl-2b"))
    assert counts.total == 3_111_355_392
    assert counts.groups.visual_experts == 1_207_959_552
    assert counts.groups.text_experts == counts.groups.visual_experts
    assert counts.groups.token_embeddings == counts.groups.head == 92553 * 2048
    assert counts.groups.attention == 24 * (4096 + 2048) * 2048
    assert counts.groups.norms == (2 * 24 + 1) * 2048
    assert counts.groups.patch_embedding == 1024 * (3 * 14 * 14 + 1) + 1026 * 1024
    assert counts.groups.projector == 2 * 4096 + (4096 + 1) * 2048 + (2048 + 1) * 2048
    assert counts.activated_text == 1_889_146_880


def test_preset_2b_has_the_released_tensors() -> None:
    config = preset("mono-internvl-2b")
    with torch.device("meta"):
        model = MonoInternVLForConditionalGeneration(config)
    shapes = expected_shapes(model, config)
    assert len(shapes) == 253
    layer = "language_model.model.layers.23"
    assert shapes["language_model.model.tok_embeddings.weight"] == (92553, 2048)
    assert shapes["language_model.output.weight"] == (92553, 2048)
    assert shapes[f"{layer}.attention.wqkv.weight"] == (4096, 2048)
    assert shapes[f"{layer}.attention.wo.weight"] == (2048, 2048)
    assert shapes[f"{layer}.feed_forward_ve.w1.weight"] == (8192, 2048)
    assert shapes[f"{layer}.feed_forward_ve.w2.weight"] == (2048, 8192)
    assert shapes["vision_model.embeddings.position_embedding"] == (1, 1025, 1024)
    assert shapes["vision_model.embeddings.patch_embedding.weight"] == (1024, 3, 14, 14)
    assert shapes["mlp1.1.weight"] == (2048, 4096)


def test_preset_modular_has_the_parameters_of_its_parts() -> None:
    counts = parameter_table(preset("mini-internvl-chat-2b-v1-5"))
    mono = parameter_table(preset("mono-internvl-2b"))
    layer = (3 * 1024 + 1024) * (1024 + 1) + 2 * 1024 * 4096 + 4096 + 1024 + 6 * 1024
    assert counts.groups.vision_tower == 24 * layer == 302_358_528
    assert counts.groups.visual_experts == 0
    assert counts.total == mono.total - mono.groups.visual_experts + 24 * layer
    assert counts.activated_text == mono.activated_text


def test_preset_2b_has_256_tokens_per_tile() -> None:
    config = preset("mono-internvl-2b")
    assert config.num_image_tokens_per_tile == 256
    assert config.image_token_id == 92546


def test_presets_are_fresh_each_time() -> None:
    for name in PRESETS:
        assert preset(name) is not preset(name)
        assert preset(name).to_dict() == preset(name).to_dict()


def test_preset_unknown_name_raises() -> None:
    with pytest.raises(ConfigError, match="mono-internvl-2b"):
        preset("mono-internvl-9b")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("experts", [(), ("ffn",), ALL_EXPERTS])
def test_parameter_table_counts_the_model(experts: tuple[str, ...], tied: bool) -> None:
    config = tiny_config(experts, tie_word_embeddings=tied, qkv_bias=True)
    model = tiny_model(experts, tie_word_embeddings=tied, qkv_bias=True)
    counts = parameter_table(config)
    numel = {name: p.numel() for name, p in model.named_parameters()}
    visual = sum(n for name, n in numel.items() if "_visual." in name)
    assert counts.total == counts.groups.total == sum(numel.values())
    assert counts.groups.visual_experts == visual
    # A token goes through one expert only; every visual part is as large as what it replaces.
    vision = counts.groups.patch_embedding + counts.groups.projector
    embedding = 0 if tied else counts.groups.token_embeddings
    assert counts.activated_text == counts.total - visual - vision
    assert counts.activated_visual == counts.activated_text - embedding + vision
