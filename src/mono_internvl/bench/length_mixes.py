"""Lengths of samples as the four published stages may have them, drawn from a few numbers.

Ours: no lengths were published. What is published are the stages' limits, the shares of S1.3's
tasks and which of S2's sets are text alone; sizes of images are those of web pictures and, in S2,
of documents, and texts are log-normal around the medians below.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from mono_internvl.processing.images import MonoInternVLImageProcessor
from mono_internvl.training.recipe import Stage

_TEMPLATE_TOKENS = 40  # system message, roles, `<img>` and `</img>`


@dataclass(frozen=True)
class Kind:
    """Samples of one kind.

    Attributes:
        ratio: Of the stage's samples.
        text_tokens: Median.
        text_spread: Of the logarithm.
        side_px: Median of the geometric mean of an image's sides; 0 without an image.
        side_spread: Of its logarithm.
    """

    ratio: float
    text_tokens: float
    text_spread: float
    side_px: float = 512.0
    side_spread: float = 0.5


MIXES: dict[str, tuple[Kind, ...]] = {
    "s11": (Kind(1.0, 14, 0.6),),
    "s12": (Kind(1.0, 45, 0.4),),
    "s13": (Kind(0.539, 45, 0.5), Kind(0.052, 120, 0.6), Kind(0.409, 180, 1.0, 800)),
    "s2": (Kind(0.7, 180, 0.9, 700), Kind(0.12, 600, 0.8, 1300), Kind(0.18, 500, 1.0, 0)),
}
"""Stage -> kinds of its samples."""
_ASPECT_SPREAD = 0.35  # of the logarithm of width / height


def lengths(stage: Stage, count: int, seed: int = 0) -> list[int]:
    """Lengths of so many samples of a published stage, none beyond its limit.

    Args:
        stage: Its `max_tokens` and `max_tiles` count; its name is one of `MIXES`.
        count: Samples.
        seed: Of the draws.
    """
    rng, layout_of = random.Random(f"{stage.name} {seed}"), MonoInternVLImageProcessor().layout_of
    kinds = MIXES[stage.name]
    found: list[int] = []
    while len(found) < count:
        (kind,) = rng.choices(kinds, [kind.ratio for kind in kinds])
        words = kind.text_tokens * rng.lognormvariate(0, kind.text_spread)
        length = _TEMPLATE_TOKENS + round(words)
        if kind.side_px:
            side = kind.side_px * rng.lognormvariate(0, kind.side_spread)
            aspect = rng.lognormvariate(0, _ASPECT_SPREAD)
            width, height = (max(1, round(side * aspect**power)) for power in (0.5, -0.5))
            length += layout_of(width, height, max_tiles=stage.max_tiles).num_tokens
        if length <= stage.max_tokens:  # a longer one is a bad sample
            found.append(length)
    return found
