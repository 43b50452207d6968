"""Models shared out over two gloo processes: the numbers of one, and states read by any number."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import sharing
import tiny_runs
import torch
from safetensors.torch import load_file

from mono_internvl.distributed import run_processes
from mono_internvl.errors import ConfigError
from mono_internvl.training.loop import train_stage
from mono_internvl.training.parallel import parallelism_of
from mono_internvl.training.state_folders import StateFolders

FIRST_STEP = 1e-6
"""Relative, of a loss: two processes add it up in another order."""
LATER = 1e-4
"""The same after up to twenty steps of AdamW."""

# One sample a process: at some steps one has an image and the other has none.
MIXED = tiny_runs.tiny_stage(batch_size=2, checkpoint_every=0)
STAGES = {
    "mixed": MIXED,
    # Only visual parts learn: a process with text alone has nothing to differentiate.
    "visual": dataclasses.replace(MIXED, rules=tiny_runs.VISION_AND_EXPERTS),
    "accumulated": dataclasses.replace(
        MIXED, batch_size=8, accumulation=2, loss_weighting="square", recompute="full", steps=4
    ),
    # Rows of about one sample: some processes get one that nothing is learnt from.
    "packed": dataclasses.replace(
        MIXED, batch_size=3, packing="best_fit", max_tokens=64, packed_tokens=64, steps=6
    ),
}
RESHARDED = tiny_runs.tiny_stage(batch_size=2, steps=44, checkpoint_every=2)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, start: Path, data: Path) -> Path:
    """The stages in one process."""
    root = tmp_path_factory.mktemp("alone")
    for name, stage in {**STAGES, "resharded": RESHARDED}.items():
        train_stage(stage, start, data, root / name, parallel="fsdp")
    return root


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, start: Path, data: Path) -> Path:
    """The same, shared out over one pair of processes; and a run of three parts, its second."""
    root = tmp_path_factory.mktemp("pair")
    part = root / "resharded"
    sharing.train_plans([("fsdp", RESHARDED, part, 3)], start, data, root)
    plans: list[sharing.Plan] = [("fsdp", stage, root / n, 0) for n, stage in STAGES.items()]
    plans.append(("fsdp", dataclasses.replace(MIXED, precision="bf16"), root / "bf16", 0))
    plans.append(("fsdp_offload", MIXED, root / "offload", 0))
    plans.append(("fsdp", RESHARDED, part, 23))
    run_processes(sharing.train_plans, 2, plans, start, data, root)
    return root


def _losses(run: Path) -> torch.Tensor:
    rows = tiny_runs.metric_rows(run / "metrics.jsonl")
    return torch.tensor([row["loss"] for row in rows], dtype=torch.float64)


@pytest.mark.parametrize("name", [*STAGES, "offload"])
def test_shared_model_gives_the_curve_of_a_whole_one(alone: Path, pair: Path, name: str) -> None:
    one, two = _losses(alone / name.replace("offload", "mixed")), _losses(pair / name)
    torch.testing.assert_close(two[:1], one[:1], rtol=FIRST_STEP, atol=0)
    torch.testing.assert_close(two, one, rtol=LATER, atol=0)
    whole, shared = (
        tiny_runs.metric_rows(root / each / "metrics.jsonl")
        for root, each in ((alone, name.replace("offload", "mixed")), (pair, name))
    )
    for a, b in zip(whole, shared, strict=True):
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-3, abs=1e-6)
        assert (b["tokens"], b["images"]) == (a["tokens"], a["images"])


def test_stages_of_the_test_meet_the_hard_cases(pair: Path) -> None:
    images = [row["images"] for row in tiny_runs.metric_rows(pair / "visual" / "metrics.jsonl")]
    assert {0, 1, 2} == set(images), "none, one process only, both"
    rows = [row["rows"] for row in tiny_runs.metric_rows(pair / "packed" / "metrics.jsonl")]
    assert any(number % 2 for number in rows), "one process gets a row without samples"


def test_layers_gathered_in_bf16_stay_near_fp32(alone: Path, pair: Path) -> None:
    fp32, bf16 = _losses(alone / "mixed"), _losses(pair / "bf16")
    torch.testing.assert_close(bf16, fp32, rtol=0.05, atol=0)
    assert not torch.equal(bf16, fp32)


def test_weights_and_moments_are_shared_out(pair: Path) -> None:
    first, second = (json.loads((pair / f"held-{n}.json").read_text()) for n in (0, 1))
    for what in ("weights", "moments"):
        (mine, whole), (yours, _) = first["mixed"][what], second["mixed"][what]
        assert mine + yours == whole
        assert mine < 0.6 * whole


def test_finished_stage_of_shards_is_a_checkpoint_like_any_other(alone: Path, pair: Path) -> None:
    whole, shared = (
        load_file(root / "visual" / "checkpoint" / "model.safetensors") for root in (alone, pair)
    )
    assert whole.keys() == shared.keys()
    for name, tensor in whole.items():
        torch.testing.assert_close(shared[name], tensor, rtol=0, atol=1e-3)
    frozen = [name for name in whole if "tok_embeddings" in name]
    assert frozen and all(torch.equal(whole[name], shared[name]) for name in frozen)


def test_one_two_one_processes_give_the_curve_of_one(
    alone: Path, pair: Path, start: Path, data: Path
) -> None:
    """A state of one process is gone on with in two, and one of two in one."""
    run = pair / "resharded"
    found = StateFolders(run).latest()
    assert found is not None and found.step == 22 and found.files is not None
    assert sum(name.endswith(".safetensors") for name in found.files) == 2, "each wrote its own"
    assert train_stage(RESHARDED, start, data, run).resumed_at == 22
    one, parts = _losses(alone / "resharded"), _losses(run)
    assert len(parts) == 44
    for first in (2, 22):  # 0-based: the steps after the states that were read by others
        torch.testing.assert_close(parts[first], one[first], rtol=FIRST_STEP, atol=0)
    torch.testing.assert_close(parts, one, rtol=LATER, atol=0)
    assert not torch.equal(parts[:22], one[:22]), "two processes were at work"


def test_offloading_needs_processes_to_share_with() -> None:
    with pytest.raises(ConfigError, match=r"fsdp_offload' with one process: .*torchrun"):
        parallelism_of("fsdp_offload", "fp32").wrap(torch.nn.Linear(2, 2))
