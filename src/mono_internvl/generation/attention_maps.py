"""Where each token of a prompt looks: attention layer by layer, as arrays and as numbers.

Any checkpoint and any length: the heads' mean is gathered in blocks of queries while the layers
run, so one layer's map lies in memory at a time, whatever attention the model answers with.

Legend: T tokens, H heads, K key-value heads, d head width, R queries of a block, V visual tokens,
S side of a kept map.

Source: arXiv 2410.08202, figure 5 (maps over system, image and user tokens). Ours: the mean over
    heads, which the paper does not state, and the numbers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from mono_internvl.configuration.model import MonoInternVLConfig
from mono_internvl.errors import PromptError
from mono_internvl.generation.context import most_tokens
from mono_internvl.model.modeling import MonoInternVLForConditionalGeneration

MAX_TOKENS = 16_384
"""Longest prompt: a layer's map, what it is compared with and the mask then take 2.3 GiB."""

SYSTEM, IMAGE, USER, ANSWER = "system", "image", "user", "answer"

_NUMBERS = {
    "visual_distance": "distance of visual attention",
    "text_to_image": "text to image",
    "image_to_text": "image to text",
}
_MAPPED = "mapped"
_QUERIES_PER_BLOCK = 128


@dataclass(frozen=True)
class Segment:
    """Tokens of one kind that stand side by side.

    Attributes:
        name: `system` (before the first image), `image`, `user` or `answer`.
        start: First token.
        stop: Token behind the last.
    """

    name: str
    start: int
    stop: int


@dataclass(frozen=True)
class LayerAttention:
    """Attention of one layer, the mean of its heads.

    A uniform figure is what attention spread evenly over all that a token may see would give.

    Attributes:
        layer: From 1.
        weights: (S, S) fp32, queries by keys; where S is less than T, means of neighbours.
        visual_distance: How far visual tokens look within their own tile, in visual tokens: the
            mean distance weighted by attention.
        uniform_visual_distance: The same, uniform.
        text_to_image: Part of its attention that a text token behind an image gives to images.
        uniform_text_to_image: The same, uniform.
        image_to_text: Part of its attention that a visual token gives to text.
        uniform_image_to_text: The same, uniform.
    """

    layer: int
    weights: np.ndarray
    visual_distance: float
    uniform_visual_distance: float
    text_to_image: float
    uniform_text_to_image: float
    image_to_text: float
    uniform_image_to_text: float


@dataclass(frozen=True)
class AttentionMaps:
    """What `attention_maps` found.

    Attributes:
        num_tokens: T.
        segments: Of the tokens, in order.
        layers: All layers, in order.
    """

    num_tokens: int
    segments: tuple[Segment, ...]
    layers: tuple[LayerAttention, ...]

    @property
    def lines(self) -> dict[str, tuple[list[float], list[float]]]:
        """Each number by its name: of all layers, and of uniform attention in them."""
        return {
            name: (
                [getattr(layer, field) for layer in self.layers],
                [getattr(layer, f"uniform_{field}") for layer in self.layers],
            )
            for field, name in _NUMBERS.items()
        }


@torch.no_grad()
def attention_maps(
    model: MonoInternVLForConditionalGeneration,
    ids: Sequence[int],
    pixel_values: Tensor,
    *,
    is_visual: Sequence[bool] | None = None,
    feature_order: Tensor | None = None,
    num_prompt: int | None = None,
    max_side: int = 512,
) -> AttentionMaps:
    """Read tokens once and keep where they look, layer by layer.

    The model is set to an attention of its own meanwhile: no other thread may use it.

    Args:
        model: Any checkpoint.
        ids: (T,) a prompt, or a prompt and its answer.
        pixel_values: (tiles, 3, S, S), all of its images.
        is_visual: (T,) which tokens are visual; the context tokens unless given.
        feature_order: (V,) as the processor gives it.
        num_prompt: Where the answer begins; all is prompt unless given.
        max_side: Largest S.

    Raises:
        PromptError: There is no image, or more tokens than the model reads or a map can show.
    """
    limit = min(MAX_TOKENS, most_tokens(model.config))
    if len(ids) > limit:
        raise PromptError(
            f"the prompt has {len(ids)} tokens, but a map shows at most {limit}; use a lower "
            "max_tiles"
        )
    tokens = torch.tensor(ids, dtype=torch.int64)
    visual = tokens == model.config.image_token_id
    if is_visual is not None:
        visual = torch.tensor(is_visual, dtype=torch.bool)
    if not bool(visual.any()):
        raise PromptError("the prompt shows no image; a map needs one")
    measure = _Measure(visual, _tile_places(model.config, visual, feature_order))
    layers: list[LayerAttention] = []

    def keep(weights: Tensor, sees: Tensor) -> None:
        layers.append(measure.layer(len(layers) + 1, weights, sees, max_side))

    with _mapped_attention(model):
        model.model(
            tokens[None].to(model.device),
            pixel_values.to(model.device, model.dtype),
            visual_token_mask=visual[None].to(model.device),
            feature_order=None if feature_order is None else feature_order.to(model.device),
            on_weights=keep,
        )
    return AttentionMaps(len(ids), _segments(visual.tolist(), num_prompt), tuple(layers))


# ------------------------------------------------------------------ attention that is looked at


@contextlib.contextmanager
def _mapped_attention(model: MonoInternVLForConditionalGeneration) -> Iterator[None]:
    """Lets a model attend by `_mapped_attention_forward` for a while, in eval mode."""
    before, was_training = model.config.get_text_config()._attn_implementation, model.training
    model.set_attn_implementation(_MAPPED)
    try:
        model.eval()
        yield
    finally:
        model.set_attn_implementation(before)
        model.train(was_training)


def _mapped_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    *,
    on_weights: Callable[[Tensor, Tensor], None],
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one row as the eager definition has it; hands out the mean of its heads.

    Args:
        module: The attention module.
        query: (1, H, T, d).
        key: (1, K, T, d).
        value: (1, K, T, d).
        attention_mask: (1, 1, T, T) bool, True where a query sees a key.
        scaling: Of the scores.
        dropout: Not read: nothing trains here.
        on_weights: Gets (T, T) fp32 weights and (T, T) bool, what a query may see; on the CPU.
        **kwargs: Not read.

    Returns:
        (1, T, H, d).
    """
    assert attention_mask is not None  # `_whole_mask` leaves none out
    groups, tokens = query.shape[1] // key.shape[1], query.shape[2]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    seen = torch.empty(tokens, tokens)
    blocks = []
    for start in range(0, tokens, _QUERIES_PER_BLOCK):
        rows = slice(start, start + _QUERIES_PER_BLOCK)
        scores = (query[:, :, rows] @ key.transpose(2, 3) * scaling).float()  # (1, H, R, T)
        weights = scores.masked_fill(~attention_mask[:, :, rows], -torch.inf).softmax(dim=-1)
        seen[rows] = weights[0].mean(dim=0).cpu()
        blocks.append((weights.to(value.dtype) @ value).transpose(1, 2))  # (1, R, H, d)
    on_weights(seen, attention_mask[0, 0].cpu())
    return torch.cat(blocks, dim=1), None


def _whole_mask(*, allow_is_causal_skip: bool = True, **kwargs: Any) -> Tensor:
    """The boolean mask of sdpa, always made: it says what attention could be spread over."""
    return sdpa_mask(allow_is_causal_skip=False, **kwargs)  # type: ignore[no-any-return]


AttentionInterface.register(_MAPPED, _mapped_attention_forward)
AttentionMaskInterface.register(_MAPPED, _whole_mask)


# ------------------------------------------------------------------ what is said about a map


@dataclass(frozen=True)
class _Tile:
    """Visual tokens of a tile: (n,) places in the prompt and (n, n) distances between them."""

    places: Tensor
    distances: Tensor


def _tile_places(
    config: MonoInternVLConfig, is_visual: Tensor, feature_order: Tensor | None
) -> list[_Tile]:
    places = is_visual.nonzero()[:, 0]  # (V,)
    feature = torch.arange(len(places)) if feature_order is None else feature_order.cpu()
    places, feature = places[feature >= 0], feature[feature >= 0]  # learned ones see nothing
    per_tile = config.num_image_tokens_per_tile
    tile, within = feature // per_tile, feature % per_tile
    side = round(per_tile**0.5)
    spots = torch.stack((within // side, within % side), dim=1).float()  # (V, 2)
    return [
        _Tile(places[tile == number], torch.cdist(spots[tile == number], spots[tile == number]))
        for number in tile.unique()
    ]


@dataclass(frozen=True)
class _Measure:
    """Numbers of a prompt's maps."""

    is_visual: Tensor
    tiles: Sequence[_Tile]

    def layer(self, number: int, weights: Tensor, sees: Tensor, max_side: int) -> LayerAttention:
        """One layer, of (T, T) weights and what could be seen."""
        uniform = sees.float()
        uniform /= uniform.sum(dim=1, keepdim=True)
        image = self.is_visual
        behind = ~image & (image.cumsum(0) > 0)
        side = min(max_side, len(weights))
        small = F.adaptive_avg_pool2d(weights[None], (side, side))[0]
        return LayerAttention(
            number,
            small.numpy(),
            self._distance(weights),
            self._distance(uniform),
            _mass(weights, behind, image),
            _mass(uniform, behind, image),
            _mass(weights, image, ~image),
            _mass(uniform, image, ~image),
        )

    def _distance(self, weights: Tensor) -> float:
        """Mean over visual tokens that see more of their tile than themselves."""
        means = []
        for tile in self.tiles:
            own = weights[tile.places[:, None], tile.places]  # (n, n)
            others = (own > 0).sum(dim=1) > 1
            means.append(((own * tile.distances).sum(dim=1) / own.sum(dim=1))[others])
        of_all = torch.cat(means)
        return float(of_all.mean()) if len(of_all) else 0.0


def _mass(weights: Tensor, queries: Tensor, keys: Tensor) -> float:
    """Part of the attention of some tokens that others get; 0 without such tokens."""
    return float(weights[queries][:, keys].sum(dim=1).mean()) if bool(queries.any()) else 0.0


def _segments(is_visual: Sequence[bool], num_prompt: int | None) -> tuple[Segment, ...]:
    """Runs of text and images; a token between two rows of one image belongs to the image."""
    visual = list(is_visual)
    for place in range(1, len(visual) - 1):
        visual[place] |= is_visual[place - 1] and is_visual[place + 1]
    first = visual.index(True)

    def name(place: int) -> str:
        if visual[place]:
            return IMAGE
        if num_prompt is not None and place >= num_prompt:
            return ANSWER
        return SYSTEM if place < first else USER

    return tuple(
        Segment(kind, (run := list(places))[0], run[-1] + 1)
        for kind, places in groupby(range(len(visual)), key=name)
    )
