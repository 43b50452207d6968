"""Fast decoding: near the exact pixels, the exact way where it cannot be, never saved."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import tiny_shards
from PIL import Image

from mono_internvl.data.sources import BytesImage
from mono_internvl.errors import ImageError
from mono_internvl.processing.fast_decoding import FastImage, load_fast
from mono_internvl.processing.image_files import image_size, load_image
from mono_internvl.processing.images import MonoInternVLImageProcessor


def _smooth(width: int, height: int, kind: str = "JPEG", **options: object) -> bytes:
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 255, (9, 12, 3), dtype=np.uint8))
    out = io.BytesIO()
    coarse.resize((width, height), Image.Resampling.BICUBIC).save(out, kind, **options)
    return out.getvalue()


def _tiles(data: bytes, decoding: str, **options: object) -> tuple[np.ndarray, list[int]]:
    processor = MonoInternVLImageProcessor(image_size=112, **options)  # type: ignore[arg-type]
    processor.decoding = decoding  # type: ignore[assignment]
    out = processor([data], max_tiles=6)
    levels = out["pixel_values"].numpy() * np.array(processor.image_std)[:, None, None] * 255
    return levels, out["num_tiles"]


@pytest.mark.parametrize("size", [(640, 480), (90, 70), (1000, 200), (224, 112)])
def test_fast_tiles_are_within_two_grey_levels_of_the_exact_ones(size: tuple[int, int]) -> None:
    data = _smooth(*size, quality=90)
    exact, fast = _tiles(data, "exact"), _tiles(data, "fast")
    assert exact[1] == fast[1]
    assert np.abs(exact[0] - fast[0]).max() < 2.01
    assert np.abs(exact[0] - fast[0]).mean() < 0.1


def test_what_is_no_plain_jpeg_takes_the_exact_way() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = _smooth(60, 40, exif=exif)
    for data in (_smooth(60, 40, "PNG"), turned):
        exact, fast = _tiles(data, "exact"), _tiles(data, "fast")
        assert exact[1] == fast[1]
    assert isinstance(load_fast(_smooth(60, 40)), FastImage)
    assert isinstance(load_fast(BytesImage(_smooth(60, 40), "x")), FastImage)
    assert load_fast(turned).size == load_image(turned).size == (40, 60)
    assert load_fast(io.BytesIO(_smooth(60, 40))).size == (60, 40)
    exact, fast = (_tiles(_smooth(90, 40), d, pad2square=True)[0] for d in ("exact", "fast"))
    assert np.abs(exact - fast).max() < 1e-3


@pytest.mark.parametrize(
    "data",
    [b"\xff\xd8\xff nothing", tiny_shards.picture(0)[:500], tiny_shards.picture(0)[:-300], b""],
)
def test_damaged_file_is_the_same_error(data: bytes) -> None:
    for load in (load_image, load_fast):
        with pytest.raises(ImageError) as raised:
            load(data)
        assert raised.value.reason == "image damaged"


def test_decoding_is_no_setting_of_a_checkpoint(tmp_path: Path) -> None:
    processor = MonoInternVLImageProcessor()
    processor.decoding = "fast"
    processor.save_pretrained(tmp_path)
    assert "decoding" not in (tmp_path / "preprocessor_config.json").read_text()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_size_is_told_by_the_header(kind: str, tmp_path: Path) -> None:
    data = _smooth(300, 200, kind)
    (tmp_path / "a").write_bytes(data)
    for source in (data, tmp_path / "a", BytesImage(data, "x")):
        assert image_size(source) == (300, 200)


def test_size_behind_a_long_header_and_of_a_turned_image() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010E] = "x" * 60_000
    profile = b"x" * 150_000
    data = _smooth(300, 200, exif=exif, icc_profile=profile)
    assert image_size(BytesImage(data, "long")) == (200, 300) == load_image(data).size
    with pytest.raises(ImageError):
        image_size(BytesImage(b"no image" * 20_000, "none"))
