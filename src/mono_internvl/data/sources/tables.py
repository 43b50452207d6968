"""Tables with images in them: parquet files, and datasets that `datasets` has saved.

Columns are those of FineVision (`images`, `texts`) and LLaVA-OneVision (`image`, `conversations`),
or `caption` or `text` beside an image; others are kept as fields of the record. A parquet file is
read by row groups, of which the last few are kept: reading in random order is for saved datasets
and tar shards, which `mono-internvl data prepare` makes.
"""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any

from mono_internvl.data.forms import raw_record
from mono_internvl.data.records import Record, parse_record, shortened
from mono_internvl.data.sources.source import BytesImage, SourceOptions, file_image
from mono_internvl.errors import MissingDependency, SampleError

_IMAGE_COLUMNS = ("images", "image", "jpg", "png")
_KEPT_ROW_GROUPS = 4


class ParquetSource:
    """Rows of parquet files.

    Args:
        files: The files in order.
        root: Folder of images that rows name instead of holding them.
        **options: Fields of `SourceOptions`.
    """

    def __init__(self, files: Path | Sequence[Path], root: Path, **options: Any):
        import_package("pyarrow")
        paths = [Path(files)] if isinstance(files, str | Path) else [Path(one) for one in files]
        self.root = Path(root)
        self.options = SourceOptions(**options).named(paths[0].stem)
        self.name, self.repeat = self.options.name, self.options.repeat
        self._groups: list[tuple[Path, int, int]] = []  # file, row group, its first row
        counts: list[int] = []
        sha = hashlib.sha256(self.options.prompt.encode())
        for path in paths:
            first = 0
            for group, count in enumerate(_row_groups(path, sha)):
                self._groups.append((path, group, first))
                counts.append(count)
                first += count
        self._ends = list(accumulate(counts)) or [0]
        self._fingerprint = sha.digest()
        self._kept: OrderedDict[int, list[dict[str, Any]]] = OrderedDict()
        if not len(self):
            raise SampleError(f"{paths[0]}: holds no record (source {self.name!r})")

    def __len__(self) -> int:
        return self._ends[-1]

    def size(self, index: int) -> int:
        """Nothing is known before a row is read."""
        return 0

    def record(self, index: int) -> Record:
        """Read one record; see `Source`."""
        place = bisect_right(self._ends, index)
        row = index - (self._ends[place - 1] if place else 0)
        path, _, first = self._groups[place]
        where = f"{path}:{first + row}"
        return record_of_row(self._rows(place, where)[row], index, where, self.root, self.options)

    def fingerprint(self) -> bytes:
        """Digest of the names, sizes and footers of the files; rows are not read."""
        return self._fingerprint

    def _rows(self, place: int, where: str) -> list[dict[str, Any]]:
        """The rows of a row group, from memory or read."""
        if place in self._kept:
            self._kept.move_to_end(place)
            return self._kept[place]
        path, group, _ = self._groups[place]
        try:
            with opened_parquet(path) as file:
                rows = file.read_row_group(group).to_pylist()
        except SampleError as error:
            raise SampleError(
                f"{where}: row group {group} is not readable ({error.__cause__}); fetch it again",
                reason="shard damaged",
            ) from error
        self._kept[place] = rows
        if len(self._kept) > _KEPT_ROW_GROUPS:
            self._kept.popitem(last=False)
        return rows


class DatasetSource:
    """A dataset as `Dataset.save_to_disk` of the package `datasets` writes it; memory-mapped.

    Args:
        folder: The saved dataset, one split.
        root: Folder of images that rows name instead of holding them.
        **options: Fields of `SourceOptions`.
    """

    def __init__(self, folder: Path, root: Path, **options: Any):
        datasets = import_package("datasets")
        self.folder, self.root = Path(folder), Path(root)
        self.options = SourceOptions(**options).named(self.folder.name)
        self.name, self.repeat = self.options.name, self.options.repeat
        try:
            found = datasets.load_from_disk(str(self.folder))
        except Exception as error:  # the package raises anything over a folder of another form
            raise SampleError(
                f"{self.folder}: not a saved dataset ({type(error).__name__}: "
                f"{shortened(str(error))}); expected what Dataset.save_to_disk writes"
            ) from error
        if not isinstance(found, datasets.Dataset):
            raise SampleError(
                f"{self.folder}: holds the splits {', '.join(found)}; name one of these folders"
            )
        self._rows = found.with_format("arrow")  # undecoded: images stay encoded
        self._fingerprint = f"{found._fingerprint} {len(found)} {self.options.prompt}".encode()
        if not len(self):
            raise SampleError(f"{self.folder}: holds no record (source {self.name!r})")

    def __len__(self) -> int:
        return len(self._rows)

    def size(self, index: int) -> int:
        """Nothing is known before a row is read."""
        return 0

    def record(self, index: int) -> Record:
        """Read one record; see `Source`."""
        row = self._rows[index].to_pylist()[0]
        return record_of_row(row, index, f"{self.folder}[{index}]", self.root, self.options)

    def fingerprint(self) -> bytes:
        """What `datasets` knows the dataset by."""
        return self._fingerprint


def record_of_row(
    row: Mapping[str, Any], index: int, where: str, root: Path, options: SourceOptions
) -> Record:
    """A row as a record.

    Args:
        row: Values by column.
        index: Of the row in its source.
        where: Its place, for messages.
        root: Folder of images that the row names.
        options: Of its source.

    Raises:
        SampleError: It is malformed.
    """
    fields = {n: _plain(value) for n, value in row.items() if n not in _IMAGE_COLUMNS}
    images = list(_images(row, root, where))
    return parse_record(
        raw_record(fields, len(images), options.prompt, where),
        index,
        where,
        lambda name: images[int(name)],
        options.max_tiles,
        augments=options.augments,
    )


def _plain(value: Any) -> Any:
    """A cell as JSON has it, which fields of a record are; what is no number is none."""
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, bytes):
        return f"{len(value)} bytes"
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | int) else str(value)


def _images(row: Mapping[str, Any], root: Path, where: str) -> Iterator[Any]:
    column = next((name for name in _IMAGE_COLUMNS if row.get(name) is not None), None)
    if column is None:
        return
    values = row[column] if isinstance(row[column], list) else [row[column]]
    for number, value in enumerate(values):
        held = value.get("bytes") if isinstance(value, Mapping) else value
        named = value.get("path") if isinstance(value, Mapping) else value
        if isinstance(held, bytes):
            yield BytesImage(held, f"{where} {column}[{number}]")
        elif isinstance(named, str):
            yield file_image(root, named, where)
        else:
            raise SampleError(
                f"{where}: {column}[{number}]={shortened(repr(value))}; expected the bytes of an "
                "image, or its path",
                reason="image missing",
            )


def _row_groups(path: Path, sha: Any) -> list[int]:
    """Rows of each row group; the file's name, size and footer go into a digest."""
    with opened_parquet(path) as file:
        about = file.metadata
    sha.update(f"{path.name} {path.stat().st_size} {about.to_dict()}".encode())
    return [about.row_group(group).num_rows for group in range(about.num_row_groups)]


@contextmanager
def opened_parquet(path: Path) -> Iterator[Any]:
    """A parquet file as `pyarrow.parquet.ParquetFile`.

    Raises:
        SampleError: It is not there, or what is read of it within is damaged.
        MissingDependency: pyarrow is not installed.
    """
    import_package("pyarrow")
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            yield file
    except FileNotFoundError:
        raise SampleError(f"{path}: no such parquet file") from None
    except (OSError, pa.ArrowException) as error:
        raise SampleError(f"{path}: not a readable parquet file ({error})") from error


def import_package(name: str) -> Any:
    """An optional package of the extra `data`.

    Raises:
        MissingDependency: It is not installed.
    """
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingDependency(
            f"{name} is not installed; pip install 'mono-internvl[data]' reads tables"
        ) from error
