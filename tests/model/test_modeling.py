"""One forward pass: placing, padding, caches, loss; whatever the way, the same numbers."""

from typing import Any

import pytest
import torch
from tiny_models import (
    ALL_EXPERTS,
    IMAGE_TOKEN,
    TOKENS_PER_TILE,
    VOCAB,
    image_ids,
    randomize,
    text_ids,
    tile_pixels,
    tiny_model,
)
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache, StaticCache

from mono_internvl.attention.packing import packed_segments
from mono_internvl.checkpoints.from_llm import copy_text_to_visual
from mono_internvl.errors import PromptError
from mono_internvl.training.recompute import enable_recompute

ATTENTION = pytest.mark.parametrize("attention", ["eager", "sdpa", "blocked"])


def _assert_close(a: Tensor, b: Tensor, atol: float = 1e-5) -> None:
    assert torch.isfinite(a).all() and torch.isfinite(b).all()
    assert torch.allclose(a, b, atol=atol, rtol=0), f"off by {(a - b).abs().max():.3g}"


def _conversation() -> tuple[Tensor, Tensor, int]:
    """Ids with an image of two tiles and one of one; pixels; where the second turn starts."""
    first = torch.cat((text_ids(5, 1), image_ids(2), text_ids(6, 2)), dim=1)
    second = torch.cat((text_ids(3, 3), image_ids(1), text_ids(4, 4)), dim=1)
    return torch.cat((first, second), dim=1), tile_pixels(3), first.shape[1]


# ------------------------------------------------------------------------------------ same numbers


@ATTENTION
@pytest.mark.parametrize("experts", [("ffn",), ALL_EXPERTS], ids=["ffn", "all"])
@torch.no_grad()
def test_image_in_later_cached_turn_equals_full_prefill(
    attention: str, experts: tuple[str, ...]
) -> None:
    model = tiny_model(experts, attention)
    ids, pixels, cut = _conversation()
    full = model(ids, pixel_values=pixels).logits
    cache = DynamicCache(config=model.config)
    first = model(ids[:, :cut], pixel_values=pixels[:2], past_key_values=cache).logits
    second = model(ids[:, cut:], pixel_values=pixels[2:], past_key_values=cache).logits
    _assert_close(torch.cat((first, second), dim=1), full, 1e-4)


@ATTENTION
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("chunk_tokens", [1, 3, 8, 1000])
@torch.no_grad()
def test_chunked_prefill_equals_full(attention: str, static: bool, chunk_tokens: int) -> None:
    model = tiny_model(attention=attention)
    ids, pixels, _ = _conversation()  # the image takes rows 6 to 13, so every size but one cuts it
    full = model(ids, pixel_values=pixels, logits_to_keep=1).logits
    cache = (
        StaticCache(config=model.config, max_cache_len=ids.shape[1] + 4)
        if static
        else DynamicCache(config=model.config)
    )
    out = model.prefill(ids, cache, pixel_values=pixels, chunk_tokens=chunk_tokens)
    _assert_close(out.logits, full, 1e-4)
    assert int(cache.get_seq_length()) == ids.shape[1]


@ATTENTION
@torch.no_grad()
def test_prefill_of_padded_batch_counts_positions_as_generate(attention: str) -> None:
    model = tiny_model(attention=attention)
    short, long = text_ids(4, 1), torch.cat((image_ids(1), text_ids(3, 2)), dim=1)
    pad = long.shape[1] - short.shape[1]
    ids = torch.cat((F.pad(short, (pad, 0), value=2), long))
    mask = torch.ones_like(ids)
    mask[0, :pad] = 0
    cache = DynamicCache(config=model.config)
    model.prefill(ids[:, :-1], cache, tile_pixels(1), mask[:, :-1], chunk_tokens=4)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": -1}
    resumed = model.generate(ids, attention_mask=mask, past_key_values=cache, **options)
    plain = model.generate(ids, attention_mask=mask, pixel_values=tile_pixels(1), **options)
    assert torch.equal(resumed, plain)


@ATTENTION
@torch.no_grad()
def test_left_padded_rows_equal_unpadded_rows(attention: str) -> None:
    model = tiny_model(attention=attention)
    rows = [
        torch.cat((text_ids(3, 1), image_ids(2), text_ids(5, 2)), dim=1),
        text_ids(4, 3),
        torch.cat((image_ids(1), text_ids(2, 4)), dim=1),
    ]
    pixels = tile_pixels(3)
    own = [pixels[:2], None, pixels[2:]]
    length = max(row.shape[1] for row in rows)
    ids = torch.cat([F.pad(row, (length - row.shape[1], 0), value=2) for row in rows])
    mask = torch.cat([F.pad(torch.ones_like(r), (length - r.shape[1], 0)) for r in rows])
    out = model(ids, pixel_values=pixels, attention_mask=mask, output_hidden_states=True)
    assert all(torch.isfinite(h).all() for h in out.hidden_states)
    for i, row in enumerate(rows):
        alone = model(row, pixel_values=own[i]).logits[0]
        _assert_close(out.logits[i, -row.shape[1] :], alone)


@ATTENTION
@torch.no_grad()
def test_text_row_of_mixed_batch_equals_text_alone(attention: str) -> None:
    model = tiny_model(attention=attention)
    with_image = torch.cat((image_ids(1), text_ids(4, 1)), dim=1)
    text = text_ids(with_image.shape[1], 2)
    out = model(torch.cat((with_image, text)), pixel_values=tile_pixels(1)).logits
    _assert_close(out[1:], model(text).logits)
    _assert_close(out[:1], model(with_image, pixel_values=tile_pixels(1)).logits)


@pytest.mark.parametrize("experts", [("ffn",), ("qkv",), ("o",), ("norms",), ALL_EXPERTS])
@torch.no_grad()
def test_copied_visual_experts_leave_text_logits_bit_identical(experts: tuple[str, ...]) -> None:
    plain, model = tiny_model(()), tiny_model(experts)
    model.load_state_dict(plain.state_dict(), strict=False)
    copy_text_to_visual(model)
    ids = text_ids(12)
    assert torch.equal(model(ids).logits, plain(ids).logits)
    randomize(model, seed=9)  # whatever the visual experts become: text does not see them
    model.load_state_dict(plain.state_dict(), strict=False)
    assert torch.equal(model(ids).logits, plain(ids).logits)
    with_image = torch.cat((image_ids(1), ids), dim=1)
    pixels = tile_pixels(1)
    ours, theirs = (m(with_image, pixel_values=pixels).logits for m in (model, plain))
    assert (ours[0, 1:] - theirs[0, 1:]).abs().max() > 0.05


@torch.no_grad()
def test_dynamic_rope_leaves_no_state() -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0}
    model = tiny_model(rope_parameters=rope, max_position_embeddings=16)
    short, long = text_ids(10, 1), text_ids(60, 2)
    before = model(short).logits
    stretched = model(long).logits
    assert torch.equal(model(short).logits, before)
    model.config.text_config.rope_parameters["rope_type"] = "default"
    assert (model(long).logits - stretched).abs().max() > 0.01
    assert torch.equal(model(short).logits, before)


@torch.no_grad()
def test_linear_rope_divides_positions() -> None:
    rope = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.0}
    linear, plain = tiny_model(rope_parameters=rope), tiny_model()
    plain.config.text_config.rope_parameters = {"rope_type": "default", "rope_theta": 10_000.0}
    ids = text_ids(9)
    halves = torch.arange(9)[None] / 2  # positions may be floats
    _assert_close(linear(ids).logits, plain(ids, position_ids=halves).logits, 1e-6)
    assert (linear(ids).logits - plain(ids).logits).abs().max() > 0.01


@ATTENTION
@pytest.mark.parametrize("window", [None, 5], ids=["full", "sliding"])
@pytest.mark.parametrize("has_cache", [False, True], ids=["no_cache", "cache"])
@torch.no_grad()
def test_packed_segments_are_kept_apart_beside_a_mask(
    attention: str, window: int | None, has_cache: bool
) -> None:
    """A mask of ones, padding on either side and between, a cache to fill: all the same."""
    layers = None if window is None else [1, 0]
    model = tiny_model(attention=attention, sliding_layers=layers, sliding_window=window)
    first, second = text_ids(5, 1), torch.cat((image_ids(1), text_ids(4, 2)), dim=1)
    pixels, length = tile_pixels(1), second.shape[1]
    alone = [model(first).logits, model(second, pixel_values=pixels).logits]
    pad, none = torch.full((1, 2), 2), torch.zeros(1, 2, dtype=torch.long)
    ones = [torch.ones_like(first), torch.ones_like(second)]
    places = [torch.arange(5)[None], torch.arange(length)[None]]
    for ids, mask, positions, starts in (
        ([first, second], ones, places, (0, 5)),
        ([pad, first, second], [none, *ones], [none, *places], (2, 7)),
        ([first, pad, second, pad], [ones[0], none, ones[1], none],
         [places[0], none + 1, places[1], none + 1], (0, 7)),
    ):  # fmt: skip
        logits = model(
            torch.cat(ids, dim=1),
            pixel_values=pixels,
            attention_mask=torch.cat(mask, dim=1),
            position_ids=torch.cat(positions, dim=1),
            use_cache=has_cache,
        ).logits
        for start, expected in zip(starts, alone, strict=True):
            _assert_close(logits[:, start : start + expected.shape[1]], expected)


def test_packed_segments_are_counted_over_padding() -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1, 0, 1, 1], [1, 1, 1, 1, 1, 1, 1, 1]])
    positions = torch.tensor([[0, 0, 0, 1, 0, 9, 1, 2], [0, 1, 2, 0, 1, 0, 4, 5]])
    assert packed_segments(positions, mask).tolist() == [
        [0, 0, 0, 0, 1, 1, 1, 1],
        [0, 0, 0, 1, 1, 2, 3, 3],
    ]
    holes = torch.tensor([[0, 1, 1, 0, 1, 1]])
    assert packed_segments(torch.tensor([[1, 0, 1, 1, 2, 3]]), holes) is None
    assert packed_segments(torch.arange(6)[None], holes) is None, "padding may take places"
    assert packed_segments(torch.arange(6)[None], None) is None


def test_packed_segments_beside_a_mask_are_refused_by_flash_attention() -> None:
    model = tiny_model().model.language_model
    model.config._attn_implementation = "flash_attention_2"
    positions = torch.tensor([[0, 1, 0, 1]])
    with pytest.raises(PromptError, match="flash attention sees packed segments"):
        model(text_ids(4), attention_mask=torch.ones(1, 4), position_ids=positions)


@torch.no_grad()
def test_prefill_beyond_dynamic_scaling_equals_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mono_internvl.attention.image_layout._CHUNK_TOKENS", 8)
    rope = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0}
    model = tiny_model(rope_parameters=rope, max_position_embeddings=20)
    for length in (20, 40):  # up to the trained length chunks change nothing
        ids = text_ids(length)
        found = model.prefill(ids, DynamicCache()).logits
        _assert_close(found[:, -1], model(ids).logits[:, -1])
    model.prefill(text_ids(20), DynamicCache(), chunk_tokens=7)
    with pytest.raises(PromptError, match=r"chunk_tokens=7: with 40 tokens, more than .*=20"):
        model.prefill(text_ids(40), DynamicCache(), chunk_tokens=7)


@ATTENTION
@torch.no_grad()
def test_restarting_positions_separate_packed_segments(attention: str) -> None:
    model = tiny_model(attention=attention)
    first, second = text_ids(5, 1), torch.cat((image_ids(1), text_ids(4, 2)), dim=1)
    positions = torch.cat((torch.arange(5), torch.arange(second.shape[1])))[None]
    packed = torch.cat((first, second), dim=1)
    together = model(packed, pixel_values=tile_pixels(1), position_ids=positions).logits
    _assert_close(together[:, :5], model(first).logits)
    _assert_close(together[:, 5:], model(second, pixel_values=tile_pixels(1)).logits)


@torch.no_grad()
def test_bf16_stays_near_fp32() -> None:
    model = tiny_model()
    ids, pixels, _ = _conversation()
    exact = model(ids, pixel_values=pixels).logits
    rough = model.to(torch.bfloat16)(ids, pixel_values=pixels).logits
    assert rough.dtype == torch.float32
    assert 0 < (rough - exact).abs().mean() < 0.05 * exact.std()


@torch.no_grad()
def test_eager_returns_attention_that_sums_to_one() -> None:
    out = tiny_model()(text_ids(5), output_attentions=True)
    assert [tuple(a.shape) for a in out.attentions] == [(1, 4, 5, 5)] * 2
    for weights in out.attentions:
        _assert_close(weights.sum(-1), torch.ones(1, 4, 5), 1e-6)
        assert (weights.triu(1) == 0).all()


# ----------------------------------------------------------------------------------- who is visual


@torch.no_grad()
def test_image_token_without_image_is_text() -> None:
    model, plain = tiny_model(), tiny_model(())
    plain.load_state_dict(model.state_dict(), strict=False)
    ids = text_ids(8)
    ids[0, 3:5] = IMAGE_TOKEN
    assert torch.equal(model(ids).logits, plain(ids).logits)


@torch.no_grad()
def test_visual_token_mask_says_where_features_go() -> None:
    model = tiny_model()
    ids = torch.cat((text_ids(3), image_ids(1), text_ids(3)), dim=1)
    places = ids == IMAGE_TOKEN
    expected = model(ids, pixel_values=tile_pixels(1)).logits
    named_otherwise = ids.masked_fill(places, 50)
    masked = {"pixel_values": tile_pixels(1), "visual_token_mask": places}
    assert torch.equal(model(named_otherwise, **masked).logits, expected)
    # An <IMG_CONTEXT> beyond the mask, as an earlier answer may hold it, is text.
    extra = torch.cat((ids, torch.tensor([[IMAGE_TOKEN]])), dim=1)
    longer = {**masked, "visual_token_mask": F.pad(places, (0, 1))}
    _assert_close(model(extra, **longer).logits[:, :-1], expected)


@torch.no_grad()
def test_precomputed_features_equal_pixels() -> None:
    model = tiny_model()
    ids, pixels, _ = _conversation()
    features = model.get_image_features(pixels)
    assert features.shape == (3, TOKENS_PER_TILE, 64)
    from_features = model(ids, image_features=features.flatten(0, 1)).logits
    assert torch.equal(from_features, model(ids, pixel_values=pixels).logits)


@torch.no_grad()
def test_tile_order_is_token_order() -> None:
    model = tiny_model()
    ids, pixels, _ = _conversation()
    swapped = pixels[[1, 0, 2]]
    a, b = (model(ids, pixel_values=p, output_hidden_states=True) for p in (pixels, swapped))
    x, y = a.hidden_states[0][0, 6:14], b.hidden_states[0][0, 6:14]
    assert torch.equal(x, y.roll(TOKENS_PER_TILE, 0))
    assert not torch.equal(x, y)


@pytest.mark.parametrize("tiles", [0, 1, 3])
def test_mismatch_of_places_and_features_raises_with_both_numbers(tiles: int) -> None:
    model = tiny_model()
    ids = torch.cat((image_ids(2), text_ids(2)), dim=1)
    with pytest.raises(PromptError, match=rf"\b8 image tokens.*\b{4 * tiles}\b"):
        model(ids, pixel_values=tile_pixels(3)[:tiles])


def test_images_without_ids_raise() -> None:
    model = tiny_model()
    with pytest.raises(PromptError, match="input_ids"):
        model(inputs_embeds=torch.zeros(1, 4, 64), pixel_values=tile_pixels(1))


@pytest.mark.parametrize("side", [28, 84, 112])
@torch.no_grad()
def test_tiles_of_another_size_resize_position_embedding(side: int) -> None:
    model = tiny_model()
    pixels = torch.randn(2, 3, side, side)
    assert model.get_image_features(pixels).shape == (2, (side // 28) ** 2, 64)
    grid = model.model.vision_embedder.position_embedding
    with_constant = torch.nn.Parameter(torch.full_like(grid, 0.7))
    model.model.vision_embedder.position_embedding = with_constant
    resized = model.model.vision_embedder.position_embeddings_for(side // 14, side // 14)
    _assert_close(resized, torch.full_like(resized, 0.7), 1e-6)


# ---------------------------------------------------------------------------------------- training


def _training_batch() -> dict[str, Tensor]:
    ids, pixels, cut = _conversation()
    labels = ids.clone()
    labels[:, :cut] = -100
    labels[(ids >= IMAGE_TOKEN - 2) & (ids <= IMAGE_TOKEN)] = -100  # <img> </img> <IMG_CONTEXT>
    return {"input_ids": ids, "pixel_values": pixels, "labels": labels}


def test_loss_is_mean_cross_entropy_of_next_tokens() -> None:
    model, batch = tiny_model(), _training_batch()
    out = model(**batch)
    logits, labels = out.logits[:, :-1].reshape(-1, VOCAB), batch["labels"][:, 1:].reshape(-1)
    _assert_close(out.loss, F.cross_entropy(logits, labels))


@pytest.mark.parametrize("options", [{}, {"num_items_in_batch": 0}, {"loss_weight": 0.0}])
def test_loss_without_labels_is_zero_and_has_a_graph(options: dict[str, Any]) -> None:
    model, batch = tiny_model().train(), _training_batch()
    if "loss_weight" in options:
        options = {"loss_weight": torch.zeros(batch["labels"].shape)}
    else:
        batch["labels"] = torch.full_like(batch["labels"], -100)
    loss = model(**batch, **options).loss
    assert loss.item() == 0
    loss.backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_loss_num_items_replaces_denominator() -> None:
    model, batch = tiny_model(), _training_batch()
    mean = model(**batch).loss
    num_labels = int((batch["labels"][:, 1:] != -100).sum())
    _assert_close(model(**batch, num_items_in_batch=50).loss, mean * num_labels / 50)
    _assert_close(
        model(**batch, num_items_in_batch=torch.tensor(50.0)).loss, mean * num_labels / 50
    )


def test_loss_weight_weighs_labels() -> None:
    model, batch = tiny_model(), _training_batch()
    _assert_close(
        model(**batch, loss_weight=torch.full(batch["labels"].shape, 3.0)).loss, model(**batch).loss
    )
    weight = torch.rand(batch["labels"].shape)
    logits, labels = model(**batch).logits[:, :-1], batch["labels"][:, 1:]
    each = F.cross_entropy(logits.reshape(-1, VOCAB), labels.reshape(-1), reduction="none")
    w = (weight[:, 1:] * (labels != -100)).reshape(-1)
    _assert_close(model(**batch, loss_weight=weight).loss, (each * w).sum() / w.sum())
    _assert_close(
        model(**batch, loss_weight=weight, num_items_in_batch=7.0).loss, (each * w).sum() / 7
    )


def test_loss_of_micro_batches_adds_up() -> None:
    model = tiny_model()
    rows = torch.cat((text_ids(9, 1), text_ids(9, 2)))
    labels = rows.clone()
    labels[0, :6] = -100
    whole = model(rows, labels=labels, num_items_in_batch=11).loss
    parts = [
        model(rows[i : i + 1], labels=labels[i : i + 1], num_items_in_batch=11) for i in (0, 1)
    ]
    _assert_close(parts[0].loss + parts[1].loss, whole)


@pytest.mark.parametrize("experts", [("ffn",), ALL_EXPERTS], ids=["ffn", "all"])
def test_text_only_training_gives_no_visual_gradient(experts: tuple[str, ...]) -> None:
    model = tiny_model(experts)
    ids = text_ids(10)
    model(ids, labels=ids).loss.backward()
    for name, p in model.named_parameters():
        is_visual = "_visual." in name or "vision_embedder" in name or "projector" in name
        reached = p.grad is not None and bool(p.grad.abs().sum() > 0)
        assert reached != is_visual, name


def test_image_training_reaches_all_but_what_can_never_learn() -> None:
    model = tiny_model(ALL_EXPERTS)
    model(**_training_batch()).loss.backward()
    in_last_layer = "mlp", "self_attn.q_proj", "self_attn.o_proj", "post_attention_layernorm"
    never = tuple(f"model.language_model.layers.1.{part}_visual." for part in in_last_layer)
    never = (*never, "model.vision_embedder.class_embedding")
    for name, p in model.named_parameters():
        reached = p.grad is not None and bool(p.grad.abs().sum() > 0)
        assert reached != name.startswith(never), name


@ATTENTION
def test_gradient_checkpointing_changes_no_gradient(attention: str) -> None:
    model, batch = tiny_model(ALL_EXPERTS, attention).train(), _training_batch()
    model(**batch).loss.backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    enable_recompute(model, "full")
    assert model.model.language_model.layers[0].gradient_checkpointing
    model(**batch).loss.backward()
    for name, p in model.named_parameters():
        if expected[name] is not None:
            assert torch.equal(p.grad, expected[name]), name


# ------------------------------------------------------------------------------------------ logits


@torch.no_grad()
def test_logits_to_keep() -> None:
    model, ids = tiny_model(), text_ids(7)
    full = model(ids).logits
    assert full.dtype == torch.float32 and full.shape == (1, 7, VOCAB)
    _assert_close(model(ids, logits_to_keep=2).logits, full[:, -2:])
    _assert_close(model(ids, logits_to_keep=torch.tensor([0, 3])).logits, full[:, [0, 3]])
    out = model(ids, labels=ids, logits_to_keep=None)
    assert out.logits is None
    _assert_close(out.loss, model(ids, labels=ids).loss)


@torch.no_grad()
def test_states_and_weights_are_kept_only_if_asked_for() -> None:
    model = tiny_model()
    plain = model(text_ids(5))
    assert plain.hidden_states is None and plain.attentions is None
    states = model(text_ids(5), output_hidden_states=True)
    assert len(states.hidden_states) == 3 and states.attentions is None


def test_base_model_returns_hidden_states_of_head() -> None:
    model, ids = tiny_model(), text_ids(7)
    x = model.model(ids).last_hidden_state
    assert torch.equal(model.lm_head(x), model(ids).logits)


def test_tied_embeddings_are_one_parameter() -> None:
    model = tiny_model(tie_word_embeddings=True)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert tiny_model().lm_head.weight is not tiny_model().get_input_embeddings().weight


def test_forward_returns_a_tuple_where_asked() -> None:
    model = tiny_model()
    ids = text_ids(5)
    for network in (model, model.model):
        whole = network(ids)
        found = network(ids, return_dict=False)
        assert isinstance(found, tuple)
        assert torch.equal(found[0], whole[0])
    model.config.return_dict = False
    assert isinstance(model(ids), tuple)
