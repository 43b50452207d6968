"""The loop in one process: gradients, identity of the text path, resume, refusals."""

from __future__ import annotations

import dataclasses
import json
import shutil
import threading
from pathlib import Path
from typing import Any

import loop_processes
import pytest
import safetensors.torch
import stored
import tiny_runs
import torch
from interrupted import interrupt
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mono_internvl import compute
from mono_internvl.errors import RecipeError, SampleError, TrainingStateError
from mono_internvl.miniature.recipes import QUICK_MINIATURE
from mono_internvl.model.modeling import MonoInternVLForConditionalGeneration
from mono_internvl.processing.processor import MonoInternVLProcessor
from mono_internvl.runs import folder as job_folder
from mono_internvl.runs.folder import exclusive
from mono_internvl.training import loop, state, state_folders
from mono_internvl.training.earlier_states import load_optimizer
from mono_internvl.training.loop import StageResult, train_stage
from mono_internvl.training.recipe import Rule, Stage
from mono_internvl.training.rules import apply_rules
from mono_internvl.training.state import STATE_FILE, truncate_metrics
from mono_internvl.training.state_folders import SHARDS, StateFolders

load_model = MonoInternVLForConditionalGeneration.from_pretrained


def _weights(result: StageResult) -> dict[str, Tensor]:
    return load_file(result.checkpoint / "model.safetensors")


def _assert_same_run(first: StageResult, second: StageResult) -> None:
    assert tiny_runs.metric_rows(first.metrics) == tiny_runs.metric_rows(second.metrics)
    old, new = _weights(first), _weights(second)
    assert old.keys() == new.keys()
    assert [key for key in old if not torch.equal(old[key], new[key])] == []


# --------------------------------------------------------------------- what a step computes


def _gradients(
    monkeypatch: pytest.MonkeyPatch, stage: Stage, start: Path, data: Path, run: Path
) -> list[Tensor]:
    """Of the last step, before clipping."""
    found: list[Tensor] = []

    def record(parameters: list[nn.Parameter], max_norm: float) -> Tensor:
        found[:] = [p.grad.clone() for p in parameters if p.grad is not None]
        return clip(parameters, max_norm)

    clip = nn.utils.clip_grad_norm_
    with monkeypatch.context() as patched:
        patched.setattr(loop.nn.utils, "clip_grad_norm_", record)
        train_stage(stage, start, data, run)
    return found


@pytest.mark.parametrize("weighting", ["token", "square", "sample"])
def test_accumulation_gives_the_gradients_of_one_batch(
    monkeypatch: pytest.MonkeyPatch, start: Path, data: Path, tmp_path: Path, weighting: str
) -> None:
    found = {}
    for accumulation in (1, 4):
        stage = tiny_runs.tiny_stage(
            steps=1, batch_size=8, accumulation=accumulation, loss_weighting=weighting
        )
        found[accumulation] = _gradients(
            monkeypatch, stage, start, data, tmp_path / str(accumulation)
        )
    assert len(found[1]) == len(found[4]) > 20
    for one, four in zip(found[1], found[4], strict=True):
        torch.testing.assert_close(four, one, rtol=0, atol=1e-6)
    assert max(float(g.abs().max()) for g in found[1]) > 1e-3
    losses = [tiny_runs.metric_rows(tmp_path / str(n) / "metrics.jsonl")[0]["loss"] for n in (1, 4)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def test_step_counts_tokens_images_and_rates(start: Path, data: Path, tmp_path: Path) -> None:
    stage = tiny_runs.tiny_stage(steps=7, batch_size=4, schedule="constant", warmup_steps=2)
    rows = tiny_runs.metric_rows(train_stage(stage, start, data, tmp_path / "run").metrics)
    assert [row["step"] for row in rows] == list(range(1, 8))
    assert [row["learning_rate_share"] for row in rows] == [0.5, 1, 1, 1, 1, 1, 1]
    assert sum(row["images"] for row in rows) == 18, "28 records are one epoch of the mixed data"
    assert all(row["tokens"] > 4 and row["skipped"] == 0 for row in rows)
    assert all(row["grad_norm"] > 0 for row in rows)


def test_training_learns(start: Path, data: Path, tmp_path: Path) -> None:
    stage = tiny_runs.tiny_stage(steps=40, batch_size=8, data="images.json", precision="bf16")
    rows = tiny_runs.metric_rows(train_stage(stage, start, data, tmp_path / "run").metrics)
    assert rows[0]["loss"] > 4
    assert rows[-1]["loss"] < 1.5


def test_reader_processes_change_nothing(start: Path, data: Path, tmp_path: Path) -> None:
    stage = tiny_runs.tiny_stage(steps=3)
    here = train_stage(stage, start, data, tmp_path / "here")
    reading = dataclasses.replace(stage, loader_workers=1)
    _assert_same_run(here, train_stage(reading, start, data, tmp_path / "there"))


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recompute_changes_nothing(start: Path, data: Path, tmp_path: Path, recompute: str) -> None:
    stage = tiny_runs.tiny_stage(steps=3)
    plain = train_stage(stage, start, data, tmp_path / "plain")
    again = dataclasses.replace(stage, recompute=recompute)
    _assert_same_run(plain, train_stage(again, start, data, tmp_path / "again"))


def test_state_of_earlier_names_is_resumed(start: Path, data: Path, tmp_path: Path) -> None:
    stage = tiny_runs.tiny_stage(steps=2)
    done = train_stage(stage, start, data, tmp_path / "run")
    file = done.checkpoint / STATE_FILE
    state = json.loads(file.read_text())
    for later in ("recompute", "objective"):
        del state["stage"][later]
    for old, new in (("warmup_share", "warmup_ratio"), ("final_rate_share", "final_rate_ratio")):
        state["stage"][old] = state["stage"].pop(new)
    file.write_text(json.dumps(state))
    assert train_stage(stage, start, data, tmp_path / "run").resumed_at == 2
    state["stage"]["warmup_share"] = 0.5
    file.write_text(json.dumps(state))
    with pytest.raises(TrainingStateError, match=r"run with warmup_ratio=0\.5"):
        train_stage(stage, start, data, tmp_path / "run")


def _slow_bf16(monkeypatch: pytest.MonkeyPatch, cost: float) -> None:
    monkeypatch.setattr(compute, "bf16_cost", lambda device_type: cost)


def _precision_of(result: StageResult) -> str:
    saved = state.read_state(result.checkpoint)
    assert saved is not None
    return str(saved.stage["precision"])


@pytest.mark.parametrize(("cost", "precision"), [(0.2, "bf16"), (40.0, "fp32")])
def test_stage_computes_in_what_the_machine_multiplies_faster(
    monkeypatch: pytest.MonkeyPatch,
    start: Path,
    data: Path,
    tmp_path: Path,
    cost: float,
    precision: str,
) -> None:
    _slow_bf16(monkeypatch, cost)
    stage = tiny_runs.tiny_stage(steps=2, precision="auto")
    asked = dataclasses.replace(stage, precision=precision)
    chosen = train_stage(stage, start, data, tmp_path / "chosen")
    assert _precision_of(chosen) == precision
    _assert_same_run(chosen, train_stage(asked, start, data, tmp_path / "asked"))


@pytest.mark.parametrize("begun", ["bf16", "fp32"])
def test_resumed_run_keeps_the_precision_it_began_with(
    monkeypatch: pytest.MonkeyPatch, start: Path, data: Path, tmp_path: Path, begun: str
) -> None:
    # States written before "auto" was known say "bf16": so does one whose stage asked for it.
    before = tiny_runs.tiny_stage(precision=begun)
    whole = train_stage(before, start, data, tmp_path / "whole")
    run = tmp_path / "run"
    interrupt(monkeypatch, 6, before, start, data, run)
    _slow_bf16(monkeypatch, 40.0 if begun == "bf16" else 0.2)  # another machine
    after = dataclasses.replace(before, precision="auto")
    result = train_stage(after, start, data, run)
    assert result.resumed_at == 4
    assert _precision_of(result) == begun
    _assert_same_run(whole, result)
    other = dataclasses.replace(before, precision="fp32" if begun == "bf16" else "bf16")
    with pytest.raises(TrainingStateError, match=f"precision='{begun}'"):
        train_stage(other, start, data, run)


def _text_logits(checkpoint: Path, attention: str) -> Tensor:
    model = load_model(checkpoint, dtype=torch.float32, attn_implementation=attention).eval()
    processor = MonoInternVLProcessor.from_pretrained(checkpoint)
    messages = [
        {"role": "user", "content": "say one two three"},
        {"role": "assistant", "content": "one two three"},
    ]
    ids = processor.encode_conversation(messages).input_ids
    with torch.inference_mode():
        return model(torch.stack((ids, ids.flip(0)))).logits


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_s11_step_leaves_text_logits_bit_identical(
    start: Path, data: Path, tmp_path: Path, attention: str
) -> None:
    stage = tiny_runs.tiny_stage(rules=QUICK_MINIATURE.stages[0].rules, steps=1, warmup_steps=1)
    after = train_stage(stage, start, data, tmp_path / "s11", attention=attention).checkpoint
    assert torch.equal(_text_logits(after, attention), _text_logits(start, attention))
    everything = tiny_runs.tiny_stage(steps=1, warmup_steps=1)
    other = train_stage(everything, start, data, tmp_path / "all", attention=attention).checkpoint
    assert not torch.equal(_text_logits(other, attention), _text_logits(start, attention))


def test_quick_s11_and_s12_leave_text_logits_bit_identical(
    start: Path, data: Path, tmp_path: Path
) -> None:
    checkpoint = start
    for stage in QUICK_MINIATURE.stages[:2]:
        small = dataclasses.replace(stage, data="mixed.json", batch_size=4)
        result = train_stage(small, checkpoint, data, tmp_path / stage.name)
        checkpoint = result.checkpoint
    for attention in ("eager", "sdpa"):
        assert torch.equal(_text_logits(checkpoint, attention), _text_logits(start, attention))
    old, new = load_model(start).state_dict(), load_model(checkpoint).state_dict()
    assert any(not torch.equal(old[key], new[key]) for key in old if "projector" in key)


# --------------------------------------------------------------------------- stop and go on


@pytest.mark.parametrize("step", [2, 4, 9, 11])
def test_interrupted_run_goes_on_to_the_same_numbers(
    monkeypatch: pytest.MonkeyPatch, start: Path, data: Path, tmp_path: Path, step: int
) -> None:
    stage = tiny_runs.tiny_stage()
    whole = train_stage(stage, start, data, tmp_path / "whole")
    run = tmp_path / "parts"
    interrupt(monkeypatch, step, stage, start, data, run)
    parts = train_stage(stage, start, data, run)
    # Stopped at once after step 4, before its state was written.
    assert (whole.resumed_at, parts.resumed_at) == (0, {2: 0, 4: 0, 9: 8, 11: 8}[step])
    _assert_same_run(whole, parts)
    assert sorted(path.name for path in run.iterdir()) == [".lock", "checkpoint", "metrics.jsonl"]


def test_killed_run_goes_on_to_the_same_numbers(data: Path, tmp_path: Path) -> None:
    start = tiny_runs.write_checkpoint(tmp_path / "dropout", attention_dropout=0.1)
    stage = tiny_runs.tiny_stage(steps=120, checkpoint_every=10)
    whole = train_stage(stage, start, data, tmp_path / "whole")
    run = tmp_path / "killed"
    loop_processes.kill_in_the_middle(1, stage, run, start, data, rows=37)
    assert not (run / "checkpoint").exists()
    found = StateFolders(run).latest()
    assert found is not None and 30 <= found.step < 120
    parts = train_stage(stage, start, data, run)
    assert parts.resumed_at == found.step
    _assert_same_run(whole, parts)


def test_finished_run_returns_at_once(
    monkeypatch: pytest.MonkeyPatch, start: Path, data: Path, tmp_path: Path
) -> None:
    stage, run = tiny_runs.tiny_stage(steps=2), tmp_path / "run"
    first = train_stage(stage, start, data, run)
    (run / "step_00000001").mkdir()
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file() and p.name != ".lock"}

    def never(*arguments: object) -> None:
        raise AssertionError("a finished run trained")

    monkeypatch.setattr(loop, "apply_rules", never)
    second = train_stage(stage, start, data, run)
    assert (second.checkpoint, second.resumed_at) == (first.checkpoint, 2)
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    assert not (run / "step_00000001").exists()


def test_checkpoint_says_what_made_it(start: Path, data: Path, tmp_path: Path) -> None:
    stage = tiny_runs.tiny_stage(steps=0, epochs=0.2)
    result = train_stage(stage, start, data, tmp_path / "run")
    saved = json.loads((result.checkpoint / STATE_FILE).read_text())
    assert saved["step"] == result.steps == 2
    assert saved["stage"]["rules"] == [{"pattern": ".*", "learning_rate": 3e-3}]
    assert saved["versions"]["torch"] == torch.__version__
    assert not (result.checkpoint / SHARDS).exists()


def test_half_written_and_half_deleted_states_are_swept(
    monkeypatch: pytest.MonkeyPatch, start: Path, data: Path, tmp_path: Path
) -> None:
    stage, run = tiny_runs.tiny_stage(), tmp_path / "run"
    interrupt(monkeypatch, 6, stage, start, data, run)
    for name in (".step_00000008.new.tmp", ".step_00000002.old.tmp"):
        (run / name).mkdir()
        (run / name / STATE_FILE).write_text("{")
    assert train_stage(stage, start, data, run).resumed_at == 4
    assert not list(run.glob(".*.tmp"))


@pytest.mark.parametrize("what", ["shards", "the rest"])
def test_state_that_cannot_be_written_leaves_the_one_before(
    monkeypatch: pytest.MonkeyPatch, start: Path, data: Path, tmp_path: Path, what: str
) -> None:
    stage, run = tiny_runs.tiny_stage(), tmp_path / "run"
    interrupt(monkeypatch, 6, stage, start, data, run)

    def full(*arguments: object, **named: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        if what == "shards":
            patched.setattr(safetensors.torch, "save", full)
        else:
            patched.setattr(state_folders, "make_whole", full)
        with pytest.raises(TrainingStateError, match=r"step 8 not written .*No space left"):
            train_stage(stage, start, data, run)
    assert [p.name for p in run.glob("*step*")] == ["step_00000004"]
    whole = train_stage(stage, start, data, tmp_path / "whole")
    _assert_same_run(whole, train_stage(stage, start, data, run))


def test_latest_and_every_nth_states_are_kept(start: Path, data: Path, tmp_path: Path) -> None:
    stage = tiny_runs.tiny_stage(checkpoint_every=1, keep_last=2, keep_every=5)
    run = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, 9, stage, start, data, run)
    assert sorted(p.name for p in run.glob("step_*")) == [
        *("step_00000005", "step_00000007", "step_00000008")
    ]
    done = train_stage(stage, start, data, run)
    assert done.resumed_at == 8
    assert sorted(p.name for p in run.glob("step_*")) == ["step_00000005", "step_00000010"]
    assert train_stage(stage, start, data, run).resumed_at == 12, "they do not undo the end"
    assert len(list(run.glob("step_*"))) == 2


def test_training_goes_on_while_a_state_is_written(
    monkeypatch: pytest.MonkeyPatch, start: Path, data: Path, tmp_path: Path
) -> None:
    stage, run = tiny_runs.tiny_stage(), tmp_path / "run"
    reached, found = threading.Event(), []
    write = safetensors.torch.save

    def slow(*arguments: Any, **named: Any) -> bytes:
        found.append(reached.wait(20))
        return write(*arguments, **named)

    def update(self: Any, row: dict[str, Any]) -> None:
        if row["step"] == 6:
            reached.set()

    monkeypatch.setattr(safetensors.torch, "save", slow)
    monkeypatch.setattr(loop.StageProgress, "update", update)
    parts = train_stage(stage, start, data, run)
    assert found == [True, True], "step 6 was taken before the state of step 4 was written"
    monkeypatch.undo()
    # What training changed meanwhile is not in the state.
    whole = train_stage(stage, start, data, tmp_path / "whole")
    _assert_same_run(whole, parts)


def test_state_holds_what_the_model_does(
    monkeypatch: pytest.MonkeyPatch, start: Path, data: Path, tmp_path: Path
) -> None:
    interrupt(monkeypatch, 6, tiny_runs.tiny_stage(), start, data, tmp_path / "run")
    found = StateFolders(tmp_path / "run").latest()
    assert found is not None
    model, processor = StateFolders(tmp_path / "run").load_model(found, "sdpa")
    plain = load_model(start)
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert model.config.to_dict() == plain.config.to_dict()
    assert model.generation_config.to_dict() == plain.generation_config.to_dict()
    assert all(torch.isfinite(p).all() for p in model.parameters())
    ids = [
        p.encode_conversation(
            [{"role": "user", "content": "say"}, {"role": "assistant", "content": "one"}]
        ).input_ids
        for p in (processor, MonoInternVLProcessor.from_pretrained(start))
    ]
    assert torch.equal(*ids)


def test_metrics_are_cut_back_to_the_state(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    truncate_metrics(file, 3)
    rows = [json.dumps({"step": n}) for n in range(1, 7)]
    file.write_text("\n".join(rows)[:-4])
    truncate_metrics(file, 5)
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [1, 2, 3, 4, 5]
    truncate_metrics(file, 3)
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [1, 2, 3]


# -------------------------------------------------------------------------------- refusals


def test_second_process_on_the_same_folder_is_refused(
    monkeypatch: pytest.MonkeyPatch, start: Path, data: Path, tmp_path: Path
) -> None:
    monkeypatch.setattr(job_folder, "LOCK_PATIENCE_S", 0.2)
    run = tmp_path / "run"
    with (
        exclusive(run),
        pytest.raises(TrainingStateError, match="another process trains here"),
    ):
        train_stage(tiny_runs.tiny_stage(), start, data, run)


@pytest.mark.parametrize("finished", [True, False])
def test_changed_stage_is_refused_with_its_field(
    monkeypatch: pytest.MonkeyPatch, start: Path, data: Path, tmp_path: Path, finished: bool
) -> None:
    stage, run = tiny_runs.tiny_stage(), tmp_path / "run"
    if finished:
        train_stage(stage, start, data, run)
    else:
        interrupt(monkeypatch, 6, stage, start, data, run)
    changes: list[tuple[str, Any]] = [
        ("batch_size", 2),
        ("seed", 5),
        ("rules", tiny_runs.VISION_AND_EXPERTS),
    ]
    for field, value in changes:
        changed = dataclasses.replace(stage, **{field: value})
        with pytest.raises(TrainingStateError, match=rf"run with {field}="):
            train_stage(changed, start, data, run)


def _change_weight(folder: Path) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors[max(tensors)].flatten()[0] += 1
    save_file(tensors, file, metadata={"format": "pt"})


def _change_config(folder: Path) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "comment": "another"}))


def _repeat_source(folder: Path) -> None:
    file = folder / "mixed.json"
    file.write_text(file.read_text() + " ")


def _lengthen_annotation(folder: Path) -> None:
    file = folder / "text.jsonl"
    file.write_text(file.read_text() + "\n")


@pytest.mark.parametrize("finished", [True, False])
def test_other_start_or_data_is_refused(
    monkeypatch: pytest.MonkeyPatch, start: Path, data: Path, tmp_path: Path, finished: bool
) -> None:
    stage, run = tiny_runs.tiny_stage(), tmp_path / "run"
    if finished:
        train_stage(stage, start, data, run)
    else:
        interrupt(monkeypatch, 6, stage, start, data, run)
    for number, change in enumerate((_change_weight, _change_config)):
        other = shutil.copytree(start, tmp_path / f"start-{number}")
        change(other)
        with pytest.raises(TrainingStateError, match="begun with another start checkpoint"):
            train_stage(stage, other, data, run)
    for number, change in enumerate((_repeat_source, _lengthen_annotation)):
        other = shutil.copytree(data, tmp_path / f"data-{number}")
        change(other)
        with pytest.raises(TrainingStateError, match="begun with another data"):
            train_stage(stage, start, other, run)
    same = shutil.copytree(start, tmp_path / "same")
    assert train_stage(stage, same, data, run).steps == 12, "a copy is the same checkpoint"


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-200])


def _scramble(file: Path) -> None:
    file.write_bytes(bytes(reversed(file.read_bytes())))


@pytest.mark.parametrize(
    ("name", "damage", "error", "complaint"),
    [
        (STATE_FILE, Path.unlink, TrainingStateError, f"no readable {STATE_FILE}"),
        (STATE_FILE, _cut, TrainingStateError, f"no readable {STATE_FILE}"),
        (f"{SHARDS}/*", Path.unlink, TrainingStateError, r"step_00000004: shards/.* is missing"),
        (f"{SHARDS}/*", _cut, TrainingStateError, r"shards/.* is \d+ bytes, written were \d+"),
        (f"{SHARDS}/*", _scramble, TrainingStateError, r"step_00000004: not readable \("),
        ("config.json", _cut, TrainingStateError, r"config\.json is \d+ bytes, written were"),
    ],
)
def test_damaged_state_is_named(
    monkeypatch: pytest.MonkeyPatch,
    start: Path,
    data: Path,
    tmp_path: Path,
    name: str,
    damage: Any,
    error: type[Exception],
    complaint: str,
) -> None:
    stage, run = tiny_runs.tiny_stage(), tmp_path / "run"
    interrupt(monkeypatch, 6, stage, start, data, run)
    (file,) = (run / "step_00000004").glob(name)
    damage(file)
    with pytest.raises(error, match=complaint):
        train_stage(stage, start, data, run)


def test_moments_are_loaded_to_where_the_optimizer_wants_them(
    monkeypatch: pytest.MonkeyPatch, start: Path, data: Path, tmp_path: Path
) -> None:
    """A fused step on a GPU wants its count there, too; the meta device stands for a GPU."""
    stage, run = tiny_runs.tiny_stage(), tmp_path / "run"
    interrupt(monkeypatch, 6, stage, start, data, run)
    stored.as_written_before(run / "step_00000004")
    model = load_model(start).to("meta")
    groups = apply_rules(model, model.config, stage)
    parameters = dict(model.named_parameters())
    optimizer = torch.optim.AdamW([parameters[n] for group in groups for n in group.names])
    optimizer.param_groups[0]["fused"] = True  # a constructor would refuse this device
    load_optimizer(run / "step_00000004", model, optimizer)
    assert len(optimizer.state) == sum(len(group.names) for group in groups) > 20
    for parameter, moments in optimizer.state.items():
        assert {key: x.device.type for key, x in moments.items()} == dict.fromkeys(
            ("step", "exp_avg", "exp_avg_sq"), "meta"
        )
        assert moments["exp_avg"].shape == parameter.shape


@pytest.mark.parametrize("layout", ["sharded", "earlier"])
def test_moments_of_other_parameters_are_refused(
    monkeypatch: pytest.MonkeyPatch, start: Path, data: Path, tmp_path: Path, layout: str
) -> None:
    stage, run = tiny_runs.tiny_stage(), tmp_path / "all"
    fewer = dataclasses.replace(stage, rules=tiny_runs.VISION_AND_EXPERTS)
    interrupt(monkeypatch, 6, stage, start, data, run)
    interrupt(monkeypatch, 6, fewer, start, data, tmp_path / "fewer")
    states = [folder / "step_00000004" for folder in (run, tmp_path / "fewer")]
    said = [json.loads((folder / STATE_FILE).read_text())["stage"] for folder in states]
    if layout == "earlier":
        for folder in states:
            stored.as_written_before(folder)
    # Each speaks of itself as of the other.
    stored.say(states[1], stage=lambda _: said[0])
    stored.say(states[0], stage=lambda _: said[1])
    with pytest.raises(TrainingStateError, match=r"unknown (parameter|to this stage)"):
        train_stage(fewer, start, data, run)
    with pytest.raises(TrainingStateError, match=r"no (step for parameter|.*\(optimizer\))"):
        train_stage(stage, start, data, tmp_path / "fewer")


def test_run_goes_on_from_a_state_of_the_earlier_layout(
    monkeypatch: pytest.MonkeyPatch, start: Path, data: Path, tmp_path: Path
) -> None:
    stage, run = tiny_runs.tiny_stage(), tmp_path / "run"
    whole = train_stage(stage, start, data, tmp_path / "whole")
    interrupt(monkeypatch, 6, stage, start, data, run)
    stored.as_written_before(run / "step_00000004")
    parts = train_stage(stage, start, data, run)
    assert parts.resumed_at == 4
    _assert_same_run(whole, parts)


def test_loss_that_is_not_finite_ends_the_run(start: Path, data: Path, tmp_path: Path) -> None:
    stage = tiny_runs.tiny_stage(rules=(Rule(".*", 1e30),), warmup_steps=0, checkpoint_every=1)
    with pytest.raises(TrainingStateError, match=r"at step \d+ \(records (image|text)-\d+, "):
        train_stage(stage, start, data, tmp_path / "run")
    saved = StateFolders(tmp_path / "run").latest()
    assert saved is None or saved.step == len(
        (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    )


def test_bad_samples_raise_or_are_skipped_and_counted(
    start: Path, data: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(data, tmp_path / "data")
    (folder / "images/3.png").write_bytes(b"not a picture")
    (folder / "images/7.png").unlink()
    with (folder / "text.jsonl").open("a") as file:
        file.write("{broken\n")
    stage = tiny_runs.tiny_stage(steps=29, batch_size=1)
    with pytest.raises(SampleError, match=r"(images\.jsonl:(4|8)|text\.jsonl:11): "):
        train_stage(stage, start, folder, tmp_path / "raise")
    skipping = dataclasses.replace(stage, on_bad_sample="skip", max_skipped_ratio=1.0)
    rows = tiny_runs.metric_rows(train_stage(skipping, start, folder, tmp_path / "skip").metrics)
    assert len(rows) == 29
    assert sum(row["skipped"] for row in rows) >= 3


def test_too_many_skipped_records_stop_the_run_which_may_go_on_with_a_higher_limit(
    start: Path, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = shutil.copytree(data, tmp_path / "data")
    for number in range(6):
        (folder / f"images/{number}.png").unlink()
    for number in range(6, 9):
        (folder / f"images/{number}.png").write_bytes(b"not a picture")
    stage = tiny_runs.tiny_stage(
        steps=30, batch_size=8, on_bad_sample="skip", max_skipped_ratio=0.2, checkpoint_every=5
    )
    with pytest.raises(SampleError, match=r"2\d of 1?\d\d records .* max_skipped_ratio=0\.2, for"):
        train_stage(stage, start, folder, tmp_path / "run")
    assert "images                image missing" in caplog.text
    assert "images                image damaged" in caplog.text
    stopped = StateFolders(tmp_path / "run").latest()
    assert stopped is not None and stopped.skipped["skipped"] > 0
    resumed = dataclasses.replace(stage, max_skipped_ratio=0.5)
    parts = train_stage(resumed, start, folder, tmp_path / "run")
    assert parts.resumed_at == stopped.step
    whole = train_stage(resumed, start, folder, tmp_path / "whole")
    _assert_same_run(whole, parts)
    rows = tiny_runs.metric_rows(whole.metrics)
    kept = [state.read_state(result.checkpoint).skipped for result in (whole, parts)]
    for counts in kept:
        for kind in counts["kinds"]:
            assert ".jsonl:" in kind.pop("first")
    assert kept[0] == kept[1], "a resumed run keeps its counts"
    assert kept[0]["skipped"] == sum(row["skipped"] for row in rows)
    assert kept[0]["records"] >= 240


def test_rules_and_data_are_checked_before_anything_is_written(
    start: Path, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match="decides no parameter"):
        stage = tiny_runs.tiny_stage(rules=(Rule("nothing", 1.0), Rule(".*", 1e-3)))
        train_stage(stage, start, data, tmp_path / "run")
    with pytest.raises(SampleError, match="no such meta file"):
        train_stage(tiny_runs.tiny_stage(data="absent.json"), start, data, tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]
