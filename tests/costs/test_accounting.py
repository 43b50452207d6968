"""Parameter counts against the released checkpoint's and against a model's own."""

from collections.abc import Callable

import pytest
import torch
from tiny_models import (
    ALL_EXPERTS,
    TOKENS_PER_TILE,
    image_ids,
    text_ids,
    tile_pixels,
    tiny_config,
    tiny_model,
)
from torch.utils.flop_counter import FlopCounterMode

from mono_internvl.checkpoints.presets import PRESETS, preset
from mono_internvl.configuration.model import MonoInternVLConfig
from mono_internvl.costs.inference import parameter_table, prompt_costs
from mono_internvl.errors import ConfigError
from mono_internvl.model.modeling import MonoInternVLForConditionalGeneration
from mono_internvl.released.keys import expected_shapes


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


# --------------------------------------------------------------------- 2B, counted by hand

LAYERS, WIDTH, FFN, KV_WIDTH, VOCABULARY = 24, 2048, 8192, 1024, 92553
ATTENTION = 2 * WIDTH * WIDTH + 2 * WIDTH * KV_WIDTH  # q and o, k and v
EXPERT = 3 * WIDTH * FFN
PROJECTOR = 4 * 1024 * WIDTH + WIDTH * WIDTH


def _with_attention_experts() -> MonoInternVLConfig:
    config = preset("mono-internvl-2b")
    config.visual_experts = ("ffn", "qkv", "o")
    return config


def test_attention_experts_add_their_projections() -> None:
    v1, v1_5 = (
        parameter_table(preset("mono-internvl-2b")),
        parameter_table(_with_attention_experts()),
    )
    added = LAYERS * ATTENTION
    assert added == 301_989_888
    assert v1_5.groups.visual_experts == LAYERS * EXPERT + added == 1_207_959_552 + 301_989_888
    assert v1_5.total == v1.total + added
    # A token goes through one expert of each kind.
    assert v1_5.activated_text == v1.activated_text
    assert v1_5.activated_visual == v1.activated_visual


@pytest.mark.parametrize("make", [lambda: preset("mono-internvl-2b"), _with_attention_experts])
def test_prompt_costs_of_2b(make: Callable[[], MonoInternVLConfig]) -> None:
    costs = prompt_costs(make(), 768, 256)
    prefill, decode, tokens = costs.prefill, costs.decode, 1024
    assert costs.tiles == 3
    assert prefill.patch_embedding == 2 * 3 * 1024 * (3 * 14 * 14) * 1024
    assert prefill.vision_tower == 0
    assert prefill.projector == 2 * 768 * PROJECTOR
    assert prefill.decoder_linear == 2 * LAYERS * (ATTENTION + EXPERT) * tokens
    pairs = sum(range(1, tokens + 1))  # query number t sees t keys
    assert prefill.decoder_attention == LAYERS * 2 * 2 * WIDTH * pairs
    assert prefill.head == decode.head == 2 * WIDTH * VOCABULARY
    assert decode.decoder_linear == 2 * LAYERS * (ATTENTION + EXPERT)
    assert decode.decoder_attention == LAYERS * 2 * 2 * WIDTH * (tokens + 1)
    assert decode.patch_embedding == decode.projector == 0
    assert costs.kv_cache_bytes == 2 * LAYERS * KV_WIDTH * tokens * 2
    assert costs.weight_bytes == 2 * parameter_table(make()).total


def test_prompt_costs_of_the_modular_baseline() -> None:
    mono, modular = (
        prompt_costs(preset(name), 768, 256)
        for name in ("mono-internvl-2b", "mini-internvl-chat-2b-v1-5")
    )
    rows, width, ffn = 1024 + 1, 1024, 4096  # the class token
    linear = 2 * rows * (4 * width * width + 2 * width * ffn)
    attention = 2 * 2 * width * rows * rows  # every patch sees all of its tile
    assert modular.prefill.vision_tower == 3 * 24 * (linear + attention)
    assert modular.prefill.total - mono.prefill.total == modular.prefill.vision_tower
    assert modular.decode == mono.decode
    assert modular.kv_cache_bytes == mono.kv_cache_bytes
    assert modular.weight_bytes == 2 * (3_111_355_392 - 1_207_959_552 + 302_358_528)


@pytest.mark.parametrize("window", [1, 5, 12, 13, 40])
def test_sliding_layers_see_no_more_than_their_window(window: int) -> None:
    sliding = {"sliding_layers": [1, 0], "sliding_window": window}
    text = tiny_config(**sliding).text_config
    costs, tokens, width = prompt_costs(tiny_config(**sliding), 0, 12), 12, 64
    places = range(1, tokens + 1)
    pairs = sum(min(place, window) for place in places) + sum(places)
    assert costs.prefill.decoder_attention == 2 * 2 * width * pairs
    assert costs.decode.decoder_attention == 2 * 2 * width * (min(tokens + 1, window) + tokens + 1)
    cached = min(tokens, window - 1) + tokens  # the next token is of its own window
    of_a_token = 2 * text.num_key_value_heads * text.head_dim * 2
    assert costs.kv_cache_bytes == cached * of_a_token


def test_layers_behind_the_hidden_state_that_is_read_cost_nothing() -> None:
    whole = preset("mini-internvl-chat-2b-v1-5")
    part = preset("mini-internvl-chat-2b-v1-5")
    part.select_layer = -4
    towers = [prompt_costs(config, 256, 0).prefill.vision_tower for config in (whole, part)]
    assert towers[1] * 24 == towers[0] * 21


@pytest.mark.parametrize(("visual", "ratio"), [(768, 0.60), (1792, 0.57), (3840, 0.57)])
def test_prefill_ratio_to_modular_at_the_rows_of_table_6(visual: int, ratio: float) -> None:
    mono, modular = (
        prompt_costs(preset(name), visual, 256).prefill.total
        for name in ("mono-internvl-2b", "mini-internvl-chat-2b-v1-5")
    )
    assert round(mono / modular, 2) == ratio


def test_prompt_costs_count_what_a_forward_multiplies() -> None:
    model, tiles = tiny_model(("ffn", "qkv", "o")), 2
    ids = torch.cat((image_ids(tiles), text_ids(6)), dim=1)
    visual = tiles * TOKENS_PER_TILE
    counted = prompt_costs(model.config, visual, ids.shape[1] - visual).prefill
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        # Asked for hidden states, the last layer computes all rows, as it is counted.
        model(
            input_ids=ids,
            pixel_values=tile_pixels(tiles),
            logits_to_keep=1,
            output_hidden_states=True,
        )
    dense_attention = counted.decoder_attention * 2 * ids.shape[1] // (ids.shape[1] + 1)
    expected = counted.total - counted.decoder_attention + dense_attention
    assert counter.get_total_flops() == expected


def test_prompt_costs_depend_on_the_dtype() -> None:
    config = preset("mono-internvl-2b")
    half, whole = prompt_costs(config, 0, 8), prompt_costs(config, 0, 8, torch.float32)
    assert (half.dtype, whole.dtype) == ("bfloat16", "float32")
    assert whole.weight_bytes == 2 * half.weight_bytes
    assert whole.kv_cache_bytes == 2 * half.kv_cache_bytes
    assert whole.prefill == half.prefill


@pytest.mark.parametrize(("visual", "text"), [(100, 0), (-256, 0), (256, -1), (0, 0)])
def test_prompt_costs_refuse_what_is_no_prompt(visual: int, text: int) -> None:
    with pytest.raises(ConfigError, match=r"visual=|text="):
        prompt_costs(preset("mono-internvl-2b"), visual, text)
