"""Ways to cut images, by the name that `config.json` and `preprocessor_config.json` give them."""

from collections.abc import Callable

from mono_internvl.processing.tiling.internvl import InternVLTiling
from mono_internvl.processing.tiling.layout import (
    NEWLINE,
    SEPARATOR,
    Tiling,
    TokenLayout,
    feature_order,
)
from mono_internvl.processing.tiling.xcomposer_4khd import XComposer4KHDTiling

TILINGS: dict[str, Callable[..., Tiling]] = {
    "internvl": InternVLTiling,
    "xcomposer_4khd": XComposer4KHDTiling,
}
"""Name -> what makes a tiling of `image_size`, `min_tiles`, `max_tiles`, `use_thumbnail`,
`pad2square` and `fill`."""

__all__ = [
    "NEWLINE",
    "SEPARATOR",
    "TILINGS",
    "InternVLTiling",
    "Tiling",
    "TokenLayout",
    "XComposer4KHDTiling",
    "feature_order",
]
