"""An image may be one or several, in every form in which programs hold them."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mono_internvl import load
from mono_internvl.errors import ImageError
from mono_internvl.processing.image_files import load_image


def _png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def test_ask_takes_one_image_in_every_form(
    checkpoint: Path, picture: Image.Image, tmp_path: Path
) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(_png(picture))
    session = load(checkpoint)
    counts = set()
    forms: list[Any] = [
        [picture],
        picture,
        path,
        str(path),
        _png(picture),
        io.BytesIO(_png(picture)),
        np.asarray(picture),
        base64.b64encode(_png(picture)).decode(),
    ]
    for image in forms:
        session.reset()
        counts.add(session.ask("what colour is this?", image, max_new_tokens=1).tokens.prompt)
    session.reset()
    without = session.ask("what colour is this?", max_new_tokens=1).tokens.prompt
    assert len(counts) == 1 and counts != {without}


def test_load_image_tells_base64_from_a_path(picture: Image.Image, tmp_path: Path) -> None:
    folder = tmp_path / ("a" * 80)
    folder.mkdir()
    file = folder / ("b" * 79 + "c")  # no dot: might be base64
    file.write_bytes(_png(picture))
    assert load_image(str(file)).size == picture.size
    with pytest.raises(ImageError):
        load_image("A" * 6000)
    with pytest.raises(ImageError, match="no such file"):
        load_image("images/" + "a" * 90 + ".png")


@pytest.mark.parametrize(
    "pixels", [np.zeros((4, 4, 3), np.float32), np.zeros((2, 4, 4, 3), np.uint8), np.zeros(0)]
)
def test_load_image_refuses_arrays_that_are_no_image(pixels: np.ndarray) -> None:
    with pytest.raises(ImageError, match=r"expected uint8 \(height, width, 3\)"):
        load_image(pixels)
