"""The modular baseline end to end in its smallest form, and what it may be compared with."""

import dataclasses
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mono_internvl.cli import app as cli
from mono_internvl.costs.inference import parameter_table
from mono_internvl.errors import ConfigError
from mono_internvl.miniature import lab_modular as module
from mono_internvl.miniature.lab_modular import QUICK, train_modular
from mono_internvl.miniature.lab_pages import Comparison, modular_page, read_comparison
from mono_internvl.miniature.language_model import add_vision
from mono_internvl.miniature.recipes import MINIATURE, QUICK_MINIATURE
from mono_internvl.miniature.recipes_modular import MINIATURE_MODULAR, QUICK_MINIATURE_MODULAR
from mono_internvl.released.keys import read_config
from mono_internvl.training.progress import StageProgress
from mono_internvl.training.recipe import Recipe

SMALLEST = dataclasses.replace(
    QUICK,
    recipe=dataclasses.replace(
        QUICK.recipe,
        stages=tuple(
            dataclasses.replace(stage, steps=2, batch_size=4) for stage in QUICK.recipe.stages
        ),
    ),
    size=dataclasses.replace(QUICK.size, heldout=3, heldout_aligned=1, validation=1, text_probes=8),
    per_kind=2,
    per_kind_blind=1,
    text_per_kind=2,
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Comparison]:
    folder = tmp_path_factory.mktemp("modular") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "QUICK", SMALLEST)
        return folder, train_modular(folder, quick=True, processes=1)


@pytest.fixture
def quickstart_run(finished: tuple[Path, Comparison], tmp_path: Path) -> Path:
    """What a quickstart on the same world leaves behind; its model answered everything right."""
    run, other = finished[0], tmp_path / "quickstart"
    (other / "data").mkdir(parents=True)
    (other / "predictions").mkdir()
    world = (run / "data" / "world.json").read_text()
    (other / "data" / "world.json").write_text(world)
    made = {"command": "mono-internvl quickstart", "processes": 2, "device": "cpu"}
    made |= {"versions": {"torch": "2.13.0"}, "date": "2026-01-31"}
    (other / "metrics.json").write_text(json.dumps(made))
    settings = {"quick": True, "seed": 0, "llm": "shipped"}
    (other / "quickstart.json").write_text(json.dumps(settings))
    rows = [json.loads(x) for x in (run / "predictions/modular.jsonl").read_text().splitlines()]
    right = [
        {**row, "score": 1.0, "prediction": row["answer"]}
        for row in rows
        if row["kind"] != "ocr" and not row["blind"]
    ]
    right.append({**right[0], "id": "asked here only", "score": 0.0})
    right.append({**right[1], "blind": True, "score": 0.0})
    text = "".join(json.dumps(row) + "\n" for row in right)
    (other / "predictions" / "s2.jsonl").write_text(text)
    add_vision(module.SHIPPED_LANGUAGE_MODEL, other / "model")
    return other


def test_modular_leaves_a_model_and_a_comparison(finished: tuple[Path, Comparison]) -> None:
    run, comparison = finished
    stored = json.loads((run / "comparison.json").read_text())
    assert stored == json.loads(json.dumps(dataclasses.asdict(comparison)))
    kinds = {row.kind: row for row in comparison.kinds}
    assert {"caption", "colour", "grounding", "ocr", "copying"} <= set(kinds)
    assert kinds["colour"].items == 2 and kinds["colour"].blind is not None
    assert kinds["copying"].blind is None, "text has no image to hide"
    assert all(row.monolithic is None for row in comparison.kinds)
    config = read_config(run / "s2" / "checkpoint")
    assert config.vision_config.kind == "vit" and config.visual_experts == ()


def test_modular_goes_on_where_it_stopped_and_compares(
    finished: tuple[Path, Comparison], quickstart_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, alone = finished
    monkeypatch.setattr(module, "QUICK", SMALLEST)
    before = (run / "s2" / "metrics.jsonl").read_text()
    both = train_modular(run, against=quickstart_run, quick=True, processes=1)
    assert (run / "s2" / "metrics.jsonl").read_text() == before, "trained once"
    assert both.modular == alone.modular
    kinds = {row.kind: row for row in both.kinds}
    assert "ocr" not in kinds, "only what both answered"
    assert kinds["colour"].monolithic == 1.0 and kinds["colour"].items == 2
    assert kinds["colour"].modular == {r.kind: r for r in alone.kinds}["colour"].modular
    assert both.monolithic is not None
    assert both.monolithic.prefill_flops < both.modular.prefill_flops


@pytest.mark.parametrize("part", ["seed", "llm", "world", "predictions", "protocol"])
def test_comparison_with_another_run_is_refused(
    finished: tuple[Path, Comparison],
    quickstart_run: Path,
    monkeypatch: pytest.MonkeyPatch,
    part: str,
) -> None:
    monkeypatch.setattr(module, "QUICK", SMALLEST)
    if part == "predictions":
        (quickstart_run / "predictions" / "s2.jsonl").unlink()
    elif part == "protocol":
        file = quickstart_run / "predictions" / "s2.jsonl"
        file.write_text(file.read_text().replace('"max_new_tokens": 64', '"max_new_tokens": 96'))
    else:
        file = quickstart_run / ("data/world.json" if part == "world" else "quickstart.json")
        stored = json.loads(file.read_text())
        stored["seed" if part == "world" else part] = 7
        file.write_text(json.dumps(stored))
    with pytest.raises(ConfigError, match=r"expected|finish first"):
        train_modular(finished[0], against=quickstart_run, quick=True, processes=1)


def test_run_folder_of_other_settings_is_refused(finished: tuple[Path, Comparison]) -> None:
    with pytest.raises(ConfigError, match="seed=0, expected 1"):
        train_modular(finished[0], quick=True, seed=1, processes=1)


def test_table_says_what_the_comparison_says(
    finished: tuple[Path, Comparison], quickstart_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, alone = finished
    monkeypatch.setattr(module, "QUICK", SMALLEST)
    both = train_modular(run, against=quickstart_run, quick=True, processes=1)
    text = (run / "table.md").read_text()
    assert text == modular_page(read_comparison(run / "comparison.json")) + "\n"
    (colour,) = (row for row in both.kinds if row.kind == "colour")
    assert f"| colour | 2 | {colour.modular:.3f} | 1.000 | {colour.blind:.3f} |" in text
    assert f"| parameters | {both.modular.parameters:,} |" in text
    assert "The monolithic model: `mono-internvl quickstart`, 2 processes" in text
    assert "What it cannot show" in text and "its scores mean nothing" in text
    assert "monolithic" not in modular_page(alone).split("What this shows")[0]
    assert str(run.parent) not in text + (run / "comparison.json").read_text()


def test_interrupted_modular_goes_on_to_the_same_end(
    finished: tuple[Path, Comparison], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, whole = finished
    stages = tuple(
        dataclasses.replace(stage, checkpoint_every=1) for stage in SMALLEST.recipe.stages
    )
    recipe = dataclasses.replace(SMALLEST.recipe, stages=stages)
    monkeypatch.setattr(module, "QUICK", dataclasses.replace(SMALLEST, recipe=recipe))
    shutil.copytree(run / "data", tmp_path / "data")
    show = StageProgress.update

    def stop_in_s13(progress: StageProgress, row: dict[str, Any]) -> None:
        if progress.stage.name == "s13" and row["step"] == 2:
            raise KeyboardInterrupt
        show(progress, row)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(StageProgress, "update", stop_in_s13)
        train_modular(tmp_path, quick=True, processes=1)
    assert [f.name for f in (tmp_path / "s13").glob("step_*")] == ["step_00000001"]
    resumed = train_modular(tmp_path, quick=True, processes=1)
    assert resumed.kinds == whole.kinds
    ours, theirs = (
        load_file(folder / "s2" / "checkpoint" / "model.safetensors") for folder in (run, tmp_path)
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_program_prints_the_table(
    finished: tuple[Path, Comparison],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, comparison = finished
    asked: dict[str, Any] = {}

    def made_up(folder: Path, **options: Any) -> Comparison:
        asked.update(options, folder=folder)
        return comparison

    monkeypatch.setattr(module, "train_modular", made_up)
    monkeypatch.setattr(
        sys, "argv", ["mono-internvl", "lab", "modular", "--out", str(run), "--quick"]
    )
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code
    assert (run / "table.md").read_text() in capsys.readouterr().out
    assert asked["folder"] == run and asked["quick"] and asked["against"] is None


# ------------------------------------------------------------------------------- the recipe


@pytest.mark.parametrize(
    ("modular", "monolithic"),
    [(MINIATURE_MODULAR, MINIATURE), (QUICK_MINIATURE_MODULAR, QUICK_MINIATURE)],
)
def test_modular_differs_from_the_monolithic_recipe_in_rules_alone(
    modular: Recipe, monolithic: Recipe
) -> None:
    pairs = list(zip(modular.stages, monolithic.stages, strict=True))
    for ours, theirs in pairs:
        assert dataclasses.replace(ours, rules=theirs.rules) == theirs
    assert [ours.rules[-1].learning_rate for ours, _ in pairs[:-1]] == [None] * 3


def test_tower_has_the_weights_of_the_visual_experts(
    finished: tuple[Path, Comparison], tmp_path: Path
) -> None:
    mono = read_config(add_vision(module.SHIPPED_LANGUAGE_MODEL, tmp_path / "mono"))
    modular = read_config(finished[0] / "start" / "checkpoint")
    experts = parameter_table(mono).groups.visual_experts
    tower = parameter_table(modular).groups.vision_tower
    assert experts <= tower <= 1.01 * experts
    assert abs(parameter_table(modular).total / parameter_table(mono).total - 1) < 0.05
