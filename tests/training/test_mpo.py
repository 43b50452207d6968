"""MPO against the formulas, written out pair by pair; its data, its shift, and the loop."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import stored
import tiny_runs
import torch
from interrupted import interrupt
from safetensors.torch import load_file
from torch import Tensor, nn

from mono_internvl import MonoInternVLForConditionalGeneration, MonoInternVLProcessor
from mono_internvl.data.batches import Batch, BatchPlan, collate
from mono_internvl.data.encoder import RecordEncoder
from mono_internvl.data.records import Record, parse_record, to_conversation
from mono_internvl.data.sources import FileImage
from mono_internvl.errors import RecipeError, SampleError
from mono_internvl.training.loop import train_stage
from mono_internvl.training.objectives.mpo import MPO
from mono_internvl.training.recipe import Stage

TOLERANCE = 2e-6
"""Of fp32 sums over a dozen tokens, in one pass over all rows here, row by row there: 4e-7."""
BETA, SHIFT = 0.1, 0.07


def pair_records(folder: Path, count: int = 8) -> list[dict[str, Any]]:
    """Pairs with and without an image, with answers of one and of several tokens."""
    records: list[dict[str, Any]] = []
    for number in range(count):
        shown = tiny_runs.image_record(folder, number)
        wrong = "one two three" if number % 3 else "blue"
        pair = {"question": "<image>\nwhat colour is this?", "image": shown["image"]}
        if number % 4 == 3:
            pair = {"question": "say one two"}
        chosen = "one two" if number % 4 == 3 else f"it is {shown['answer']}"
        records.append({"id": f"pair-{number}", **pair, "chosen": chosen, "rejected": wrong})
    return records


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `pairs.json`."""
    folder = tmp_path_factory.mktemp("pairs")
    tiny_runs.write_lines(folder / "pairs.jsonl", pair_records(folder))
    meta = {"pairs": {"root": ".", "annotation": "pairs.jsonl", "repeat_time": 1}}
    (folder / "pairs.json").write_text(json.dumps(meta))
    return folder


@pytest.fixture(scope="module")
def models(start: Path) -> tuple[nn.Module, nn.Module, MonoInternVLProcessor]:
    """A policy that has moved away, its reference, and their processor."""
    reference = MonoInternVLForConditionalGeneration.from_pretrained(start, dtype=torch.float32)
    policy = copy.deepcopy(reference)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return policy, reference.eval(), MonoInternVLProcessor.from_pretrained(start)


def records_of(folder: Path) -> list[Record]:
    return [
        parse_record(value, n, f"pairs:{n}", lambda name: FileImage(folder / name))
        for n, value in enumerate(pair_records(folder))
    ]


def batch_of(folder: Path, processor: MonoInternVLProcessor, **changed: Any) -> Batch:
    plan = BatchPlan(
        batch_size=8,
        max_tokens=128,
        pad_token_id=0,
        image_token_id=processor.image_token_id,
        loss_weighting="sample",
        **{"is_paired": True, **changed},
    )
    encode = RecordEncoder(processor, 1)
    return collate([encode(record) for record in records_of(folder)], plan, (), ())


def by_formulas(
    policy: nn.Module, reference: nn.Module, processor: MonoInternVLProcessor, folder: Path
) -> Tensor:
    """The mean over pairs of 0.8 DPO + 0.2 BCO + next token, answer by answer."""

    def logprobs(model: nn.Module, turns: Any) -> Tensor:
        """Of an answer's tokens; the whole conversation alone, all of its logits."""
        sample = processor.encode_conversation(turns, max_tiles=1)
        logits = model(sample.input_ids[None], pixel_values=sample.pixel_values).logits[0]
        places = [t for t in range(1, len(sample.labels)) if sample.labels[t] >= 0]
        rows = [logits[t - 1] - torch.logsumexp(logits[t - 1], 0) for t in places]
        return torch.stack([row[sample.labels[t]] for row, t in zip(rows, places, strict=True)])

    losses = []
    for record in records_of(folder):
        assert record.rejected_turns is not None
        good, bad = logprobs(policy, record.turns), logprobs(policy, record.rejected_turns)
        with torch.no_grad():
            was_good = logprobs(reference, record.turns).sum()
            was_bad = logprobs(reference, record.rejected_turns).sum()
        up, down = BETA * (good.sum() - was_good), BETA * (bad.sum() - was_bad)
        dpo = torch.log(1 + torch.exp(down - up))
        bco = torch.log(1 + torch.exp(SHIFT - up)) + torch.log(1 + torch.exp(down - SHIFT))
        losses.append(0.8 * dpo + 0.2 * bco - good.mean())
    return torch.stack(losses).mean()


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {n: g for n, g in zip(named, found, strict=True) if g is not None}


def _full(model: nn.Module) -> nn.Module:
    return model


def _lora(model: nn.Module) -> nn.Module:
    peft = pytest.importorskip("peft", reason="in the extra [dev]")
    config = peft.LoraConfig(r=2, target_modules=r".*self_attn\.(q|v)_proj|.*mlp_visual\.up_proj")
    adapted = peft.get_peft_model(copy.deepcopy(model), config)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return adapted  # type: ignore[no-any-return]


@pytest.mark.parametrize("adapt", [_full, _lora])
def test_mpo_loss_and_gradients_are_those_of_the_formulas(
    adapt: Callable[[nn.Module], nn.Module], models: Any, pairs: Path
) -> None:
    policy, reference, processor = models
    policy = adapt(policy)
    batch = batch_of(pairs, processor)
    state = {"shift": torch.tensor(SHIFT), "steps": torch.tensor(3)}
    denominator = batch.loss_weight.sum()
    assert denominator == pytest.approx(8)
    loss, scalars = MPO().loss(policy, batch, denominator, state, reference)
    expected = by_formulas(policy, reference, processor, pairs)
    assert loss.item() == pytest.approx(expected.item(), abs=TOLERANCE)
    ours, theirs = gradients(policy, loss), gradients(policy, expected)
    assert ours.keys() <= theirs.keys() and len(ours) > 5
    largest = max(float(g.abs().max()) for g in theirs.values())
    for name, gradient in theirs.items():  # of rows that nobody reads there is none, or zeros
        found = ours.get(name, torch.zeros_like(gradient))
        assert torch.allclose(found, gradient, atol=2e-5 * largest), name
    assert 0 <= float(scalars["ranked"]) <= 1
    assert float(scalars["shift"]) == pytest.approx(SHIFT)


def test_mpo_without_its_shift_is_another_loss(models: Any, pairs: Path) -> None:
    policy, reference, processor = models
    batch = batch_of(pairs, processor)
    objective, start = MPO(), MPO().initial_state()
    one = [objective.loss(policy, batch, torch.tensor(8.0), start, reference)[1]]
    carried = objective.next_state(start, {k: float(v) for k, v in one[0].items()})
    mean = (float(one[0]["reward_chosen"]) + float(one[0]["reward_rejected"])) / 2
    assert float(carried["shift"]) == pytest.approx(mean) and abs(mean) > 1e-3
    carried = objective.next_state(carried, {"reward_chosen": 1.0, "reward_rejected": 3.0})
    assert float(carried["shift"]) == pytest.approx((mean + 2) / 2), "the mean of both steps"
    loss, zero = (
        objective.loss(policy, batch, torch.tensor(8.0), state, reference)
        for state in (carried, start)
    )
    assert abs(loss[0].item() - zero[0].item()) > 1e-2
    assert float(loss[1]["preference"]) == float(zero[1]["preference"])
    some = [gradients(policy, found[0]) for found in (loss, zero)]
    assert any((some[0][name] - some[1][name]).abs().max() > 1e-4 for name in some[0])


def test_mpo_begins_at_even_odds(models: Any, pairs: Path) -> None:
    _, reference, processor = models
    scalars = MPO().loss(
        reference, batch_of(pairs, processor), torch.tensor(8.0), MPO().initial_state(), reference
    )[1]
    assert float(scalars["preference"]) == pytest.approx(math.log(2))
    assert float(scalars["quality"]) == pytest.approx(2 * math.log(2))
    assert float(scalars["reward_chosen"]) == float(scalars["reward_rejected"]) == 0


def test_batch_of_pairs_reads_every_tile_once(models: Any, pairs: Path) -> None:
    _, _, processor = models
    batch = batch_of(pairs, processor)
    assert batch.num_pairs == 8 and len(batch.input_ids) == 16
    assert batch.pixel_values is not None and len(batch.pixel_values) == batch.num_images == 6
    assert batch.routing.num_visual == 2 * 6 * tiny_runs.TOKENS_PER_TILE
    assert batch.loss_weight[8:].sum() == 0 and (batch.labels[8:] >= 0).any()
    plain = batch_of(pairs, processor, is_paired=False)
    assert len(plain.input_ids) == 8 and plain.num_pairs == 0 and plain.feature_order is None


STAGE = tiny_runs.tiny_stage(
    data="pairs.json",
    objective=MPO(),
    loss_weighting="sample",
    steps=8,
    batch_size=4,
    checkpoint_every=3,
)


def test_mpo_stage_ranks_its_pairs_and_resumes(
    monkeypatch: pytest.MonkeyPatch, start: Path, pairs: Path, tmp_path: Path
) -> None:
    whole = tiny_runs.metric_rows(train_stage(STAGE, start, pairs, tmp_path / "whole").metrics)
    assert whole[0]["preference"] == pytest.approx(math.log(2), abs=1e-6)
    assert whole[-1]["ranked"] > 0.7 and whole[-1]["reward_chosen"] > whole[-1]["reward_rejected"]
    rewards = [(row["reward_chosen"] + row["reward_rejected"]) / 2 for row in whole]
    assert whole[5]["shift"] == pytest.approx(sum(rewards[:5]) / 5, abs=1e-6)
    run = tmp_path / "run"
    interrupt(monkeypatch, 7, STAGE, start, pairs, run)
    carried = load_file(stored.shard(run / "step_00000006"))
    assert carried["objective.steps"].item() == 6 and carried["objective.shift"] != 0
    assert tiny_runs.metric_rows(train_stage(STAGE, start, pairs, run).metrics) == whole
    halves = dataclasses.replace(STAGE, accumulation=2)
    other = tiny_runs.metric_rows(train_stage(halves, start, pairs, tmp_path / "halves").metrics)
    for one, two in zip(whole, other, strict=True):
        for name in ("loss", "quality", "generation", "shift"):
            assert two[name] == pytest.approx(one[name], abs=1e-4), name


def test_mpo_stage_refuses_what_is_no_pair(
    start: Path, data: Path, pairs: Path, tmp_path: Path
) -> None:
    with pytest.raises(SampleError, match=r"images\.jsonl:\d+: no pair, but this stage learns"):
        train_stage(dataclasses.replace(STAGE, data="images.json"), start, data, tmp_path / "a")
    for wrong in ({"loss_weighting": "token"}, {"packing": "best_fit"}):
        with pytest.raises(RecipeError, match="learns from pairs: set loss_weighting"):
            dataclasses.replace(STAGE, **wrong)
    plain = tiny_runs.tiny_stage(data="pairs.json", steps=1)
    assert isinstance(plain, Stage)
    row = tiny_runs.metric_rows(train_stage(plain, start, pairs, tmp_path / "plain").metrics)[0]
    assert "preference" not in row, "the next token is learnt from chosen answers alone"


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"rejected": "it is red"}, "chosen and rejected are the same"),
        ({"rejected": " "}, "rejected=' '; expected an answer in words"),
        ({"chosen": 3}, "chosen=3; expected an answer in words"),
        ({"question": None}, "turn 0 lacks a text 'value'"),
        ({"image": None}, "1 <image> placeholders but 0 images"),
        ({"conversations": "x"}, r"roles \[\]; expected human"),
    ],
)
def test_damaged_pair_is_refused_by_its_place(changed: dict[str, Any], said: str) -> None:
    record = {"image": "a", "question": "<image>\nwhat?", "chosen": "it is red", "rejected": "no"}
    with pytest.raises(SampleError, match=f"^pairs:3: .*({said})"):
        parse_record({**record, **changed}, 3, "pairs:3", lambda name: FileImage(Path(name)))


def test_pair_goes_through_shards_whole(pairs: Path) -> None:
    for record in records_of(pairs):
        images = iter(record.images)
        value = {**to_conversation(record), "image": [str(image) for image in record.images]}
        again = parse_record(value, 0, "shard", lambda _, left=images: next(left))
        assert again.rejected_turns == record.rejected_turns and again.turns == record.turns
