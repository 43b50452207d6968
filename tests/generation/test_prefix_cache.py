"""What prompts begin with is read once, and only where nothing that follows can change it."""

from __future__ import annotations

import torch
from tiny_models import IMAGE_TOKEN, TOKENS_PER_TILE, image_ids, text_ids, tile_pixels, tiny_model
from torch import Tensor

from mono_internvl.generation.engine import Engine
from mono_internvl.generation.prefix import PrefixCache, find_beginnings
from mono_internvl.generation.request import Request
from mono_internvl.generation.sampling import Sampling
from mono_internvl.model.modeling import MonoInternVLForConditionalGeneration

BEGINNING = 3 + 1 + TOKENS_PER_TILE  # text, <img>, one tile


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

    assert [cached(images[n]) for n in (0, 1, 0, 2, 0, 2)] == [0, 0, BEGINNING, 0, *[BEGINNING] * 2]
    assert cached(images[1]) == 0
    engine.prefixes.clear()
    assert cached(images[1]) == 0


def test_prefix_that_is_too_large_is_read_each_time() -> None:
    model = tiny_model()
    tiles = _count_tiles(model)
    engine = Engine(model, prefix_bytes=BEGINNING * Engine(model).bytes_per_token - 1)
    engine.generate([_about(tile_pixels(1), question) for question in range(3)])
    assert sum(tiles) == 3 and len(engine.prefixes) == 0


def test_find_beginnings_tells_pixels_and_tokens_apart() -> None:
    def keys(request: Request) -> list[bytes]:
        assert isinstance(request.input_ids, Tensor) and request.pixel_values is not None
        is_visual = request.input_ids == IMAGE_TOKEN
        found = find_beginnings(request.input_ids, is_visual, request.pixel_values, TOKENS_PER_TILE)
        return [one.key for one in found]

    one, other = tile_pixels(1), tile_pixels(1, seed=7)
    assert keys(_about(one, 1)) == keys(_about(one, 5))
    assert keys(_about(one, 1)) != keys(_about(other, 1))
    assert keys(_about(one, 1)) != keys(_about(one, 1, start=4))
    ends = Request(torch.cat((text_ids(3, 1), image_ids(1)[:, :-1]), dim=1)[0], one)
    assert keys(ends) == []


def test_prefix_cache_counts_what_it_holds() -> None:
    cache = PrefixCache(10)
    assert not cache.can_hold(11)
    cache.put(b"a", [torch.zeros(4, dtype=torch.int8)])
    cache.put(b"b", [torch.zeros(5, dtype=torch.int8)])
    cache.take(b"a")
    cache.put(b"c", [torch.zeros(3, dtype=torch.int8)])
    assert (b"a" in cache, b"b" in cache, cache.num_bytes) == (True, False, 7)
