"""Stages and recipes as data: numbers, refusals, files of the user's, overrides."""

from __future__ import annotations

import dataclasses
import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
from hypothesis import assume, given
from hypothesis import strategies as st

from mono_internvl.cli.recipes import RECIPES
from mono_internvl.errors import RecipeError
from mono_internvl.training.progress import describe_recipe
from mono_internvl.training.recipe import (
    STAGE_CHECKS,
    PublishedData,
    Recipe,
    Rule,
    Stage,
    load_recipe,
)
from mono_internvl.training.run import override, train


def test_constant_schedule_warms_up_and_stays() -> None:
    stage = tiny_runs.tiny_stage(schedule="constant", warmup_steps=4, steps=10)
    shares = [stage.rate_ratio(step) for step in range(10)]
    assert shares == [0.25, 0.5, 0.75, 1.0, *[1.0] * 6]


def test_cosine_schedule_falls_to_its_final_share() -> None:
    stage = tiny_runs.tiny_stage(steps=110, warmup_steps=10, final_rate_ratio=0.1)
    assert stage.rate_ratio(0) == 0.1
    assert stage.rate_ratio(9) == stage.rate_ratio(10) == 1.0
    assert stage.rate_ratio(60) == pytest.approx(0.1 + 0.9 * 0.5)
    assert stage.rate_ratio(35) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert stage.rate_ratio(110) == pytest.approx(0.1)
    shares = [stage.rate_ratio(step) for step in range(10, 110)]
    assert all(a > b for a, b in pairwise(shares))


def test_schedule_without_warmup_starts_at_the_peak() -> None:
    assert tiny_runs.tiny_stage(warmup_steps=0).rate_ratio(0) == 1.0


def test_resolved_turns_epochs_and_shares_into_steps() -> None:
    stage = tiny_runs.tiny_stage(
        steps=0, epochs=2.5, batch_size=8, warmup_steps=0, warmup_ratio=0.1
    )
    assert (stage.resolved(100).steps, stage.resolved(100).warmup_steps) == (32, 3)
    assert stage.resolved(1).steps == 1
    fixed = tiny_runs.tiny_stage(steps=7, epochs=2.5, warmup_steps=3)
    assert fixed.resolved(100) == fixed


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"accumulation": 0}, "accumulation=0"),
        ({"max_tokens": 0}, "max_tokens=0"),
        ({"max_tiles": 0}, "max_tiles=0"),
        ({"steps": -1}, "steps=-1"),
        ({"steps": 0}, "steps=0 and epochs=0"),
        ({"epochs": -1.0}, "epochs=-1"),
        ({"warmup_steps": -2}, "warmup_steps=-2"),
        ({"warmup_ratio": -0.1}, "warmup_ratio=-0.1"),
        ({"warmup_ratio": 3}, "warmup_ratio=3; expected a number from 0 to 1"),
        ({"warmup_ratio": math.nan}, "warmup_ratio=nan"),
        ({"final_rate_ratio": 1.5}, "final_rate_ratio=1.5; expected a number from 0 to 1"),
        ({"max_skipped_ratio": 10}, "max_skipped_ratio=10; expected a number from 0 to 1"),
        ({"max_skipped_ratio": "0.1"}, "max_skipped_ratio='0.1'"),
        ({"eps": -1e-8}, "eps=-1e-08"),
        ({"betas": (0.9, 1.0)}, r"betas=\(0.9, 1.0\)"),
        ({"betas": (0.9,)}, r"betas=\(0.9,\)"),
        ({"betas": 0.9}, "betas=0.9"),
        ({"betas": (0.9, math.nan)}, "betas="),
        ({"weight_decay": -0.1}, "weight_decay=-0.1"),
        ({"checkpoint_every": -1}, "checkpoint_every=-1"),
        ({"recompute": "some"}, "recompute='some'"),
        (
            {"batch_size": 1_000_000_000},
            "batch_size=1000000000; expected an integer from 1 to",
        ),
        ({"loader_workers": -1}, "loader_workers=-1"),
        ({"clip_norm": 0.0}, "clip_norm=0"),
        ({"batch_size": 6, "accumulation": 4}, "not a multiple of accumulation=4"),
        ({"rules": ()}, r"rules=\(\); expected a tuple of 1 Rule or more"),
        ({"schedule": "linear"}, "schedule='linear'"),
        ({"precision": "fp16"}, "precision='fp16'"),
        ({"loss_weighting": "word"}, "loss_weighting='word'"),
        ({"on_bad_sample": "ignore"}, "on_bad_sample='ignore'"),
        *[
            ({"name": name}, "name=")
            for name in ("a/b", "", ".", "..", ".a", "a\\b", "a\n", "a b", "-a", None)
        ],
        ({"epochs": math.inf, "steps": 0}, "epochs=inf"),
        ({"epochs": math.nan, "steps": 0}, "epochs=nan"),
        ({"clip_norm": math.nan}, "clip_norm=nan"),
        ({"clip_norm": "1"}, "clip_norm='1'"),
        ({"clip_norm": -math.inf}, "clip_norm=-inf"),
        ({"weight_decay": math.nan}, "weight_decay=nan"),
        ({"final_rate_ratio": -0.5}, "final_rate_ratio=-0.5"),
        ({"batch_size": 2.0}, "batch_size=2.0"),
        ({"steps": True}, "steps=True"),
    ],
)
def test_stage_refuses_fields_that_make_no_sense(fields: dict[str, Any], complaint: str) -> None:
    with pytest.raises(RecipeError, match=complaint):
        tiny_runs.tiny_stage(**fields)


NUMERIC = [f.name for f in dataclasses.fields(Stage) if f.type in ("int", "float")]
INTEGERS = [f.name for f in dataclasses.fields(Stage) if f.type == "int"]
UNLIMITED = {"clip_norm", "max_loss_ratio"}
"""May be infinite: no clipping, no limit."""


def test_every_field_of_a_stage_is_checked() -> None:
    assert set(STAGE_CHECKS) == {f.name for f in dataclasses.fields(Stage)}
    assert len(NUMERIC) > 15 and {"seed", "warmup_ratio"} < set(NUMERIC)


@given(
    name=st.sampled_from(NUMERIC),
    wrong=st.one_of(
        st.sampled_from([math.nan, -math.inf, math.inf, None, "1", True, [1], 1 + 0j]),
        st.integers(max_value=-1),
        st.floats(max_value=0, exclude_max=True),
        st.text(),
    ),
)
def test_numeric_field_refuses_what_is_no_number_in_its_range(name: str, wrong: Any) -> None:
    assume(not (wrong == math.inf and name in UNLIMITED))
    with pytest.raises(RecipeError) as refused:
        tiny_runs.tiny_stage(**{name: wrong})
    assert f"stage 'tiny': {name}={wrong!r}; expected " in str(refused.value)


@given(name=st.sampled_from(INTEGERS), wrong=st.floats(min_value=0))
def test_count_refuses_fractions(name: str, wrong: float) -> None:
    with pytest.raises(RecipeError, match=f"{name}=.*; expected an integer"):
        tiny_runs.tiny_stage(**{name: wrong})


def test_stage_is_made_under_its_earlier_names() -> None:
    old = tiny_runs.tiny_stage(warmup_share=0.25, final_rate_share=0.1)
    assert old == tiny_runs.tiny_stage(warmup_ratio=0.25, final_rate_ratio=0.1)
    recipe = Recipe(name="r", source="s", stages=(old,))
    assert override(recipe, {"warmup_share": "0.5"}).stages[0].warmup_ratio == 0.5
    with pytest.raises(TypeError, match="warmup_part"):
        tiny_runs.tiny_stage(warmup_part=0.25)


@pytest.mark.parametrize("rate", [-1e-3, math.nan, math.inf, "1e-3", True])
def test_rule_refuses_rates_that_make_no_sense(rate: Any) -> None:
    with pytest.raises(RecipeError, match="learning_rate="):
        Rule(".*", rate)
    with pytest.raises(RecipeError, match="pattern="):
        Rule(None, 1e-3)  # type: ignore[arg-type]


def test_recipe_refuses_names_that_are_no_folder() -> None:
    with pytest.raises(RecipeError, match=r"name='\.\./up'"):
        Recipe(name="../up", source="test", stages=(tiny_runs.tiny_stage(),))


@pytest.mark.parametrize(
    "fields",
    [{"source": None}, {"start": 1}, {"notes": "one"}, {"ours": (1,)}, {"published_data": ("x",)}],
)
def test_recipe_refuses_fields_of_another_type(fields: dict[str, Any]) -> None:
    common: dict[str, Any] = {"name": "r", "source": "s", "stages": (tiny_runs.tiny_stage(),)}
    with pytest.raises(RecipeError, match=f"recipe 'r': {next(iter(fields))}=.*; expected "):
        Recipe(**{**common, **fields})


@pytest.mark.parametrize("ratio", [-0.1, 1.1, math.nan, math.inf, "0.5", True])
def test_published_data_refuses_ratios_that_make_no_sense(ratio: Any) -> None:
    with pytest.raises(RecipeError, match=r"ratio=.*expected a number from 0 to 1, or None"):
        PublishedData(stage="s", task="t", datasets=("d",), ratio=ratio)


def test_recipe_refuses_no_stage_and_repeated_names() -> None:
    stage = tiny_runs.tiny_stage()
    with pytest.raises(RecipeError, match="expected a tuple of 1 Stage or more"):
        Recipe(name="r", source="test", stages=())
    with pytest.raises(RecipeError, match="names repeat"):
        Recipe(name="r", source="test", stages=(stage, stage))


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_recipe_is_plain_data_found_by_its_name(name: str) -> None:
    recipe = load_recipe(name, RECIPES)
    assert recipe.name == name
    assert recipe.source
    assert json.loads(json.dumps(recipe.to_dict()))["stages"][0]["name"] == recipe.stages[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.stages[0].steps = 5  # type: ignore[misc]


USER_RECIPE = """
from mono_internvl.training.recipe import Recipe, Rule, Stage
RECIPE = Recipe(name="mine", source="ours", stages=(
    Stage(name="only", title="t", data="d.json", rules=(Rule(".*", 1e-3),), steps=3, batch_size=2),
))
"""


OWN_OBJECTIVE = """
from mono_internvl.training.objectives.next_token import NextToken
class Own(NextToken):
    pass
""" + USER_RECIPE.replace("steps=3", "steps=3, objective=Own()")


def test_user_recipe_file_is_read(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(USER_RECIPE)
    recipe = load_recipe(str(file), RECIPES)
    assert (recipe.name, recipe.stages[0].rules) == ("mine", (Rule(".*", 1e-3),))


def test_user_recipe_file_may_define_dataclasses(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    own = "from __future__ import annotations\nimport dataclasses\nfrom typing import ClassVar\n"
    own += "@dataclasses.dataclass\nclass Own:\n    x: ClassVar[int] = 1\n"
    file.write_text(own + USER_RECIPE)
    assert load_recipe(str(file), RECIPES).name == "mine"


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("x = 1", "defines no RECIPE"),
        ("RECIPE = 'miniature'", "defines no RECIPE"),
        ("RECIPE = ", "SyntaxError"),
        ("import no_such_module", "no_such_module"),
        ("1 / 0", r"mine\.py: ZeroDivisionError"),
        ("{}['x']", r"mine\.py: KeyError"),
        ("open('absent')", r"mine\.py: FileNotFoundError"),
        ("RECIPE = '\x00'", r"mine\.py: "),
        (USER_RECIPE.replace("steps=3", "stepz=3"), "stepz"),
        (USER_RECIPE.replace("batch_size=2", "batch_size=0"), "batch_size=0"),
        (OWN_OBJECTIVE, r"mine\.py: defines the objective Own itself"),
    ],
)
def test_user_recipe_file_that_is_wrong_is_named(
    tmp_path: Path, content: str, complaint: str
) -> None:
    file = tmp_path / "mine.py"
    file.write_text(content)
    with pytest.raises(RecipeError, match=complaint):
        load_recipe(str(file), RECIPES)


def test_unknown_recipe_lists_the_known(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="miniature-sft"):
        load_recipe("minature", RECIPES)
    with pytest.raises(RecipeError, match="no such recipe file"):
        load_recipe(str(tmp_path / "absent.py"), RECIPES)


def test_override_parses_every_kind_of_field() -> None:
    recipe = Recipe(name="r", source="s", stages=(tiny_runs.tiny_stage(),))
    fields = {"steps": "7", "epochs": "1.5", "precision": "bf16", "data": "other.json"}
    stage: Stage = override(recipe, fields).stages[0]
    assert (stage.steps, stage.epochs, stage.precision, stage.data) == (
        7,
        1.5,
        "bf16",
        "other.json",
    )
    assert recipe.stages[0].steps == 12


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"stepz": "7"}, "no such field; known: .*batch_size"),
        ({"rules": "x"}, "no such field"),
        ({"steps": "many"}, "steps=many: expected int"),
        ({"steps": "1.5"}, "expected int"),
        ({"weight_decay": "x"}, "expected float"),
        ({"precision": "fp8"}, "expected one of auto, bf16, fp32"),
        ({"batch_size": "0"}, "batch_size=0"),
    ],
)
def test_override_refuses_what_is_no_field_or_value(fields: dict[str, str], complaint: str) -> None:
    recipe = Recipe(name="r", source="s", stages=(tiny_runs.tiny_stage(),))
    with pytest.raises(RecipeError, match=complaint):
        override(recipe, fields)


def test_train_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="needs data"):
        train(RECIPES["sft"], start="x", run=tmp_path)
    with pytest.raises(RecipeError, match="names no checkpoint"):
        train(RECIPES["sft"], data=tmp_path, run=tmp_path)
    with pytest.raises(RecipeError, match=r"one meta file for the 4 stages.*s11\.json, s12\.json"):
        train(RECIPES["miniature"], start="x", data=tmp_path / "meta.json", run=tmp_path)


def test_described_recipe_names_every_stage_and_rule() -> None:
    for recipe in RECIPES.values():
        text = describe_recipe(recipe)
        for stage in recipe.stages:
            assert f"{stage.name}  {stage.title}" in text
            assert all(rule.pattern in text for rule in stage.rules)
    assert text.count("frozen") == sum(
        rule.learning_rate is None for stage in recipe.stages for rule in stage.rules
    )
