"""The meta file that names the sources of a stage.

    {"captions": {"root": "images/", "annotation": "captions.jsonl", "repeat_time": 1}}

Paths in it are relative to the meta file. What an annotation is called says what reads it: a folder
is a saved `datasets` dataset, else the suffix decides (`SOURCES`). Shards are one path, a list of
them, or a pattern such as `shards/*.tar`.

Instead of `repeat_time` every entry may have a `ratio` of the samples; they add up to 1. An epoch
is then so long that each source is seen whole at least once, one of them exactly.

Source: the meta files of OpenGVLab's InternVL models.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mono_internvl.data.sources.json_files import JsonArraySource, JsonlSource, read_json_file
from mono_internvl.data.sources.source import Source
from mono_internvl.data.sources.tables import DatasetSource, ParquetSource
from mono_internvl.data.sources.tar_shards import TarSource
from mono_internvl.errors import SampleError

FOLDER = "/"
SOURCES: dict[str, Callable[..., Source]] = {
    ".jsonl": JsonlSource,
    ".json": JsonArraySource,
    ".tar": TarSource,
    ".parquet": ParquetSource,
    FOLDER: DatasetSource,
}
"""What reads an annotation, by its suffix, or by "/" if it is a folder; called as `JsonlSource` is,
which reads all others. Shards get a list of paths."""
_SHARDED = {".tar", ".parquet"}
_RATIO_TOLERANCE = 0.002  # published ratios are rounded


def read_meta(path: Path) -> list[Source]:
    """The sources that a meta file names.

    Args:
        path: JSON file `{name: {root, annotation, repeat_time, max_dynamic_patch, ...}}`; paths in
            it are relative to its folder.

    Raises:
        SampleError: Not such a file, or a source of it is missing.
    """
    path = Path(path)
    entries = read_entries(path)
    sources = [_source_of(path, name, entry) for name, entry in entries.items()]
    ratios = [entry.get("ratio") for entry in entries.values()]
    if any(ratio is not None for ratio in ratios):
        _check_ratios(path, entries)
        longest = max(len(s) / ratio for s, ratio in zip(sources, ratios, strict=True))
        for source, ratio in zip(sources, ratios, strict=True):
            source.repeat = ratio * longest / len(source)
    return sources


def read_entries(path: Path) -> Mapping[str, Any]:
    """The entries of a meta file as they stand there.

    Raises:
        SampleError: It is no such file.
    """
    if not path.is_file():
        raise SampleError(f"{path}: no such meta file; expected JSON naming the sources")
    meta = read_json_file(path)
    if not isinstance(meta, dict) or not meta:
        raise SampleError(f"{path}: expected a JSON object with one entry per source")
    return meta


def _source_of(meta: Path, name: str, entry: Any) -> Source:
    """The source of one entry of a meta file."""
    here = f"{meta}: source {name!r}"
    if not isinstance(entry, dict):
        raise SampleError(f"{here}: {entry!r}; expected an object with root and annotation")
    names = _names_of(here, entry.get("annotation"))
    needs_root = not _holds_images(meta.parent, names)  # else they lie elsewhere
    root = entry.get("root", None if needs_root else ".")
    if not isinstance(root, str):
        raise SampleError(f"{here}: root={root!r}; expected a path")
    options = {"name": name, **_options_of(here, entry)}
    return _opened(here, meta.parent, names, meta.parent / root, options)


def open_source(annotation: Path, root: Path | None = None, **options: Any) -> Source:
    """The source that one annotation names, as in a meta file.

    Args:
        annotation: File, pattern of shards such as `shards/*.tar`, or folder.
        root: Folder that image paths are relative to; the annotation's own unless given.
        **options: Fields of `SourceOptions`.

    Raises:
        SampleError: It is not there, or damaged.
    """
    base, name = annotation.parent, annotation.name
    root = base if root is None else root
    if glob.has_magic(str(base)):  # folders may be part of the pattern
        base, name = Path(), str(annotation)
    return _opened(str(annotation), base, [name], root, options)


def _holds_images(base: Path, names: list[str]) -> bool:
    """Whether the images of an annotation are in it."""
    return Path(names[0]).suffix in _SHARDED or (base / names[0]).is_dir()


def _opened(
    here: str, base: Path, names: list[str], root: Path, options: Mapping[str, Any]
) -> Source:
    """The source of annotations below a folder, chosen by the first of them."""
    suffix, is_folder = Path(names[0]).suffix, (base / names[0]).is_dir()
    if suffix in _SHARDED and not is_folder:
        return SOURCES[suffix](_files_of(here, base, names, suffix), root, **options)
    if len(names) > 1:
        raise SampleError(
            f"{here}: annotation is a list of {len(names)}; only {' and '.join(sorted(_SHARDED))} "
            "files are listed, write an entry for each other file"
        )
    open_one = SOURCES.get(FOLDER if is_folder else suffix, JsonlSource)
    return open_one(base / names[0], root, **options)


def _check_ratios(meta: Path, entries: Mapping[str, Any]) -> None:
    for name, entry in entries.items():
        ratio = entry.get("ratio")
        if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 < ratio <= 1:
            raise SampleError(
                f"{meta}: source {name!r}: ratio={ratio!r}; expected a number above 0 and up to 1 "
                "in every entry, or in none"
            )
        if "repeat_time" in entry:
            raise SampleError(
                f"{meta}: source {name!r}: repeat_time beside ratio={ratio!r}; remove one of them"
            )
    total = sum(entry["ratio"] for entry in entries.values())
    if abs(total - 1) > _RATIO_TOLERANCE:
        raise SampleError(f"{meta}: the ratios add up to {total:g}; expected 1")


def _names_of(here: str, annotation: Any) -> list[str]:
    """The paths of an annotation, one or a list."""
    names = annotation if isinstance(annotation, list) else [annotation]
    if not names or not all(isinstance(one, str) and one for one in names):
        raise SampleError(f"{here}: annotation={annotation!r}; expected a path")
    return names


def _options_of(here: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `SourceOptions`; those that few sources have only where they are given."""
    repeat, max_tiles = entry.get("repeat_time", 1), entry.get("max_dynamic_patch")
    if isinstance(repeat, bool) or not isinstance(repeat, int | float):
        raise SampleError(f"{here}: repeat_time={repeat!r}; expected a positive number")
    is_count = isinstance(max_tiles, int) and not isinstance(max_tiles, bool) and max_tiles >= 1
    if max_tiles is not None and not is_count:
        raise SampleError(f"{here}: max_dynamic_patch={max_tiles!r}; expected an integer >= 1")
    options: dict[str, Any] = {"repeat": float(repeat), "max_tiles": max_tiles}
    augments = entry.get("data_augment", False)
    if not isinstance(augments, bool):
        raise SampleError(f"{here}: data_augment={augments!r}; expected true or false")
    if augments:
        options["augments"] = True
    if (prompt := entry.get("prompt")) is not None:
        if not isinstance(prompt, str) or not prompt.strip():
            raise SampleError(f"{here}: prompt={prompt!r}; expected what captions answer")
        options["prompt"] = prompt
    return options


def _files_of(here: str, base: Path, names: list[str], suffix: str) -> list[Path]:
    """The shards in order, patterns expanded and sorted."""
    files: list[Path] = []
    for name in names:
        if Path(name).suffix != suffix:
            raise SampleError(f"{here}: {name!r} among {suffix} files; write another entry for it")
        if glob.has_magic(name) and not (base / name).is_file():
            found = sorted(glob.glob(os.path.join(glob.escape(str(base)), name), recursive=True))
            if not found:
                raise SampleError(f"{here}: annotation={name!r} fits no file in {base}")
            files += [Path(one) for one in found]
        else:
            files.append(base / name)
    return files
