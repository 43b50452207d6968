"""Ways to cut images, by the name that `preprocessor_config.json` gives them."""

from collections.abc import Callable

from mono_internvl.processing.tiling.internvl import InternVLTiling
from mono_internvl.processing.tiling.layout import Tiling, TokenLayout, feature_order

TILINGS: dict[str, Callable[..., Tiling]] = {"internvl": InternVLTiling}
"""Name -> what makes a tiling of `image_size`, `min_tiles`, `max_tiles`, `use_thumbnail`,
`pad2square` and `fill`."""

__all__ = ["TILINGS", "InternVLTiling", "Tiling", "TokenLayout", "feature_order"]
