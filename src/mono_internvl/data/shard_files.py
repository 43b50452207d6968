"""Members of a tar shard as they are written."""

from __future__ import annotations

import io
import tarfile

_EXTENSIONS = {b"\xff\xd8": "jpg", b"\x89P": "png", b"RI": "webp", b"GI": "gif", b"BM": "bmp"}
_EXTENSIONS |= {b"II": "tif", b"MM": "tif"}


def image_extension(data: bytes) -> str:
    """What an encoded image is called by its first bytes."""
    return _EXTENSIONS.get(data[:2], "avif")


def add_member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """Write a file into a shard."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))
