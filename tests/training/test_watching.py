"""What is watched: losses of sources, bad steps and their records, rates, TensorBoard and W&B."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch
from interrupted import interrupt
from safetensors.torch import load_file
from torch import nn

from mono_internvl.checkpoints.presets import preset
from mono_internvl.costs.training import SampleShape, step_flops
from mono_internvl.errors import ConfigError, TrainingStateError
from mono_internvl.model.layers import DecoderLayer
from mono_internvl.training import watching
from mono_internvl.training.loop import train_stage
from mono_internvl.training.objectives.objective import LossOf
from mono_internvl.training.recompute import compile_layers
from mono_internvl.training.watching import OwedFlops, StepGuard, check_watch, rates_of, scalars

EPOCH = tiny_runs.tiny_stage(steps=1, batch_size=28, warmup_steps=0, checkpoint_every=0)
BAD = "image-7"


@pytest.mark.parametrize(
    "fields",
    [
        {"loss_weighting": "token"},
        {"loss_weighting": "square", "accumulation": 4},
        {"loss_weighting": "sample", "packing": "best_fit", "packed_tokens": 128},
    ],
)
def test_loss_of_a_source_is_that_of_training_on_it_alone(
    start: Path, data: Path, tmp_path: Path, fields: dict[str, Any]
) -> None:
    def row(**changed: Any) -> dict[str, Any]:
        stage = dataclasses.replace(EPOCH, **{**fields, **changed})
        run = tmp_path / stage.data
        (found,) = tiny_runs.metric_rows(train_stage(stage, start, data, run).metrics)
        return found

    both = row()
    assert both["losses"].keys() == {"images", "text"}
    for name, size in (("images", 18), ("text", 10)):
        alone = row(data=f"{name}.json", batch_size=size, accumulation=1)
        assert alone["losses"] == {name: pytest.approx(alone["loss"], rel=1e-6)}
        assert both["losses"][name] == pytest.approx(alone["loss"], rel=1e-5)
    assert both["losses"]["images"] != pytest.approx(both["losses"]["text"], rel=1e-4)


def _spoil(monkeypatch: pytest.MonkeyPatch, record_id: str) -> None:
    """Let a record have a loss that is not finite."""
    forward = LossOf.forward

    def spoilt(self: LossOf, batch: Any, *arguments: Any) -> Any:
        loss, logged = forward(self, batch, *arguments)
        return loss * (math.nan if record_id in batch.record_ids else 1.0), logged

    monkeypatch.setattr(LossOf, "forward", spoilt)


def test_bad_step_is_skipped_with_its_records_listed_and_resumed_alike(
    monkeypatch: pytest.MonkeyPatch, start: Path, data: Path, tmp_path: Path
) -> None:
    stage = tiny_runs.tiny_stage(on_bad_step="skip", accumulation=2)
    _spoil(monkeypatch, BAD)
    whole = train_stage(stage, start, data, tmp_path / "whole")
    rows = tiny_runs.metric_rows(whole.metrics)
    assert [row["step"] for row in rows] == list(range(1, 13))
    bad = [row for row in rows if "bad_step" in row]
    assert bad and len(bad) < 4
    assert all(row["loss"] is None and row["bad_step"] == "not finite" for row in bad)
    listed = [json.loads(line) for line in (tmp_path / "whole/bad_steps.jsonl").open()]
    assert [row["step"] for row in listed] == [row["step"] for row in bad]
    for row in listed:
        assert BAD in row["records"] and len(row["records"]) == 2, "of its micro-batch alone"
    weights = load_file(whole.checkpoint / "model.safetensors")
    assert all(torch.isfinite(x).all() for x in weights.values())
    interrupt(monkeypatch, bad[0]["step"] + 1, stage, start, data, tmp_path / "cut")
    cut = train_stage(stage, start, data, tmp_path / "cut")
    assert tiny_runs.metric_rows(cut.metrics) == rows
    assert (tmp_path / "cut/bad_steps.jsonl").read_text() == (
        tmp_path / "whole/bad_steps.jsonl"
    ).read_text()


def test_bad_step_stops_the_run_which_goes_on_without_it(
    monkeypatch: pytest.MonkeyPatch, start: Path, data: Path, tmp_path: Path
) -> None:
    stage = tiny_runs.tiny_stage(checkpoint_every=1)
    _spoil(monkeypatch, BAD)
    with pytest.raises(TrainingStateError, match=rf"{BAD}.*not finite; .*on_bad_step=\"skip\""):
        train_stage(stage, start, data, tmp_path / "run")
    going_on = dataclasses.replace(stage, on_bad_step="skip")
    done = train_stage(going_on, start, data, tmp_path / "run")
    assert done.resumed_at > 0 and done.steps == 12
    whole = train_stage(going_on, start, data, tmp_path / "whole")
    assert tiny_runs.metric_rows(done.metrics) == tiny_runs.metric_rows(whole.metrics)


def test_run_that_is_lost_stops_even_where_steps_are_skipped(
    monkeypatch: pytest.MonkeyPatch, start: Path, data: Path, tmp_path: Path
) -> None:
    monkeypatch.setattr(watching, "_MOST_IN_A_ROW", 3)
    forward = LossOf.forward

    def spoilt(self: LossOf, *arguments: Any) -> Any:
        loss, logged = forward(self, *arguments)
        return loss * math.inf, logged

    monkeypatch.setattr(LossOf, "forward", spoilt)
    with pytest.raises(TrainingStateError, match="at step 3 "):
        train_stage(tiny_runs.tiny_stage(on_bad_step="skip"), start, data, tmp_path / "run")


def test_guard_tells_leaps_from_noise_and_goes_on_from_its_state() -> None:
    guard = StepGuard(max_loss_ratio=3.0)
    assert not guard.judge(100.0, 1.0), "nothing is known before some steps"
    for step in range(200):
        assert not guard.judge(2.0 + 0.5 * (step % 2), 1.0)
    again = StepGuard.from_dict(json.loads(json.dumps(guard.to_dict())), 3.0)
    assert again == guard
    assert 2.0 < guard.mean < 2.6
    assert "times the mean" in guard.judge(9.0, 1.0)
    assert guard.mean == again.mean, "a leap moves no mean"
    assert guard.judge(2.0, math.inf) == "not finite"
    assert guard.num_in_a_row == 2 and not guard.judge(7.0, 1.0) and guard.num_in_a_row == 0
    assert not StepGuard(math.inf).is_lost


@pytest.mark.parametrize("learned", ["_visual.", ""])
def test_owed_operations_of_tokens_add_up_to_those_of_a_sample(learned: str) -> None:
    config = preset("mono-internvl-2b")
    names = {
        f"model.language_model.layers.{n}.mlp_visual.{part}_proj.weight"
        for n in range(23)
        for part in ("gate", "up", "down")
    }
    owed = OwedFlops.of(config, names if learned else {"lm_head.weight"})
    assert owed is not None
    sample = SampleShape(1280, 145, 100)
    tokens = 1280 + 145
    found = owed.of_step(tokens, 1280, 100, tokens * (tokens + 1) // 2)
    expected = step_flops(config, names if learned else {"lm_head.weight"}, sample).total
    assert found == pytest.approx(expected, rel=0.01)


def test_rates_know_the_utilization_where_the_peak_is_known(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    row = {"tokens": 1000, "images": 10}
    owed = OwedFlops(per_visual=10.0, per_text=20.0, per_label=5.0, per_pair=1.0)
    assert rates_of(row, (400, 100, 5000), 2.0, owed, "cpu") == {
        "tokens_per_s": 500.0,
        "images_per_s": 5.0,
    }
    monkeypatch.setattr(watching, "peak_flops", lambda device: 1e5)
    owes = 400 * 10 + 600 * 20 + 100 * 5 + 5000
    assert rates_of(row, (400, 100, 5000), 2.0, owed, "cuda")["mfu"] == owes / 2.0 / 1e5


def test_scalars_are_the_numbers_of_a_row() -> None:
    row = {"step": 3, "loss": None, "grad_norm": 1.5, "bad_step": "x", "losses": {"a": 2.0}}
    assert scalars(row) == {"grad_norm": 1.5, "losses/a": 2.0}


def test_tensorboard_shows_every_step_once(
    monkeypatch: pytest.MonkeyPatch, start: Path, data: Path, tmp_path: Path
) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    stage, run = tiny_runs.tiny_stage(steps=6, checkpoint_every=2), tmp_path / "run"
    interrupt(monkeypatch, 5, stage, start, data, run, watch=("tensorboard",))
    done = train_stage(stage, start, data, run, watch=("tensorboard",))
    found = events.EventAccumulator(str(run / "tensorboard"))
    found.Reload()
    rows = tiny_runs.metric_rows(done.metrics)
    for name, expected in (
        ("loss", [row["loss"] for row in rows]),
        ("losses/text", [row["losses"]["text"] for row in rows if "text" in row["losses"]]),
    ):
        shown = found.Scalars(name)
        assert [x.value for x in shown] == pytest.approx(expected)
    assert {"tokens_per_s", "images_per_s", "grad_norm", "skipped"} <= set(found.Tags()["scalars"])


def test_weights_and_biases_goes_on_with_its_run(
    monkeypatch: pytest.MonkeyPatch, start: Path, data: Path, tmp_path: Path
) -> None:
    began: list[dict[str, Any]] = []
    logged: list[tuple[int, dict[str, float]]] = []

    class Run:
        def log(self, values: dict[str, float], step: int) -> None:
            logged.append((step, values))

        def finish(self) -> None:
            logged.append((-1, {}))

    def init(**options: Any) -> Run:
        began.append(options)
        return Run()

    fake = types.ModuleType("wandb")
    fake.__spec__ = types.SimpleNamespace()  # type: ignore[assignment]
    fake.init, fake.util = init, types.SimpleNamespace(generate_id=lambda: "a1b2")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    check_watch(["wandb"])
    stage, run = tiny_runs.tiny_stage(steps=3, checkpoint_every=1), tmp_path / "recipe" / "run"
    interrupt(monkeypatch, 2, stage, start, data, run, watch=("wandb",))
    train_stage(stage, start, data, run, watch=("wandb",))
    assert [options["id"] for options in began] == ["a1b2", "a1b2"]
    assert began[0]["resume"] == "allow" and began[0]["name"] == "recipe/run"
    assert [step for step, _ in logged][-3:] == [2, 3, -1] or logged[-1][0] == -1
    assert logged[0][1]["loss"] > 0


def test_watching_what_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="--watch telegraph: expected one of tensorboard, wandb"):
        check_watch(["telegraph"])
    monkeypatch.setattr(watching.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"tensorboard is not installed; pip install .*\[watch\]"):
        check_watch(["tensorboard"])


def test_compiled_layers_give_the_same_losses(
    monkeypatch: pytest.MonkeyPatch, start: Path, data: Path, tmp_path: Path
) -> None:
    """Traced and run as it is: the generated code costs a minute, and is PyTorch's own business."""
    compiled: list[nn.Module] = []
    plain = nn.Module.compile

    def trace(self: nn.Module, **options: Any) -> None:
        compiled.append(self)
        plain(self, backend="eager", **options)

    monkeypatch.setattr(nn.Module, "compile", trace)
    stage = tiny_runs.tiny_stage(steps=2)
    rows = [
        tiny_runs.metric_rows(train_stage(one, start, data, tmp_path / name).metrics)
        for name, one in (("no", stage), ("yes", dataclasses.replace(stage, compiling="layers")))
    ]
    assert [type(layer) for layer in compiled[:1]] == [DecoderLayer] and len(compiled) == 2
    for a, b in zip(*rows, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-6)
    compile_layers(nn.Linear(2, 2))
