"""The golden data: found, not listed.

Everything under the folder that `GOLDEN_DIR` names (default: `golden` beside this file) is
discovered and held against its own index. What is missing, half there or unknown raises
`GoldenDataError`, and as the tests discover while they are collected, such a folder fails the run:
nothing is ever skipped.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

KNOWN_CASES = frozenset(
    {
        "img1_tile1",
        "img1_tile3_thumb",
        "img2",
        "batch2_rightpad",
        "batch2_leftpad",
        "text_only",
        "mixed",
        "loss_weight",
        "mismatch",
        "extract_feature",
    }
)
MODEL_FILES = ("config.json", "model.safetensors", "param_shapes.json", "pixels.safetensors")
OTHER_FOLDERS = frozenset({"data", "images", "python", "tokenizer", "tokenizer_dummy_prefix"})
MONOLITHIC_PREFIX, MODULAR_PREFIX = "mono_", "vit_"


class GoldenDataError(AssertionError):
    """The golden data is missing, incomplete or holds something that no check knows."""


def golden_dir() -> Path:
    """The folder of the golden data."""
    return Path(os.environ.get("GOLDEN_DIR") or Path(__file__).parent / "golden")


@dataclass(frozen=True)
class GoldenCase:
    """One case of one model: inputs, and what the reference made of them.

    Attributes:
        folder: Of the model.
        name: Of the case, without `case_`.
    """

    folder: Path
    name: str

    @property
    def id(self) -> str:
        """`model/case`, for test ids and messages."""
        return f"{self.folder.name}/{self.name}"

    @cached_property
    def meta(self) -> dict[str, Any]:
        """The case's JSON: loss, gradient norms, notes."""
        return json.loads((self.folder / f"case_{self.name}.json").read_text(encoding="utf-8"))

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """All tensors, under `in.*` and `out.*`."""
        return load_file(self.folder / f"case_{self.name}.safetensors")

    @property
    def outputs(self) -> dict[str, Tensor]:
        """What the reference computed, without the prefix `out.`."""
        return {k.removeprefix("out."): v for k, v in self.tensors.items() if k.startswith("out.")}

    def input(self, name: str) -> Tensor | None:
        """An input by name, None where the case has none of that name."""
        return self.tensors.get(f"in.{name}")

    @cached_property
    def pixel_values(self) -> Tensor | None:
        """(tiles, 3, S, S) without dummy tiles (`image_flags` 0); None if that leaves none.

        A dummy tile stands for "no image" in the reference's training; ours needs none.
        """
        pixels = self.input("pixel_values")
        if pixels is None:
            stored = load_file(self.folder / "pixels.safetensors")
            pixels = torch.cat([stored[name] for name in self._pixel_names()])
        flags = self.input("image_flags")
        if flags is not None:
            pixels = pixels[flags.bool()]
        return pixels if pixels.shape[0] else None

    def _pixel_names(self) -> list[str]:
        if "pixel_values" in self.meta:
            return self.meta["pixel_values"]
        # loss_weight repeats the inputs of another case and leaves the pixels there.
        for other in cases_of(self.folder):
            ids = other.input("input_ids")
            if "pixel_values" in other.meta and ids is not None:
                own = self.input("input_ids")
                if own is not None and torch.equal(ids, own):
                    return other.meta["pixel_values"]
        raise GoldenDataError(
            f"{self.id}: names no pixel_values, nor does a case with its input_ids"
        )


def cases_of(folder: Path) -> list[GoldenCase]:
    """The cases of a model folder, each of them whole and known.

    Raises:
        GoldenDataError: There is none, one lacks a file or an entry in index.json, or its name is
            unknown.
    """
    described = {path.stem.removeprefix("case_") for path in folder.glob("case_*.json")}
    stored = {path.stem.removeprefix("case_") for path in folder.glob("case_*.safetensors")}
    indexed = set(_read_index(folder))
    if not described | stored:
        raise GoldenDataError(f"{folder}: no case_*.json")
    for name in sorted(described | stored | indexed):
        for where, names in ((".json", described), (".safetensors", stored), ("index", indexed)):
            if name not in names:
                raise GoldenDataError(f"{folder.name}/{name}: partial case, not in {where}")
        if name not in KNOWN_CASES:
            raise GoldenDataError(f"{folder.name}/{name}: unknown case, no check covers it")
    return [GoldenCase(folder, name) for name in sorted(described)]


def verify_against_index(case: GoldenCase) -> None:
    """Hold the tensors of a case against the names and shapes that index.json announces.

    The index was written before the set was thinned out: full gradients and hidden states may be
    gone, and the last rows of the logits may stand for all of them. Nothing else may differ.

    Raises:
        GoldenDataError: A tensor is missing, unannounced or of another shape.
    """
    entry = _read_index(case.folder)[case.name]
    announced = {
        f"{part}.{name}": tuple(spec[1:])
        for part in ("in", "out")
        for name, spec in entry.get(part, {}).items()
    }
    stored = {key: tuple(tensor.shape) for key, tensor in case.tensors.items()}
    tail = stored.pop("out.logits_tail", None)
    if tail is not None:
        full = announced.get("out.logits", ())
        stored["out.logits"] = full if (tail[0], tail[-1]) == (full[0], full[-1]) else tail
    if not any(key.startswith("out.") for key in stored):
        raise GoldenDataError(f"{case.id}: partial case, no out.* tensor")
    for key, shape in stored.items():
        if announced.get(key) != shape:
            raise GoldenDataError(
                f"{case.id}: {key} is {shape}, index.json announces {announced.get(key)}"
            )
    for key in announced.keys() - stored.keys():
        if not key.startswith(("in.pixel_values", "out.grad.", "out.hidden_states")):
            raise GoldenDataError(f"{case.id}: partial case, {key} of index.json is missing")


def model_folders(root: Path | None = None) -> list[Path]:
    """Every model folder of a golden set, monolithic and modular.

    Raises:
        GoldenDataError: There is no monolithic model, one lacks a file, or a folder is of no known
            kind.
    """
    root = root or golden_dir()
    if not root.is_dir():
        raise GoldenDataError(f"{root}: no golden data; set GOLDEN_DIR to a folder that holds it")
    folders = []
    for path in sorted(root.iterdir()):
        if not path.is_dir() or path.name in OTHER_FOLDERS or path.name.startswith("."):
            continue
        if not path.name.startswith((MONOLITHIC_PREFIX, MODULAR_PREFIX)):
            raise GoldenDataError(f"{path}: neither a model ({MONOLITHIC_PREFIX}*, ...) nor known")
        for name in MODEL_FILES:
            if not (path / name).is_file():
                raise GoldenDataError(f"{path}: partial model, {name} is missing")
        folders.append(path)
    if not any(path.name.startswith(MONOLITHIC_PREFIX) for path in folders):
        raise GoldenDataError(f"{root}: no {MONOLITHIC_PREFIX}* model folder")
    return folders


def all_cases(root: Path | None = None) -> list[GoldenCase]:
    """Every case of every model, each held against its index."""
    cases = [case for folder in model_folders(root) for case in cases_of(folder)]
    for case in cases:
        verify_against_index(case)
    return cases


def find_case(model: str, name: str, root: Path | None = None) -> GoldenCase:
    """One case by name, for tests that need a certain situation.

    Raises:
        GoldenDataError: The set does not have it.
    """
    folder = (root or golden_dir()) / model
    for case in cases_of(folder):
        if case.name == name:
            return case
    raise GoldenDataError(f"{folder}: no case {name}")


def _read_index(folder: Path) -> dict[str, Any]:
    file = folder / "index.json"
    if not file.is_file():
        raise GoldenDataError(f"{folder}: index.json is missing")
    entries = json.loads(file.read_text(encoding="utf-8"))
    return {name: entry for name, entry in entries.items() if not name.startswith("_")}
