"""Foreign image files: an RGB image or an `ImageError`, never a program, a hang or gigabytes."""

import base64
import io
import os
import random
import subprocess
import sys
import textwrap
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile
from test_image_processing import encoded, picture, png_header

from mono_internvl.configuration.options import MAX_TILES
from mono_internvl.errors import ConfigError, ImageError
from mono_internvl.processing.image_files import MAX_BYTES, load_image
from mono_internvl.processing.images import MonoInternVLImageProcessor
from mono_internvl.reports.gallery import load_picture

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"


@pytest.fixture
def ghostscript_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that is there once somebody has started `gs`."""
    trace, program = tmp_path / "trace", tmp_path / "bin" / "gs"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ntouch {trace}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)
    return trace


@pytest.mark.parametrize("is_opened", [False, True])
def test_load_image_never_starts_ghostscript(
    tmp_path: Path, ghostscript_trace: Path, is_opened: bool
) -> None:
    path = tmp_path / "photo.png"
    path.write_bytes(EPS)
    source = Image.open(path) if is_opened else path
    with pytest.raises(ImageError, match="EPS is not read; expected one of JPEG"):
        load_image(source)
    assert load_picture(tmp_path, "photo.png") is None
    assert not ghostscript_trace.exists()


@pytest.mark.parametrize("kind", ["PCX", "ICNS", "DDS", "SGI", "QOI", "JPEG2000"])
def test_load_image_refuses_other_formats_by_name(kind: str) -> None:
    with pytest.raises(ImageError, match=f"{kind} is not read"):
        load_image(encoded(picture(), kind))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"])
def test_load_image_reads_allowed_formats(kind: str) -> None:
    assert load_image(encoded(picture(), kind)).size == (40, 30)


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "PNG", "TIFF", "AVIF", "GIF", "BMP"])
def test_damaged_image_raises_nothing_but_image_error(kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x010F], exif[0x9286] = 6, "maker", "comment"
    options = {} if kind in ("GIF", "BMP") else {"exif": exif.tobytes()}
    whole, chance = encoded(picture(), kind, **options), random.Random(0)
    where = whole.find(b"Exif") if kind in ("JPEG", "WEBP") else 0
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(chance.randint(1, 6)):
            place = chance.randrange(max(where, 0), min(len(data), max(where, 0) + 120))
            data[place] = chance.randrange(256)
        with suppress(ImageError):
            assert load_image(bytes(data)).mode == "RGB"


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("x"), AttributeError("x")])
def test_error_of_a_reader_is_an_image_error(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: object) -> None:
        raise error

    monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
    with pytest.raises(ImageError, match=r"<\d+ bytes>"):
        load_image(encoded(picture()))


def test_damaged_exif_leaves_image_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: object) -> None:
        raise TypeError

    monkeypatch.setattr(Image.Image, "getexif", fail)
    np.testing.assert_array_equal(np.asarray(load_image(encoded(picture()))), np.asarray(picture()))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_load_image_turns_as_pillow_does(orientation: int, kind: str) -> None:
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(picture(), kind, exif=exif, **options)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    np.testing.assert_array_equal(np.asarray(load_image(data)), np.asarray(expected))


# ------------------------------------------------------------------------------- bounded work


@pytest.mark.parametrize("size", [(1, 100_000_000), (100_000_000, 1), (65_536, 1)])
def test_load_image_refuses_extreme_sides_before_decoding(size: tuple[int, int]) -> None:
    with pytest.raises(ImageError, match="a side has at most 65535"):
        load_image(png_header(*size))


def test_padding_to_a_square_is_bounded() -> None:
    cutter = MonoInternVLImageProcessor(image_size=28, max_tiles=1, pad2square=True)
    with pytest.raises(ImageError, match="padded to a square"):
        cutter.tiling_with().cut(Image.new("RGB", (65_500, 1)))


def test_load_image_refuses_fifo(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(ImageError, match="no such file"):
        load_image(tmp_path / "a.png")
    assert load_picture(tmp_path, "a.png") is None


@pytest.mark.parametrize(
    "name",
    ["x" * 300, "a\0b", "loop", "\udc80.png"],
    ids=["long", "nul", "loop", "surrogate"],  # xdist sends names as UTF-8
)
def test_report_shows_no_picture_of_impossible_name(tmp_path: Path, name: str) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert load_picture(tmp_path, name) is None


@pytest.mark.parametrize("tiles", [1000, 10**9])
def test_max_tiles_is_bounded(tiles: int) -> None:
    cutter = MonoInternVLImageProcessor()
    assert cutter.layout_of(1000, 10, max_tiles=MAX_TILES).num_tiles > 40
    with pytest.raises(ConfigError, match=f"max_tiles={tiles}; expected an integer from 1 to 256"):
        cutter.layout_of(1000, 10, max_tiles=tiles)
    with pytest.raises(ConfigError, match="max_tiles"):
        MonoInternVLImageProcessor(max_tiles=tiles)


@pytest.mark.parametrize("value", [1.5, "2", True, None])
def test_max_tiles_of_another_type_is_refused(value: object) -> None:
    with pytest.raises(ConfigError, match="max_tiles"):
        MonoInternVLImageProcessor(max_tiles=value)  # type: ignore[arg-type]


_PEAK = """
import resource, sys
from mono_internvl.errors import ImageError
from mono_internvl.processing.image_files import load_image
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    {call}
    print("loaded", end=" ")
except ImageError:
    print("refused", end=" ")
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def _outcome_and_peak_mb(call: str) -> tuple[str, int]:
    """What a call does, and how much memory it takes, in a process of its own."""
    script = textwrap.dedent(_PEAK).format(call=call)
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    outcome, peak = done.stdout.split()
    return outcome, int(peak)


def test_huge_sparse_file_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    with path.open("wb") as file:
        file.write(png_header(8, 8))
        file.truncate(6 << 30)
    outcome, peak = _outcome_and_peak_mb(f"load_image({str(path)!r})")
    assert outcome == "refused" and peak < 50
    with pytest.raises(ImageError, match=f"at most {MAX_BYTES} are read"):
        load_image(path)


def test_huge_percent_encoded_uri_is_not_unquoted() -> None:
    outcome, peak = _outcome_and_peak_mb("load_image('data:image/png,' + '%00' * 33_000_000)")
    assert outcome == "refused" and peak < 250  # the text itself has 100 MB


def test_sixteen_bit_grey_takes_no_wide_copies(tmp_path: Path) -> None:
    side = 5000
    Image.fromarray(np.zeros((side, side), dtype=np.uint16)).save(tmp_path / "a.png")
    outcome, peak = _outcome_and_peak_mb(f"load_image({str(tmp_path / 'a.png')!r})")
    assert outcome == "loaded" and peak < 8 * side * side / 1e6 + 50  # 8 bytes per pixel


def test_escapes_in_base64_are_read() -> None:
    text = base64.b64encode(encoded(picture())).decode().replace("+", "%2B").replace("/", "%2F")
    assert load_image(f"data:image/png;base64,{text}").size == (40, 30)
