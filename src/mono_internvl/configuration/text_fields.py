"""Checks of what Llama-like decoders differ in: rotary scaling, sliding layers, layers without it.

The knobs are fields of `MonoInternVLTextConfig`; what none of them can say is refused by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mono_internvl.configuration.checks import check_integer, check_number, checked_object
from mono_internvl.errors import ConfigError

if TYPE_CHECKING:
    from mono_internvl.configuration.model import MonoInternVLTextConfig

ROPE_FIELDS: dict[str, tuple[str, ...]] = {
    "default": ("partial_rotary_factor",),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
    "yarn": (
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
    ),
}
"""Types of rotary scaling and what belongs to each of them, besides `rope_theta`.

With a `partial_rotary_factor` below 1 that part of a head's pairs turns, the first ones; channels i
and i + d/2 are a pair whatever the factor.
"""

LAYER_TYPES = ("full_attention", "sliding_attention")
"""Transformers' names of a layer that does not slide, and of one that does."""

_NEEDED = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ROPE_FIELDS["llama3"],
    "yarn": ("factor",),
}


def check_rope(rope_parameters: Any, head_dim: int | None = None) -> None:
    """Hold rotary parameters to a type that is implemented, and to the fields of that type.

    Args:
        rope_parameters: To check.
        head_dim: Width of the heads that they turn, where it is known.

    Raises:
        ConfigError: Naming the type or the field.
    """
    rope = checked_object("llm_config.rope_parameters", rope_parameters)
    check_number("llm_config.rope_theta", rope.get("rope_theta"), above=0)
    kind = rope.get("rope_type", "default")
    if not isinstance(kind, str) or kind not in ROPE_FIELDS:
        raise ConfigError(
            f"rope_parameters.rope_type={kind!r} is not implemented; known: "
            f"{', '.join(ROPE_FIELDS)}"
        )
    for name in _NEEDED.get(kind, ()):
        check_number(f"llm_config.rope_scaling.{name}", rope.get(name), above=0)
    if (part := rope.get("partial_rotary_factor")) is not None:
        check_number("llm_config.rope_scaling.partial_rotary_factor", part, above=0)
        turned = 2 if head_dim is None else int(head_dim * part)
        if part > 1 or turned < 2 or turned % 2:
            raise ConfigError(
                f"llm_config.rope_scaling.partial_rotary_factor={part!r}; expected a number up to "
                f"1, and pairs of the {head_dim or 'head_dim'} channels of a head"
            )
    known = {"rope_type", "type", "rope_theta", *ROPE_FIELDS[kind]}
    unknown = sorted(name for name in rope.keys() - known if rope[name] is not None)
    if unknown:
        raise ConfigError(
            f"rope parameter {unknown[0]}={rope[unknown[0]]!r} is not one of rope_type={kind!r}; "
            f"known: {', '.join(ROPE_FIELDS[kind]) or 'none'}"
        )


def check_layers(
    num_layers: int,
    sliding_layers: Sequence[Any] | None,
    sliding_window: Any,
    no_rope_layers: Sequence[Any] | None,
) -> None:
    """Hold what is said layer by layer to the number of layers and to what is known.

    Raises:
        ConfigError: Naming the field.
    """
    for name, values in (("sliding_layers", sliding_layers), ("no_rope_layers", no_rope_layers)):
        if values is None:
            continue
        if not isinstance(values, list | tuple) or len(values) != num_layers:
            raise ConfigError(
                f"llm_config.{name}={values!r}; expected a list with one entry for each of the "
                f"{num_layers} layers"
            )
        wrong = [value for value in values if value not in (0, 1)]
        if wrong:
            raise ConfigError(f"llm_config.{name} has {wrong[0]!r}; expected 0 or 1")
    if any(sliding_layers or ()):
        check_integer("llm_config.sliding_window", sliding_window)
    elif sliding_window is not None:
        raise ConfigError(
            f"llm_config.sliding_window={sliding_window!r} but no layer slides; name the layers in "
            "sliding_layers, or leave sliding_window out"
        )


def is_scaled_dynamically(config: MonoInternVLTextConfig, kv_length: int) -> bool:
    """Whether "dynamic" scaling turns the keys of a context by angles that depend on its length.

    Such keys are of use in a context of this length only.

    Args:
        config: Its `rope_parameters` and `max_position_embeddings` are read.
        kv_length: Tokens of the context.
    """
    is_dynamic = config.rope_parameters["rope_type"] == "dynamic"
    return is_dynamic and kv_length > config.max_position_embeddings
