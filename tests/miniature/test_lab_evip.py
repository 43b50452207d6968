"""EViP and EViP++ side by side, in the smallest form that walks the whole path."""

import dataclasses
import json
import multiprocessing
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from test_quickstart import SMALLEST

from mono_internvl.cli import app as cli
from mono_internvl.errors import ConfigError
from mono_internvl.miniature import lab_evip as module
from mono_internvl.miniature.lab_evip import compare_pretraining, pretraining_variants
from mono_internvl.miniature.lab_pages import Figure, MeasuredRun, evip_page, read_runs
from mono_internvl.miniature.recipes import MINIATURE
from mono_internvl.model.modeling import MonoInternVLForConditionalGeneration

VARIANTS = ("evip", "evip-plus-plus", "evip-plus-plus-42")
MINUTES = "training, CPU minutes"


def _plan(steps: int = 5) -> Any:
    stages = tuple(dataclasses.replace(s, steps=steps) for s in SMALLEST.recipe.stages)
    return dataclasses.replace(SMALLEST, recipe=dataclasses.replace(SMALLEST.recipe, stages=stages))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lab") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "QUICK", _plan())
        compare_pretraining(folder, seeds=1, quick=True)
    return folder


def _values(run: Path, measure: str) -> dict[tuple[str, str], float]:
    return {
        (one.variant, stage): figures[measure].value
        for one in read_runs(run / "runs.jsonl")
        for stage, figures in one.stages.items()
    }


def test_text_logits_of_evip_plus_plus_are_the_language_models_until_s2(run: Path) -> None:
    same = _values(run, "text-only logits as before")
    stages = ("start", "s11", "s12", "s13", "s2")
    found = {variant: [same[variant, stage] for stage in stages] for variant in VARIANTS}
    assert found == {
        "evip": [1, 1, 1, 0, 0],
        "evip-plus-plus": [1, 1, 1, 1, 0],
        "evip-plus-plus-42": [1, 1, 1, 1, 0],
    }


def test_arms_see_the_data_that_their_names_say(run: Path) -> None:
    samples = _values(run, "samples")
    assert {variant: samples[variant, "s12"] for variant in VARIANTS} == {
        "evip": 5 * 4,
        "evip-plus-plus": 5 * 4,
        "evip-plus-plus-42": 2 * 4,
    }
    assert len({samples[variant, "s2"] for variant in VARIANTS}) == 1


def test_variants_of_a_seed_start_alike_but_for_their_experts(run: Path) -> None:
    load = MonoInternVLForConditionalGeneration.from_pretrained
    starts = [load(run / variant / "seed0" / "start" / "checkpoint") for variant in VARIANTS]
    assert [m.config.visual_experts for m in starts] == [("ffn",), *[("ffn", "qkv", "o")] * 2]
    for name, p in starts[0].named_parameters():
        for other in starts[1:]:
            assert torch.equal(other.get_parameter(name), p), name


def test_shared_attention_moves_in_s13_with_evip_alone(run: Path) -> None:
    load = MonoInternVLForConditionalGeneration.from_pretrained
    for variant, moves in zip(VARIANTS, (True, False, False), strict=True):
        before, after = (
            load(run / variant / "seed0" / stage / "checkpoint").model.language_model.layers[0]
            for stage in ("start", "s13")
        )
        is_same = torch.equal(before.self_attn.q_proj.weight, after.self_attn.q_proj.weight)
        assert is_same != moves
        if not moves:
            copied = before.self_attn.q_proj_visual.weight
            assert not torch.equal(copied, after.self_attn.q_proj_visual.weight)


def test_finished_arms_are_not_run_again(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "QUICK", _plan())
    monkeypatch.setattr(module, "_run", lambda _: pytest.fail("ran again"))
    before = (run / "runs.jsonl").read_text()
    compare_pretraining(run, seeds=1, quick=True)
    assert (run / "runs.jsonl").read_text() == before
    with pytest.raises(ConfigError, match="begun with"):
        compare_pretraining(run, seeds=1, quick=False)
    with pytest.raises(ConfigError, match="seeds=0"):
        compare_pretraining(run, seeds=0)


# ----------------------------------------------------------------------------- killed, and reused


def _lab(folder: Path, plan: Any) -> None:
    """In a process of its own, which the test kills."""
    torch.set_num_threads(1)
    module.QUICK = plan  # type: ignore[misc]
    compare_pretraining(folder, seeds=1, quick=True)


def _copy(run: Path, folder: Path, *variants: str) -> Path:
    """A lab in which some variants are finished."""
    for part in ("data", *variants):
        shutil.copytree(run / part, folder / part)
    return folder


def test_killed_lab_goes_on_to_the_same_end(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = tuple(
        dataclasses.replace(stage, checkpoint_every=2 if stage.name == "s13" else 0)
        for stage in _plan().recipe.stages
    )
    plan = dataclasses.replace(_plan(), recipe=dataclasses.replace(_plan().recipe, stages=stages))
    folder = _copy(run, tmp_path / "lab", VARIANTS[0], VARIANTS[2])
    variant = folder / VARIANTS[1] / "seed0"
    process = multiprocessing.get_context("spawn").Process(target=_lab, args=(folder, plan))
    process.start()
    until = time.monotonic() + 300
    while not [*variant.glob("s13/step_*")]:
        assert process.is_alive() and time.monotonic() < until
        time.sleep(0.01)
    process.kill()
    process.join()
    assert (variant / "s12" / "checkpoint").exists() and not (
        variant / "s13" / "checkpoint"
    ).exists()

    monkeypatch.setattr(module, "QUICK", plan)
    compare_pretraining(folder, seeds=1, quick=True)
    again, whole = read_runs(folder / "runs.jsonl"), read_runs(run / "runs.jsonl")
    for new, old in zip(again, whole, strict=True):
        for stage, figures in old.stages.items():
            assert _but_minutes(new.stages[stage]) == _but_minutes(figures)
    assert [MINUTES in one.stages["s2"] for one in again] == [True, False, True]
    text = (folder / "table.md").read_text()
    assert _line(text, "pre-training, CPU minutes").split(" | ")[2] == "-"


def _but_minutes(figures: Mapping[str, Figure]) -> dict[str, Figure]:
    return {name: figure for name, figure in figures.items() if name != MINUTES}


def _as_quickstart(run: Path, folder: Path) -> Path:
    """The EViP variant of seed 0, as `mono-internvl quickstart` leaves it."""
    shutil.copytree(run / "evip" / "seed0", folder)
    settings = {"quick": True, "llm": "shipped", "seed": 0}
    (folder / "quickstart.json").write_text(json.dumps(settings))
    return folder


def test_finished_quickstart_stands_for_evip_of_seed_0(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "QUICK", _plan())
    monkeypatch.setattr(module, "_run", lambda _: pytest.fail("ran again"))
    folder = _copy(run, tmp_path / "lab", *VARIANTS[1:])
    other = _as_quickstart(run, tmp_path / "quickstart")
    metrics = json.loads((other / "metrics.json").read_text())
    (other / "metrics.json").write_text(json.dumps({**metrics, "command": "quickstart"}))
    compare_pretraining(folder, seeds=1, quick=True, against=other)
    reused, own = (read_runs(place / "runs.jsonl") for place in (folder, run))
    assert reused[0] == dataclasses.replace(own[0], command="quickstart")
    assert reused[1:] == own[1:]
    assert "- EViP (seed 0): `quickstart`" in (folder / "table.md").read_text()


@pytest.mark.parametrize("part", ["settings", "unfinished", "weights", "stage", "data", "protocol"])
def test_quickstart_of_something_else_is_refused(
    part: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "QUICK", _plan(7) if part == "stage" else _plan())
    monkeypatch.setattr(module, "_run", lambda _: pytest.fail("ran"))
    folder, other = _copy(run, tmp_path / "lab"), _as_quickstart(run, tmp_path / "quickstart")
    message = "it cannot stand for the run evip, seed 0"
    if part == "settings":
        settings = {"quick": True, "llm": "scratch", "seed": 0}
        (other / "quickstart.json").write_text(json.dumps(settings))
        message = "llm='scratch', expected 'shipped'"
    elif part == "unfinished":
        (other / "metrics.json").unlink()
        message = r"metrics\.json: not readable .*let a quickstart"
    elif part == "weights":
        shutil.copytree(run / VARIANTS[1] / "seed0" / "start", other / "start", dirs_exist_ok=True)
    elif part == "data":
        file = other / "s12" / "checkpoint" / "training_state.json"
        state = json.loads(file.read_text())
        state["inputs"]["data content"] = "0"
        file.write_text(json.dumps(state))
    elif part == "protocol":
        file = other / "predictions" / "s12.jsonl"
        file.write_text(file.read_text().replace('"max_new_tokens": 64', '"max_new_tokens": 96'))
        message = r"s12\.jsonl: answered with max_new_tokens=96, expected 64"
    with pytest.raises(ConfigError, match=message):
        compare_pretraining(folder, seeds=1, quick=True, against=other)


# ------------------------------------------------------------------------------------ the table


def _line(text: str, label: str) -> str:
    (line,) = (line for line in text.splitlines() if line.startswith(f"| {label}"))
    return line


def test_table_says_what_the_runs_say(run: Path) -> None:
    text = (run / "table.md").read_text()
    assert "its scores mean nothing" in text and "EViP++, 42 % of the pre-training data" in text
    scores, differences = text.split("seed by seed")
    caption = _values(run, "caption")
    for variant in VARIANTS:
        assert f"{caption[variant, 's2']:.3f}" in _line(scores, "caption (2)")
    minus = caption["evip-plus-plus", "s2"] - caption["evip", "s2"]
    assert _line(differences, "caption").startswith(f"| caption | {minus:+.3f} |")


def test_runs_name_no_folder_of_the_machine(run: Path) -> None:
    assert str(run.parent) not in (run / "runs.jsonl").read_text() + (run / "table.md").read_text()


def _made_up(seeds: tuple[int, ...]) -> list[MeasuredRun]:
    def figures(variant: int, seed: int) -> dict[str, Figure]:
        return {
            "caption": Figure(0.5 + 0.1 * seed + variant / 8, 40),
            "text: perplexity": Figure(20.0 + seed),
            "text-only logits as before": Figure(float(variant > 0)),
            "samples": Figure(1000),
            "training, CPU minutes": Figure(2.5 + seed),
        }

    return [
        MeasuredRun(
            variant=variant.name,
            title=variant.title,
            seed=seed,
            quick=False,
            stages={name: figures(i, seed) for name in ("start", "s11", "s12", "s13", "s2")},
            command="mono-internvl lab evip-plus-plus",
            processes=1,
            device="cpu",
            versions={"torch": "2.13.0"},
            date="2026-01-31",
        )
        for seed in seeds
        for i, variant in enumerate(pretraining_variants(MINIATURE))
    ]


def test_table_gives_mean_each_seed_and_the_differences_within_seeds() -> None:
    text = evip_page(_made_up((0, 1, 2)))
    assert "mean over three seeds (then each: 0, 1, 2)" in text
    scores, differences = text.split("seed by seed")
    assert "| 0.600 (0.500, 0.600, 0.700) | 0.725 (0.625, 0.725, 0.825) |" in scores
    each = "+0.125 (+0.125, +0.125, +0.125) | +0.250 (+0.250, +0.250, +0.250) |"
    assert each in _line(differences, "caption")
    assert _line(text, "pre-training samples").count("3,000 (3,000, 3,000, 3,000)") == 3
    assert _line(text, "pre-training, CPU").count("10.5 (7.5, 10.5, 13.5)") == 3
    assert "| no, no, no | yes, yes, yes | yes, yes, yes |" in _line(
        text, "text-only logits bit for bit as at the start, after S1.3"
    )


def test_table_leaves_out_what_was_not_measured() -> None:
    runs = _made_up((0, 1))
    runs = [runs[0], *(one for one in runs if one.seed == 1), runs[1]]  # no third variant of seed 0
    runs[0].stages["s12"].pop("training, CPU minutes")  # type: ignore[attr-defined]
    text = evip_page(runs)
    assert "0.850 (-, 0.850)" in _line(text, "caption (40)")
    assert _line(text, "pre-training, CPU").startswith(
        "| pre-training, CPU minutes | 10.5 (-, 10.5)"
    )


def test_program_prints_the_table(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "QUICK", _plan())
    words = ["lab", "evip-plus-plus", "--quick", "--seeds", "1", "--out", str(run)]
    monkeypatch.setattr(sys, "argv", ["mono-internvl", *words])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code
    assert (run / "table.md").read_text() in capsys.readouterr().out
