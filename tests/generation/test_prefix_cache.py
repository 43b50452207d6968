"""What prompts begin with is read once, and only where nothing that follows can change it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_models import (
    IMAGE_TOKEN,
    TOKENS_PER_TILE,
    image_ids,
    text_ids,
    tile_after_tile,
    tile_pixels,
    tiny_model,
)
from torch import Tensor

from mono_internvl.errors import ConfigError
from mono_internvl.generation.engine import Engine
from mono_internvl.generation.prefix import PrefixCache, num_shared, signature_of
from mono_internvl.generation.request import Request
from mono_internvl.generation.sampling import Sampling
from mono_internvl.model.modeling import MonoInternVLForConditionalGeneration

START = 3 + 1  # text, <img>
BEGINNING = START + TOKENS_PER_TILE


def _about(pixels: Tensor, question: int, *more: Tensor, start: int = 3) -> Request:
    ids = (text_ids(start, 1), image_ids(len(pixels)), text_ids(2 + question, question), *more)
    return Request(torch.cat(ids, dim=1)[0], pixels, Sampling(max_new_tokens=3))


def _count_tiles(model: MonoInternVLForConditionalGeneration) -> list[int]:
    tiles: list[int] = []
    model.model.vision_embedder.register_forward_hook(
        lambda module, args, out: tiles.append(len(args[0]))
    )
    return tiles


def test_prefix_images_are_read_once() -> None:
    model = tiny_model()
    tiles, engine = _count_tiles(model), Engine(model)
    images = [tile_pixels(1), tile_pixels(1, seed=7), tile_pixels(2, seed=3)]
    engine.generate([_about(image, question) for question in range(3) for image in images])
    assert sum(tiles) == 1 + 1 + 2
    (later,) = engine.generate([_about(images[0], 9)])
    assert sum(tiles) == 4 and later.num_cached == BEGINNING


def test_prefix_of_a_later_image_continues_that_of_the_first() -> None:
    model = tiny_model()
    tiles, engine = _count_tiles(model), Engine(model)
    first, second = tile_pixels(1), tile_pixels(2, seed=3)
    engine.generate([_about(first, 1)])
    ids = _about(first, 1, image_ids(2), text_ids(2)).input_ids
    both = Request(ids, torch.cat((first, second)), Sampling(max_new_tokens=3))
    (result,) = engine.generate([both])
    assert tiles == [1, 2] and result.num_cached == BEGINNING
    (result,) = engine.generate([both])
    assert tiles == [1, 2] and result.num_cached == len(ids) - 3


def test_prefix_bytes_are_kept_and_the_oldest_goes() -> None:
    model = tiny_model()
    room = 2 * BEGINNING * Engine(model).bytes_per_token
    engine = Engine(model, prefix_bytes=room)
    images = [tile_pixels(1, seed=seed) for seed in range(3)]

    def cached(image: Tensor) -> int:
        (result,) = engine.generate([_about(image, 1)])
        assert engine.prefixes.num_bytes <= room
        return result.num_cached

    text, whole = START, BEGINNING
    assert [cached(images[n]) for n in (0, 1, 0, 2, 0, 2)] == [0, text, whole, text, whole, whole]
    assert cached(images[1]) == text
    engine.prefixes.clear()
    assert cached(images[1]) == 0


def test_prefix_that_is_too_large_is_read_each_time() -> None:
    model = tiny_model()
    tiles = _count_tiles(model)
    most = BEGINNING * Engine(model).bytes_per_token - 1
    engine = Engine(model, max_rows=1, prefix_bytes=most)
    engine.generate([_about(tile_pixels(1), question) for question in range(3)])
    assert sum(tiles) == 3 and len(engine.prefixes) == 0


def _shared(one: Request, other: Request) -> int:
    def signature(request: Request) -> Tensor:
        ids = torch.as_tensor(request.input_ids)
        is_visual = ids == IMAGE_TOKEN
        return signature_of(ids, is_visual, request.pixel_values, tile_after_tile(is_visual))

    return num_shared(signature(one), signature(other))


def test_num_shared_tells_pixels_and_tokens_apart() -> None:
    one, other = tile_pixels(1), tile_pixels(1, seed=7)
    assert _shared(_about(one, 1), _about(one, 5)) >= BEGINNING
    assert _shared(_about(one, 1), _about(other, 1)) == START
    assert _shared(_about(one, 1), _about(one, 1, start=4)) < START
    same = _about(one, 1)
    assert _shared(same, same) == len(same.input_ids) - 1


def test_num_shared_divides_no_image() -> None:
    two = tile_pixels(2, seed=3)
    for pixels in (two[:1], torch.cat((two[:1], tile_pixels(1)))):
        assert _shared(_about(pixels, 1), _about(two, 1)) == START
        assert _shared(_about(two, 1), _about(pixels, 1)) == START
    ends = Request(torch.cat((text_ids(3, 1), image_ids(2)[:, :-1]), dim=1)[0], two)
    assert _shared(ends, _about(two, 1)) == _shared(ends, ends) == START


def test_num_shared_tells_a_generated_image_token_from_an_image() -> None:
    ids = torch.tensor([5, IMAGE_TOKEN, 6])
    here, nowhere = ids == IMAGE_TOKEN, torch.zeros(3, dtype=torch.bool)
    text = signature_of(ids, nowhere, None, tile_after_tile(nowhere))
    assert num_shared(text, signature_of(ids, here, tile_pixels(1), tile_after_tile(here))) == 1


def _tensors(num_bytes: int) -> list[Tensor]:
    return [torch.zeros(num_bytes, dtype=torch.int8)]


def test_prefix_cache_counts_what_it_holds() -> None:
    cache = PrefixCache(10)
    a, b, c, d = (torch.tensor([n, 1, 2]) for n in range(4))
    cache.keep(a, 11, lambda: _tensors(11))
    assert len(cache) == 0
    cache.keep(a, 4, lambda: _tensors(4))
    cache.keep(b, 5, lambda: _tensors(5))
    assert cache.find(a)[0] == 2 and cache.find(d) == (0, [])
    cache.keep(c, 3, lambda: _tensors(3))
    assert [cache.find(x)[0] for x in (a, b, c)] == [2, 0, 2] and cache.num_bytes == 7


def test_prefix_cache_keeps_the_longest_of_a_conversation() -> None:
    cache = PrefixCache(10)
    ids = torch.arange(6)
    cache.keep(ids[:3], 3, lambda: _tensors(3))
    cache.keep(ids, 6, lambda: _tensors(6))
    cache.keep(ids[:4], 4, lambda: _tensors(4))
    assert (len(cache), cache.num_bytes, cache.find(ids)[0]) == (1, 6, 5)


# ------------------------------------------------------------------ turns and samples


def _count_tokens(model: MonoInternVLForConditionalGeneration) -> list[tuple[int, ...]]:
    read: list[tuple[int, ...]] = []
    model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(tuple(kwargs["inputs_embeds"].shape[:2])),
        with_kwargs=True,
    )
    return read


def test_prefix_of_a_conversation_is_read_once() -> None:
    """A turn reads its own tokens, the last one that was answered before, and no image again."""
    model = tiny_model()
    tiles, read, engine = _count_tiles(model), _count_tokens(model), Engine(model)
    ids, pixels = _about(tile_pixels(1), 1).input_ids, tile_pixels(1)
    cached = 0
    for turn in range(3):
        read.clear()
        request = Request(ids, pixels, Sampling(max_new_tokens=3), is_continued=True)
        (result,) = engine.generate([request])
        assert result.num_cached == cached
        assert read == [(1, len(ids) - cached), (1, 1), (1, 1)]
        cached = len(ids) + 2
        ids = torch.cat((torch.as_tensor(ids), torch.tensor(result.ids), text_ids(4, turn)[0]))
    assert tiles == [1] and len(engine.prefixes) == 1


def test_prefix_of_one_that_is_being_answered_is_not_read_again() -> None:
    model = tiny_model()
    read, engine = _count_tokens(model), Engine(model)
    engine.submit(_text(20, 9))
    engine.step()
    engine.step()
    (result,) = engine.generate([_text(20, 3)])
    assert result.num_cached == 19
    assert read[:3] == [(1, 20), (1, 1), (1, 1)]


def _text(length: int, new: int, **sampling: float) -> Request:
    return Request(text_ids(length, 1)[0], None, Sampling(max_new_tokens=new, **sampling))


@pytest.mark.parametrize("max_rows", [8, 3])
@pytest.mark.parametrize("has_image", [True, False], ids=["image", "text"])
def test_samples_share_one_prefill(max_rows: int, has_image: bool) -> None:
    model = tiny_model()
    tiles, read = _count_tiles(model), _count_tokens(model)
    sampling = Sampling(temperature=2.0, max_new_tokens=6, seed=5)
    request = replace(_about(tile_pixels(1), 1) if has_image else _text(14, 6), sampling=sampling)
    prompt = len(request.input_ids)
    results = Engine(model, max_rows=max_rows).generate(request.samples(8))
    prefills = [shape for shape in read if shape[1] > 1]
    assert prefills == [(1, prompt)] and sum(tiles) == has_image
    assert [result.num_cached for result in results] == [0, *[prompt - 1] * 7]
    assert len({result.ids for result in results}) > 4
    for number, result in enumerate(results):
        alone = replace(request, sampling=replace(sampling, seed=5 + number))
        assert Engine(model, prefix_bytes=0).generate([alone])[0].ids == result.ids


def test_samples_count_seeds_on_and_refuse_none() -> None:
    seeds = [one.sampling.seed for one in _text(3, 1, seed=2**64 - 1).samples(2)]
    assert seeds == [2**64 - 1, 0]
    assert [one.sampling.seed for one in _text(3, 1).samples(2)] == [None, None]
    with pytest.raises(ConfigError, match="n=0"):
        _text(3, 1).samples(0)


def test_prefix_may_end_within_a_tile_whose_rows_are_separated() -> None:
    """Visual tokens that were read with an earlier prompt are not placed again."""
    model, pixels, sampling = tiny_model(), tile_pixels(1), Sampling(max_new_tokens=3)
    image = image_ids(1)[0]
    middle = 1 + TOKENS_PER_TILE // 2

    def separated_by(separator: int) -> Request:
        rows = (image[:middle], torch.tensor([separator]), image[middle:])
        ids = torch.cat((text_ids(3, 1)[0], *rows, text_ids(4, 2)[0]))
        return Request(ids, pixels, sampling, has_logprobs=True)

    (alone,) = Engine(model, prefix_bytes=0).generate([separated_by(9)])
    engine = Engine(model)
    engine.generate([separated_by(8)])
    (later,) = engine.generate([separated_by(9)])
    assert later.num_cached == 3 + middle
    assert later.ids == alone.ids
    assert later.logprobs == pytest.approx(alone.logprobs, abs=1e-5)
