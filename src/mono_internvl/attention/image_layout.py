"""What the images of a pass mean for attention and positions, where a model departs from plain.

Plain is: every token causal, every token one position further. With `image_attention` the tokens of
one image attend to each other both ways; with `visual_position_step` (V2PE) a visual token moves
the rotary position by less than 1. Both are worked out here, once per forward pass, from where
image features were placed; nothing else counts positions.

A run of visual tokens is one image: its tiles stand between `<img>` and `</img>`, which are text.

Legend: B batch, T tokens of this pass.

Source: V2PE as its released code has it (OpenGVLab/V2PE): image token k stands at last + step * k,
text goes on at ceil(last) + 1; in training the step is drawn per image.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache

from mono_internvl.configuration.model import MonoInternVLConfig
from mono_internvl.configuration.text_fields import is_scaled_dynamically
from mono_internvl.errors import ConfigError, PromptError

_HISTORY = "mono_internvl_history"
_CHUNK_TOKENS = 2048


@dataclass(frozen=True)
class ImageLayout:
    """Images of one pass.

    Attributes:
        image_numbers: (B, T_seen + T) int64, equal for the tokens of one image, -1 for text and for
            what is cached; None where all is causal.
        positions: (B, T) fp32 rotary positions; None where they are the tokens' places.
    """

    image_numbers: Tensor | None = None
    positions: Tensor | None = None

    def length(self, num_tokens: int) -> int:
        """Length of the context in positions, for rotary scaling: not the number of tokens.

        Ours: a step below 1 is there to stay within the trained length.
        """
        if self.positions is None:
            return num_tokens
        return min(num_tokens, int(self.positions.max().ceil()) + 1)


@dataclass(frozen=True)
class _History:
    """What a cache must remember of its tokens, besides keys and values.

    Attributes:
        lag: (B, T_seen) fp64, place minus rotary position.
        is_visual: (B, T_seen) bool.
    """

    lag: Tensor
    is_visual: Tensor


def moves_positions(config: MonoInternVLConfig) -> bool:
    """Whether a visual token may move the rotary position by something else than 1."""
    return config.visual_position_step != 1 or bool(config.visual_position_steps)


def has_image_layout(config: MonoInternVLConfig) -> bool:
    """Whether images change attention or positions at all."""
    return config.image_attention != "causal" or moves_positions(config)


def lay_out_images(
    config: MonoInternVLConfig,
    is_visual: Tensor,
    position_ids: Tensor | None,
    cache: Cache | None,
    *,
    is_training: bool = False,
) -> ImageLayout:
    """Lay out the images of one pass, and remember them with the cache.

    Args:
        config: Its `image_attention`, `visual_position_step` and `visual_position_steps` are read.
        is_visual: (B, T) bool, where image features were placed.
        position_ids: (B, T) integer places of the tokens: padding takes none, and a place that does
            not follow on the one before begins a packed segment. Floats are rotary positions and
            taken as they are. Counted on from the cache unless given.
        cache: What came before; extended by these tokens.
        is_training: Draws a step per image, if the configuration has steps to draw from.

    Raises:
        PromptError: The cache begins or ends inside an image whose tokens attend both ways, or it
            was not filled by this model.
        ConfigError: Images that attend both ways, with an attention that cannot do that.
    """
    tokens = is_visual.shape[1]
    seen = 0 if cache is None else int(cache.get_seq_length())
    history = _history_of(cache, seen, is_visual)
    places = position_ids
    if places is None:
        places = (torch.arange(tokens, device=is_visual.device) + seen).expand_as(is_visual)
    counts_on = history is not None or places.is_floating_point()
    image_starts = _image_starts(is_visual, None if counts_on else places)
    steps = _steps(config, image_starts, is_training)  # (B, T)
    if places.is_floating_point():
        lag = (torch.arange(tokens, device=places.device) + seen) - places.double()
    else:
        lag = position_lag(places, is_visual, steps, None if history is None else history.lag)
    numbers = None
    if config.image_attention == "bidirectional" and bool(is_visual.any()):
        _check_images_are_whole(is_visual, history)
        numbers = _number_images(is_visual, image_starts, seen)
        if "flash" in (config.get_text_config()._attn_implementation or ""):
            raise ConfigError(
                "image_attention='bidirectional' with flash attention, which knows causal masks "
                "only; use attn_implementation='sdpa', 'eager' or 'flex_attention'"
            )
    if cache is not None:
        new = _History(lag, is_visual)
        if history is not None:
            new = _History(
                torch.cat((history.lag, lag), dim=1),
                torch.cat((history.is_visual, is_visual), dim=1),
            )
        setattr(cache, _HISTORY, new)
    positions = places if places.is_floating_point() else places - lag
    return ImageLayout(numbers, positions.float() if moves_positions(config) else None)


def check_attention_and_cache(attention: str | None, cache: Cache | None) -> None:
    """Refuses flex attention over a static cache.

    Raises:
        ConfigError: transformers 5.23 fails on the pair and 5.17 generates other tokens.
    """
    if attention == "flex_attention" and cache is not None and cache.is_compileable:
        raise ConfigError(
            "attn_implementation='flex_attention' over a static cache is wrong in transformers; "
            "use a dynamic cache, or attn_implementation='sdpa'"
        )


def chunk_ends(
    config: MonoInternVLConfig, is_visual: Tensor, chunk_tokens: int | None, num_seen: int = 0
) -> list[int]:
    """Where the chunks of a prompt end.

    Args:
        config: With `image_attention="bidirectional"` an image must lie in one chunk. Beyond the
            length that dynamic rotary scaling begins at, the whole prompt does.
        is_visual: (B, T) bool.
        chunk_tokens: Tokens of a chunk; None takes 2,048 and cuts behind an image, not in it.
        num_seen: Tokens that the cache holds already.

    Raises:
        PromptError: A chunk of the given size would end inside an image, or a prompt, that must be
            whole.
    """
    length, size = is_visual.shape[1], chunk_tokens or _CHUNK_TOKENS
    if is_scaled_dynamically(config.get_text_config(), num_seen + length):
        if chunk_tokens is not None and chunk_tokens < length:
            raise PromptError(
                f"chunk_tokens={chunk_tokens}: with {num_seen + length} tokens, more than "
                f"max_position_embeddings={config.get_text_config().max_position_embeddings}, "
                "dynamic rotary scaling turns every key by an angle of the whole length; leave "
                "chunk_tokens out to read the prompt in one pass"
            )
        return [length]
    if config.image_attention == "causal":
        return [*range(size, length, size), length]
    is_inside = (is_visual[:, 1:] & is_visual[:, :-1]).any(0).tolist()  # cut before token i + 1
    ends, end = [], size
    while end < length:
        if is_inside[end - 1] and chunk_tokens is not None:
            raise PromptError(
                f"chunk_tokens={chunk_tokens}: a chunk would end at token {end}, inside an image "
                "whose tokens attend to each other both ways (image_attention='bidirectional'); "
                "leave chunk_tokens out to cut behind images"
            )
        while end < length and is_inside[end - 1]:
            end += 1
        ends.append(end)
        end += size
    return ends if ends[-1:] == [length] else [*ends, length]


def position_lag(
    places: Tensor, is_visual: Tensor, steps: Tensor, lag_before: Tensor | None = None
) -> Tensor:
    """How far rotary positions stay behind the tokens' places.

    A visual token adds 1 - step; text after an image falls back to the next whole position, so that
    an image of n tokens leaves a lag of floor(n * (1 - step)). Exact, for steps that are multiples
    of a power of two.

    Args:
        places: (B, T) integers; one that does not follow on the one before begins a segment.
        is_visual: (B, T) bool.
        steps: (B, T) fp64, one value per image.
        lag_before: (B, T_seen) fp64 of a cache that these tokens continue, or None.

    Returns:
        (B, T) fp64.
    """
    segment_starts = torch.zeros_like(is_visual)
    segment_starts[:, 0] = True
    gain = (1 - steps) * is_visual  # (B, T)
    if lag_before is None:
        segment_starts |= F.pad(places, (1, 0))[:, :-1] + 1 != places
        gain = gain.masked_fill(segment_starts, 0.0)  # a sequence begins at 0, with an image too
        carried = torch.zeros_like(gain[:, 0])  # (B,)
    else:  # an image that goes on here keeps its fraction, text does not
        last = lag_before[:, -1]
        gain[:, 0] += last * is_visual[:, 0]
        carried = last.floor() * ~is_visual[:, 0]
    previous_visual = F.pad(is_visual, (1, 0))[:, :-1]
    run_starts = is_visual & (~previous_visual | segment_starts)
    run_ends_before = previous_visual & (~is_visual | segment_starts)
    total = gain.cumsum(1)
    before_run = torch.where(run_starts, total - gain, 0.0).cummax(1).values
    in_run = (total - before_run) * is_visual  # (B, T)
    ended = torch.where(run_ends_before, F.pad(in_run, (1, 0))[:, :-1].floor(), 0.0)
    lag = ended.cumsum(1)
    at_segment = torch.where(segment_starts, lag, 0.0).cummax(1).values
    return lag - at_segment + in_run + carried[:, None]


def _image_starts(is_visual: Tensor, places: Tensor | None) -> Tensor:
    """(B, T) bool: the first token of every image; with places, an image ends with its segment."""
    goes_on = F.pad(is_visual, (1, 0))[:, :-1]
    if places is not None:
        goes_on = goes_on & (F.pad(places, (1, 0))[:, :-1] + 1 == places)
    return is_visual & ~goes_on


def _steps(config: MonoInternVLConfig, image_starts: Tensor, is_training: bool) -> Tensor:
    """(B, T) fp64: the position step of every token's image."""
    shape, device = image_starts.shape, image_starts.device
    choices = config.visual_position_steps if is_training else ()
    if not choices:
        return torch.full(shape, config.visual_position_step, dtype=torch.float64).to(device)
    drawn = torch.randint(len(choices), shape, device=device)
    columns = torch.arange(shape[1], device=device).expand_as(drawn)
    first_of_image = torch.where(image_starts, columns, 0).cummax(1).values
    values = torch.tensor(choices, dtype=torch.float64, device=device)
    return values[drawn.gather(1, first_of_image)]


def _number_images(is_visual: Tensor, image_starts: Tensor, seen: int) -> Tensor:
    numbers = torch.where(is_visual, image_starts.cumsum(1), -1)
    return F.pad(numbers, (seen, 0), value=-1)


def _history_of(cache: Cache | None, seen: int, is_visual: Tensor) -> _History | None:
    """What the cache remembers of its `seen` tokens; tokens that were cropped are forgotten."""
    if cache is None or seen == 0:
        return None
    history: _History | None = getattr(cache, _HISTORY, None)
    found = (0, 0) if history is None else tuple(history.lag.shape)
    if history is None or found[0] != is_visual.shape[0] or found[1] < seen:
        raise PromptError(
            f"the cache holds {seen} tokens of {is_visual.shape[0]} rows, but which of them are "
            f"visual is known of {found[1]} tokens of {found[0]} rows; fill it with this model "
            "from its first token on, and copy it with copy.deepcopy"
        )
    return _History(history.lag[:, :seen], history.is_visual[:, :seen])


def _check_images_are_whole(is_visual: Tensor, history: _History | None) -> None:
    if history is not None and bool((history.is_visual[:, -1] & is_visual[:, 0]).any()):
        raise PromptError(
            "a chunk begins inside an image, whose tokens attend to each other both ways "
            "(image_attention='bidirectional'); cut the prompt outside of <img>...</img>"
        )
