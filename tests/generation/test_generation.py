"""`generate`: every way to the same tokens, and images only where they were put."""

from typing import Any

import pytest
import torch
from tiny_models import IMAGE_TOKEN, VOCAB, image_ids, text_ids, tile_pixels, tiny_model
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache, StaticCache
from transformers.generation.streamers import BaseStreamer

from mono_internvl.errors import PromptError
from mono_internvl.experts import Routing
from mono_internvl.model.modeling import MonoInternVLForConditionalGeneration

ATTENTION = pytest.mark.parametrize("attention", ["eager", "sdpa", "blocked"])
GREEDY: dict[str, Any] = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": -1}

Model = MonoInternVLForConditionalGeneration


def _prompt(tiles: int = 2) -> dict[str, Tensor]:
    ids = torch.cat((text_ids(3, 1), image_ids(tiles), text_ids(4, 2)), dim=1)
    return {"input_ids": ids, "pixel_values": tile_pixels(tiles)}


def _batch() -> dict[str, Tensor]:
    """Two images in the first row, none in the second, one in the third; padded on the left."""
    rows = [
        torch.cat((image_ids(1), text_ids(2, 1), image_ids(1), text_ids(2, 2)), dim=1),
        text_ids(5, 3),
        torch.cat((text_ids(2, 4), image_ids(1), text_ids(3, 5)), dim=1),
    ]
    length = max(row.shape[1] for row in rows)
    return {
        "input_ids": torch.cat([F.pad(r, (length - r.shape[1], 0), value=2) for r in rows]),
        "attention_mask": torch.cat(
            [F.pad(torch.ones_like(r), (length - r.shape[1], 0)) for r in rows]
        ),
        "pixel_values": tile_pixels(3),
    }


def _by_full_forward(model: Model, ids: Tensor, pixels: Tensor | None, steps: int) -> Tensor:
    """Greedy decoding without any cache: the definition."""
    places = ids == IMAGE_TOKEN
    for _ in range(steps):
        mask = F.pad(places, (0, ids.shape[1] - places.shape[1]))
        images = {} if pixels is None else {"pixel_values": pixels, "visual_token_mask": mask}
        ids = torch.cat((ids, model(ids, **images).logits[:, -1:].argmax(-1)), dim=1)
    return ids


@ATTENTION
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"cache_implementation": "static"},
        {"use_cache": False},
        {"prompt_lookup_num_tokens": 3},
    ],
    ids=["dynamic", "static", "no_cache", "prompt_lookup"],
)
@pytest.mark.parametrize("has_image", [True, False], ids=["image", "text"])
@torch.no_grad()
def test_generate_equals_full_forward(
    attention: str, options: dict[str, Any], has_image: bool
) -> None:
    model = tiny_model(attention=attention)
    prompt = _prompt() if has_image else {"input_ids": text_ids(6)}
    expected = _by_full_forward(model, prompt["input_ids"], prompt.get("pixel_values"), 10)
    assert torch.equal(model.generate(**prompt, **GREEDY, **options), expected)


@ATTENTION
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@torch.no_grad()
def test_generate_rows_of_batch_equal_rows_alone(attention: str, static: bool) -> None:
    model, batch = tiny_model(attention=attention), _batch()
    options = {"cache_implementation": "static"} if static else {}
    together = model.generate(**batch, **GREEDY, **options)
    tiles = iter(batch["pixel_values"][:, None])
    for row, (ids, mask) in enumerate(
        zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True)
    ):
        num_tiles = int((ids == IMAGE_TOKEN).sum()) // 4
        own = [next(tiles) for _ in range(num_tiles)]
        images = {"pixel_values": torch.cat(own)} if own else {}
        alone = model.generate(ids[mask][None], **images, **GREEDY)
        assert torch.equal(together[row, -10:], alone[0, -10:]), row


def test_generate_dynamic_rope_beyond_trained_length() -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0}
    model = tiny_model(rope_parameters=rope, max_position_embeddings=8)
    prompt = _prompt()
    dynamic = model.generate(**prompt, **GREEDY)
    assert torch.equal(model.generate(**prompt, **GREEDY, cache_implementation="static"), dynamic)


@ATTENTION
@pytest.mark.parametrize("whole", [True, False], ids=["whole_conversation", "new_tokens_only"])
@torch.no_grad()
def test_generate_image_in_later_turn_equals_full_forward(attention: str, whole: bool) -> None:
    model = tiny_model(attention=attention)
    cache = DynamicCache(config=model.config)
    first = model.generate(**_prompt(1), **GREEDY, past_key_values=cache)
    question = torch.cat((text_ids(2, 7), image_ids(2), text_ids(3, 8)), dim=1)
    ids = torch.cat((first, question), dim=1)
    new_pixels = tile_pixels(2, seed=5)
    seen = cache.get_seq_length()
    turn = ids if whole else ids[:, seen:]
    second = model.generate(
        turn,
        attention_mask=torch.ones_like(ids),
        pixel_values=new_pixels,
        past_key_values=cache,
        **GREEDY,
    )
    expected = _by_full_forward(model, ids, torch.cat((tile_pixels(1), new_pixels)), 10)
    assert torch.equal(second[:, -10:], expected[:, -10:])


@torch.no_grad()
def test_generate_text_turn_after_image_turn() -> None:
    model = tiny_model()
    cache = DynamicCache(config=model.config)
    first = model.generate(**_prompt(1), **GREEDY, past_key_values=cache)
    ids = torch.cat((first, text_ids(4, 7)), dim=1)
    second = model.generate(ids, past_key_values=cache, **GREEDY)
    assert torch.equal(second, _by_full_forward(model, ids, tile_pixels(1), 10))


@torch.no_grad()
def test_generate_after_chunked_prefill() -> None:
    model, prompt = tiny_model(), _prompt()
    ids = prompt["input_ids"]
    cache = StaticCache(config=model.config, max_cache_len=ids.shape[1] + 12)
    model.prefill(ids[:, :-1], cache, prompt["pixel_values"], chunk_tokens=4)
    resumed = model.generate(ids, past_key_values=cache, **GREEDY)
    assert torch.equal(resumed, model.generate(**prompt, **GREEDY))


def _always_answer(model: Model, token: int) -> None:
    """Make `token` the answer to everything."""
    head = torch.nn.Linear(64, VOCAB)
    head.weight.data.zero_()
    head.bias.data.zero_()
    head.bias.data[token] = 1.0
    model.lm_head = head


@pytest.mark.parametrize(
    "options",
    [{}, {"cache_implementation": "static"}, {"use_cache": False}],
    ids=["dynamic", "static", "no_cache"],
)
@torch.no_grad()
def test_generated_image_token_is_text(options: dict[str, Any]) -> None:
    model, prompt = tiny_model(), _prompt()
    states: list[Tensor] = []
    _always_answer(model, IMAGE_TOKEN)
    model.model.language_model.norm.register_forward_hook(
        lambda module, args, out: states.append(out[:, -1])
    )
    new = model.generate(**prompt, **GREEDY, **options)
    assert (new[:, -10:] == IMAGE_TOKEN).all()
    length = prompt["input_ids"].shape[1]
    mask = F.pad(prompt["input_ids"] == IMAGE_TOKEN, (0, 9))
    steps = torch.stack(states, dim=1)
    model(new[:, :-1], pixel_values=prompt["pixel_values"], visual_token_mask=mask)
    model.model.language_model.norm._forward_hooks.clear()
    out = model.model(
        new[:, :-1], pixel_values=prompt["pixel_values"], visual_token_mask=mask
    ).last_hidden_state
    assert torch.allclose(steps[:, :10], out[:, length - 1 :], atol=1e-4, rtol=0)


@torch.no_grad()
def test_generate_several_answers_each_with_its_images() -> None:
    model = tiny_model()
    batch = _batch()
    plain = model.generate(**batch, **GREEDY)
    options = {**GREEDY, "num_beams": 3, "num_return_sequences": 3}
    torch.manual_seed(0)
    beams = model.generate(**batch, **options)
    assert beams.shape[0] == 9
    alone = model.generate(
        batch["input_ids"][:1],
        attention_mask=batch["attention_mask"][:1],
        pixel_values=batch["pixel_values"][:2],
        **options,
    )
    assert torch.equal(beams[:3], alone)
    sampled = {**GREEDY, "do_sample": True, "top_k": 1, "num_return_sequences": 2}
    same = model.generate(**batch, **sampled)  # the best token only: all answers are the greedy one
    assert torch.equal(same, plain.repeat_interleave(2, dim=0))


def test_generate_several_answers_refuses_part_of_the_images() -> None:
    model, prompt = tiny_model(), _prompt(2)
    prompt["pixel_values"] = prompt["pixel_values"][:1].repeat(3, 1, 1, 1)
    with pytest.raises(PromptError, match="3 entries for 8 image tokens"):
        model.generate(**prompt, **GREEDY, num_beams=2)


def test_generate_mismatch_raises() -> None:
    prompt = _prompt(2)
    with pytest.raises(PromptError, match=r"8 image tokens.* 4 features"):
        tiny_model().generate(
            prompt["input_ids"], pixel_values=prompt["pixel_values"][:1], **GREEDY
        )


def test_generate_refuses_places_without_images() -> None:
    model, ids = tiny_model(), _prompt(2)["input_ids"]
    with pytest.raises(PromptError, match=r"8 image tokens.* 0 features"):
        model.generate(ids, **GREEDY)
    with pytest.raises(PromptError, match=r"8 image tokens.* 0 features"):
        model.generate(input_ids=ids, past_key_values=DynamicCache(config=model.config), **GREEDY)


def test_generate_takes_generated_image_tokens_of_a_prompt_as_text() -> None:
    model, ids = tiny_model(), _prompt(2)["input_ids"]
    nowhere = torch.zeros_like(ids, dtype=torch.bool)
    found = model.generate(ids, visual_token_mask=nowhere, **GREEDY)
    assert torch.equal(found, _by_full_forward(model, ids, None, 10))


class _Collector(BaseStreamer):
    """Keeps the ids that generation hands over, one call per step."""

    def __init__(self) -> None:
        self.steps: list[list[int]] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.steps.append(value.flatten().tolist())

    def end(self) -> None:
        self.ended = True


def test_generate_streams_every_token() -> None:
    model, prompt, streamer = tiny_model(), _prompt(), _Collector()
    out = model.generate(**prompt, **GREEDY, streamer=streamer)
    assert streamer.ended
    assert streamer.steps[0] == prompt["input_ids"][0].tolist()
    assert all(len(step) == 1 for step in streamer.steps[1:])
    assert [token for step in streamer.steps for token in step] == out[0].tolist()


def test_generate_stops_at_any_of_several_end_tokens() -> None:
    model, prompt = tiny_model(), _prompt()
    free = model.generate(**prompt, **GREEDY)[0, -10:].tolist()
    stop = free[4]
    out = model.generate(**prompt, **{**GREEDY, "eos_token_id": [VOCAB - 1, stop]})
    new = out[0, prompt["input_ids"].shape[1] :].tolist()
    assert new == free[: free.index(stop) + 1]


def test_generate_runs_image_features_once() -> None:
    model, prompt = tiny_model(), _prompt()
    calls: list[int] = []
    model.model.vision_embedder.register_forward_hook(lambda *_: calls.append(1))
    model.generate(**prompt, **GREEDY)
    assert len(calls) == 1


def test_generate_computes_last_logits_only() -> None:
    model, prompt = tiny_model(), _prompt()
    rows: list[int] = []
    model.lm_head.register_forward_hook(
        lambda module, args, out: rows.append(out.shape[:-1].numel())
    )
    model.generate(**prompt, **GREEDY)
    assert rows == [1] * 10


def test_generate_in_bf16() -> None:
    model, batch = tiny_model().to(torch.bfloat16), _batch()
    options = {**GREEDY, "output_logits": True, "return_dict_in_generate": True}
    out = model.generate(**batch, **options)
    assert out.sequences.shape[1] == batch["input_ids"].shape[1] + 10
    exact = tiny_model().generate(**batch, **options)
    # bf16 keeps 8 bits: the first logits differ by some hundredths of their spread, no more.
    difference = (out.logits[0].float() - exact.logits[0]).abs().max()
    assert difference < 0.1 * exact.logits[0].std()
    with_other_images = tiny_model().generate(
        **{**batch, "pixel_values": tile_pixels(3, seed=9)}, **options
    )
    assert (with_other_images.logits[0] - exact.logits[0]).abs().max() > 2 * difference


def test_generate_refuses_places_without_images_beyond_a_cache() -> None:
    model = tiny_model()
    cache = DynamicCache(config=model.config)
    first = model.generate(**_prompt(1), **GREEDY, past_key_values=cache)
    question = torch.cat((text_ids(2, 7), image_ids(2), text_ids(3, 8)), dim=1)
    ids = torch.cat((first, question), dim=1)
    seen = cache.get_seq_length()
    for turn, options in (
        (ids, {}),
        (ids, {"attention_mask": torch.ones_like(ids)}),
        (ids[:, seen:], {"attention_mask": torch.ones_like(ids)}),
    ):
        with pytest.raises(PromptError, match="8 image tokens but the images give 0 features"):
            model.generate(turn, past_key_values=cache, **options, **GREEDY)
    assert cache.get_seq_length() == seen
    text = torch.cat((first, text_ids(4, 9)), dim=1)  # images of the first turn are in the cache
    model.generate(text, past_key_values=cache, **GREEDY)


@ATTENTION
@pytest.mark.parametrize(
    "options",
    [{}, {"cache_implementation": "static"}, {"num_beams": 2}, {"num_return_sequences": 2}],
    ids=str,
)
@pytest.mark.parametrize("has_ids", [False, True], ids=["embeds", "embeds_and_ids"])
@torch.no_grad()
def test_generate_from_embeddings_equals_from_ids(
    attention: str, options: dict[str, Any], has_ids: bool
) -> None:
    model, batch = tiny_model(attention=attention), _batch()
    greedy = {**GREEDY, "do_sample": "num_return_sequences" in options, "top_k": 1}
    expected = model.generate(**batch, **greedy, **options)[:, batch["input_ids"].shape[1] :]
    features = model.get_image_features(batch["pixel_values"]).flatten(0, 1)
    is_visual = batch["input_ids"] == IMAGE_TOKEN
    embeds = model.model.place_features(batch["input_ids"], features, Routing.from_mask(is_visual))
    given: dict[str, Any] = {"inputs_embeds": embeds, "attention_mask": batch["attention_mask"]}
    if has_ids:  # they say which rows are visual, and stand before the answers
        found = model.generate(batch["input_ids"], **given, **greedy, **options)
        found = found[:, batch["input_ids"].shape[1] :]
    else:
        found = model.generate(**given, visual_token_mask=is_visual, **greedy, **options)
    assert torch.equal(found, expected)
    text = model.generate(**given, visual_token_mask=is_visual & False, **greedy, **options)
    assert not torch.equal(text[:, -10:], expected), "the mask counts"
