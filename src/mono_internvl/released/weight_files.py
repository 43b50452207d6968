"""The files that hold the weights: which they are is said once, for checking and for loading.

A folder may hold more than its checkpoint: weights of an earlier save, adapters, pickles. Whoever
loads gets a `verified_view`: a folder with the files that were checked and nothing beside them.
Only safetensors files are read.
"""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from mono_internvl.errors import CheckpointError
from mono_internvl.runs.files import read_json, reading

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SNAPSHOT_FILES = ("*.json", "*.safetensors", "*.model", "*.jinja", "*.txt", "*.md")

_DIGEST_DIGITS = 16
_SAMPLE_BYTES = 64  # of every tensor
# Rotary tables that some exporters save; they hold no weights.
_IGNORED_KEYS = re.compile(r"rotary_emb\.inv_freq$")
_SHARD_NAME = re.compile(r"[^/\\\0]{1,200}\.safetensors")


@dataclass(frozen=True)
class TensorInfo:
    """Header entry of one stored tensor."""

    shape: tuple[int, ...]
    dtype: str
    file: str


def resolve_checkpoint(
    name_or_path: str | Path,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    token: str | None = None,
    patterns: Sequence[str] = SNAPSHOT_FILES,
) -> Path:
    """The local folder of a checkpoint: the path itself, or a hub id's snapshot.

    Of a hub repository only data is fetched (safetensors, JSON, tokenizer): no pickles, no code.

    Args:
        name_or_path: Folder or hub id.
        revision: Branch, tag or commit of a hub id.
        cache_dir: Where hub files are kept.
        local_files_only: Never ask the network.
        token: Of the hub.
        patterns: Names of the files that are needed of a hub id.

    Raises:
        CheckpointError: Neither a folder nor an id that can be had.
    """
    path = Path(name_or_path)
    if path.is_dir():
        return path
    if path.exists() or path.is_absolute() or str(name_or_path).startswith((".", "~")):
        raise CheckpointError(f"{name_or_path}: not a folder; give a checkpoint folder or a hub id")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                str(name_or_path),
                revision=revision,
                cache_dir=cache_dir,
                local_files_only=local_files_only,
                token=token,
                allow_patterns=list(patterns),
            )
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"{name_or_path}: no such folder, and not available as hub id at revision "
            f"{revision or 'main'} ({type(error).__name__}: {_first_line(error)}); check the name, "
            "or download the checkpoint and give its folder"
        ) from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "no message")


def safetensors_files(folder: Path) -> list[Path]:
    """The weight files of a checkpoint folder, as its index names them.

    Raises:
        CheckpointError: There are none, the index is damaged, or a file it names is missing or lies
            outside of the folder.
    """
    index = folder / INDEX
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{index}: not a safetensors index; restore the file")
        for name in weight_map.values():
            if not isinstance(name, str) or not _SHARD_NAME.fullmatch(name):
                raise CheckpointError(
                    f"{index}: shard {name!r}; expected the name of a file in this folder, restore "
                    "the index"
                )
        files = [folder / name for name in sorted(set(weight_map.values()))]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise CheckpointError(
                f"{folder}: shard {missing[0]} named by {index.name} is missing; copy it from the "
                "checkpoint"
            )
        return files
    single = folder / WEIGHTS
    if single.is_file():
        return [single]
    found = sorted(p.name for p in folder.glob("*.bin")) + sorted(
        p.name for p in folder.glob("*.pt*")
    )
    hint = f"; {found[0]} is a pickle, which is never loaded" if found else ""
    raise CheckpointError(
        f"{folder}: no model.safetensors and no {index.name}{hint}; get the safetensors files of "
        "the checkpoint"
    )


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    with (
        reading(f"{file}: not a readable safetensors file"),
        safe_open(file, framework="pt") as handle,
    ):
        yield handle


@dataclass(frozen=True)
class WeightFiles:
    """The files that hold a checkpoint's weights, and what their headers say.

    Attributes:
        files: In the order of their names.
        tensors: Name -> header entry; what no model reads is left out.
    """

    files: tuple[Path, ...]
    tensors: Mapping[str, TensorInfo]

    def view(self) -> tempfile.TemporaryDirectory[str]:
        """A folder with links to these files, and nothing beside them.

        What is loaded from it is what the headers say: no other weights, no adapters, no pickles.
        """
        view = tempfile.TemporaryDirectory(prefix="mono-internvl-weights-")
        place = Path(view.name)
        names = {file.name: f"model-{i:05}.safetensors" for i, file in enumerate(self.files, 1)}
        if len(self.files) == 1:
            names = {self.files[0].name: WEIGHTS}
        else:
            index = {key: names[info.file] for key, info in self.tensors.items()}
            (place / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}))
        for file in self.files:
            (place / names[file.name]).symlink_to(file.resolve())
        return view


def read_weight_files(folder: Path) -> WeightFiles:
    """Find the weight files of a folder and read their headers, without reading data.

    Raises:
        CheckpointError: As `safetensors_files`, a header is damaged, or two files hold one tensor.
    """
    tensors: dict[str, TensorInfo] = {}
    files = safetensors_files(folder)
    for file in files:
        with _opened(file) as handle:
            for key in handle.keys():  # noqa: SIM118 - not a dict
                if key in tensors:
                    raise CheckpointError(
                        f"{folder}: {key} stands in {tensors[key].file} and in {file.name}; "
                        "expected every tensor once, restore the files"
                    )
                part = handle.get_slice(key)
                tensors[key] = TensorInfo(tuple(part.get_shape()), part.get_dtype(), file.name)
    kept = {key: info for key, info in tensors.items() if not _IGNORED_KEYS.search(key)}
    return WeightFiles(tuple(files), kept)


def read_headers(folder: Path) -> Mapping[str, TensorInfo]:
    """Name, shape and dtype of every stored tensor; see `read_weight_files`."""
    return read_weight_files(folder).tensors


def iterate_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Every stored tensor, one at a time.

    Raises:
        CheckpointError: A file cannot be read.
    """
    for file in safetensors_files(folder):
        with _opened(file) as handle:
            for key in handle.keys():  # noqa: SIM118 - not a dict
                if not _IGNORED_KEYS.search(key):
                    yield key, handle.get_tensor(key)


def digest_of_checkpoint(folder: Path) -> str | None:
    """A short digest of a checkpoint; None if there is no such folder.

    Reads config.json, the headers of the weight files and the first bytes of every tensor: other
    weights of the same shape differ there, and gigabytes need not be read.

    Raises:
        CheckpointError: A weight file is missing, or cannot be read.
    """
    if not (folder / "config.json").is_file():
        return None
    sha = hashlib.sha256((folder / "config.json").read_bytes())
    for path in safetensors_files(folder):
        try:
            with path.open("rb") as file:
                header = file.read(int.from_bytes(file.read(8), "little"))
                sha.update(f"{path.name} {path.stat().st_size}\n".encode() + header)
                ends = (info.get("data_offsets", (0, 0)) for info in json.loads(header).values())
                for begin in sorted(int(first) for first, _ in ends):
                    file.seek(8 + len(header) + begin)
                    sha.update(file.read(_SAMPLE_BYTES))
        except (OSError, OverflowError, ValueError, AttributeError, TypeError) as error:
            raise CheckpointError(
                f"{path}: not a readable safetensors file ({error}); restore it"
            ) from error
    return sha.hexdigest()[:_DIGEST_DIGITS]
