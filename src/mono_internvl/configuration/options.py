"""What a model may do differently for visual tokens: its experts, its attention, its positions."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from mono_internvl.configuration.checks import check_choice, check_number
from mono_internvl.errors import ConfigError

VISUAL_EXPERTS = ("ffn", "qkv", "o", "norms")
"""Parts of a decoder layer that may have a visual copy, in the order they are written."""

EXPERT_ALIASES: dict[str, tuple[str, ...]] = {"attention": ("qkv", "o"), "qkvo": ("qkv", "o")}
"""Words for several parts at once, understood wherever a set of experts is given."""

EXPERT_PRESETS: dict[str, tuple[str, ...]] = {"v1": ("ffn",), "v1_5": ("ffn", "qkv", "o")}
"""Expert sets by version. `v1_5` is our reconstruction: the paper's abstract names visual attention
experts, but not their parts, and nothing of that model was released."""

IMAGE_ATTENTION = ("causal", "bidirectional")
"""How the visual tokens of one image attend to each other."""

TILINGS = ("internvl", "xcomposer_4khd")
"""How an image is cut and how its tokens stand in a prompt: tile after tile, or as rows of one
picture with learned tokens behind them."""

MAX_TILES = 256
"""Most tiles that an image is cut into: at 448 px, twice what a context of 32,768 tokens holds."""

MAX_TILE_PX = 8192
"""Longest side of a tile, px."""

_STEPS_PER_UNIT = 1024


def visual_expert_set(names: Iterable[str]) -> tuple[str, ...]:
    """A set of visual experts in its written order, with aliases resolved.

    Args:
        names: Out of `VISUAL_EXPERTS` and `EXPERT_ALIASES`; none for a plain language model.

    Raises:
        ConfigError: A name that is neither, or something that is not a list of names.
    """
    if not isinstance(names, list | tuple | set | frozenset):
        raise ConfigError(
            f"visual_experts={names!r}; expected a list of names out of {', '.join(VISUAL_EXPERTS)}"
        )
    given = {str(name) for name in names}
    if unknown := sorted(given - set(VISUAL_EXPERTS) - set(EXPERT_ALIASES)):
        raise ConfigError(
            f"visual_experts={unknown} unknown; choose from "
            f"{', '.join((*VISUAL_EXPERTS, *EXPERT_ALIASES))}"
        )
    parts = given.union(*(EXPERT_ALIASES.get(name, ()) for name in given))
    return tuple(name for name in VISUAL_EXPERTS if name in parts)


def parse_visual_experts(text: str) -> tuple[str, ...]:
    """A set of visual experts as typed at a command line: `ffn,attention`, `v1_5` or `none`.

    Raises:
        ConfigError: A name that is not known.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    if names == ["none"]:
        return ()
    if len(names) == 1 and names[0] in EXPERT_PRESETS:
        return EXPERT_PRESETS[names[0]]
    if not names:
        raise ConfigError("visual experts: nothing given; name some, or 'none'")
    return visual_expert_set(names)


def parse_position_steps(text: str) -> tuple[float, ...]:
    """Position steps as typed at a command line: `1,0.5,0.25`.

    Raises:
        ConfigError: A part is no number; `check_position_step` looks at the numbers.
    """
    try:
        return tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise ConfigError(
            f"visual_position_steps={text!r}: {error}; expected numbers, for example 1,0.5,0.25"
        ) from error


def check_image_attention(value: Any) -> None:
    """Refuses what is not a way for the tokens of one image to attend to each other.

    Raises:
        ConfigError: With field and value; so do all checks here.
    """
    check_choice("image_attention", value, IMAGE_ATTENTION)


def check_position_step(field: str, value: Any) -> None:
    """Refuses a position step that is not in (0, 1], or not a multiple of 1/1024.

    The published steps are multiples of 1/256. Multiples of a power of two add up without rounding,
    so that positions do not depend on how a prompt is cut into chunks and turns.
    """
    check_number(field, value, above=0)
    if value > 1 or value * _STEPS_PER_UNIT % 1:
        raise ConfigError(
            f"{field}={value!r}; expected a multiple of 1/{_STEPS_PER_UNIT} that is at most 1, for "
            "example 0.25"
        )


def check_tiling(config: Any) -> None:
    """Refuses a way to cut images that is not known, or that other settings contradict.

    Args:
        config: Of a model.
    """
    check_choice("tiling", config.tiling, TILINGS)
    if not config.has_image_marks:
        return
    for name, value in (
        ("dynamic_image_size", True),
        ("use_thumbnail", True),
        ("min_dynamic_patch", 1),
        ("pad2square", False),
        ("ps_version", "v2"),
    ):
        if getattr(config, name) != value:
            raise ConfigError(
                f"tiling={config.tiling!r} with {name}={getattr(config, name)!r}; expected "
                f"{value!r}: its grids, padding and global view have one form"
            )
