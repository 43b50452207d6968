"""Where records come from: one protocol (`Source`), and a file for each kind of store."""

from mono_internvl.data.sources.json_files import JsonArraySource, JsonlSource
from mono_internvl.data.sources.meta import SOURCES, open_source, read_meta
from mono_internvl.data.sources.source import (
    BytesImage,
    FileImage,
    Measure,
    MeasuredSource,
    Source,
    SourceOptions,
)
from mono_internvl.data.sources.tables import DatasetSource, ParquetSource
from mono_internvl.data.sources.tar_shards import TarSource

__all__ = [
    "SOURCES",
    "BytesImage",
    "DatasetSource",
    "FileImage",
    "JsonArraySource",
    "JsonlSource",
    "Measure",
    "MeasuredSource",
    "ParquetSource",
    "Source",
    "SourceOptions",
    "TarSource",
    "open_source",
    "read_meta",
]
