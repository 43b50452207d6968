"""What the fields of a recipe may be, each in one line of a table.

`huggingface_hub.dataclasses.strict` would do, but it checks where a field is assigned, and a frozen
dataclass assigns past it: a stage of two warm-ups passed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, get_args

from mono_internvl.errors import RecipeError

_FOLDER_NAME = re.compile(r"\w[\w.+-]*")


@dataclass(frozen=True)
class Check:
    """What a value must be.

    Attributes:
        expected: In words, for the error.
        holds: Whether it is.
    """

    expected: str
    holds: Callable[[Any], bool]


def check_fields(owner: str, of: object, checks: Mapping[str, Check]) -> None:
    """Look at fields of an object, in the order of the table.

    Args:
        owner: What it is, for the error.
        of: Has the fields.
        checks: By the name of a field.

    Raises:
        RecipeError: The first field that is not as expected.
    """
    for name, check in checks.items():
        value = getattr(of, name)
        if not check.holds(value):
            raise RecipeError(f"{owner}: {name}={value!r}; expected {check.expected}")


def integer(at_least: int, at_most: int | None = None) -> Check:
    """A whole number (no bool) within limits."""
    words = f"an integer >= {at_least}"
    if at_most is not None:
        words = f"an integer from {at_least} to {at_most:,}"
    most = math.inf if at_most is None else at_most

    def holds(value: Any) -> bool:
        return isinstance(value, int) and _is_number(value) and at_least <= value <= most

    return Check(words, holds)


def number(at_least: float, at_most: float = math.inf, below: float = math.inf) -> Check:
    """A finite number within limits.

    Args:
        at_least: The least.
        at_most: The largest.
        below: A limit that is not reached.
    """
    words = f"a finite number >= {at_least:g}"
    if at_most < math.inf:
        words = f"a number from {at_least:g} to {at_most:g}"
    elif below < math.inf:
        words = f"a number from {at_least:g} to below {below:g}"

    def holds(value: Any) -> bool:
        return _is_number(value) and at_least <= value <= at_most and value < below

    return Check(words, holds)


def positive_or_infinite() -> Check:
    """A limit that may be left out as `inf`."""
    return Check("a number > 0, inf for no limit", lambda value: _is_number(value) and value > 0)


def optional(check: Check, none: str) -> Check:
    """None, or what another check lets pass.

    Args:
        check: The other.
        none: What None does.
    """
    words = f"{check.expected}, or None to {none}"
    return Check(words, lambda value: value is None or check.holds(value))


def pair_of(check: Check) -> Check:
    """A tuple of two values that another check lets pass."""

    def holds(value: Any) -> bool:
        return isinstance(value, tuple) and len(value) == 2 and all(map(check.holds, value))

    return Check(f"two times {check.expected}", holds)


def tuple_of(kind: type, at_least: int = 0) -> Check:
    """A tuple of so many objects of a class, or more."""

    def holds(value: Any) -> bool:
        is_long = isinstance(value, tuple) and len(value) >= at_least
        return is_long and all(isinstance(part, kind) for part in value)

    return Check(f"a tuple of {at_least} {kind.__name__} or more", holds)


def one(kind: type, expected: str) -> Check:
    """An object of a class or runtime-checkable protocol."""
    return Check(expected, lambda value: isinstance(value, kind))


def choice(literal: Any) -> Check:
    """One of the values of a `Literal`."""
    values = get_args(literal)
    words = f"one of {', '.join(values)}"
    return Check(words, lambda value: isinstance(value, str) and value in values)


TEXT = Check("text", lambda value: isinstance(value, str))
FOLDER_NAME = Check(
    "the name of a folder: letters, digits and _ - + ., beginning with a letter or digit",
    lambda value: isinstance(value, str) and bool(_FOLDER_NAME.fullmatch(value)),
)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
