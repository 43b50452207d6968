"""EViP and EViP++ side by side, in the smallest form that walks the whole path."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_quickstart import SMALLEST, read_rows

from mono_internvl.errors import ConfigError
from mono_internvl.model.modeling import MonoInternVLForConditionalGeneration
from mono_internvl.pipelines import lab_evip as module
from mono_internvl.pipelines.lab_evip import MeasuredRow, arms_of, compare_pretraining, table
from mono_internvl.recipes.miniature import MINIATURE

ARMS = ("evip", "evip-plus-plus", "evip-plus-plus-42")


def _plan() -> Any:
    stages = tuple(dataclasses.replace(s, steps=5) for s in SMALLEST.recipe.stages)
    return dataclasses.replace(SMALLEST, recipe=dataclasses.replace(SMALLEST.recipe, stages=stages))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lab") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "QUICK", _plan())
        compare_pretraining(folder, seeds=1, quick=True)
    return folder


def _values(run: Path, measure: str) -> dict[tuple[str, str], float]:
    rows = [MeasuredRow(**row) for row in read_rows(run / "rows.jsonl")]
    return {(row.arm, row.stage): row.value for row in rows if row.measure == measure}


def test_text_logits_of_evip_plus_plus_are_the_language_models_until_s2(run: Path) -> None:
    same = _values(run, "text-only logits as before")
    stages = ("start", "s11", "s12", "s13", "s2")
    found = {arm: [same[arm, stage] for stage in stages] for arm in ARMS}
    assert found == {
        "evip": [1, 1, 1, 0, 0],
        "evip-plus-plus": [1, 1, 1, 1, 0],
        "evip-plus-plus-42": [1, 1, 1, 1, 0],
    }


def test_arms_see_the_data_that_their_names_say(run: Path) -> None:
    samples = _values(run, "samples")
    assert {arm: samples[arm, "s12"] for arm in ARMS} == {
        "evip": 5 * 4,
        "evip-plus-plus": 5 * 4,
        "evip-plus-plus-42": 2 * 4,
    }
    assert len({samples[arm, "s2"] for arm in ARMS}) == 1


def test_arms_of_a_seed_start_alike_but_for_their_experts(run: Path) -> None:
    load = MonoInternVLForConditionalGeneration.from_pretrained
    starts = [load(run / arm / "seed0" / "start" / "checkpoint") for arm in ARMS]
    assert [m.config.visual_experts for m in starts] == [("ffn",), *[("ffn", "qkv", "o")] * 2]
    for name, p in starts[0].named_parameters():
        for other in starts[1:]:
            assert torch.equal(other.get_parameter(name), p), name


def test_shared_attention_moves_in_s13_with_evip_alone(run: Path) -> None:
    load = MonoInternVLForConditionalGeneration.from_pretrained
    for arm, moves in zip(ARMS, (True, False, False), strict=True):
        before, after = (
            load(run / arm / "seed0" / stage / "checkpoint").model.language_model.layers[0]
            for stage in ("start", "s13")
        )
        is_same = torch.equal(before.self_attn.q_proj.weight, after.self_attn.q_proj.weight)
        assert is_same != moves
        if not moves:
            copied = before.self_attn.q_proj_visual.weight
            assert not torch.equal(copied, after.self_attn.q_proj_visual.weight)


def test_finished_arms_are_not_run_again(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "QUICK", _plan())
    monkeypatch.setattr(module, "_run_arm", lambda *_: pytest.fail("ran again"))
    before = (run / "rows.jsonl").read_text()
    compare_pretraining(run, seeds=1, quick=True)
    assert (run / "rows.jsonl").read_text() == before
    with pytest.raises(ConfigError, match="begun with"):
        compare_pretraining(run, seeds=1, quick=False)
    with pytest.raises(ConfigError, match="seeds=0"):
        compare_pretraining(run, seeds=0)


def test_table_says_what_the_rows_say(run: Path) -> None:
    text = (run / "table.md").read_text()
    assert "its scores mean nothing" in text and "EViP++, 42 % of the pre-training data" in text
    caption = _values(run, "caption")
    (line,) = (line for line in text.splitlines() if line.startswith("| caption |"))
    for arm in ARMS:
        assert f"{caption[arm, 's2']:.3g}" in line
    json.loads((run / "evip" / "seed0" / "metrics.json").read_text())


def test_table_gives_mean_and_each_seed() -> None:
    arms = arms_of(MINIATURE)
    own = ("text-only logits as before", "samples", "training, CPU minutes")
    rows = [
        MeasuredRow(arm.name, seed, stage, name, seed + 0.5, None, "c", "cpu", {}, "2026-01-31")
        for arm in arms
        for seed in (0, 1, 2)
        for stage in ("s11", "s12", "s13", "s2")
        for name in ("caption", *own)
    ]
    text = table(rows, arms)
    assert "Mean over 3 seeds" in text
    assert f"| caption |{' 1.5 (0.5, 1.5, 2.5) |' * 3}" in text
    assert f"| pre-training samples |{' 4.5 (1.5, 4.5, 7.5) |' * 3}" in text
