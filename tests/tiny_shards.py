"""Tar shards, parquet files and broken records, small enough for a test."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (40, 60, 230)}


def picture(number: int, width: int = 56, height: int = 56, kind: str = "JPEG") -> bytes:
    """An encoded picture of one colour with noise."""
    rng = np.random.default_rng(number)
    base = np.array(list(COLOURS.values())[number % 3])
    pixels = base + rng.integers(-25, 25, (height, width, 3))
    out = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(out, kind)
    return out.getvalue()


def write_tar(file: Path, members: Iterable[tuple[str, bytes]]) -> Path:
    """A tar file of members in order."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file


def caption_members(numbers: Iterable[int]) -> list[tuple[str, bytes]]:
    """Samples as img2dataset writes them: image, caption, and what is known of the image."""
    members = []
    for number in numbers:
        colour = list(COLOURS)[number % 3]
        about = {"caption": colour, "url": f"https://example.org/{number}", "width": 1}
        members += [
            (f"{number:09d}.jpg", picture(number)),
            (f"{number:09d}.json", json.dumps(about).encode()),
            (f"{number:09d}.txt", colour.encode()),
        ]
    return members


def conversation(number: int) -> dict[str, Any]:
    """A conversation about one image."""
    colour = list(COLOURS)[number % 3]
    return {
        "id": f"c{number}",
        "conversations": [
            {"from": "human", "value": "<image>\nwhat colour is this?"},
            {"from": "gpt", "value": colour},
        ],
    }


def write_meta(file: Path, sources: Mapping[str, Any]) -> Path:
    """A meta file."""
    file.write_text(json.dumps(sources))
    return file
