"""An image from outside -> 8-bit RGB, upright; whatever is wrong with it is an `ImageError`.

Image files are foreign data. Formats are on an allow-list (some of Pillow's readers start programs
or are hardly ever tested), and size is bounded three times: bytes before reading, pixels and sides
before decoding.
"""

import base64
import binascii
import io
import logging
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError

from mono_internvl.errors import ImageError

logger = logging.getLogger(__name__)


class Readable(Protocol):
    """An open file, or an `ImageRef` of a record."""

    def read(self, size: int = -1, /) -> bytes: ...


ImageSource = str | Path | bytes | Readable | Image.Image | np.ndarray
"""What `load_image` accepts: a path, encoded bytes, a data URI, base64, an open file, or pixels."""

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
"""What is decoded, by Pillow's names."""

MAX_PIXELS = 100_000_000
"""Largest image that is decoded, px; beyond it a small file can exhaust the memory."""

MAX_SIDE = 65_535
"""Longest side that is decoded, px: the longest that JPEG knows."""

MAX_BYTES = 3 * MAX_PIXELS + (1 << 20)
"""Largest file that is read: `MAX_PIXELS` without compression, with a header."""

_SHORTEST_BASE64 = 64  # the smallest PNG takes 92 characters
_LONGEST_BASE64 = 4 * MAX_BYTES // 3 + 4
_MAX_ESCAPES = 1 << 22  # each takes some 60 bytes while a data URI is unquoted
_NAMES_OF_FORMATS = {*FORMATS, "MPO"}  # MPO: a JPEG with more pictures behind the first
_ORIENTATION = 0x0112
_SIDEWAYS = (5, 6, 7, 8)
_HEADER_BYTES = 1 << 16
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIXTEEN_BIT_MODES = ("I;16", "I;16L", "I;16B", "I;16N", "I")
_ROWS_AT_A_TIME = 256


def load_image(source: ImageSource) -> Image.Image:
    """Decodes an image to 8-bit RGB, upright.

    EXIF orientation is applied, if it can be read; of an animation the first frame is taken; alpha
    is dropped without compositing, as the released code does. Grey of more than 8 bits (modes
    "I;16" and "I") is read as 0 to 65535, whatever its brightest pixel, and scaled; beyond that
    range it is refused.

    Args:
        source: Path, encoded bytes, open file, data URI, base64, PIL image, or array of uint8
            (height, width, 3). No URL is fetched.

    Returns:
        A PIL image of mode RGB.

    Raises:
        ImageError: If the source is no image, of a format outside of `FORMATS`, truncated, empty,
            has a side of zero or above `MAX_SIDE`, more than `MAX_PIXELS` pixels or `MAX_BYTES`
            bytes (checked before decoding), or is a URL.
    """
    with _naming_failure(_name_of(source)) as name:
        image = _opened(source, name)
        image.load()
        return _to_rgb(_upright(image), name)


def image_size(source: ImageSource) -> tuple[int, int]:
    """(width, height) of an upright image, px, told by its header: pixels are not decoded.

    Args:
        source: As `load_image` takes it; of an open file the beginning is read, and all of it only
            where the beginning does not say.

    Raises:
        ImageError: As by `load_image`, as far as a header tells.
    """
    with _naming_failure(_name_of(source)) as name:
        image = _header_of(source, name)
        width, height = image.size
        is_turned = _orientation(image) in _SIDEWAYS
        return (height, width) if is_turned else (width, height)


def jpeg_bytes(source: ImageSource) -> bytes | None:
    """The encoded bytes of an upright JPEG in colour or grey; None for any other image.

    Args:
        source: As `load_image` takes it; of an open file, which is read once, nothing is told.

    Raises:
        ImageError: As by `load_image`, as far as a header tells.
    """
    with _naming_failure(_name_of(source)) as name:
        if isinstance(source, Path):
            data = read_file(source)
        elif hasattr(source, "version"):  # an `ImageRef`
            data = source.read(MAX_BYTES + 1)  # type: ignore[union-attr]
        elif isinstance(source, bytes):
            data = source
        else:
            return None
        image = _opened(data, name)
        is_plain = image.format == "JPEG" and image.mode in ("RGB", "L")
        return data if is_plain and _orientation(image) not in _UPRIGHT else None


def _header_of(source: object, name: str) -> Image.Image:
    if hasattr(source, "version"):  # an `ImageRef`: read anew each time
        beginning = source.read(_HEADER_BYTES)  # type: ignore[attr-defined]
        if len(beginning) == _HEADER_BYTES:
            try:
                return _opened(beginning, name)
            except (OSError, SyntaxError, ValueError):
                pass  # its header is longer
    return _opened(source, name)


def _opened(source: object, name: str) -> Image.Image:
    """The image with its header read and held against the bounds."""
    image = _open(source)
    _check_format(image, name)
    _check_size(image, name)
    return image


@contextmanager
def _naming_failure(name: str) -> Iterator[str]:
    """Within, whatever Pillow raises becomes an error that names the image.

    Raises:
        ImageError: Instead of anything else.
    """
    try:
        yield name
    except ImageError:
        raise
    except MemoryError as error:
        raise ImageError(
            f"image {name}: not enough memory to decode it; scale it down first"
        ) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(
            f"image {name}: {error}; at most {MAX_PIXELS} pixels are decoded",
            reason="image too large",
        ) from error
    except Exception as error:  # a damaged file makes Pillow's readers raise anything
        raise ImageError(
            f"image {name}: cannot be decoded ({type(error).__name__}: {error}); "
            "check that the file is complete and a supported image format"
        ) from error


def _name_of(source: object) -> str:
    """A short name of a source for messages: never the data themselves."""
    if isinstance(source, bytes):
        return f"<{len(source)} bytes>"
    if isinstance(source, Image.Image):
        return f"<PIL image {source.mode} {source.width}x{source.height}>"
    if isinstance(source, np.ndarray):
        return f"<array {source.dtype} {source.shape}>"
    text = str(source)
    return text if len(text) <= 120 else text[:117] + "..."


def _open(source: object) -> Image.Image:
    """The image behind `source`, its header read, its pixels perhaps not yet."""
    if isinstance(source, Image.Image):
        return source
    if isinstance(source, str):
        scheme = source[:8].split(":", 1)[0].lower() if ":" in source[:8] else ""
        if scheme in ("http", "https", "ftp", "s3", "gs", "file"):
            raise ImageError(
                f"image {_name_of(source)}: nothing is fetched; save it first and pass its path"
            )
        if scheme == "data":
            return _open(_read_data_uri(source))
        decoded = _read_base64(source)
        return _open(Path(source) if decoded is None else decoded)
    if isinstance(source, np.ndarray):
        return _from_array(source)
    if isinstance(source, Path):
        return _decode_header(read_file(source), _name_of(source))
    data: object = source.read(MAX_BYTES + 1) if hasattr(source, "read") else source
    if isinstance(data, bytes):
        if len(data) > MAX_BYTES:
            raise ImageError(
                f"image of more than {MAX_BYTES} bytes: not read, compress it",
                reason="image too large",
            )
        if not data:
            raise ImageError("image <0 bytes>: empty; expected an encoded image")
        return _decode_header(data, _name_of(source))
    raise ImageError(
        f"image of type {type(source).__name__}; expected a path, bytes, an open file, a data URI, "
        "base64, a PIL image or an array"
    )


def read_file(path: Path) -> bytes:
    """A file of at most `MAX_BYTES`.

    Raises:
        ImageError: There is no such regular file, it is empty, or it is larger.
    """
    name = _name_of(path)
    if not path.is_file():  # a pipe or a device would never end
        raise ImageError(f"image {name}: no such file")
    size = path.stat().st_size
    if size == 0:
        raise ImageError(f"image {name}: the file is empty")
    if size <= MAX_BYTES:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        size = len(data)
    if size > MAX_BYTES:
        raise ImageError(
            f"image {name}: {size} bytes; at most {MAX_BYTES} are read, compress it",
            reason="image too large",
        )
    return data


def _read_data_uri(uri: str) -> bytes:
    name = _name_of(uri)
    header, comma, payload = uri[:256].partition(",")
    if not comma:
        raise ImageError(f"image {name}: a data URI needs a comma before its data")
    payload = uri[len(header) + 1 :]
    escapes = payload.count("%")
    if len(payload) - 2 * escapes > _LONGEST_BASE64 or escapes > _MAX_ESCAPES:
        raise ImageError(
            f"image {name}: {len(uri)} characters, {escapes} of them escapes; at most {MAX_BYTES} "
            f"bytes in base64 and {_MAX_ESCAPES} escapes are read, pass a path"
        )
    data = urllib.parse.unquote_to_bytes(payload) if escapes else payload.encode()
    if not header.lower().endswith(";base64"):
        return data
    try:
        return base64.b64decode(b"".join(data.split()), validate=True)
    except binascii.Error as error:
        raise ImageError(f"image {name}: not valid base64 ({error})") from error


def _read_base64(text: str) -> bytes | None:
    """The bytes of an image in base64, as hosts hand it over; None if the text is a path."""
    if not _SHORTEST_BASE64 <= len(text) <= _LONGEST_BASE64:
        return None
    try:
        data = base64.b64decode(text, validate=True)
        return None if Path(text).is_file() else data
    except ValueError:  # a path has characters that base64 has not, mostly a dot
        return None
    except OSError:  # too long for a path
        return data


def _from_array(pixels: np.ndarray) -> Image.Image:
    """The image of uint8 pixels, (height, width) grey or (height, width, 3 or 4)."""
    fits = pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] in (3, 4))
    if pixels.dtype != np.uint8 or not fits or not pixels.size:
        raise ImageError(
            f"image array of {pixels.dtype} {pixels.shape}; expected uint8 (height, width, 3)"
        )
    return Image.fromarray(pixels)


def is_one_image(images: object) -> bool:
    """Whether this is an image, and no collection of images."""
    kinds = (str, Path, bytes, Image.Image, np.ndarray)
    return isinstance(images, kinds) or hasattr(images, "read")


def _decode_header(data: bytes, name: str) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        if (other := _other_format(data[:16])) is not None:
            raise ImageError(
                f"image {name}: {other} is not read; expected one of {', '.join(FORMATS)}, "
                "convert it"
            ) from None
        raise


def _other_format(prefix: bytes) -> str | None:
    """The format that a file begins like, told by its first bytes alone: no reader is started."""
    Image.init()
    for kind, (_, accepts) in sorted(Image.OPEN.items()):
        if kind not in FORMATS and accepts is not None and accepts(prefix) is True:
            return kind
    return None


def _check_format(image: Image.Image, name: str) -> None:
    """Refuses a file that the caller opened, and that would be decoded only now."""
    if isinstance(image, ImageFile.ImageFile) and image.format not in _NAMES_OF_FORMATS:
        raise ImageError(
            f"image {name}: {image.format} is not read; expected one of {', '.join(FORMATS)}, "
            "convert it"
        )


def _check_size(image: Image.Image, name: str) -> None:
    width, height = image.size
    if width <= 0 or height <= 0:
        raise ImageError(f"image {name}: {width}x{height} px; expected at least 1x1")
    if width * height > MAX_PIXELS:
        raise ImageError(
            f"image {name}: {width}x{height} = {width * height} pixels; "
            f"at most {MAX_PIXELS} are decoded, scale it down first",
            reason="image too large",
        )
    if max(width, height) > MAX_SIDE:
        raise ImageError(
            f"image {name}: {width}x{height} px; a side has at most {MAX_SIDE}, scale it down "
            "first",
            reason="image too large",
        )


def _upright(image: Image.Image) -> Image.Image:
    """A copy, turned as EXIF says; as it is where EXIF is damaged, and nothing of it rewritten."""
    method = _UPRIGHT.get(_orientation(image))
    return image.copy() if method is None else image.transpose(method)


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception as error:  # see load_image
        logger.debug("EXIF not readable (%s: %s)", type(error).__name__, error)
        return 1


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    """8-bit RGB; 16-bit grey is scaled, where Pillow's own conversion would clip it to white."""
    if image.mode == "RGB":
        return image
    if image.mode in _SIXTEEN_BIT_MODES:
        return _eight_bit_grey(image, name).convert("RGB")
    if image.mode == "F":
        raise ImageError(
            f"image {name}: floating-point pixels have no fixed range; convert it to 8 bits first"
        )
    return image.convert("RGB")


def _eight_bit_grey(image: Image.Image, name: str) -> Image.Image:
    """Some rows at a time, so that no wider copy of the whole image is made."""
    grey = Image.new("L", image.size)
    for top in range(0, image.height, _ROWS_AT_A_TIME):
        bottom = min(top + _ROWS_AT_A_TIME, image.height)
        values = np.asarray(image.crop((0, top, image.width, bottom))).astype(np.int64)
        if values.min() < 0 or values.max() > 0xFFFF:
            raise ImageError(
                f"image {name}: integer pixels from {values.min()} to {values.max()}; "
                "expected 0 to 65535, convert it to 8 or 16 bits first"
            )
        grey.paste(Image.fromarray(((values + 128) // 257).astype(np.uint8)), (0, top))
    return grey
