"""Images that attend both ways, and positions that images stretch: every way to the same numbers.

The reference is the plain model of the same weights, given the mask and the positions explicitly.
"""

import copy
import math
from typing import Any

import pytest
import torch
from tiny_models import (
    ALL_EXPERTS,
    IMAGE_TOKEN,
    image_ids,
    text_ids,
    tile_pixels,
    tiny_config,
    tiny_model,
)
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache, StaticCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mono_internvl.attention.image_layout import has_image_layout, lay_out_images, position_lag
from mono_internvl.configuration.model import MonoInternVLConfig
from mono_internvl.errors import ConfigError, PromptError
from mono_internvl.experts import Routing
from mono_internvl.model.layers import eager_attention_forward
from mono_internvl.model.modeling import MonoInternVLForConditionalGeneration
from mono_internvl.training.recompute import enable_recompute

ATTENTION = pytest.mark.parametrize("attention", ["eager", "sdpa"])
OPTIONS: dict[str, dict[str, Any]] = {
    "bidirectional": {"image_attention": "bidirectional"},
    "step": {"visual_position_step": 0.375},
    "both": {"image_attention": "bidirectional", "visual_position_step": 1 / 256},
}
EACH = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
GREEDY: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": -1}
Model = MonoInternVLForConditionalGeneration


def _model(options: dict[str, Any], attention: str = "eager", **text: Any) -> Model:
    model = tiny_model(("ffn", "qkv"), attention=attention, **text)
    for name, value in options.items():
        setattr(model.config, name, value)
    return model


def _conversation() -> tuple[Tensor, Tensor]:
    ids = torch.cat(
        (text_ids(3, 1), image_ids(2), text_ids(4, 2), image_ids(1), text_ids(2, 3)), dim=1
    )
    return ids, tile_pixels(3)


def _reference_positions(is_visual: list[bool], steps: list[float]) -> list[float]:
    """The published recurrence, token by token."""
    positions: list[float] = []
    for visual, step in zip(is_visual, steps, strict=True):
        if not positions:
            positions.append(0.0)
        elif visual:
            positions.append(positions[-1] + step)
        else:
            positions.append(math.ceil(positions[-1]) + 1.0)
    return positions


def _reference(options: dict[str, Any], ids: Tensor, pixels: Tensor | None) -> Tensor:
    """Logits of one row by an explicit mask and explicit positions."""
    visual = (ids[0] == IMAGE_TOKEN).tolist()
    step = float(options.get("visual_position_step", 1.0))
    positions = torch.tensor([_reference_positions(visual, [step] * len(visual))])
    length = len(visual)
    allowed = torch.ones(length, length).tril().bool()
    if "image_attention" in options:
        for i in range(length):
            for j in range(i + 1, length):
                allowed[i, j] = all(visual[i : j + 1])
    mask = torch.zeros(1, 1, length, length).masked_fill(~allowed, torch.finfo().min)
    with torch.no_grad():
        out = _model({})(ids, pixel_values=pixels, attention_mask=mask, position_ids=positions)
    logits: Tensor = out.logits
    return logits


def _assert_close(a: Tensor, b: Tensor, atol: float = 5e-5) -> None:
    assert a.shape == b.shape
    assert torch.allclose(a, b, atol=atol, rtol=0), (a - b).abs().max().item()


def _by_full_forward(model: Model, ids: Tensor, pixels: Tensor, steps: int) -> Tensor:
    places = ids == IMAGE_TOKEN
    for _ in range(steps):
        mask = F.pad(places, (0, ids.shape[1] - places.shape[1]))
        out = model(ids, pixel_values=pixels, visual_token_mask=mask)
        ids = torch.cat((ids, out.logits[:, -1:].argmax(-1)), dim=1)
    return ids


# --------------------------------------------------------------------------------- positions alone


def _random_rows(seed: int, rows: int = 4, length: int = 48) -> tuple[Tensor, Tensor]:
    """Which tokens are visual, and a step for each token, one value per image."""
    generator = torch.Generator().manual_seed(seed)
    is_visual = torch.rand(rows, length // 4, generator=generator).lt(0.5).repeat_interleave(4, 1)
    is_visual &= torch.rand(rows, length, generator=generator) < 0.9
    steps = torch.empty(rows, length, dtype=torch.float64)
    for row in range(rows):
        for i in range(length):
            goes_on = i > 0 and bool(is_visual[row, i] & is_visual[row, i - 1])
            exponent = int(torch.randint(0, 9, (1,), generator=generator))
            steps[row, i] = steps[row, i - 1] if goes_on else 2.0**-exponent
    return is_visual, steps


@pytest.mark.parametrize("seed", range(4))
def test_positions_follow_the_published_recurrence(seed: int) -> None:
    is_visual, steps = _random_rows(seed)
    places = torch.arange(48).expand_as(is_visual)
    found = places - position_lag(places, is_visual, steps)
    expected = [
        _reference_positions(v, s) for v, s in zip(is_visual.tolist(), steps.tolist(), strict=True)
    ]
    assert torch.equal(found, torch.tensor(expected, dtype=torch.float64))
    assert is_visual.any(1).all() and (found != places).any()


@pytest.mark.parametrize("cut", [1, 7, 8, 9, 10, 11, 23, 40, 47])
def test_positions_do_not_depend_on_where_a_prompt_is_cut(cut: int) -> None:
    is_visual, steps = _random_rows(9)
    places = torch.arange(48).expand_as(is_visual)
    whole = position_lag(places, is_visual, steps)
    first = position_lag(places[:, :cut], is_visual[:, :cut], steps[:, :cut])
    rest = position_lag(places[:, cut:], is_visual[:, cut:], steps[:, cut:], first)
    assert torch.equal(torch.cat((first, rest), dim=1), whole)


def test_positions_of_packed_segments_are_those_alone() -> None:
    is_visual, steps = _random_rows(5)
    lengths = (13, 20, 15)
    places = torch.cat([torch.arange(n) for n in lengths]).expand_as(is_visual)
    found = position_lag(places, is_visual, steps)
    parts = zip(*(x.split(lengths, 1) for x in (places, is_visual, steps)), strict=True)
    assert torch.equal(found, torch.cat([position_lag(*part) for part in parts], dim=1))


def test_text_after_a_tile_goes_on_at_the_next_whole_position() -> None:
    config = tiny_config()
    config.visual_position_step = 0.25
    is_visual = torch.tensor([[False, *[True] * 6, False, False]])
    layout = lay_out_images(config, is_visual, None, None)
    assert layout.positions is not None
    assert layout.positions.tolist() == [[0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 3, 4]]


def test_training_draws_one_step_per_image_from_the_set() -> None:
    config = tiny_config()
    config.visual_position_steps = (0.125, 0.25, 1.0)
    row = [False, *[True] * 4] * 60
    is_visual = torch.tensor([row, [*row[::-1]]])

    def differences(seed: int, is_training: bool = True) -> Tensor:
        torch.manual_seed(seed)
        layout = lay_out_images(config, is_visual, None, None, is_training=is_training)
        assert layout.positions is not None
        steps: Tensor = layout.positions.diff(dim=1)[0].view(-1)[: 5 * 59].view(59, 5)[:, :4]
        return steps

    steps = differences(0)
    assert (steps == steps[:, :1]).all(), "constant inside an image"
    assert set(steps[:, 0].tolist()) == {0.125, 0.25, 1.0}
    assert torch.equal(differences(0), steps) and not torch.equal(differences(1), steps)
    assert (differences(0, is_training=False) == 1).all()


def test_training_with_drawn_steps_has_a_loss_and_gradients() -> None:
    model = _model({"visual_position_steps": (1 / 16, 1.0)}).train()
    ids, pixels = _conversation()
    losses = []
    for seed in range(6):
        torch.manual_seed(seed)
        losses.append(model(ids, pixel_values=pixels, labels=ids).loss)
    assert len({round(loss.item(), 5) for loss in losses}) > 1
    losses[0].backward()
    assert model.get_parameter("model.projector.fc2.weight").grad.abs().sum() > 0
    model.eval()
    _assert_close(model(ids, pixel_values=pixels).logits, _reference({}, ids, pixels))


# -------------------------------------------------------------------------------------- the model


@EACH
@ATTENTION
@torch.no_grad()
def test_forward_equals_explicit_mask_and_positions(
    attention: str, options: dict[str, Any]
) -> None:
    ids, pixels = _conversation()
    expected = _reference(options, ids, pixels)
    _assert_close(_model(options, attention)(ids, pixel_values=pixels).logits, expected)
    assert (expected - _reference({}, ids, pixels)).abs().max() > 0.05
    text = text_ids(9)
    _assert_close(_model(options, attention)(text).logits, _reference({}, text, None))


def test_plain_models_have_no_layout_and_no_new_fields() -> None:
    config = tiny_config()
    assert not has_image_layout(config)
    written = config.to_dict()
    assert not {"image_attention", "visual_position_step", "visual_position_steps"} & set(written)


@pytest.mark.parametrize(
    "fields", [*OPTIONS.values(), {"visual_position_steps": (0.25, 1.0)}], ids=str
)
def test_options_survive_in_the_file(tmp_path: Any, fields: dict[str, Any]) -> None:
    config = tiny_config()
    for name, value in fields.items():
        setattr(config, name, value)
    config.save_pretrained(tmp_path)
    again = MonoInternVLConfig.from_pretrained(tmp_path)
    assert {name: getattr(again, name) for name in fields} == fields
    assert again.to_dict() == config.to_dict()


@pytest.mark.parametrize(
    "fields",
    [
        {"image_attention": "both"},
        {"visual_position_step": 0},
        {"visual_position_step": 1.5},
        {"visual_position_step": 0.1},
        {"visual_position_step": True},
        {"visual_position_steps": 0.5},
        {"visual_position_steps": [0.5, float("nan")]},
    ],
    ids=str,
)
def test_options_out_of_range_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(fields))):
        MonoInternVLConfig(**fields)


@EACH
@ATTENTION
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@torch.no_grad()
def test_chunks_and_caches_give_the_logits_of_one_pass(
    attention: str, options: dict[str, Any], static: bool
) -> None:
    model, (ids, pixels) = _model(options, attention), _conversation()
    expected = _reference(options, ids, pixels)
    causal = "image_attention" not in options
    for chunk in (4, 7, 13) if causal else (4, 17, 18):  # 4 and 7 cut images
        cache: Any = DynamicCache(config=model.config)
        if static:
            cache = StaticCache(config=model.config, max_cache_len=ids.shape[1] + 5)
        if not causal and chunk == 4:
            with pytest.raises(PromptError, match=r"chunk_tokens=4.* inside an image"):
                model.prefill(ids, cache, pixels, chunk_tokens=chunk)
            continue
        out = model.prefill(ids[:, :-1], cache, pixels, chunk_tokens=chunk)
        _assert_close(out.logits[:, -1], expected[:, -2])
        step = model(ids[:, -1:], past_key_values=cache)
        _assert_close(step.logits, expected[:, -1:])


@torch.no_grad()
def test_default_chunks_keep_images_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mono_internvl.attention.image_layout._CHUNK_TOKENS", 6)
    options = OPTIONS["both"]
    model, (ids, pixels) = _model(options), _conversation()
    chunks: list[int] = []
    first_layer = model.model.language_model.layers[0]
    first_layer.register_forward_pre_hook(lambda module, args: chunks.append(args[0].shape[1]))
    out = model.prefill(ids, DynamicCache(config=model.config), pixels)
    _assert_close(out.logits[:, -1], _reference(options, ids, pixels)[:, -1])
    assert chunks == [12, 6, 6, 1]  # the first goes on to the end of its image


@torch.no_grad()
def test_pass_that_begins_inside_an_image_is_refused() -> None:
    model, (ids, pixels) = _model(OPTIONS["bidirectional"]), _conversation()
    features = model.get_image_features(pixels).flatten(0, 1)
    cache = DynamicCache(config=model.config)
    model(ids[:, :6], image_features=features[:2], past_key_values=cache)
    with pytest.raises(PromptError, match="begins inside an image"):
        model(ids[:, 6:14], image_features=features[2:8], past_key_values=cache)


@EACH
@ATTENTION
@pytest.mark.parametrize(
    "way",
    [
        {},
        {"cache_implementation": "static"},
        {"use_cache": False},
        {"prompt_lookup_num_tokens": 3},
        {"num_beams": 1, "do_sample": True, "top_k": 1, "num_return_sequences": 2},
    ],
    ids=["dynamic", "static", "no_cache", "prompt_lookup", "several"],
)
@torch.no_grad()
def test_generate_equals_full_forward(
    attention: str, options: dict[str, Any], way: dict[str, Any]
) -> None:
    model, (ids, pixels) = _model(options, attention), _conversation()
    expected = _by_full_forward(model, ids, pixels, 8)
    found = model.generate(ids, pixel_values=pixels, **{**GREEDY, **way})
    assert torch.equal(found, expected.expand_as(found))


@EACH
@pytest.mark.parametrize("whole", [True, False], ids=["whole_conversation", "new_tokens_only"])
@torch.no_grad()
def test_later_turn_with_an_image_equals_full_forward(options: dict[str, Any], whole: bool) -> None:
    model, (ids, pixels) = _model(options), _conversation()
    cache = DynamicCache(config=model.config)
    first = model.generate(ids, pixel_values=pixels, past_key_values=cache, **GREEDY)
    turn = torch.cat((first, text_ids(2, 7), image_ids(1), text_ids(3, 8)), dim=1)
    more = tile_pixels(1, seed=5)
    seen = cache.get_seq_length()
    second = model.generate(
        turn if whole else turn[:, seen:],
        attention_mask=torch.ones_like(turn),
        pixel_values=more,
        past_key_values=cache,
        **GREEDY,
    )
    expected = _by_full_forward(model, turn, torch.cat((pixels, more)), 8)
    assert torch.equal(second[:, -8:], expected[:, -8:])


@EACH
@torch.no_grad()
def test_cropped_and_copied_caches_go_on(options: dict[str, Any]) -> None:
    model, (ids, pixels) = _model(options), _conversation()
    cache = DynamicCache(config=model.config)
    model.prefill(ids[:, :-2], cache, pixels)
    copied = copy.deepcopy(cache)
    expected = _reference(options, ids, pixels)[:, -2:]
    model(text_ids(3, 40), past_key_values=cache)
    cache.crop(-3)
    for again in (cache, copied):
        _assert_close(model(ids[:, -2:], past_key_values=again).logits, expected)


@torch.no_grad()
def test_cache_of_another_model_is_refused() -> None:
    cache = DynamicCache(config=tiny_model().config)
    tiny_model()(text_ids(4), past_key_values=cache)
    with pytest.raises(PromptError, match=r"holds 4 tokens of 1 rows.* 0 tokens"):
        _model(OPTIONS["step"])(text_ids(2), past_key_values=cache)


def _padded_batch() -> tuple[list[Tensor], dict[str, Tensor]]:
    rows = [
        torch.cat((image_ids(1), text_ids(2, 1), image_ids(1), text_ids(2, 2)), dim=1),
        text_ids(5, 3),
        torch.cat((text_ids(2, 4), image_ids(1), text_ids(3, 5)), dim=1),
    ]
    length = max(row.shape[1] for row in rows)
    pads = [length - row.shape[1] for row in rows]
    batch = {
        "input_ids": torch.cat(
            [F.pad(r, (p, 0), value=2) for r, p in zip(rows, pads, strict=True)]
        ),
        "attention_mask": torch.cat(
            [F.pad(torch.ones_like(r), (p, 0)) for r, p in zip(rows, pads, strict=True)]
        ),
        "pixel_values": tile_pixels(3),
    }
    return rows, batch


@EACH
@ATTENTION
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@torch.no_grad()
def test_left_padded_rows_equal_rows_alone(
    attention: str, options: dict[str, Any], static: bool
) -> None:
    model, (rows, batch) = _model(options, attention), _padded_batch()
    places = (batch["attention_mask"].cumsum(1) - 1).clamp_min(0)
    out = model(**batch, position_ids=places)
    assert torch.isfinite(out.logits).all()
    way = {"cache_implementation": "static"} if static else {}
    together = model.generate(**batch, **GREEDY, **way)
    own = [batch["pixel_values"][:2], None, batch["pixel_values"][2:]]
    for i, row in enumerate(rows):
        _assert_close(out.logits[i, -row.shape[1] :][None], _reference(options, row, own[i]))
        alone = model.generate(row, pixel_values=own[i], **GREEDY)
        assert torch.equal(together[i, -8:], alone[0, -8:]), i


def _assert_packed_as_alone(
    attention: str, options: dict[str, Any], parts: list[torch.Tensor]
) -> None:
    """Segments with one image and two give packed into a row what they give alone."""
    model, pixels = _model(options, attention), tile_pixels(3)
    places = torch.cat([torch.arange(part.shape[1]) for part in parts])[None]
    together = model(torch.cat(parts, dim=1), pixel_values=pixels, position_ids=places).logits
    split = together.split([part.shape[1] for part in parts], dim=1)
    for part, own, found in zip(parts, (pixels[:1], pixels[1:]), split, strict=True):
        _assert_close(found, _reference(options, part, own))


@EACH
@ATTENTION
@torch.no_grad()
def test_packed_segments_equal_segments_alone(attention: str, options: dict[str, Any]) -> None:
    parts = [
        torch.cat((text_ids(2, 1), image_ids(1), text_ids(3, 2)), dim=1),
        torch.cat((image_ids(2), text_ids(4, 3)), dim=1),
    ]
    _assert_packed_as_alone(attention, options, parts)


@EACH
@ATTENTION
@torch.no_grad()
def test_image_ends_with_its_packed_segment(attention: str, options: dict[str, Any]) -> None:
    parts = [  # cut inside their images: no text stands between the two
        torch.cat((text_ids(2, 1), image_ids(1)[:, :-1]), dim=1),
        torch.cat((image_ids(2)[:, 1:], text_ids(4, 3)), dim=1),
    ]
    _assert_packed_as_alone(attention, options, parts)


def test_steps_are_drawn_for_each_segment_of_a_packed_row() -> None:
    config = tiny_config()
    config.visual_position_steps = (0.125, 0.25, 0.5, 1.0)
    places, is_visual = torch.arange(4).repeat(40)[None], torch.ones(1, 160, dtype=torch.bool)
    torch.manual_seed(0)
    layout = lay_out_images(config, is_visual, places, None, is_training=True)
    assert layout.positions is not None
    steps = layout.positions.view(40, 4).diff(dim=1)
    assert (steps == steps[:, :1]).all(), "constant inside an image"
    assert len(set(steps[:, 0].tolist())) == 4


@EACH
@torch.no_grad()
def test_routing_made_on_the_host_says_where_images_are(options: dict[str, Any]) -> None:
    ids, pixels = _conversation()
    routing = Routing.from_mask(ids == IMAGE_TOKEN)
    found = _model(options)(ids, pixel_values=pixels, routing=routing).logits
    _assert_close(found, _reference(options, ids, pixels))
    text = text_ids(9)
    found = _model(options)(text, routing=Routing.all_text(9)).logits
    _assert_close(found, _reference({}, text, None))


@torch.no_grad()
def test_rotary_scaling_looks_at_positions_not_tokens() -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0}
    ids, pixels = _conversation()
    step = {"visual_position_step": 1 / 64}
    logits = [
        _model(step, rope_parameters=rope, max_position_embeddings=limit)(
            ids, pixel_values=pixels
        ).logits
        for limit in (18, 64, 8)
    ]
    assert ids.shape[1] > 18
    assert torch.equal(logits[0], logits[1])
    assert (logits[0] - logits[2]).abs().max() > 0.01


def test_gradient_checkpointing_changes_no_gradient() -> None:
    model = _model(OPTIONS["both"]).train()
    ids, pixels = _conversation()
    model(ids, pixel_values=pixels, labels=ids).loss.backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    enable_recompute(model, "full")
    model(ids, pixel_values=pixels, labels=ids).loss.backward()
    for name, p in model.named_parameters():
        assert expected[name] is None or torch.equal(p.grad, expected[name]), name


# ------------------------------------------------------------------------- flex and flash attention


@torch.no_grad()
def test_flex_attention_equals_eager() -> None:
    torch._dynamo.reset()  # compiled for the shapes of this test
    ids, pixels = _conversation()
    model = _model(OPTIONS["both"], "flex_attention")
    expected = _reference(OPTIONS["both"], ids, pixels)
    _assert_close(model(ids, pixel_values=pixels).logits, expected)
    found = model.generate(ids, pixel_values=pixels, **{**GREEDY, "max_new_tokens": 3})
    assert torch.equal(found, _by_full_forward(_model(OPTIONS["both"]), ids, pixels, 3))


def test_flex_attention_over_a_static_cache_is_refused() -> None:
    model, (ids, pixels) = _model({}, "flex_attention"), _conversation()
    with pytest.raises(ConfigError, match=r"flex_attention.*static cache"):
        model.generate(ids, pixel_values=pixels, cache_implementation="static", **GREEDY)
    cache = StaticCache(config=model.config, max_cache_len=64)
    with pytest.raises(ConfigError, match=r"flex_attention.*static cache"):
        model(text_ids(4), past_key_values=cache)


def test_flash_attention_is_refused_for_images_that_attend_both_ways() -> None:
    model, (ids, pixels) = _model(OPTIONS["bidirectional"]), _conversation()
    model.config.text_config._attn_implementation = "flash_attention_2"
    with pytest.raises(ConfigError, match="flash attention"):
        model(ids, pixel_values=pixels)


@torch.no_grad()
def test_flash_attention_is_told_where_packed_segments_begin(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def by_positions(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kw: Any) -> Any:
        """What the kernel does on a GPU: causal inside each segment of the position ids."""
        assert mask is None
        segment = (kw["position_ids"][0] == 0).cumsum(0)
        length = q.shape[2]
        same = segment[:, None] == segment[None, :]
        allowed = torch.ones(length, length).tril().bool() & same
        return eager_attention_forward(
            module, q, k, v, torch.zeros(length, length).masked_fill(~allowed, -1e9), kw["scaling"]
        )

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "flash_attention_2", by_positions)
    parts = [torch.cat((text_ids(2, 1), image_ids(1)), dim=1), text_ids(5, 3)]
    packed = torch.cat(parts, dim=1)
    places = torch.cat([torch.arange(part.shape[1]) for part in parts])[None]
    model, plain = _model(OPTIONS["step"]), _model(OPTIONS["step"])
    model.config.text_config._attn_implementation = "flash_attention_2"
    inputs = {"pixel_values": tile_pixels(1), "position_ids": places}
    _assert_close(model(packed, **inputs).logits, plain(packed, **inputs).logits)


def test_every_expert_set_takes_the_options() -> None:
    model = tiny_model(ALL_EXPERTS)
    ids, pixels = _conversation()
    plain = model(ids, pixel_values=pixels).logits
    model.config.visual_position_step = 0.5
    assert (model(ids, pixel_values=pixels).logits - plain).abs().max() > 0.01
