"""Proof that a checkpoint survives us: loaded, saved, and compared bit for bit."""

import dataclasses
import json
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from mono_internvl.configuration.model import MonoInternVLConfig
from mono_internvl.errors import CheckpointError
from mono_internvl.model.modeling import MonoInternVLForConditionalGeneration
from mono_internvl.processing.processor import MonoInternVLProcessor
from mono_internvl.released.keys import digest
from mono_internvl.released.weight_files import read_headers, resolve_checkpoint, safetensors_files
from mono_internvl.runs.files import read_json
from mono_internvl.runs.folder import new_folder

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")
# Says who wrote the file, not what the model is.
_PROVENANCE = ("transformers_version", "_name_or_path", "_commit_hash", "auto_map")


@dataclass(frozen=True)
class RoundTrip:
    """What a checkpoint holds, and what changed on the way through this package.

    Attributes:
        tensors: How many are stored.
        parameters: Their elements.
        dtypes: Tensors per dtype, in safetensors' names.
        digest: SHA-256 over names, dtypes, shapes and bytes.
        tokens: Size of the tokenizer's vocabulary; None if the folder has no tokenizer.
        differences: One line each; empty is the proof.
        out: Where the copy was written; None if it was not kept.
    """

    tensors: int
    parameters: int
    dtypes: dict[str, int]
    digest: str
    tokens: int | None
    differences: tuple[str, ...]
    out: Path | None


class StoredTensors(Mapping[str, Tensor]):
    """The tensors of a checkpoint folder, each read when asked for; a context manager."""

    def __init__(self, folder: Path) -> None:
        self._headers = read_headers(folder)
        self._folder = folder
        self._stack = ExitStack()
        self._handles: dict[str, Any] = {}

    def __enter__(self) -> "StoredTensors":
        for file in safetensors_files(self._folder):
            self._handles[file.name] = self._stack.enter_context(safe_open(file, framework="pt"))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def __getitem__(self, key: str) -> Tensor:
        tensor: Tensor = self._handles[self._headers[key].file].get_tensor(key)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._headers)

    def __len__(self) -> int:
        return len(self._headers)


def check_round_trip(checkpoint: str | Path, out: Path | None = None) -> RoundTrip:
    """Load a checkpoint, save it, and hold what was written against what was read.

    Tensors are compared bit for bit under their released names, the configuration in meaning: every
    field of the file and everything we read from it. A tokenizer must keep its vocabulary.

    Args:
        checkpoint: Folder or hub id.
        out: New or empty folder for the copy; a temporary one unless given.

    Raises:
        CheckpointError: The checkpoint does not load, or `out` is in use or cannot be written.
    """
    folder = resolve_checkpoint(checkpoint)
    if out is None:
        with tempfile.TemporaryDirectory(prefix="mono-internvl-convert-") as temporary:
            return _check(folder, Path(temporary), is_kept=False)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out}: not an empty folder; give a new one, nothing is overwritten")
    with new_folder(out) as partial:
        found = _check(folder, partial, is_kept=True)
        if out.is_dir():
            out.rmdir()  # it is empty
    return dataclasses.replace(found, out=out)


def _check(folder: Path, out: Path, *, is_kept: bool) -> RoundTrip:
    headers = read_headers(folder)
    dtypes = Counter(info.dtype for info in headers.values())
    only = next(iter(dtypes)) if len(dtypes) == 1 else ""
    model = MonoInternVLForConditionalGeneration.from_pretrained(
        folder, dtype=DTYPES.get(only, "auto")
    )
    model.save_pretrained(out)
    del model
    differences = _compare_configs(folder, out)
    with StoredTensors(folder) as before, StoredTensors(out) as after:
        differences += _compare_tensors(before, after)
        sha = digest(before)
        parameters = sum(torch.Size(info.shape).numel() for info in headers.values())
    tokens = None
    if any((folder / name).is_file() for name in TOKENIZER_FILES):
        processor = MonoInternVLProcessor.from_pretrained(folder)
        processor.save_pretrained(out)
        vocabulary = processor.tokenizer.get_vocab()
        if MonoInternVLProcessor.from_pretrained(out).tokenizer.get_vocab() != vocabulary:
            differences.append("tokenizer: the vocabulary changed")
        tokens = len(vocabulary)
    return RoundTrip(
        tensors=len(headers),
        parameters=parameters,
        dtypes=dict(dtypes),
        digest=sha,
        tokens=tokens,
        differences=tuple(differences),
        out=out if is_kept else None,
    )


def _compare_tensors(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> list[str]:
    differences = [f"{key}: was not written" for key in before if key not in after]
    differences += [f"{key}: was not there before" for key in after if key not in before]
    for key in before:
        if key not in after:
            continue
        x, y = before[key], after[key]
        if x.dtype != y.dtype or x.shape != y.shape:
            differences.append(
                f"{key}: {x.dtype} {tuple(x.shape)} became {y.dtype} {tuple(y.shape)}"
            )
        elif not torch.equal(_bytes(x), _bytes(y)):
            changed = int((_bytes(x) != _bytes(y)).sum())
            differences.append(f"{key}: {changed} of {_bytes(x).numel()} bytes changed")
    return differences


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _compare_configs(folder: Path, out: Path) -> list[str]:
    before, after = read_json(folder / "config.json"), read_json(out / "config.json")
    differences = _compare_fields(before, after, "config.json")
    was, now = (MonoInternVLConfig(**fields).to_dict() for fields in (before, after))
    return differences + _compare_fields(was, now, "config.json as read")


def _compare_fields(before: dict[str, Any], after: dict[str, Any], path: str) -> list[str]:
    """Fields of `before` that are missing or say something else in `after`; nulls say nothing."""
    differences: list[str] = []
    for key, value in before.items():
        if key in _PROVENANCE or value is None:
            continue
        now = after.get(key)
        if isinstance(value, dict) and isinstance(now, dict):
            differences += _compare_fields(value, now, f"{path}.{key}")
        elif json.dumps(value, default=str) != json.dumps(now, default=str) and value != now:
            differences.append(f"{path}.{key}: {value!r} became {now!r}")
    return differences
