"""Attention maps are the eager definition's, and their numbers mean what they say."""

import pytest
import torch
from tiny_models import (
    ALL_EXPERTS,
    TOKENS_PER_TILE,
    image_ids,
    text_ids,
    tile_pixels,
    tiny_model,
)

from mono_internvl.errors import PromptError
from mono_internvl.generation import attention_maps as module
from mono_internvl.generation.attention_maps import attention_maps

IDS = torch.cat((text_ids(4), image_ids(2), text_ids(6, seed=1)), dim=1)
VISUAL = slice(5, 5 + 2 * TOKENS_PER_TILE)


def eager_means(model):
    """(L, T, T) attention of the definition, the mean of the heads."""
    out = model.model(IDS, tile_pixels(2), output_attentions=True)
    return torch.stack([weights[0].mean(0) for weights in out.attentions])


@pytest.mark.parametrize("experts", [("ffn",), ALL_EXPERTS])
@torch.no_grad()
def test_maps_are_those_of_eager_attention(experts, monkeypatch):
    monkeypatch.setattr(module, "_QUERIES_PER_BLOCK", 5)  # 20 tokens end within a block
    model = tiny_model(experts)
    expected = eager_means(model)
    model.set_attn_implementation("sdpa")
    found = attention_maps(model, IDS[0].tolist(), tile_pixels(2))
    assert model.config.get_text_config()._attn_implementation == "sdpa"
    for layer, weights in zip(found.layers, expected, strict=True):
        torch.testing.assert_close(torch.from_numpy(layer.weights), weights, atol=1e-6, rtol=1e-5)
        behind = weights[VISUAL.stop - 8 :][8:]  # text behind the image, `</img>` included
        assert layer.text_to_image == pytest.approx(float(behind[:, VISUAL].sum(1).mean()), 1e-4)
        text = torch.cat((weights[VISUAL, :5], weights[VISUAL, VISUAL.stop :]), dim=1)
        assert layer.image_to_text == pytest.approx(float(text.sum(1).mean()), 1e-4)
    named = [(segment.name, segment.start, segment.stop) for segment in found.segments]
    assert named == [("system", 0, 5), ("image", 5, 13), ("user", 13, 20)]


@torch.no_grad()
def test_uniform_numbers_are_those_of_equal_weights():
    model = tiny_model()
    for name, parameter in model.named_parameters():
        if "q_proj" in name:
            parameter.zero_()  # every key gets the same score
    for layer in attention_maps(model, IDS[0].tolist(), tile_pixels(2)).layers:
        assert layer.visual_distance == pytest.approx(layer.uniform_visual_distance)
        assert layer.text_to_image == pytest.approx(layer.uniform_text_to_image)
        assert layer.image_to_text == pytest.approx(layer.uniform_image_to_text)
    # Of a tile of 2 x 2 tokens, seen causally: the second is 1 from the first; the third 1 and 2^.5
    # from those before; the fourth 2^.5, 1 and 1.
    root = 2**0.5
    by_hand = (1 / 2 + (1 + root) / 3 + (root + 1 + 1) / 4) / 3
    assert layer.uniform_visual_distance == pytest.approx(by_hand, rel=1e-5)
    per_token = [8 / seen for seen in range(14, 21)]
    assert layer.uniform_text_to_image == pytest.approx(sum(per_token) / 7, rel=1e-5)


@torch.no_grad()
def test_answer_is_told_from_prompt_and_small_maps_keep_their_mass():
    found = attention_maps(
        tiny_model(), IDS[0].tolist(), tile_pixels(2), num_prompt=17, max_side=10
    )
    assert [segment.name for segment in found.segments] == ["system", "image", "user", "answer"]
    assert found.num_tokens == 20
    weights = found.layers[0].weights
    assert weights.shape == (10, 10)
    assert weights.mean() * 20 == pytest.approx(1.0, rel=1e-5)  # every row summed to 1


def test_images_seen_both_ways_are_measured_both_ways():
    model = tiny_model()
    model.config.image_attention = "bidirectional"
    layer = attention_maps(model, IDS[0].tolist(), tile_pixels(2)).layers[0]
    assert layer.weights[VISUAL.start, VISUAL.start + 1] > 0
    assert layer.uniform_visual_distance == pytest.approx((1 + 1 + 2**0.5) / 4, rel=1e-5)


def test_refused_are_prompts_without_image_and_beyond_the_limit(monkeypatch):
    with pytest.raises(PromptError, match="shows no image"):
        attention_maps(tiny_model(), text_ids(4)[0].tolist(), tile_pixels(1))
    monkeypatch.setattr(module, "MAX_TOKENS", 19)
    with pytest.raises(PromptError, match=r"20 tokens.*at most 19.*max_tiles"):
        attention_maps(tiny_model(), IDS[0].tolist(), tile_pixels(2))
