"""GGUF files as they lie on disk: metadata, and tensors that are dequantised one at a time.

A file is walked once before anything in it is believed: every count, length and offset is held to
what the file can hold, so that a damaged or hostile one is refused in the time that reading its
bytes takes. What the blocks of a quantised tensor mean is known by the package `gguf`.

Source: the GGUF specification of ggml, versions 2 and 3, little-endian.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mono_internvl.configuration.checks import MAX_LAYERS, MOST_OF_TEXT
from mono_internvl.errors import CheckpointError
from mono_internvl.runs.files import MAX_TOKENIZER_BYTES, reading

GGUF_SUFFIX = ".gguf"

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_STRING, _ARRAY, _BOOL = 8, 9, 7
# Type of a value -> how struct reads it.
_SCALARS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    _BOOL: "<B",
    10: "<Q",
    11: "<q",
    12: "<d",
}
_MOST_FIELDS = 10_000
_MOST_TENSORS = 30 * MAX_LAYERS
_MOST_STRING_BYTES = 1 << 20
# Tokens or merges of the largest vocabulary that a configuration may name.
_MOST_ELEMENTS = MOST_OF_TEXT["vocab_size"]
_DEFAULT_ALIGNMENT = 32


@dataclass(frozen=True)
class GgufTensor:
    """Where a tensor lies.

    Attributes:
        shape: As torch writes it, the longest-moving dimension first.
        kind: Number of its type, of `gguf.GGMLQuantizationType`.
        start: First byte in the file.
        num_bytes: That it takes there.
    """

    shape: tuple[int, ...]
    kind: int
    start: int
    num_bytes: int


@dataclass(frozen=True)
class GgufFile:
    """A file whose header has been checked.

    Attributes:
        path: Of the file.
        metadata: Key -> number, text, or list of these.
        tensors: Name -> where it lies.
    """

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]

    def kind_name(self, name: str) -> str:
        """Type of a tensor in ggml's words, as "Q4_1"."""
        import gguf

        return str(gguf.GGMLQuantizationType(self.tensors[name].kind).name)

    def dequantised(self, name: str) -> np.ndarray:
        """A tensor in fp32, of its shape.

        Raises:
            CheckpointError: Its type is not known to the package `gguf`.
        """
        import gguf

        tensor = self.tensors[name]
        with reading(f"{self.path}: tensor {name}"):
            stored = np.memmap(self.path, np.uint8, "r", tensor.start, (tensor.num_bytes,))
            kind = gguf.GGMLQuantizationType(tensor.kind)
            rows = stored.reshape(math.prod(tensor.shape[:-1]), -1)
            return np.array(gguf.dequantize(rows, kind), np.float32).reshape(tensor.shape)


def read_gguf(path: Path) -> GgufFile:
    """Read and check the header of a GGUF file.

    Raises:
        CheckpointError: The package `gguf` is missing, or the file is damaged, of another version
            or byte order, one of several parts, or larger in any respect than a model can be.
    """
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise CheckpointError(
            f"{path}: GGUF files need the package gguf, which is not installed; "
            "pip install 'mono-internvl[gguf]', or give the model's safetensors folder"
        ) from error
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; give a GGUF file")
    with reading(f"{path}: not a readable GGUF file"), path.open("rb") as file:
        size = path.stat().st_size
        if size < 24 or file.read(4) != _MAGIC:
            raise CheckpointError(f"{path}: not a GGUF file; restore the file")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _read(_Cursor(path, data, 4), size)


class _Cursor:
    """Reads values one after another, never past what a header may take."""

    def __init__(self, path: Path, data: mmap.mmap, place: int):
        self.path, self.data, self.place = path, data, place
        self.end = min(len(data), MAX_TOKENIZER_BYTES)

    def refuse(self, why: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {why}; restore the file")

    def take(self, count: int) -> bytes:
        if count > self.end - self.place:
            raise self.refuse(f"its header ends within {count} bytes at byte {self.place}")
        self.place += count
        return self.data[self.place - count : self.place]

    def scalar(self, kind: int) -> Any:
        if (form := _SCALARS.get(kind)) is None:
            raise self.refuse(f"a value of type {kind}; expected 0 to 12")
        value = struct.unpack(form, self.take(struct.calcsize(form)))[0]
        return bool(value) if kind == _BOOL else value

    def count(self, what: str, most: int) -> int:
        value = self.scalar(10)
        if value > most:
            raise self.refuse(f"{value} {what}; expected at most {most}")
        return int(value)

    def text(self) -> str:
        return self.take(self.count("bytes of text", _MOST_STRING_BYTES)).decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            return self.scalar(kind)
        element = self.scalar(4)
        count = self.count("elements of an array", _MOST_ELEMENTS)
        if element == _STRING:
            return [self.text() for _ in range(count)]
        if (form := _SCALARS.get(element)) is None:
            raise self.refuse(f"an array of values of type {element}; expected numbers or text")
        return np.frombuffer(self.take(count * struct.calcsize(form)), form).tolist()


def _read(cursor: _Cursor, size: int) -> GgufFile:
    version = cursor.scalar(4)
    if version not in _VERSIONS:
        raise cursor.refuse(f"version {version}; expected 2 or 3, little-endian")
    num_tensors = cursor.count("tensors", _MOST_TENSORS)
    metadata: dict[str, Any] = {}
    for _ in range(cursor.count("fields", _MOST_FIELDS)):
        key = cursor.text()
        if key in metadata:
            raise cursor.refuse(f"{key!r:.60} stands in it twice")
        metadata[key] = cursor.value(cursor.scalar(4))
    if metadata.get("split.count", 0) not in (0, 1):
        raise CheckpointError(
            f"{cursor.path}: one of {metadata['split.count']} parts; join them with llama.cpp's "
            "`llama-gguf-split --merge`"
        )
    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or not 0 < alignment <= 1 << 20:
        raise cursor.refuse(f"general.alignment={alignment!r:.40}; expected 1 to {1 << 20}")
    entries = [_tensor_entry(cursor) for _ in range(num_tensors)]
    data = -(-cursor.place // alignment) * alignment
    tensors = {name: _placed(cursor, name, entry, data, size) for name, *entry in entries}
    if len(tensors) != len(entries):
        raise cursor.refuse("two tensors have one name")
    if sum(tensor.num_bytes for tensor in tensors.values()) > size - data:
        raise cursor.refuse("tensors lie on one another")
    return GgufFile(cursor.path, metadata, tensors)


def _tensor_entry(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    """Name, shape as torch writes it, type and offset within the data."""
    name, dimensions = cursor.text(), cursor.scalar(4)
    if not 1 <= dimensions <= 4:
        raise cursor.refuse(f"tensor {name!r:.60} has {dimensions} dimensions; expected 1 to 4")
    shape = tuple(
        cursor.count("elements along a dimension", size) for size in [1 << 40] * dimensions
    )
    return name, shape[::-1], cursor.scalar(4), cursor.scalar(10)


def _placed(cursor: _Cursor, name: str, entry: list[Any], data: int, size: int) -> GgufTensor:
    from gguf.constants import GGML_QUANT_SIZES

    shape, kind, offset = entry
    if kind not in list(GGML_QUANT_SIZES):
        raise cursor.refuse(f"tensor {name!r:.60} is of type {kind}, which is not known")
    block, block_bytes = GGML_QUANT_SIZES[kind]
    if not all(shape) or shape[-1] % block:
        raise cursor.refuse(
            f"tensor {name!r:.60} has the shape {shape}; expected no zero and rows of whole blocks "
            f"of {block}"
        )
    num_bytes = math.prod(shape) // block * block_bytes
    if data + offset + num_bytes > size:
        raise cursor.refuse(
            f"tensor {name!r:.60} ends at byte {data + offset + num_bytes} of {size}; "
            "the file is cut off"
        )
    return GgufTensor(shape, int(kind), data + offset, num_bytes)
