"""Every number of every published recipe, against tables written from the sources.

The tables stand apart from the recipes on purpose: who changes a number there must change it here,
and say from where. `P` is arXiv 2410.08202, `R` the released fine-tuning script at 5b17ab4, `T` a
third party's table of EViP++'s samples (README of NEO, October 2025), `I` arXiv 2504.10479 and its
code, `ours` no source at all.
"""

from __future__ import annotations

import ast
import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from mono_internvl.checkpoints.presets import preset
from mono_internvl.cli.recipes import RECIPES
from mono_internvl.training.recipe import Stage
from mono_internvl.training.rules import apply_rules

_VISUAL = r"vision_embedder\.|vision_tower\.|projector\.|_visual\."
_ATTENTION = r"self_attn\.(q|k|v|o)_proj\."

# field: (value, source). AdamW's numbers are P table 8's, and R's.
_COMMON: dict[str, tuple[Any, str]] = {
    "epochs": (0.0, "P table 8 counts steps"),
    "warmup_ratio": (0.0, "P table 8 counts steps"),
    "final_rate_ratio": (0.0, "ours: P names a cosine, not its end"),
    "objective": ("next_token", "P: autoregressive loss of the text"),
    "weight_decay": (0.01, "P table 8"),
    "betas": ((0.9, 0.999), "P table 8"),
    "eps": (1e-8, "P table 8"),
    "clip_norm": (1.0, "ours"),
    "loss_weighting": ("token", "ours"),
    "precision": ("auto", "ours; P table 8: bfloat16"),
    "seed": (0, "ours"),
    "on_bad_sample": ("skip", "ours"),
    "max_skipped_ratio": (0.1, "ours"),
    "packing": ("none", "ours"),
    "packed_tokens": (8192, "ours"),
    "decoding": ("exact", "as the released code decodes"),
    "loader_workers": (0, "ours"),
    "keep_last": (1, "ours"),
    "keep_every": (0, "ours"),
    "on_bad_step": ("stop", "ours"),
    "max_loss_ratio": (math.inf, "ours"),
    "compiling": ("none", "ours"),
    "recompute": ("none", "ours"),
    "accumulation": (1, "P table 8"),
    "batch_size": (2048, "P table 8"),
    "warmup_steps": (100, "P table 8"),
    "checkpoint_every": (1000, "ours"),
}

_S11: dict[str, tuple[Any, str]] = {
    **_COMMON,
    "name": ("s11", "P table 1"),
    "data": ("s11.json", "ours"),
    "rules": (((_VISUAL, 1e-4), (".*", None)), "P table 1 (what trains), table 8 (rate)"),
    "steps": (450_000, "P table 8"),
    "schedule": ("constant", "P table 8: constant with warm-up"),
    "max_tokens": (1425, "P table 8"),
    "max_tiles": (4, "inferred: P table 8 has 1,280 = (4 + 1) * 256 visual tokens"),
}
_S12: dict[str, tuple[Any, str]] = {
    **_S11,
    "name": ("s12", "P table 1"),
    "data": ("s12.json", "ours"),
    "steps": (126_000, "P table 8"),
    "max_tokens": (1925, "P table 8"),
    "max_tiles": (6, "inferred: P table 8 has 1,792 = (6 + 1) * 256 visual tokens"),
}
_S13: dict[str, tuple[Any, str]] = {
    **_COMMON,
    "name": ("s13", "P table 1"),
    "data": ("s13.json", "ours"),
    "rules": (((f"{_VISUAL}|{_ATTENTION}", 5e-5), (".*", None)), "P table 1, table 8"),
    "steps": (70_000, "P table 8"),
    "schedule": ("cosine", "P table 8"),
    "max_tokens": (4096, "P table 8"),
    "max_tiles": (12, "inferred: P table 8 has 3,328 = (12 + 1) * 256 visual tokens"),
}
_S2: dict[str, tuple[Any, str]] = {
    **_COMMON,
    "name": ("s2", "P table 1"),
    "data": ("s2.json", "ours"),
    "rules": (((".*", 2e-5),), "P table 1, table 8"),
    "steps": (14_000, "P table 8"),
    "batch_size": (1024, "P table 8"),
    "accumulation": (4, "P table 8"),
    "schedule": ("cosine", "P table 8"),
    "warmup_steps": (420, "P table 8"),
    "max_tokens": (8192, "P table 8"),
    "max_tiles": (24, "inferred: P table 8 has 6,400 = (24 + 1) * 256 visual tokens"),
    "checkpoint_every": (500, "ours"),
}
_PLUS_PLUS_STEPS = {
    "s11": (122_070, "ours: 250M of T's 400M samples / 2,048"),
    "s12": (73_242, "ours: 150M of T's 400M samples / 2,048"),
    "s13": (73_242, "T: 150M samples; / 2,048"),
}
_SFT: dict[str, tuple[Any, str]] = {
    **_COMMON,
    "name": ("sft", "ours"),
    "data": ("train.json", "ours"),
    "rules": (((".*", 4e-5),), "R"),
    "steps": (0, "R counts epochs"),
    "epochs": (1.0, "R"),
    "batch_size": (128, "R"),
    "schedule": ("cosine", "R"),
    "warmup_steps": (0, "R counts a ratio"),
    "warmup_ratio": (0.03, "R"),
    "max_tokens": (2048, "R"),
    "max_tiles": (6, "R"),
    "checkpoint_every": (500, "ours"),
}

# `M` is the script internvl3_2b_mpo.sh of OpenGVLab/InternVL at 2410d1d.
_MPO: dict[str, tuple[Any, str]] = {
    **_SFT,
    "name": ("mpo", "ours"),
    "data": ("mpo.json", "ours"),
    "objective": ("mpo", "M: sigmoid and bco_pair at 0.8 and 0.2, rpo_alpha 1"),
    "loss_weighting": ("sample", "arXiv 2411.10442: 1 / |y_c| of each answer"),
    "rules": (((".*", 2e-7),), "M"),
    "batch_size": (256, "M"),
    "weight_decay": (0.05, "M"),
    "warmup_ratio": (0.03, "M"),
    "max_tokens": (12_288, "M"),
    "max_tiles": (12, "ours"),
    "checkpoint_every": (100, "ours"),
}
_LLAVA: dict[str, tuple[Any, str]] = {**_SFT, "data": ("llava_665k.json", "ours")}
_NATIVE: dict[str, tuple[Any, str]] = {
    **_COMMON,
    "name": ("native", "ours"),
    "data": ("native.json", "ours"),
    "rules": (((_VISUAL, 1e-4), (".*", 2e-5)), "I: everything; ours: rates"),
    "loss_weighting": ("square", "I"),
    "steps": (44_000, "ours: 200 billion tokens / 2,048 / 2,220"),
    "schedule": ("cosine", "ours"),
    "warmup_steps": (500, "ours"),
    "max_tokens": (8192, "ours"),
    "max_tiles": (12, "ours"),
    "packing": ("best_fit", "ours"),
    "checkpoint_every": (500, "ours"),
}

PUBLISHED: dict[str, tuple[dict[str, tuple[Any, str]], ...]] = {
    "evip-2b": (_S11, _S12, _S13, _S2),
    "evip-plus-plus-2b": (
        {**_S11, "steps": _PLUS_PLUS_STEPS["s11"]},
        {**_S12, "steps": _PLUS_PLUS_STEPS["s12"]},
        {
            **_S13,
            "steps": _PLUS_PLUS_STEPS["s13"],
            "rules": (((_VISUAL, 5e-5), (".*", None)), "ours: the visual copies alone"),
        },
        _S2,
    ),
    "native-2b": (_NATIVE,),
    "llava-665k": (_LLAVA,),
    "sft": (_SFT,),
    "mpo": (_MPO,),
}
_PROSE = {"title"}
STAGES = [
    pytest.param(name, number, id=f"{name}-{expected['name'][0]}")
    for name, stages in PUBLISHED.items()
    for number, expected in enumerate(stages)
]


def _values(stage: Stage) -> dict[str, Any]:
    values = {field.name: getattr(stage, field.name) for field in dataclasses.fields(stage)}
    values["objective"] = stage.objective.name
    values["rules"] = tuple((rule.pattern, rule.learning_rate) for rule in stage.rules)
    return values


def _differences(values: dict[str, Any], expected: dict[str, tuple[Any, str]]) -> list[str]:
    """Fields that are not as published, or that the table does not know."""
    return sorted(
        name
        for name in (values.keys() | expected.keys()) - _PROSE
        if name not in expected or name not in values or values[name] != expected[name][0]
    )


@pytest.mark.parametrize(("recipe", "number"), STAGES)
def test_published_recipe_has_the_numbers_of_its_source(recipe: str, number: int) -> None:
    assert len(RECIPES[recipe].stages) == len(PUBLISHED[recipe])
    assert _differences(_values(RECIPES[recipe].stages[number]), PUBLISHED[recipe][number]) == []


def _mutants(value: Any) -> list[Any]:
    """Values near one, each wrong in one thing."""
    if isinstance(value, bool) or value is None:
        return [not value]
    if value == math.inf:
        return [10.0]
    if isinstance(value, int | float):
        return [value * 3 + 1, value * 1.01 + 1e-9] if value else [1, 1e-3]
    if isinstance(value, str):
        return [value + "x"]
    return [
        (*value[:place], changed, *value[place + 1 :])
        for place, part in enumerate(value)
        for changed in _mutants(part)
    ] + [value[:-1], (*value, value[-1])]


@pytest.mark.parametrize("field", sorted({f.name for f in dataclasses.fields(Stage)} - _PROSE))
@pytest.mark.parametrize(("recipe", "number"), STAGES)
def test_published_numbers_notice_a_change_of_any_field(
    recipe: str, number: int, field: str
) -> None:
    values = _values(RECIPES[recipe].stages[number])
    mutants = _mutants(values[field])
    assert mutants
    for mutant in mutants:
        changed = {**values, field: mutant}
        assert _differences(changed, PUBLISHED[recipe][number]) == [field], mutant


def _rate_of(name: str, recipe: str, stage: str) -> float | None:
    """What P table 1 and 8 say of a parameter by its name, written without patterns."""
    is_new = any(part in name for part in ("vision_embedder", "projector", "_visual"))
    is_shared_attention = "self_attn" in name and "norm" not in name and "_visual" not in name
    if stage in ("s11", "s12"):
        return 1e-4 if is_new else None
    if stage == "s13":
        also_attention = recipe == "evip-2b" and is_shared_attention
        return 5e-5 if is_new or also_attention else None
    if stage == "native":
        return 1e-4 if is_new else 2e-5
    return {"s2": 2e-5, "sft": 4e-5, "mpo": 2e-7}[stage]


@pytest.mark.parametrize(("recipe", "number"), STAGES)
def test_published_rules_train_what_the_source_says(recipe: str, number: int) -> None:
    from mono_internvl.costs.inference import skeleton

    stage = RECIPES[recipe].stages[number]
    config = preset("v1_5" if recipe == "evip-plus-plus-2b" else "v1")
    model = skeleton(config)
    with torch.no_grad():
        groups = apply_rules(model, config, stage)
    found = {name: group.learning_rate for group in groups for name in group.names}
    last = f"layers.{config.get_text_config().num_hidden_layers - 1}."
    for name, _ in model.named_parameters():
        unread = "class_embedding" in name or (
            last in name and "_visual" in name and ".k_proj" not in name and ".v_proj" not in name
        )
        assert found.get(name) == (None if unread else _rate_of(name, recipe, stage.name)), name
    decays = {
        group.weight_decay for group in groups for name in group.names if name.endswith("bias")
    }
    assert decays <= {0.0}


def test_published_data_of_evip_adds_up() -> None:
    data = RECIPES["evip-2b"].published_data
    ratios = [part.ratio for part in data if part.stage == "s13"]
    assert ratios == [0.539, 0.052, 0.409], "P, appendix on data"
    assert sum(ratios) == pytest.approx(1)
    (first,) = (part for part in data if part.stage == "s11")
    assert first.prompt == "provide a one-sentence caption for the image"
    sets = {name for part in data if part.stage == "s2" for name in part.datasets}
    assert len([part for part in data if part.stage == "s2"]) == 13
    assert {"TextCaps", "GeoQA+", "OpenHermes2.5", "POIE", "NTU RGB+D"} <= sets


def test_published_data_of_llava_adds_up() -> None:
    data = RECIPES["llava-665k"].published_data
    ratios = {part.datasets[0]: part.ratio or 0 for part in data}
    assert sum(ratios.values()) == pytest.approx(1, abs=0.005)
    records = {name: round(665_298 * ratio) for name, ratio in ratios.items()}
    assert records["LLaVA-Instruct (COCO)"] == pytest.approx(157_712, rel=0.02)
    assert records["OCR-VQA"] == pytest.approx(80_000, rel=0.02)


def _uncommented(source: str) -> list[str]:
    """Fields of stages that are set without a comment in their line."""
    lines = source.splitlines()
    calls = [
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "Stage"
    ]
    return [
        f"{keyword.lineno}: {keyword.arg}"
        for call in calls
        for keyword in call.keywords
        if "  # " not in lines[keyword.lineno - 1]
    ]


def test_every_field_of_a_published_stage_says_unit_and_source() -> None:
    assert _uncommented("Stage(\n  a=1,  # x\n  b=2,\n)") == ["3: b"]
    import mono_internvl.recipes as package

    files = sorted(Path(package.__path__[0]).glob("*.py"))
    wrong = [f"{file.name}:{where}" for file in files for where in _uncommented(file.read_text())]
    assert not wrong, wrong
