"""Markdown that pages of figures share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

NOTHING = "*No measured row is committed for this block yet; nothing is claimed here.*\n"


def line(cells: Iterable[str]) -> str:
    """A line of a table."""
    return f"| {' | '.join(cells)} |"


def head(cells: Sequence[str], numbers: bool = True) -> list[str]:
    """The first two lines of a table.

    Args:
        cells: Names of the columns.
        numbers: Whether all columns but the first are aligned as numbers.
    """
    return [line(cells), line(["---", *["---:" if numbers else "---"] * (len(cells) - 1)])]


def table(columns: Sequence[str], rows: Iterable[Iterable[str]], numbers: bool = True) -> str:
    """A whole table; see `head`."""
    return "".join(f"{text}\n" for text in (*head(columns, numbers), *map(line, rows)))


def in_words(versions: Mapping[str, str]) -> str:
    """Versions in a sentence."""
    return ", ".join(f"{name} {version}" for name, version in versions.items())
