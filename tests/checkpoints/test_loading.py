"""A checkpoint in memory as the plan has it: on a small machine with int8 weights, and said so."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import text_record, write_checkpoint, write_lines

from mono_internvl import compute
from mono_internvl.checkpoints.loading import load_planned, plan_inference, quantize_int8
from mono_internvl.errors import MissingDependency
from mono_internvl.evaluation.evaluate import evaluate
from mono_internvl.evaluation.protocol import Protocol
from mono_internvl.model.layers import DecoderLayer
from mono_internvl.serving.loading import load


@pytest.fixture(scope="module")
def fp32(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("loading") / "fp32")


@pytest.fixture(scope="module")
def bf16(fp32: Path) -> Path:
    """The same with its weights stored in bf16, as released checkpoints are."""
    folder = fp32.with_name("bf16")
    session = load(fp32, device="cpu", precision="bf16")
    session.model.save_pretrained(folder)
    session.processor.save_pretrained(folder)
    return folder


def _machine(monkeypatch: pytest.MonkeyPatch, cost: float, free_bytes: int) -> None:
    monkeypatch.setattr(compute, "bf16_cost", lambda device_type: cost)
    monkeypatch.setattr(compute, "available_bytes", lambda: free_bytes)


@pytest.mark.parametrize(
    ("cost", "free_bytes", "precision"),
    [(0.3, 1 << 40, "bf16"), (40.0, 1 << 40, "fp32"), (40.0, 1000, "int8")],
)
def test_load_goes_by_what_the_machine_can_do(
    monkeypatch: pytest.MonkeyPatch, bf16: Path, cost: float, free_bytes: int, precision: str
) -> None:
    pytest.importorskip("torchao", reason="needs the extra int8")
    _machine(monkeypatch, cost, free_bytes)
    session = load(bf16, device="cpu")
    assert session.plan is not None and session.plan.precision == precision
    assert session.ask("say one two", max_new_tokens=2).tokens.generated <= 2
    assert f"cpu, {precision} (bf16 products" in session.plan.describe()


def test_load_does_not_round_weights_stored_in_fp32(
    monkeypatch: pytest.MonkeyPatch, fp32: Path
) -> None:
    _machine(monkeypatch, 0.3, 1 << 40)
    plan = plan_inference(fp32, device="cpu")
    assert (plan.precision, plan.reason) == ("fp32", "as the weights are stored")
    assert plan_inference(fp32, device="cpu", autocasts=True).precision == "bf16"
    assert plan_inference(fp32, device="cpu", precision="bf16").precision == "bf16"


@torch.inference_mode()
def test_int8_weights_answer_as_fp32_up_to_their_rounding(bf16: Path) -> None:
    torchao = pytest.importorskip("torchao", reason="needs the extra int8")
    ids = torch.arange(4, 40)[None]
    plans = [plan_inference(bf16, device="cpu", precision=name) for name in ("fp32", "int8")]
    plain, small = (load_planned(bf16, plan) for plan in plans)
    ours, theirs = small(ids).logits, plain(ids).logits
    assert ours.dtype == torch.float32
    # Rows of 32 to 48 weights with steps of 1/127 of the largest: a few per cent after two layers.
    assert (ours - theirs).abs().max() < 0.05 * theirs.abs().max()
    assert not torch.equal(ours, theirs)
    kinds = {type(layer.self_attn.q_proj.weight) for layer in small.model.language_model.layers}
    assert all(kind.__module__.startswith(torchao.__name__) for kind in kinds)


def test_int8_without_its_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(MissingDependency, match=r"pip install 'mono-internvl\[int8\]'"):
        quantize_int8(torch.nn.Linear(2, 2))


def test_evaluation_computes_as_planned_and_says_so(
    monkeypatch: pytest.MonkeyPatch, fp32: Path, tmp_path: Path
) -> None:
    records = write_lines(tmp_path / "records.jsonl", [text_record(i) for i in range(3)])
    attentions = []
    forward = DecoderLayer.forward

    def spy(self: DecoderLayer, *args: Any, **kwargs: Any) -> Any:
        used = self.self_attn.config._attn_implementation
        attentions.append((used, torch.is_autocast_enabled("cpu")))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(DecoderLayer, "forward", spy)
    for cost, precision, attention in ((40.0, "fp32", "sdpa"), (0.3, "bf16", "blocked")):
        _machine(monkeypatch, cost, 1 << 40)
        attentions.clear()
        said: list[str] = []
        found = evaluate(
            fp32,
            records,
            device="cpu",
            protocol=Protocol(max_new_tokens=2),
            out=tmp_path / f"{precision}.jsonl",
            on_plan=lambda plan, said=said: said.append(plan.describe()),
        )
        assert found.plan["precision"] == precision
        assert set(attentions) == {(attention, precision == "bf16")}
        assert said and said[0].startswith(f"plan: cpu, {precision} (")
