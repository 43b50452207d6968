"""Checks of single configuration values: what is wrong is named by its field, where it enters."""

import math
from collections.abc import Mapping
from typing import Any

from mono_internvl.errors import ConfigError

MAX_INTEGER = 2**31 - 1
"""Largest number of anything in a configuration: what fits a tensor's index."""

MAX_LAYERS = 1000
"""Most layers of a decoder or a vision tower."""

MOST_OF_TEXT: dict[str, int] = {
    "vocab_size": 1 << 22,
    "hidden_size": 1 << 17,
    "intermediate_size": 1 << 19,
    "num_hidden_layers": MAX_LAYERS,
    "num_attention_heads": 1 << 12,
    "num_key_value_heads": 1 << 12,
    "max_position_embeddings": MAX_INTEGER,
}
"""Counts of the decoder and the most they may be, ten times and more what is known: a damaged or
hostile file must not build a million layers before it is refused."""

_NEXT_STEP = "correct config.json"


def check_integer(field: str, value: Any, least: int = 1, most: int = MAX_INTEGER) -> None:
    """Refuses what is not an integer from `least` to `most`.

    Raises:
        ConfigError: With field and value; so do all checks here.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        limit = f">= {least}" if most == MAX_INTEGER else f"from {least} to {most}"
        raise ConfigError(f"{field}={value!r:.40}; expected an integer {limit}, {_NEXT_STEP}")


def check_number(field: str, value: Any, *, above: float = -math.inf) -> None:
    """Refuses what is not a finite number above `above`."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not above < value < math.inf:
        limit = "" if above == -math.inf else f" > {above:g}"
        raise ConfigError(f"{field}={value!r}; expected a finite number{limit}, {_NEXT_STEP}")


def check_share(field: str, value: Any) -> None:
    """Refuses what is not a number from 0 to 1, 1 excluded."""
    check_number(field, value)
    if not 0 <= value < 1:
        raise ConfigError(f"{field}={value!r}; expected 0 <= {field} < 1, {_NEXT_STEP}")


def check_flag(field: str, value: Any) -> None:
    """Refuses what is not true or false (0 and 1 included)."""
    if not isinstance(value, bool | int) or value not in (0, 1):
        raise ConfigError(f"{field}={value!r}; expected true or false, {_NEXT_STEP}")


def check_choice(field: str, value: Any, choices: Any) -> None:
    """Refuses what is not one of the choices, names in a container."""
    if not isinstance(value, str) or value not in choices:
        raise ConfigError(
            f"{field}={value!r} is not known; expected one of {', '.join(sorted(choices))}, "
            f"{_NEXT_STEP}"
        )


def checked_object(field: str, value: Any) -> dict[str, Any]:
    """A copy of a JSON object; an empty one for null.

    Raises:
        ConfigError: It is something else.
    """
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ConfigError(
            f"{field} is a {type(value).__name__} ({value!r:.60}); expected an object, {_NEXT_STEP}"
        )
    return dict(value)
