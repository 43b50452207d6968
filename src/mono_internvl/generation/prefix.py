"""What prompts begin with, read once: system message and images of earlier requests.

Attention is causal and the images come first, so their keys and values do not depend on the
question. A beginning is known by its tokens and the pixels of its tiles, and ends with an image.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mono_internvl.attention.image_layout import has_image_layout
from mono_internvl.configuration.model import MonoInternVLConfig
from mono_internvl.configuration.text_fields import is_scaled_dynamically


@dataclass(frozen=True)
class Beginning:
    """A part of a prompt, from its first token to the end of one of its images.

    Attributes:
        key: Fingerprint of tokens and pixels.
        num_tokens: Its length.
        num_tiles: Tiles of its images.
    """

    key: bytes
    num_tokens: int
    num_tiles: int


class PrefixCache:
    """Keys and values of beginnings; the one that was not asked for the longest goes first.

    Args:
        max_bytes: Of all keys and values that are kept.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._kept: OrderedDict[bytes, list[Tensor]] = OrderedDict()

    def __contains__(self, key: object) -> bool:
        return key in self._kept

    def __len__(self) -> int:
        return len(self._kept)

    def take(self, key: bytes) -> list[Tensor]:
        """The tensors kept under a key, which was asked for just now."""
        self._kept.move_to_end(key)
        return self._kept[key]

    def can_hold(self, num_bytes: int) -> bool:
        """Whether so much may be kept at all."""
        return num_bytes <= self.max_bytes

    def put(self, key: bytes, tensors: list[Tensor]) -> None:
        """Keep tensors that `can_hold` allows."""
        self.num_bytes += _num_bytes(tensors)
        self._kept[key] = tensors
        while self.num_bytes > self.max_bytes:
            self.num_bytes -= _num_bytes(self._kept.popitem(last=False)[1])

    def clear(self) -> None:
        """Forget everything: the model's weights, or how it computes, have changed."""
        self._kept.clear()
        self.num_bytes = 0


def depends_on_the_beginning_alone(config: MonoInternVLConfig, num_tokens: int) -> bool:
    """Whether the beginning of a prompt has the same keys and values whatever follows.

    Not beyond the trained length with dynamic scaling, which turns every key by an angle of the
    whole prompt. Nor where images move positions or attend both ways: then keys and values are not
    all that must be known of them.

    Args:
        config: Of the model.
        num_tokens: Length of the whole prompt.
    """
    return not has_image_layout(config) and not is_scaled_dynamically(
        config.text_config, num_tokens
    )


def find_beginnings(
    input_ids: Tensor, is_visual: Tensor, pixel_values: Tensor, tokens_per_tile: int
) -> list[Beginning]:
    """What a prompt begins with, up to each of its images; at least one token follows.

    Args:
        input_ids: (T,).
        is_visual: (T,) bool.
        pixel_values: (tiles, 3, S, S), as many as the visual tokens need.
        tokens_per_tile: Visual tokens of a tile.
    """
    goes_on = torch.cat((is_visual[1:], is_visual.new_zeros(1)))
    ends = ((is_visual & ~goes_on).nonzero().flatten() + 1).tolist()
    fingerprint = hashlib.blake2b(digest_size=16)
    found, begin, tile = [], 0, 0
    for end in ends:
        last_tile = int(is_visual[:end].sum()) // tokens_per_tile
        fingerprint.update(digest(input_ids[begin:end]) + digest(pixel_values[tile:last_tile]))
        if end < len(input_ids):
            found.append(Beginning(fingerprint.digest(), end, last_tile))
        begin, tile = end, last_tile
    return found


def digest(x: Tensor) -> bytes:
    """A fingerprint of a tensor's values, shape and dtype."""
    data = x.detach().cpu().contiguous()
    found = hashlib.blake2b(repr((tuple(data.shape), data.dtype)).encode(), digest_size=16)
    found.update(data.view(torch.uint8).numpy().data)
    return found.digest()


def _num_bytes(tensors: Sequence[Tensor]) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)
