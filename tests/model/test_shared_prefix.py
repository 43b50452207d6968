"""Several questions about one image: the same answers, the image read once."""

from typing import Any

import pytest
import torch
from tiny_models import image_ids, text_ids, tile_pixels, tiny_model
from torch import Tensor
from torch.nn import functional as F

from mono_internvl.errors import PromptError
from mono_internvl.model.shared_prefix import generate_sharing_prefixes, share_prefixes

GREEDY: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": 2}
SIZES = {"image_token_id": 121, "tokens_per_tile": 4}


def _batch() -> dict[str, Tensor]:
    """Three questions on one image, one on another of the same size, one on two tiles, one text."""
    start, other = text_ids(3, 1), tile_pixels(1, seed=7)
    images = [tile_pixels(1)] * 3 + [other, tile_pixels(2, seed=3)]
    rows = [
        torch.cat((start, image_ids(len(pixels)), text_ids(n, n)), dim=1)
        for n, pixels in zip((4, 2, 6, 2, 3), images, strict=True)
    ]
    rows.append(text_ids(5, 9))
    length = max(row.shape[1] for row in rows)
    pads = [length - row.shape[1] for row in rows]
    return {
        "input_ids": torch.cat(
            [F.pad(r, (p, 0), value=2) for r, p in zip(rows, pads, strict=True)]
        ),
        "attention_mask": torch.cat(
            [F.pad(torch.ones_like(r), (p, 0)) for r, p in zip(rows, pads, strict=True)]
        ),
        "pixel_values": torch.cat(images),
    }


@pytest.mark.parametrize("attention", ["eager", "sdpa", "blocked"])
def test_shared_prefix_gives_the_same_answers(attention: str) -> None:
    model, batch = tiny_model(attention=attention), _batch()
    expected = model.generate(**batch, **GREEDY)[:, batch["input_ids"].shape[1] :]
    assert torch.equal(generate_sharing_prefixes(model, **batch, **GREEDY), expected)


@pytest.mark.parametrize(
    "options",
    [
        {"image_attention": "bidirectional"},
        {"visual_position_step": 0.25},
        {"visual_position_steps": (0.25, 1.0)},  # drawn in training; 1 here
    ],
    ids=str,
)
def test_shared_prefix_is_left_out_where_a_cache_remembers_images(options: dict[str, Any]) -> None:
    model, batch = tiny_model(), _batch()
    for name, value in options.items():
        setattr(model.config, name, value)
    expected = model.generate(**batch, **GREEDY)[:, batch["input_ids"].shape[1] :]
    assert torch.equal(generate_sharing_prefixes(model, **batch, **GREEDY), expected)


def test_shared_prefix_gives_the_same_logits() -> None:
    model, batch = tiny_model(), _batch()
    options = {**GREEDY, "output_logits": True, "return_dict_in_generate": True}
    expected = model.generate(**batch, **options).logits[0]
    states: list[Tensor] = []
    model.lm_head.register_forward_hook(lambda module, args, out: states.append(out))
    generate_sharing_prefixes(model, **batch, **GREEDY)
    first = next(x for x in states if x.shape[0] == len(expected))
    torch.testing.assert_close(first, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("attention", ["eager", "blocked"])
@pytest.mark.parametrize("layers", [(1, 1), (1, 0)], ids=["all slide", "one slides"])
@pytest.mark.parametrize("window", [9, 40])
def test_shared_prefix_gives_the_same_answers_where_layers_slide(
    attention: str, layers: tuple[int, int], window: int
) -> None:
    """Padding behind a shared image would fill the window; a wide one hides nothing."""
    model = tiny_model(attention=attention, sliding_layers=list(layers), sliding_window=window)
    batch = _batch()
    expected = model.generate(**batch, **GREEDY)[:, batch["input_ids"].shape[1] :]
    tiles: list[int] = []
    model.model.vision_embedder.register_forward_hook(lambda m, args, o: tiles.append(len(args[0])))
    assert torch.equal(generate_sharing_prefixes(model, **batch, **GREEDY), expected)
    assert sum(tiles) == (6 if window == 9 else 4), "what is wide enough is still shared"


def test_shared_prefix_keeps_the_form_of_generate() -> None:
    model, batch = tiny_model(), _batch()
    options = {**GREEDY, "return_dict_in_generate": True, "output_logits": True}
    length = batch["input_ids"].shape[1]
    for rows, tiles in ((slice(0, 6), slice(0, 6)), (slice(5, 6), slice(0, 0))):
        some = {name: x[rows] for name, x in batch.items() if name != "pixel_values"}
        pixels = batch["pixel_values"][tiles] if rows.start == 0 else None
        images = {} if pixels is None else {"pixel_values": pixels}
        expected = model.generate(**some, **images, **options)
        found = generate_sharing_prefixes(model, **some, pixel_values=pixels, **options)
        assert torch.equal(found.sequences, expected.sequences[:, length:])
        torch.testing.assert_close(found.logits[-1], expected.logits[-1], atol=1e-5, rtol=0)


def test_shared_prefix_counts_new_tokens_as_generate_does() -> None:
    model, batch = tiny_model(), _batch()
    length = batch["input_ids"].shape[1]
    options = {"do_sample": False, "eos_token_id": -1, "max_length": length + 3}
    expected = model.generate(**batch, **options)[:, length:]
    assert expected.shape[1] == 3
    assert torch.equal(generate_sharing_prefixes(model, **batch, **options), expected)


@pytest.mark.parametrize("copies", [{"num_beams": 2}, {"num_beams": 3, "num_return_sequences": 2}])
def test_shared_prefix_gives_the_same_answers_by_beam_search(copies: dict[str, int]) -> None:
    model, batch = tiny_model(), _batch()
    expected = model.generate(**batch, **GREEDY, **copies)[:, batch["input_ids"].shape[1] :]
    assert torch.equal(generate_sharing_prefixes(model, **batch, **GREEDY, **copies), expected)


def test_prompts_that_end_with_their_image_are_not_shared() -> None:
    model = tiny_model()
    ids = torch.cat((text_ids(3, 1), image_ids(1)[:, :-1]), dim=1)  # nothing closes the image
    longer = torch.cat((ids, text_ids(2, 2)), dim=1)
    batch = {
        "input_ids": torch.cat((F.pad(ids, (2, 0), value=2), longer)),
        "attention_mask": torch.cat((F.pad(torch.ones_like(ids), (2, 0)), torch.ones_like(longer))),
        "pixel_values": tile_pixels(1).repeat(2, 1, 1, 1),
    }
    for rows in (slice(0, 2), slice(0, 1)):
        some = {name: x[rows] for name, x in batch.items()}
        twice = {name: torch.cat((x, x)) for name, x in some.items()}
        expected = model.generate(**twice, **GREEDY)[:, ids.shape[1] + 2 :]
        assert torch.equal(generate_sharing_prefixes(model, **twice, **GREEDY), expected)


def test_tiles_without_a_place_are_refused_also_where_prompts_begin_alike() -> None:
    model, batch = tiny_model(), _batch()
    batch["pixel_values"] = torch.cat((batch["pixel_values"], tile_pixels(1)))
    with pytest.raises(PromptError, match="24 image tokens but the images give 28 features"):
        generate_sharing_prefixes(model, **batch, **GREEDY)


def test_shared_prefix_reads_each_image_once() -> None:
    model, batch = tiny_model(), _batch()
    tiles: list[int] = []
    model.model.vision_embedder.register_forward_hook(lambda m, args, o: tiles.append(len(args[0])))
    generate_sharing_prefixes(model, **batch, **GREEDY)
    assert tiles == [1 + 1 + 2]  # not 3 + 1 + 2


def test_equal_tokens_with_other_pixels_are_not_shared() -> None:
    shared = share_prefixes(**_batch(), **SIZES)
    assert shared is not None
    assert shared.row_of_prompt.tolist() == [0, 0, 0, 1, 2, 3]
    assert torch.equal(shared.beginning_ids[0], shared.beginning_ids[1])


def test_batch_without_repetition_is_left_alone() -> None:
    batch = {name: x[2:] for name, x in _batch().items() if name != "pixel_values"}
    assert share_prefixes(**batch, pixel_values=_batch()["pixel_values"][2:], **SIZES) is None
    text = {name: x[-1:] for name, x in batch.items()}
    assert share_prefixes(**text, pixel_values=None, **SIZES) is None
    model = tiny_model()
    alone = generate_sharing_prefixes(model, **text, **GREEDY)
    assert torch.equal(alone, model.generate(**text, **GREEDY)[:, text["input_ids"].shape[1] :])


def test_prompts_beyond_dynamic_scaling_are_not_shared() -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0}
    model = tiny_model(rope_parameters=rope, max_position_embeddings=8)
    batch = _batch()
    expected = model.generate(**batch, **GREEDY)[:, batch["input_ids"].shape[1] :]
    assert torch.equal(generate_sharing_prefixes(model, **batch, **GREEDY), expected)


def test_padding_of_the_parts_does_not_reach_dynamic_scaling() -> None:
    batch = _batch()
    rows = (0, 1, 4)  # the longest beginning is not that of the longest rest
    few = {name: batch[name][list(rows)] for name in ("input_ids", "attention_mask")}
    few["pixel_values"] = batch["pixel_values"][[0, 1, 4, 5]]
    length = few["input_ids"].shape[1]
    rope = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 4.0}
    model = tiny_model(rope_parameters=rope, max_position_embeddings=length)
    logits: list[Tensor] = []
    model.lm_head.register_forward_hook(lambda module, args, out: logits.append(out))
    one = {**GREEDY, "max_new_tokens": 1}
    model.generate(**few, **one)
    expected = logits.pop()
    logits.clear()
    generate_sharing_prefixes(model, **few, **one)
    torch.testing.assert_close(logits[-1], expected, atol=1e-5, rtol=0)


def test_padding_of_the_parts_does_not_reach_dynamic_scaling_in_a_long_answer() -> None:
    batch = _batch()
    rope = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 8.0}
    model = tiny_model(rope_parameters=rope, max_position_embeddings=22)
    options = {**GREEDY, "output_logits": True, "return_dict_in_generate": True}
    shared = share_prefixes(**batch, **SIZES)
    assert shared is not None
    assert batch["input_ids"].shape[1] < shared.input_ids.shape[1] <= 22, "prompts alone are short"
    expected = model.generate(**batch, **options).logits[-1]
    found = generate_sharing_prefixes(model, **batch, **options).logits[-1]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_images_with_options_are_not_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = tiny_model(), _batch()
    tiles: list[int] = []
    model.model.vision_embedder.register_forward_hook(lambda m, args, o: tiles.append(len(args[0])))
    monkeypatch.setattr(model.config, "visual_position_step", 0.5)
    generate_sharing_prefixes(model, **batch, **GREEDY)
    assert tiles == [6]
