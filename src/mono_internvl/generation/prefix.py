"""What prompts begin with, read once: system message, images, the earlier turns of a conversation.

Attention is causal, so keys and values of a beginning do not depend on what follows. Beginnings
are compared by signature: a text token counts by its id, a visual one by the pixels of its tile and
its number in it. An image is shared whole or not at all, as its tokens may attend to each other
both ways.

Legend: T tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class PrefixCache:
    """Keys and values of beginnings; the one that was not asked for the longest goes first.

    Args:
        max_bytes: Of all keys and values that are kept.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._kept: list[tuple[Tensor, list[Tensor]]] = []  # what was asked for last stands last

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def num_bytes(self) -> int:
        """Bytes of all keys and values that are kept."""
        return sum(_num_bytes(tensors) for _, tensors in self._kept)

    def find(self, signature: Tensor) -> tuple[int, list[Tensor]]:
        """The longest beginning of a prompt that is kept.

        Args:
            signature: (T,) of the prompt, see `signature_of`.

        Returns:
            Its tokens, and tensors of at least as many, which count as asked for; 0 and none where
            nothing is shared.
        """
        length, longest = 0, None
        for number, (kept, _) in enumerate(self._kept):
            if (shared := num_shared(signature, kept, beyond=length)) > length:
                length, longest = shared, number
        if longest is None:
            return 0, []
        self._kept.append(self._kept.pop(longest))
        return length, self._kept[-1][1]

    def keep(self, signature: Tensor, num_bytes: int, copy: Callable[[], list[Tensor]]) -> None:
        """Keep a beginning, unless it is too large or part of one that is kept.

        Shorter ones that it begins with go, and as many old ones as it needs the room of.

        Args:
            signature: (T,).
            num_bytes: Of its keys and values.
            copy: Makes them, when there is room.
        """
        if num_bytes > self.max_bytes or any(_begins(kept, signature) for kept, _ in self._kept):
            return
        self._kept = [one for one in self._kept if not _begins(signature, one[0])]
        while self.num_bytes + num_bytes > self.max_bytes:
            del self._kept[0]
        self._kept.append((signature, copy()))

    def clear(self) -> None:
        """Forget everything: the model's weights, or how it computes, have changed."""
        self._kept.clear()


def signature_of(
    input_ids: Tensor, is_visual: Tensor, pixel_values: Tensor | None, shown: Tensor
) -> Tensor:
    """(T,) int64: ids of text tokens, and below 0, for visual ones, a fingerprint of what they see.

    Args:
        input_ids: (T,).
        is_visual: (T,) bool.
        pixel_values: (tiles, 3, S, S), as many as the visual tokens need.
        shown: (visual tokens, 2) int64, tile and feature of it that stand at each; both below 0 for
            a learned token, which sees nothing.
    """
    if pixel_values is None:
        return input_ids
    tiles = torch.tensor([_fingerprint(tile) for tile in pixel_values])
    signature = input_ids.clone()
    tile, feature = shown.unbind(1)
    signature[is_visual] = torch.where(tile < 0, feature, ~(tiles[tile] ^ feature))
    return signature


def num_shared(prompt: Tensor, other: Tensor, *, beyond: int = 0) -> int:
    """Leading tokens that a prompt has in common with another; at least one of its own is left.

    Args:
        prompt: (T,) signature.
        other: Signature of any length.
        beyond: No more than so many count as none: most prompts are told apart by one comparison.
    """
    most = min(len(prompt) - 1, len(other))
    if most <= beyond or not torch.equal(prompt[: beyond + 1], other[: beyond + 1]):
        return 0
    differs = (prompt[:most] != other[:most]).nonzero()
    shared = int(differs[0]) if len(differs) else most
    if divides_image(prompt, shared) or divides_image(other, shared):
        text = (prompt[:shared] >= 0).nonzero()
        shared = int(text[-1]) + 1 if len(text) else 0
    return shared


def divides_image(signature: Tensor, length: int) -> bool:
    """Whether a prompt's first tokens end within one of its images."""
    return 0 < length < len(signature) and bool((signature[length - 1 : length + 1] < 0).all())


def end_of_images(signature: Tensor) -> int:
    """Tokens up to the end of the last image; 0 without images."""
    visual = (signature < 0).nonzero()
    return int(visual[-1]) + 1 if len(visual) else 0


def _begins(signature: Tensor, other: Tensor) -> bool:
    """Whether a signature begins with another."""
    return torch.equal(signature[: len(other)], other)


def _fingerprint(x: Tensor) -> int:
    """63 bits of a tensor's values and dtype."""
    data = x.detach().cpu().contiguous()
    found = hashlib.blake2b(str(data.dtype).encode(), digest_size=8)
    found.update(data.view(torch.uint8).numpy().data)
    return int.from_bytes(found.digest()) >> 1


def _num_bytes(tensors: Sequence[Tensor]) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)
