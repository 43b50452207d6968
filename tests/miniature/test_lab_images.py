"""How visual tokens attend and stand, compared: the whole path in its smallest form."""

import dataclasses
import json
from pathlib import Path

import pytest
from test_quickstart import SMALLEST

from mono_internvl.miniature import lab_evip
from mono_internvl.miniature.lab_images import V2PE_STEPS, compare_images
from mono_internvl.miniature.lab_pages import read_runs
from mono_internvl.model.modeling import MonoInternVLForConditionalGeneration

VARIANTS = ("causal", "bidirectional", "v2pe")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images") / "run"
    stages = tuple(dataclasses.replace(s, steps=2) for s in SMALLEST.recipe.stages)
    recipe = dataclasses.replace(SMALLEST.recipe, stages=stages)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lab_evip, "QUICK", dataclasses.replace(SMALLEST, recipe=recipe))
        compare_images(folder, seeds=1, quick=True)
    return folder


def test_variants_differ_in_their_option_alone(run: Path) -> None:
    load = MonoInternVLForConditionalGeneration.from_pretrained
    first, *others = (load(run / name / "seed0" / "start" / "checkpoint") for name in VARIANTS)
    weights = first.state_dict()
    for other in others:
        assert all(weights[name].equal(x) for name, x in other.state_dict().items())
    assert [m.config.image_attention for m in (first, *others)] == [
        "causal",
        "bidirectional",
        "causal",
    ]
    assert [m.config.visual_position_step for m in (first, *others)] == [1, 1, 0.25]
    assert others[1].config.visual_position_steps == V2PE_STEPS


def test_variants_train_to_different_losses_and_a_table(run: Path) -> None:
    losses = {
        json.loads((run / name / "seed0" / "s2" / "metrics.jsonl").read_text().splitlines()[-1])[
            "loss"
        ]
        for name in VARIANTS
    }
    assert len(losses) == 3
    assert [one.variant for one in read_runs(run / "runs.jsonl")] == list(VARIANTS)
    assert "V2PE, minus causal, one position a token" in (run / "table.md").read_text()
