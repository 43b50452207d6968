"""Our model against the reference's numbers, on every case of every golden model.

Weights go through the project's own converter, gradients come back through its key table.
"""

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from golden_data import (
    MONOLITHIC_PREFIX,
    GoldenCase,
    GoldenDataError,
    all_cases,
    cases_of,
    model_folders,
)
from parity_checks import Check, Model, case_checks, checks_of, load_model
from safetensors.torch import load_file, save_file

from mono_internvl.released.keys import expected_shapes

ATTENTION = ("eager", "sdpa")
CASE_CHECKS = case_checks(all_cases())

_model = cache(load_model)


def _id(value: object) -> str | None:
    if isinstance(value, GoldenCase):
        return value.id
    return value.__name__.removeprefix("check_") if callable(value) else None


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize(("case", "check"), CASE_CHECKS, ids=_id)
def test_model_agrees_with_reference(case: GoldenCase, check: Check, attention: str) -> None:
    check(_model(case.folder, attention), case)


@pytest.mark.parametrize("folder", model_folders(), ids=lambda folder: folder.name)
def test_model_parameters_are_those_of_reference(folder: Path) -> None:
    model: Model = _model(folder)
    theirs = json.loads((folder / "param_shapes.json").read_text(encoding="utf-8"))
    ours = expected_shapes(model, model.config)
    assert {name: tuple(shape) for name, shape in theirs.items()} == ours


# ---------------------------------------------------------------- nothing may be skipped in silence


@pytest.fixture
def golden_copy(tmp_path: Path) -> Path:
    """A copy of one golden model, to be damaged."""
    monolithic = [path for path in model_folders() if path.name.startswith(MONOLITHIC_PREFIX)]
    folder = min(monolithic, key=lambda f: sum(x.stat().st_size for x in f.iterdir()))
    shutil.copytree(folder, tmp_path / folder.name)
    return tmp_path


def _discover(root: Path) -> None:
    case_checks(all_cases(root))


def _only_folder(root: Path) -> Path:
    (folder,) = (path for path in root.iterdir() if path.is_dir())
    return folder


def _rename_case(folder: Path) -> None:
    case = cases_of(folder)[0]
    for suffix in ("json", "safetensors"):
        old = folder / f"case_{case.name}.{suffix}"
        old.rename(folder / f"case_new_kind.{suffix}")
    index = json.loads((folder / "index.json").read_text())
    index["new_kind"] = index.pop(case.name)
    (folder / "index.json").write_text(json.dumps(index))


def _add_output(folder: Path) -> None:
    name = cases_of(folder)[0].name
    file, index_file = folder / f"case_{name}.safetensors", folder / "index.json"
    save_file({**load_file(file), "out.attentions": torch.zeros(2)}, file)
    index = json.loads(index_file.read_text())
    index[name]["out"]["attentions"] = ["float32", 2]
    index_file.write_text(json.dumps(index))


def _drop_output(folder: Path) -> None:
    name = next(case.name for case in cases_of(folder) if "generated_ids" in case.outputs)
    file = folder / f"case_{name}.safetensors"
    save_file({k: v for k, v in load_file(file).items() if k != "out.generated_ids"}, file)


def _unlink(pattern: str) -> Callable[[Path], None]:
    return lambda folder: next(iter(sorted(folder.glob(pattern)))).unlink()


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (_unlink("case_*.safetensors"), "partial case"),
        (_unlink("case_*.json"), "partial case"),
        (_unlink("model.safetensors"), "partial model"),
        (_unlink("index.json"), "index.json is missing"),
        (_drop_output, "partial case"),
        (_rename_case, "unknown case"),
        (_add_output, "no check for out.attentions"),
        (lambda folder: folder.rename(folder.with_name("novel_model")), "neither a model"),
        (lambda folder: [file.unlink() for file in folder.glob("case_*")], "no case"),
        (shutil.rmtree, "no mono_"),
    ],
)
def test_discovery_refuses_damaged_golden_data(
    golden_copy: Path, damage: Callable[[Path], object], complaint: str
) -> None:
    _discover(golden_copy)
    damage(_only_folder(golden_copy))
    with pytest.raises(GoldenDataError, match=complaint):
        _discover(golden_copy)


def test_discovery_refuses_missing_golden_data(tmp_path: Path) -> None:
    with pytest.raises(GoldenDataError, match="GOLDEN_DIR"):
        _discover(tmp_path / "nowhere")


def test_checks_cover_every_output_of_every_case() -> None:
    for case in all_cases():
        assert checks_of(case), case.id
