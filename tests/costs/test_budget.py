"""What `mono-internvl plan` says: held against the paper, hand counts and steps that are run."""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import Any

import pytest
import tiny_runs
import torch
from tiny_models import TOKENS_PER_TILE, tiny_config, tiny_model

from mono_internvl.checkpoints.presets import preset
from mono_internvl.cli import app as cli
from mono_internvl.cli.recipes import RECIPES
from mono_internvl.costs import budget as module
from mono_internvl.costs.accelerators import ACCELERATORS, accelerator, peak_tflops_of
from mono_internvl.costs.budget import Fleet, StageBudget, budget, longest_sample
from mono_internvl.costs.kept import KeptBytes, Sketch
from mono_internvl.costs.training import SampleShape
from mono_internvl.errors import ConfigError
from mono_internvl.training.recipe import Rule
from mono_internvl.training.rules import apply_rules

PAPER = Fleet(256, accelerator("a100-80g"), 0.4)


class _NoSketch:
    """Stands for `Sketch` where memory is not asked for: 1 GB a layer and sample."""

    def __init__(self, config: Any) -> None:
        self.config = config

    def kept_bytes(self, stage: Any, sample: SampleShape, num_samples: int) -> KeptBytes:
        return KeptBytes(10**9 * num_samples, 10**9, 10**7 * num_samples, 24)


@pytest.fixture(scope="module")
def evip() -> list[StageBudget]:
    """The budget of the published recipe on the paper's machines."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "Sketch", _NoSketch)
        return budget(RECIPES["evip-2b"], preset("v1"), PAPER)


def test_budget_of_evip_is_the_papers(evip: list[StageBudget]) -> None:
    assert [one.sample.visual_tokens for one in evip] == [1280, 1792, 3328, 6400]
    samples = [one.samples for one in evip]
    assert samples == pytest.approx([922e6, 258e6, 143e6, 14.3e6], rel=0.003), "table 1"
    pre_training = evip[:3]
    assert sum(one.tokens for one in pre_training) == pytest.approx(2.40e12, rel=0.002)
    flops = sum(one.flops for one in pre_training)
    # An estimate by hand that counts all rows of the last layer comes to 2.15e22.
    assert flops == pytest.approx(2.15e22, rel=0.02)
    # 16 days on 256 A100 (arXiv 2410.08202, appendix): the paper's own ratio was no higher.
    assert PAPER.mfu_of(flops, 16) == pytest.approx(0.195, rel=0.02)
    assert sum(one.days for one in pre_training) == pytest.approx(16 * 0.195 / 0.4, rel=0.02)


def test_budget_counts_disk_by_what_is_trainable(evip: list[StageBudget]) -> None:
    total = 3_111_355_392
    trainable = [1_171_875_840, 1_171_875_840, 1_473_865_728, 3_061_022_720]
    assert [one.trainable for one in evip] == trainable
    assert {one.checkpoint_bytes for one in evip} == {4 * total}
    assert [one.state_bytes for one in evip] == [4 * total + 8 * count for count in trainable]
    memory = evip[0].layouts[0].memory
    assert (memory.weights, memory.gradients) == (4 * total, 4 * trainable[0])
    assert memory.moments == 8 * trainable[0]
    of_pixels = 1024 * 28 * 28 * module.JPEG_BYTES_OF_PIXEL  # the thumbnail is no picture
    assert evip[0].data_bytes == pytest.approx(evip[0].samples * (of_pixels + 4 * 145))


def test_layouts_are_the_first_that_fit(evip: list[StageBudget]) -> None:
    # S1.1: weights, gradients, moments 26.5 GB; a sample keeps 24 GB, recomputed 2.2 GB.
    replicated, sharded = evip[0].layouts
    assert (replicated.accumulation, replicated.samples, replicated.fits) == (8, 1, True)
    assert (sharded.accumulation, sharded.samples, sharded.recompute) == (4, 2, "none")
    assert sharded.memory.weights == replicated.memory.weights // 256
    # S2: 49 GB; not even one sample fits without recomputation.
    assert (evip[3].layouts[0].recompute, evip[3].layouts[0].fits) == ("full", True)


def test_fleet_that_is_too_small_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "Sketch", _NoSketch)
    small = Fleet(8, accelerator("a100-40g"), 0.4)
    found = budget(RECIPES["sft"], preset("v1"), small, records=665_298)[0]
    assert [one.fits for one in found.layouts] == [False, True]
    assert found.samples == 128 * 5198 and found.tokens == found.samples * 2048
    assert found.data_bytes < found.samples * 1536 * 28 * 28
    native = budget(RECIPES["native-2b"], preset("v1"), PAPER)[0]
    assert native.layouts[1].accumulation == 0 and native.samples == 44_000 * 2048


def test_reference_of_an_objective_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "Sketch", _NoSketch)
    (with_it,) = budget(RECIPES["mpo"], preset("v1"), PAPER, records=300_000)
    stage = dataclasses.replace(
        RECIPES["mpo"].stages[0], objective=RECIPES["sft"].stages[0].objective
    )
    plain = dataclasses.replace(RECIPES["mpo"], stages=(stage,))
    (without,) = budget(plain, preset("v1"), PAPER, records=300_000)
    first, second = with_it.layouts[1].memory, without.layouts[1].memory
    assert first.weights == 2 * second.weights and first.moments == second.moments
    # Forward once more beside forward and twice as much backward.
    assert with_it.flops == pytest.approx(without.flops * 4 / 3, rel=0.01)


@pytest.mark.parametrize(
    ("recipe", "options", "complaint"),
    [
        ("sft", {}, "counts 1 epochs; say with --records"),
        ("evip-2b", {"tokens": (1280, 500)}, "1280 visual and 500 text tokens; it takes 1425"),
        ("evip-2b", {"tokens": (1280, 1)}, "text=1; expected 4"),
        ("evip-2b", {"tokens": (100, 50)}, "visual=100; expected a multiple of 256"),
        ("evip-2b", {"gpus": 3}, "2048 samples of a step do not divide among 3 GPUs"),
        ("evip-2b", {"mfu": 0.0}, "mfu=0.0"),
        ("evip-2b", {"mfu": float("nan")}, "mfu=nan"),
    ],
)
def test_budget_refuses_what_is_none(
    monkeypatch: pytest.MonkeyPatch, recipe: str, options: dict[str, Any], complaint: str
) -> None:
    monkeypatch.setattr(module, "Sketch", _NoSketch)
    with pytest.raises(ConfigError, match=complaint):
        changed = {name: options.pop(name) for name in ("gpus", "mfu") if name in options}
        budget(RECIPES[recipe], preset("v1"), dataclasses.replace(PAPER, **changed), **options)


def test_accelerators_are_found_by_either_name() -> None:
    assert peak_tflops_of("NVIDIA H100 80GB HBM3") == 989
    assert peak_tflops_of("AMD EPYC") is None
    assert all(name == one.name for name, one in ACCELERATORS.items())
    with pytest.raises(ConfigError, match="gpu='v100' is not known; choose from a100-40g"):
        accelerator("v100")


def _kept_in_fact(layers: int, rules: tuple[Rule, ...], sample: SampleShape, count: int) -> int:
    """Bytes that autograd keeps of a real step of a tiny model in bf16 autocast."""
    model = tiny_model(attention="sdpa", num_hidden_layers=layers).train()
    apply_rules(model, model.config, tiny_runs.tiny_stage(rules=rules))
    inputs = Sketch(model.config).inputs(sample, count)
    real = {n: v for n, v in inputs.items() if not isinstance(v, torch.Tensor)}
    shape = inputs["labels"].shape
    is_visual = torch.zeros(shape, dtype=torch.bool)
    is_visual[:, : sample.visual_tokens] = True
    labels = torch.full(shape, -100)
    labels[:, shape[1] - sample.labelled_tokens :] = 0
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16):
        loss = model(
            **real,
            input_ids=is_visual * model.config.image_token_id,
            pixel_values=torch.rand(inputs["pixel_values"].shape),
            labels=labels,
            loss_weight=torch.ones(shape),
            num_items_in_batch=torch.ones(()),
        ).loss
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert loss.isfinite()
    return sum(t.untyped_storage().nbytes() for key, t in kept.items() if key not in weights)


@pytest.mark.parametrize("layers", [4, 6])
@pytest.mark.parametrize("rules", [(Rule("_visual", 1e-3), Rule(".*", None)), (Rule(".*", 1e-3),)])
def test_sketch_keeps_what_a_step_keeps(layers: int, rules: tuple[Rule, ...]) -> None:
    sample, count = SampleShape(2 * TOKENS_PER_TILE, 20, 12), 3
    stage = tiny_runs.tiny_stage(rules=rules)
    found = Sketch(tiny_config(num_hidden_layers=layers)).kept_bytes(stage, sample, count)
    assert found.total == pytest.approx(_kept_in_fact(layers, rules, sample, count), rel=0.02)
    assert found.recomputed < found.total


def test_a_4khd_model_is_budgeted_with_its_learned_tokens() -> None:
    config = tiny_config()
    config.change({"tiling": "xcomposer_4khd", "max_dynamic_patch": 4})
    stage = tiny_runs.tiny_stage(max_tiles=4, max_tokens=80)
    sample = longest_sample(stage, config)
    assert sample == SampleShape(5 * (4 + 2) + 1, 49, 47, tiles=5)
    assert Sketch(config).kept_bytes(stage, sample, 2).layer > 0
    with pytest.raises(ConfigError, match="they depend on the shapes of images"):
        budget(RECIPES["evip-2b"], config, PAPER, tokens=(31, 9))


def test_longest_sample_leaves_room_for_text() -> None:
    config = preset("v1")
    stage = RECIPES["sft"].stages[0]
    assert longest_sample(stage, config) == SampleShape(1792, 256, 254)
    narrow = dataclasses.replace(stage, max_tokens=1792)
    assert longest_sample(narrow, config).visual_tokens == 6 * 256


def test_plan_prints_and_gives_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "Sketch", _NoSketch)

    def said(*arguments: str) -> str:
        asked = ["mono-internvl", "plan", *arguments, "--gpus", "256", "--gpu", "a100-80g"]
        monkeypatch.setattr(sys, "argv", asked)
        with pytest.raises(SystemExit) as end:
            cli.main()
        out = capsys.readouterr()
        assert not end.value.code, out.err
        return out.out

    text = said("evip-2b", "--mfu", "0.195")
    assert "in all: 2.51e+12 tokens, 2.25e+22 operations owed" in text
    assert "days, MFU 0.195" in text and "data, about" in text
    found = json.loads(said("evip-plus-plus-2b", "--tokens", "visual=768,text=60", "--json"))
    first = found["stages"][0]
    assert first["sample"]["visual_tokens"] == 768 and found["fleet"]["gpus"] == 256
    memory = first["layouts"][0]["memory"]
    assert memory["total"] == sum(value for name, value in memory.items() if name != "total")
    assert first["checkpoint_bytes"] == 4 * (3_111_355_392 + 301_989_888), "attention experts"
