"""Several questions about one image: read system message and image once.

Attention is causal and the image comes first, so its keys and values do not depend on the question.
Prompts that begin alike, same tokens and same tiles, up to the end of their last image share one
row of the cache while it is read; then every prompt gets its copy and reads its own question.

Legend: B prompts, U different beginnings, P tokens of the longest, T tokens of the longest rest.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from mono_internvl.model.image_layout import has_image_layout
from mono_internvl.model.layers import is_scaled_dynamically
from mono_internvl.model.modeling import MonoInternVLForConditionalGeneration


@dataclass(frozen=True)
class SharedPrompts:
    """A batch of prompts cut into beginnings, each different one once, and the rest.

    Attributes:
        beginning_ids: (U, P), padded on the left.
        beginning_mask: (U, P), 0 at padding.
        beginning_pixels: Tiles of all beginnings, or None.
        row_of_prompt: (B,) which beginning a prompt has.
        input_ids: (B, P + T) beginning and rest, each padded on its left.
        attention_mask: (B, P + T), 0 at padding.
    """

    beginning_ids: Tensor
    beginning_mask: Tensor
    beginning_pixels: Tensor | None
    row_of_prompt: Tensor
    input_ids: Tensor
    attention_mask: Tensor


def share_prefixes(
    input_ids: Tensor,
    attention_mask: Tensor,
    pixel_values: Tensor | None,
    *,
    image_token_id: int,
    tokens_per_tile: int,
) -> SharedPrompts | None:
    """Find the prompts of a batch that begin alike; None where no two do.

    None, too, where a prompt ends with its image, which leaves no token to answer from, and where
    tiles and places do not match, which the model will say.

    Args:
        input_ids: (B, T) prompts, padded on the left.
        attention_mask: (B, T), 0 at padding.
        pixel_values: Tiles of the batch in order.
        image_token_id: Id of `<IMG_CONTEXT>`.
        tokens_per_tile: Visual tokens of a tile.
    """
    if pixel_values is None:
        return None
    rows = [ids[mask.bool()] for ids, mask in zip(input_ids, attention_mask, strict=True)]
    numbers: dict[Any, int] = {}
    beginnings: list[Tensor] = []
    pixels: list[Tensor] = []
    row_of_prompt, rests, tile = [], [], 0
    for row in rows:
        places = (row == image_token_id).nonzero()
        num_tiles = len(places) // tokens_per_tile
        own = pixel_values[tile : tile + num_tiles]
        tile += num_tiles
        end = int(places[-1]) + 1 if len(places) else 0
        key = (tuple(row[:end].tolist()), digest(own))
        if key not in numbers:
            numbers[key] = len(beginnings)
            beginnings.append(row[:end])
            pixels.append(own)
        row_of_prompt.append(numbers[key])
        rests.append(row[end:])
    is_whole = tile == len(pixel_values) and all(len(rest) for rest in rests)
    if len(beginnings) == len(rows) or not is_whole:
        return None
    ids, mask = _pad_left(beginnings, input_ids)
    rest_ids, rest_mask = _pad_left(rests, input_ids)
    of_prompt = torch.tensor(row_of_prompt, device=input_ids.device)
    return SharedPrompts(
        ids,
        mask,
        torch.cat(pixels) if any(len(x) for x in pixels) else None,
        of_prompt,
        torch.cat((ids[of_prompt], rest_ids), dim=1),
        torch.cat((mask[of_prompt], rest_mask), dim=1),
    )


@torch.inference_mode()
def generate_sharing_prefixes(
    model: MonoInternVLForConditionalGeneration,
    input_ids: Tensor,
    attention_mask: Tensor,
    pixel_values: Tensor | None = None,
    **options: Any,
) -> Any:
    """New tokens of a batch of prompts, (B, new); what several of them begin with is read once.

    With `return_dict_in_generate` the output of `generate`, its `sequences` without the prompts.

    Args:
        model: In eval mode.
        input_ids: (B, T) prompts, padded on the left.
        attention_mask: (B, T), 0 at padding.
        pixel_values: Tiles of the batch in order.
        **options: As `generate` takes them.
    """
    text, length = model.config.text_config, input_ids.shape[1]
    shared = share_prefixes(
        input_ids,
        attention_mask,
        pixel_values,
        image_token_id=model.config.image_token_id,
        tokens_per_tile=model.config.num_image_tokens_per_tile,
    )
    device = model.device
    if shared is None or not _may_be_shared(model, shared, options):
        images = {} if pixel_values is None else {"pixel_values": pixel_values.to(device)}
        batch = {"attention_mask": attention_mask.to(device), **images}
        return _without_prompt(model.generate(input_ids.to(device), **batch, **options), length)
    cache = DynamicCache(config=text)
    model.prefill(
        shared.beginning_ids.to(device),
        cache,
        None if shared.beginning_pixels is None else shared.beginning_pixels.to(device),
        shared.beginning_mask.to(device),
    )
    copies = _rows_each(model, options)
    cache.batch_select_indices(shared.row_of_prompt.repeat_interleave(copies).to(device))
    out = model.generate(
        shared.input_ids.to(device),
        attention_mask=shared.attention_mask.to(device),
        past_key_values=cache,
        **options,
    )
    return _without_prompt(out, shared.input_ids.shape[1])


def _without_prompt(out: Any, length: int) -> Any:
    """What `generate` returned, its sequences without the prompt of `length` tokens."""
    if isinstance(out, Tensor):
        return out[:, length:]
    out.sequences = out.sequences[:, length:]
    return out


def _rows_each(model: MonoInternVLForConditionalGeneration, options: dict[str, Any]) -> int:
    """Rows into which `generate` repeats a prompt; a cache that is handed to it is not repeated."""
    config = options.get("generation_config") or model.generation_config
    names = ("num_beams", "num_return_sequences")
    return max(int(options.get(name) or getattr(config, name, None) or 1) for name in names)


def _may_be_shared(
    model: MonoInternVLForConditionalGeneration, shared: SharedPrompts, options: dict[str, Any]
) -> bool:
    """Whether the shared form gives the numbers of every prompt read alone.

    Beginning and rest are padded each, so rows are longer than the longest prompt, with padding
    behind the image. That must be without meaning: no row may outgrow the window of layers that
    slide, which padding would fill, nor the length at which dynamic scaling begins, which turns
    every key by an angle of that length; and the end of an answer must not be counted from the
    start of its row. Where a cache remembers more of its images than keys and values, rows are not
    copied either.
    """
    config = model.config
    text = config.get_text_config()
    given = options.get("generation_config") or model.generation_config
    num_new = options.get("max_new_tokens") or given.max_new_tokens
    if num_new is None or has_image_layout(config):
        return False
    num_tokens = shared.input_ids.shape[1] + num_new
    slides = text.sliding_layers is not None and any(text.sliding_layers)
    if slides and text.sliding_window is not None and num_tokens > text.sliding_window:
        return False
    return not is_scaled_dynamically(text, num_tokens)


def digest(x: Tensor) -> bytes:
    """A fingerprint of a tensor's values and shape."""
    data = x.detach().cpu().contiguous()
    found = hashlib.blake2b(repr((tuple(data.shape), data.dtype)).encode(), digest_size=16)
    found.update(data.view(torch.uint8).numpy().data)
    return found.digest()


def _pad_left(rows: list[Tensor], like: Tensor) -> tuple[Tensor, Tensor]:
    """Rows as (B, T) ids and their mask; padding is 0, which nobody sees."""
    length = max(len(row) for row in rows)
    ids, mask = like.new_zeros(len(rows), length), like.new_zeros(len(rows), length)
    for number, row in enumerate(rows):
        ids[number, length - len(row) :] = row
        mask[number, length - len(row) :] = 1
    return ids, mask
