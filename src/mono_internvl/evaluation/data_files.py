"""Benchmark data as it is published: TSV with base64, JSON lines, parquet, folders of text files.

Rows come with their images unread. Nothing is left out in silence: what is damaged names its file
and line.
"""

from __future__ import annotations

import ast
import base64
import binascii
import csv
import hashlib
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from mono_internvl.data.records import ImageRef, shortened
from mono_internvl.data.sources.source import FileImage
from mono_internvl.data.sources.tables import opened_parquet
from mono_internvl.errors import ImageError, SampleError
from mono_internvl.evaluation.toolkits import is_given
from mono_internvl.runs.json_lines import read_lines

SUFFIXES = (".tsv", ".jsonl", ".parquet", ".json", ".txt")
"""What is read, and in a folder of several forms the first of these."""

_LONGEST_REFERENCE = 64  # a shorter `image` of a TSV row is the index of the row that holds it
_IMAGE_COLUMNS = ("image", "images", "decoded_image", *(f"image_{n}" for n in range(1, 8)))
_DIGEST_BYTES = 16
_VERSION_BYTES = 8


@dataclass(frozen=True)
class Row:
    """One row of a benchmark.

    Attributes:
        fields: By column, images left out.
        images: In order.
        where: Its place, for messages.
    """

    fields: Mapping[str, Any]
    images: tuple[ImageRef, ...]
    where: str


@dataclass(frozen=True)
class TsvImage:
    """One base64 image in a row of a TSV file, read anew each time; equal to any of the same bytes.

    Attributes:
        digest: Of its text.
        file: That holds it.
        span: First and end byte of the row.
        column: Of the image.
        number: Among the images of the cell.
    """

    digest: bytes
    file: Path = field(compare=False)
    span: tuple[int, int] = field(compare=False)
    column: str = field(compare=False)
    number: int = field(compare=False)

    def __str__(self) -> str:
        return f"{self.file} at byte {self.span[0]}, {self.column}[{self.number}]"

    def read(self, size: int = -1, /) -> bytes:
        """The encoded image; see `ImageRef`."""
        with self.file.open("rb") as file:
            header = next(_records([file.readline().decode("utf-8-sig")]))
            file.seek(self.span[0])
            text = file.read(self.span[1] - self.span[0]).decode("utf-8", "replace")
        cells = next(_records(f"{line}\n" for line in text.removesuffix("\n").split("\n")))
        found = _cell_images(cells[header.index(self.column)])[self.number]
        try:
            data = base64.b64decode(found, validate=True)
        except (binascii.Error, ValueError) as error:
            raise ImageError(f"{self}: not base64 ({error}); fetch the file again") from error
        return data if size < 0 else data[:size]

    def version(self) -> tuple[int, ...]:
        """Of its text; see `ImageRef`."""
        return (int.from_bytes(self.digest[:_VERSION_BYTES], "big"),)


@dataclass(frozen=True)
class ParquetImage:
    """One image in a cell of a parquet file.

    Attributes:
        file: That holds it.
        group: Row group.
        row: In the group.
        column: Of the image.
        number: Among the images of the cell.
    """

    file: Path
    group: int
    row: int
    column: str
    number: int

    def __str__(self) -> str:
        return f"{self.file} group {self.group} row {self.row}, {self.column}[{self.number}]"

    def read(self, size: int = -1, /) -> bytes:
        """The encoded image; see `ImageRef`."""
        cells = _image_column(self.file, self.group, self.column)
        value = cells[self.row]
        value = value[self.number] if isinstance(value, list) else value
        data = value.get("bytes") if isinstance(value, Mapping) else value
        if not isinstance(data, bytes):
            raise ImageError(f"{self}: {shortened(repr(value))}; expected the bytes of an image")
        return data if size < 0 else data[:size]

    def version(self) -> tuple[int, ...]:
        """Size and time of the file; see `ImageRef`."""
        status = self.file.stat()
        return status.st_size, status.st_mtime_ns


def find_data(root: Path, names: tuple[str, ...]) -> list[Path]:
    """The files of a benchmark below a folder: `NAME.tsv` and the like, or those of a folder NAME.

    Raises:
        SampleError: There is none.
    """
    for name in names:
        for suffix in SUFFIXES:
            if (file := root / f"{name}{suffix}").is_file():
                return [file]
        for suffix in SUFFIXES:
            if files := sorted((root / name).glob(f"*{suffix}")):
                return files
    forms = ", ".join(f"{name}{{{','.join(SUFFIXES[:3])}}}" for name in names)
    raise SampleError(
        f"{root}: none of {forms} is there, nor a folder of such a name that holds one"
    )


def digest_of(files: list[Path]) -> str:
    """MD5 of the contents, as toolkits name their files by; of several one after another."""
    md5 = hashlib.md5(usedforsecurity=False)
    for path in files:
        with path.open("rb") as file:
            while chunk := file.read(1 << 22):
                md5.update(chunk)
    return md5.hexdigest()


def read_rows(file: Path, root: Path) -> Iterator[Row]:
    """The rows of a file by its suffix.

    Args:
        file: To read.
        root: Folder that names of images are looked for in, besides the file's own.

    Raises:
        SampleError: It is damaged, of another form, or names an image that is not there.
    """
    if file.suffix == ".tsv":
        return _tsv(file, root)
    if file.suffix == ".parquet":
        return _parquet(file)
    if file.suffix == ".txt":
        return _mme_text(file, root)
    return _json(file, root)


def _records(lines: Any) -> Any:
    """The cells of tab-separated records, as `csv.reader` gives them."""
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    return csv.reader(lines, delimiter="\t", strict=True)


def _tsv(file: Path, root: Path) -> Iterator[Row]:
    """Rows of VLMEvalKit's form."""
    held: dict[str, tuple[ImageRef, ...]] = {}
    waiting: list[tuple[dict[str, Any], str, str]] = []
    for fields, span, where in _tsv_records(file):
        cell = fields.pop("image", "")
        index = str(fields.get("index", ""))
        if not cell and is_given(path := fields.get("image_path")):
            names = _cell_images(str(path))
            yield Row(fields, tuple(_image_file(n, file, root, where) for n in names), where)
        elif cell and len(cell) <= _LONGEST_REFERENCE:
            if cell in held:
                yield Row(fields, held[cell], where)
            else:
                waiting.append((fields, cell, where))
        else:
            texts = _cell_images(cell) if cell else []
            images = tuple(
                TsvImage(_digest(text), file, span, "image", n) for n, text in enumerate(texts)
            )
            held[index] = images
            yield Row(fields, images, where)
    for fields, cell, where in waiting:  # rows that stand before the one they refer to
        if cell not in held:
            raise SampleError(f"{where}: image={cell!r}; no row of that index holds an image")
        yield Row(fields, held[cell], where)


def _tsv_records(file: Path) -> Iterator[tuple[dict[str, Any], tuple[int, int], str]]:
    end = 0

    def lines(stream: Any) -> Iterator[str]:
        nonlocal end
        for line in stream:
            end += len(line)
            yield line.decode("utf-8")

    with file.open("rb") as stream:
        reader = _records(lines(stream))
        header: list[str] = []
        start = 0
        try:
            for cells in reader:
                span, start = (start, end), end
                where = f"{file}:{reader.line_num}"
                if not header:
                    header = [cells[0].removeprefix("\ufeff"), *cells[1:]]
                elif len(cells) != len(header):
                    raise SampleError(
                        f"{where}: {len(cells)} cells; the header has {len(header)}, fetch the "
                        "file again"
                    )
                else:
                    yield dict(zip(header, cells, strict=True)), span, where
        except (csv.Error, UnicodeDecodeError) as error:
            raise SampleError(
                f"{file}:{reader.line_num}: not tab-separated UTF-8 ({error}); fetch it again"
            ) from error


def _cell_images(cell: str) -> list[str]:
    """One image or path, or several in a list as Python writes it."""
    if not cell.startswith("["):
        return [cell]
    try:
        return [str(one) for one in ast.literal_eval(cell)]
    except (ValueError, SyntaxError):
        return [cell]


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=_DIGEST_BYTES).digest()


def _image_file(name: str, file: Path, root: Path, where: str) -> FileImage:
    """An image by the path of a row: beside the file, below the root, or below its tail there."""
    parts = Path(name).parts
    for folder in (file.parent, root):
        for skipped in range(len(parts)):
            path = folder.joinpath(*parts[skipped:])
            try:
                if path.is_file():
                    return FileImage(path)
            except (OSError, ValueError):
                break
    raise SampleError(
        f"{where}: image {shortened(name)!r} is neither below {file.parent} nor below {root}; put "
        "it there"
    )


def _json(file: Path, root: Path) -> Iterator[Row]:
    """JSON lines of InternVL's form, or one JSON value: an array, or captions in COCO's form."""
    try:
        if file.suffix == ".jsonl":
            lines = read_lines(file)
            values = [(json.loads(line), n) for n, line in enumerate(lines, 1) if line.strip()]
        else:
            whole = json.loads(file.read_text(encoding="utf-8"))
            values = [(one, n) for n, one in enumerate(_of_coco(whole, file))]
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, SampleError):
            raise
        raise SampleError(f"{file}: not readable JSON ({error}); correct the file") from error
    answers = _separate_answers(file)
    for value, number in values:
        where = f"{file}:{number}"
        if not isinstance(value, dict):
            raise SampleError(f"{where}: a JSON {type(value).__name__}; expected an object")
        fields = {name: item for name, item in value.items() if name not in ("image", "images")}
        if (key := str(value.get("question_id"))) in answers:
            fields["answers"] = answers[key]
        if "human" in file.stem or "augmented" in file.stem:  # ChartQA's two files
            fields.setdefault("type", file.stem)
        named = value.get("image", value.get("images", []))
        names = named if isinstance(named, list) else [named]
        images = tuple(_image_file(str(n), file, root, where) for n in names if is_given(n))
        yield Row(fields, images, where)


def _separate_answers(file: Path) -> dict[str, Any]:
    """Ten answers of each question in `NAME_annotations.json` beside NAME.jsonl, VQA's own form."""
    beside = file.with_name(f"{file.stem}_annotations.json")
    if not beside.is_file():
        return {}
    try:
        found = json.loads(beside.read_text(encoding="utf-8"))["annotations"]
        return {str(one["question_id"]): one["answers"] for one in found}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SampleError(f"{beside}: not VQA annotations ({error!r})") from error


def _of_coco(value: Any, file: Path) -> list[Any]:
    """The images of a caption file with all captions of each; an array as it is."""
    if isinstance(value, list):
        return value
    if not isinstance(value, dict) or not isinstance(value.get("images"), list):
        raise SampleError(f"{file}: expected an array, or `images` and `annotations` as in COCO")
    captions: dict[str, list[str]] = {}
    for one in value.get("annotations", []):
        captions.setdefault(str(one["image_id"]), []).append(str(one["caption"]))
    rows = []
    for one in value["images"]:
        name = one.get("file_name", one.get("image"))
        rows.append({"image": name, "id": one["id"], "answers": captions.get(str(one["id"]), [])})
    return rows


def _mme_text(file: Path, root: Path) -> Iterator[Row]:
    """A subtask of MME's own folder: a line `image TAB question TAB answer` for each question."""
    folder = file.parent / "images" / file.stem
    for number, line in enumerate(read_lines(file), 1):
        where = f"{file}:{number}"
        cells = line.rstrip("\r").split("\t")
        if not line.strip():
            continue
        if len(cells) != 3:
            raise SampleError(f"{where}: {len(cells)} cells; expected image, question and answer")
        name, question, answer = cells
        beside = file.parent / file.stem / name
        path = next((one for one in (folder / name, beside) if one.is_file()), None)
        image = FileImage(path) if path else _image_file(name, file, root, where)
        fields = {"question": question, "answer": answer, "category": file.stem}
        yield Row({**fields, "image_path": f"{file.stem}/{name}"}, (image,), where)


def _parquet(file: Path) -> Iterator[Row]:
    with opened_parquet(file) as table:
        columns = table.schema_arrow.names
        shown = [name for name in _IMAGE_COLUMNS if name in columns]
        plain = [name for name in columns if name not in shown]
        number = 0
        for group in range(table.num_row_groups):
            rows = table.read_row_group(group, columns=plain).to_pylist()
            counts = _image_counts(table.read_row_group(group, columns=shown), shown)
            for index, fields in enumerate(rows):
                images = tuple(
                    ParquetImage(file, group, index, column, n)
                    for column in shown
                    for n in range(counts[column][index])
                )
                yield Row(fields, images, f"{file}:{number}")
                number += 1


def _image_counts(table: Any, columns: list[str]) -> dict[str, list[int]]:
    counts = {}
    for name in columns:
        cells = table.column(name)
        is_list = "list" in str(cells.type)
        counts[name] = [0 if not cell.is_valid else len(cell) if is_list else 1 for cell in cells]
    return counts


@lru_cache(maxsize=2)
def _image_column(file: Path, group: int, column: str) -> list[Any]:
    """The cells of one row group; the last two are kept, for questions come in order."""
    try:
        with opened_parquet(file) as table:
            return list(table.read_row_group(group, columns=[column]).column(column).to_pylist())
    except SampleError as error:
        raise ImageError(
            f"{file}: row group {group} is not readable ({error.__cause__})"
        ) from error
