"""Pictures of named things: the same thing by several artists, and from two other collections."""

from __future__ import annotations

import io
import json
import re
import unicodedata
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import resvg_py
from PIL import Image

_RENDERED_PX = 256
_LARGEST_PX = 40_000_000
"""Pixels of a raster picture; a larger one is left out unread."""
_VARIATION_SELECTOR = "fe0f"
_GROUPS = (
    *("animals-nature", "food-drink", "travel-places", "objects", "activities"),
    *("smileys-emotion", "symbols"),
)


@dataclass(frozen=True)
class Concept:
    """A thing that artists have drawn.

    Attributes:
        key: Its code points in hexadecimal, joined by "-".
        name: In English, by Unicode.
        group: Such as "food-drink".
        subgroup: Such as "food-fruit".
    """

    key: str
    name: str
    group: str
    subgroup: str


def read_concepts(package: Path) -> dict[str, Concept]:
    """Concepts by name, from the table of the package `openmoji`.

    Args:
        package: Its folder.
    """
    rows = json.loads((package / "data/openmoji.json").read_text())
    found: dict[str, Concept] = {}
    for row in rows:
        if row["group"] in _GROUPS and not row["skintone"]:
            key = _key(row["hexcode"])
            concept = Concept(key, row["annotation"], row["group"], row["subgroups"])
            found.setdefault(concept.name, concept)
    return found


def _key(code_points: str) -> str:
    return "-".join(p for p in code_points.lower().split("-") if p != _VARIATION_SELECTOR)


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]", "", unicodedata.normalize("NFKD", text.lower()))


def render_svg(svg: str) -> Image.Image:
    """An RGBA picture of a vector file.

    Raises:
        ValueError: resvg cannot read it.
    """
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=_RENDERED_PX, height=_RENDERED_PX))
    return Image.open(io.BytesIO(png)).convert("RGBA")


class IconSet:
    """The drawings of one artist in Iconify's JSON.

    Args:
        package: Its folder.
    """

    def __init__(self, package: Path):
        self._icons: dict[str, Any] = json.loads((package / "icons.json").read_text())
        chars = package / "chars.json"
        names = json.loads(chars.read_text()) if chars.is_file() else {}
        self._by_key = {_key(code): name for code, name in names.items()}

    @cached_property
    def _by_slug(self) -> dict[str, str]:
        names = (*self._icons.get("aliases", {}), *self._icons["icons"])
        return {_slug(name): name for name in names}

    def _name_of(self, concept: Concept) -> str | None:
        if self._by_key:
            return self._by_key.get(concept.key)
        found = self._by_slug.get(_slug(concept.name))
        if found is None and "-" not in concept.key:
            found = self._by_slug.get(_slug(unicodedata.name(chr(int(concept.key, 16)), "-")))
        return found

    def has(self, concept: Concept) -> bool:
        """Whether the artist has drawn it."""
        return self._name_of(concept) is not None

    def picture(self, concept: Concept) -> Image.Image | None:
        """The artist's drawing with its transparency, or None where there is none."""
        name = self._name_of(concept)
        aliases = self._icons.get("aliases", {})
        while name in aliases:
            name = aliases[name]["parent"]
        icon = self._icons["icons"].get(name)
        if icon is None:
            return None
        width, height = (icon.get(side, self._icons.get(side, 16)) for side in ("width", "height"))
        box = f"{icon.get('left', 0)} {icon.get('top', 0)} {width} {height}"
        return render_svg(
            f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{box}" width="{width}" height="{height}">{icon["body"]}</svg>'
        )


class RasterSet:
    """The drawings of one artist as files that are called by code points.

    Args:
        package: Its folder.
    """

    def __init__(self, package: Path):
        self._files = {_key(file.stem): file for file in sorted(package.glob("assets/*.webp"))}

    def has(self, concept: Concept) -> bool:
        """See `IconSet`."""
        return concept.key in self._files

    def picture(self, concept: Concept) -> Image.Image | None:
        """See `IconSet`."""
        file = self._files.get(concept.key)
        return None if file is None else Image.open(file).convert("RGBA")


@dataclass(frozen=True)
class Titled:
    """A picture of a collection with its title.

    Attributes:
        title: In lower case, without article and remarks.
        file: Of the picture.
    """

    title: str
    file: Path

    def picture(self) -> Image.Image | None:
        """With its transparency; None for a broken or an oversized file."""
        try:
            if self.file.suffix == ".svg":
                return render_svg(self.file.read_text(errors="replace"))
            opened = Image.open(self.file)
            if opened.width * opened.height > _LARGEST_PX:
                return None
            return opened.convert("RGBA")
        except (OSError, ValueError, SyntaxError, RuntimeError):
            return None


def _title(text: str) -> str:
    plain = re.sub(r"[^a-z \-]", "", text.lower().split("(")[0])
    return re.sub(r"^(a|an|the|some|one|two|three)\s+", "", plain.strip())


def read_stamps(package: Path) -> list[Titled]:
    """Tux Paint's stamps: beside each picture lies a text whose first line says what it is."""
    stamps = package / "usr/share/tuxpaint/stamps"
    found = []
    for text in sorted(stamps.rglob("*.txt")):
        picture = text.with_suffix(".png")
        lines = text.read_text(encoding="utf-8", errors="replace").splitlines()
        if lines and picture.is_file():
            found.append(Titled(_title(lines[0]), picture))
    return found


def read_clipart(package: Path) -> list[Titled]:
    """The Open Clip Art Library: the title stands in the metadata of each vector file."""
    found = []
    for file in sorted((package / "usr/share/openclipart").rglob("*.svg")):
        text = file.read_text(errors="replace")
        title = re.search(r"<dc:title>([^<]+)</dc:title>", text)
        if title:
            found.append(Titled(_title(title.group(1)), file))
    return found
