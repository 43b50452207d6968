"""Decoding of all kinds of images, tiling, normalisation, the image processor's own file."""

import base64
import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mono_internvl.errors import ConfigError, ImageError
from mono_internvl.processing.image_files import load_image
from mono_internvl.processing.images import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    MonoInternVLImageProcessor,
    share_tiles,
)
from mono_internvl.processing.tiling.internvl import candidate_grids, choose_grid


def picture(width: int = 40, height: int = 30, seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds almost no data."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        crc = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc)

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def test_load_image_reads_path_bytes_data_uri_and_pil_alike(tmp_path: Path) -> None:
    image = picture()
    data = encoded(image)
    path = tmp_path / "image.png"
    path.write_bytes(data)
    uri = "data:image/png;base64," + base64.b64encode(data).decode()
    quoted = "data:image/png," + "".join(f"%{byte:02x}" for byte in data)
    for source in (path, str(path), data, uri, quoted, image):
        loaded = load_image(source)
        assert loaded.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(loaded), np.asarray(image))


@pytest.mark.parametrize("url", ["http://a.b/c.png", "https://a.b/c.png", "file:///c.png"])
def test_load_image_fetches_nothing(url: str) -> None:
    with pytest.raises(ImageError, match="nothing is fetched"):
        load_image(url)


def test_load_image_applies_exif_orientation() -> None:
    image = picture(40, 30)
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees clockwise to show it
    upright = load_image(encoded(image, "PNG", exif=exif))
    assert upright.size == (30, 40)
    np.testing.assert_array_equal(np.asarray(upright), np.rot90(np.asarray(image), -1))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "HSV"])
def test_load_image_converts_every_mode_as_pillow_does(mode: str) -> None:
    image = picture().convert(mode)
    expected = np.asarray(image.convert("RGB"))
    np.testing.assert_array_equal(np.asarray(load_image(image)), expected)


def test_load_image_drops_alpha_without_compositing() -> None:
    image = picture().convert("RGBA")
    image.putalpha(0)
    np.testing.assert_array_equal(np.asarray(load_image(encoded(image))), np.asarray(picture()))


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_load_image_scales_16_bit_grey(kind: str) -> None:
    levels = np.array([[0, 128, 257, 32896, 65407, 65535]], dtype=np.uint16)
    loaded = np.asarray(load_image(encoded(Image.fromarray(levels), kind)))
    np.testing.assert_array_equal(loaded[0, :, 0], [0, 0, 1, 128, 255, 255])
    assert (loaded == loaded[..., :1]).all()


def test_load_image_scales_32_bit_storage_of_16_bit_values() -> None:
    image = Image.fromarray(np.array([[0, 65535]], dtype=np.int32))
    assert image.mode == "I"
    np.testing.assert_array_equal(np.asarray(load_image(image))[0, :, 0], [0, 255])


@pytest.mark.parametrize("values", [np.int32([[70000]]), np.int32([[-1]]), np.float32([[0.5]])])
def test_load_image_refuses_pixels_without_a_known_range(values: np.ndarray) -> None:
    with pytest.raises(ImageError, match="convert it to"):
        load_image(Image.fromarray(values))


@pytest.mark.parametrize("kind", ["GIF", "PNG", "TIFF", "WEBP"])
def test_load_image_takes_the_first_frame(kind: str) -> None:
    red, blue = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(red, kind, save_all=True, append_images=[blue], **options)
    assert load_image(data).getpixel((4, 4)) == (255, 0, 0)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"])
def test_load_image_refuses_truncated_files(kind: str, tmp_path: Path) -> None:
    data = encoded(picture(200, 150), kind)
    path = tmp_path / f"half.{kind.lower()}"
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(ImageError, match=path.name):
        load_image(path)


def test_load_image_names_the_source_of_every_failure(tmp_path: Path) -> None:
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "notes.txt").write_text("not an image")
    for name, reason in (("empty.png", "empty"), ("notes.txt", "decoded"), ("gone.png", "no such")):
        with pytest.raises(ImageError, match=reason) as caught:
            load_image(tmp_path / name)
        assert name in str(caught.value)
    with pytest.raises(ImageError, match="no such file"):
        load_image(tmp_path)
    for source, reason in ((b"", "empty"), (b"GIF89a", "<6 bytes>"), (3, "type int")):
        with pytest.raises(ImageError, match=reason):
            load_image(source)  # type: ignore[arg-type]


@pytest.mark.parametrize("uri", ["data:image/png;base64", "data:image/png;base64,@@@@"])
def test_load_image_refuses_broken_data_uris(uri: str) -> None:
    with pytest.raises(ImageError, match="data:image/png"):
        load_image(uri)


def test_load_image_keeps_data_out_of_messages() -> None:
    uri = "data:image/png;base64," + "A" * 10_000
    with pytest.raises(ImageError) as caught:
        load_image(uri)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("size", [(10_001, 10_000), (20_000, 20_000)])
def test_load_image_refuses_huge_images_before_decoding(size: tuple[int, int]) -> None:
    with pytest.raises(ImageError, match="100000000"):
        load_image(png_header(*size))


def test_load_image_refuses_sides_of_zero() -> None:
    with pytest.raises(ImageError, match="0x5"):
        load_image(Image.new("RGB", (0, 5)))


def test_candidate_grids_hold_every_grid_once_up_to_forty_tiles() -> None:
    grids = candidate_grids(1, 40)
    expected = {(c, r) for c in range(1, 41) for r in range(1, 41) if c * r <= 40}
    assert len(grids) == len(expected)
    assert set(grids) == expected
    counts = [columns * rows for columns, rows in grids]
    assert counts == sorted(counts)


def test_choose_grid_without_candidates_is_one_tile() -> None:
    assert choose_grid(900, 100, min_tiles=1, max_tiles=0, image_size=448) == (1, 1)


@pytest.mark.parametrize(("size", "grid"), [(448, (1, 1)), (633, (1, 1)), (634, (2, 2))])
def test_choose_grid_breaks_ties_by_area(size: int, grid: tuple[int, int]) -> None:
    # The 2x2 grid needs more than half of its 4 * 448 * 448 pixels: a side of 634.
    assert choose_grid(size, size, min_tiles=1, max_tiles=8, image_size=448) == grid


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 40))
def test_choose_grid_is_nearest_and_within_bounds(width: int, height: int, most: int) -> None:
    columns, rows = choose_grid(width, height, min_tiles=1, max_tiles=most, image_size=28)
    assert 1 <= columns * rows <= most
    distance = abs(width / height - columns / rows)
    assert distance == min(abs(width / height - c / r) for c, r in candidate_grids(1, most))


def test_cut_tiles_are_row_major_with_the_thumbnail_last() -> None:
    cutter = MonoInternVLImageProcessor(image_size=28, max_tiles=6)
    image = Image.new("RGB", (84, 56))
    colours = [(40 * i, 255 - 40 * i, 7) for i in range(6)]
    for index, colour in enumerate(colours):
        left, top = 28 * (index % 3), 28 * (index // 3)
        image.paste(colour, (left, top, left + 28, top + 28))
    tiles = cutter.tiling_with().cut(image)
    assert tiles.shape == (7, 28, 28, 3)
    for tile, colour in zip(tiles, colours, strict=False):
        assert tuple(tile[14, 14]) == colour
    thumbnail = np.asarray(image.resize((28, 28), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(tiles[-1], thumbnail)


@pytest.mark.parametrize("size", [(1, 300), (5000, 9), (448, 448), (1000, 40), (37, 41)])
@pytest.mark.parametrize("most", [1, 12, 40])
@pytest.mark.parametrize("thumbnail", [True, False])
def test_layout_counts_tiles_without_pixels(
    size: tuple[int, int], most: int, thumbnail: bool
) -> None:
    cutter = MonoInternVLImageProcessor(image_size=28, max_tiles=most, use_thumbnail=thumbnail)
    assert (
        len(cutter.tiling_with().cut(Image.new("RGB", size))) == cutter.layout_of(*size).num_tiles
    )


def test_max_tiles_does_not_count_the_thumbnail() -> None:
    cutter = MonoInternVLImageProcessor(image_size=28)
    assert cutter.layout_of(40, 1, max_tiles=40).num_tiles == 41
    assert cutter.layout_of(40, 1, max_tiles=1).num_tiles == 1


def test_normalize_tiles_equals_the_formula_bit_for_bit() -> None:
    tiles = np.random.default_rng(1).integers(0, 256, (2, 28, 28, 3), dtype=np.uint8)
    tensor = torch.from_numpy(tiles).permute(0, 3, 1, 2).to(torch.float32).div(255)
    mean = torch.tensor(IMAGENET_MEAN).view(3, 1, 1)
    std = torch.tensor(IMAGENET_STD).view(3, 1, 1)
    expected = ((tensor - mean) / std).numpy()
    np.testing.assert_array_equal(MonoInternVLImageProcessor().normalize_tiles(tiles), expected)


def test_preprocess_concatenates_images_of_any_nesting() -> None:
    cutter = MonoInternVLImageProcessor(image_size=28, max_tiles=4)
    images = [picture(100, 30, 1), picture(30, 30, 2), picture(30, 90, 3)]
    flat = cutter(images)
    nested = cutter([[images[0], images[1]], [images[2]]])
    counts = [cutter.layout_of(*image.size).num_tiles for image in images]
    assert flat["num_tiles"] == nested["num_tiles"] == counts
    assert flat["pixel_values"].dtype == torch.float32
    assert flat["pixel_values"].shape == (sum(counts), 3, 28, 28)
    assert torch.equal(flat["pixel_values"], nested["pixel_values"])
    alone = torch.cat([cutter(image)["pixel_values"] for image in images])
    assert torch.equal(flat["pixel_values"], alone)


def test_preprocess_takes_one_limit_or_one_for_each_image() -> None:
    cutter = MonoInternVLImageProcessor(image_size=28, max_tiles=4)
    images = [picture(120, 30, 1), picture(120, 30, 2)]
    assert cutter(images, max_tiles=2)["num_tiles"] == [3, 3]
    assert cutter(images, max_tiles=[4, 1])["num_tiles"] == [5, 1]
    with pytest.raises(ConfigError, match="3 values for 2 images"):
        cutter(images, max_tiles=[1, 2, 3])


def test_preprocess_answers_to_the_names_of_transformers() -> None:
    cutter = MonoInternVLImageProcessor(image_size=28, max_tiles=4, min_tiles=2)
    images = [picture(120, 30, 1), picture(30, 60, 2)]
    cut = cutter(images, crop_to_patches=True, return_tensors="pt")
    assert cut["num_patches"].tolist() == cut["num_tiles"].tolist() == [5, 3]
    assert torch.equal(cut["pixel_values"], cutter(images)["pixel_values"])
    assert cutter(images, crop_to_patches=False)["num_patches"] == [1, 1]


def test_preprocess_makes_one_tile_of_each_video_frame() -> None:
    cutter = MonoInternVLImageProcessor(image_size=28)
    frames = [picture(320, 180, seed) for seed in range(8)]
    assert cutter(frames, max_tiles=1)["num_tiles"] == [1] * 8


def test_preprocess_returns_the_asked_tensors() -> None:
    cutter = MonoInternVLImageProcessor(image_size=28)
    assert isinstance(cutter(picture(), return_tensors="np")["pixel_values"], np.ndarray)
    assert torch.is_tensor(cutter(picture(), return_tensors="pt")["num_tiles"])


def test_preprocess_refuses_what_it_cannot_do() -> None:
    cutter = MonoInternVLImageProcessor(image_size=28)
    with pytest.raises(ImageError, match="at least one"):
        cutter([])
    with pytest.raises(ConfigError, match="28 px"):
        cutter(picture(), image_size=56)
    with pytest.raises(TypeError, match="max_tile"):
        cutter(picture(), max_tile=3)
    with pytest.raises(ConfigError, match="max_tiles=0"):
        cutter(picture(), max_tiles=0)


def test_pad2square_pads_single_tiles_with_the_mean_colour() -> None:
    cutter = MonoInternVLImageProcessor(image_size=28, max_tiles=1, pad2square=True)
    (tile,) = cutter.tiling_with().cut(Image.new("RGB", (56, 28), "white"))
    assert tuple(tile[0, 0]) == tuple(int(255 * mean) for mean in IMAGENET_MEAN)
    assert tuple(tile[14, 14]) == (255, 255, 255)


@pytest.mark.parametrize(
    "wrong",
    [
        {"image_size": 0},
        {"max_tiles": 0},
        {"min_tiles": 5, "max_tiles": 4},
        {"image_std": (1, 1, 0)},
        {"image_mean": (0.5,)},
    ],
)
def test_image_processor_refuses_settings_out_of_range(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        MonoInternVLImageProcessor(**wrong)  # type: ignore[arg-type]


def test_image_processor_round_trips_through_its_file(tmp_path: Path) -> None:
    cutter = MonoInternVLImageProcessor(
        image_size=56, min_tiles=2, max_tiles=7, use_thumbnail=False, pad2square=True
    )
    cutter.save_pretrained(tmp_path)
    assert (tmp_path / "preprocessor_config.json").is_file()
    again = MonoInternVLImageProcessor.from_pretrained(tmp_path)
    assert again.to_dict() == cutter.to_dict()
    image = picture(200, 90)
    assert torch.equal(again(image)["pixel_values"], cutter(image)["pixel_values"])


def test_share_tiles_divides_the_budget_and_leaves_each_image_a_tile() -> None:
    assert [share_tiles(12, count) for count in (1, 2, 5, 13)] == [12, 6, 2, 1]
