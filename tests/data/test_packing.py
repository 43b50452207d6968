"""Packed steps: full rows, every sample once whoever asks, and the loss of the samples alone."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import tiny_shards
import torch

from mono_internvl.data.batches import BatchPlan, BatchStream, read_ahead
from mono_internvl.data.encoder import RecordEncoder
from mono_internvl.data.packed import PackedStream
from mono_internvl.data.packing import pack
from mono_internvl.data.sources import Source, read_meta
from mono_internvl.errors import SampleError
from mono_internvl.model.modeling import MonoInternVLForConditionalGeneration
from mono_internvl.processing.processor import MonoInternVLProcessor

CAPACITY = 100


@pytest.mark.parametrize("seed", range(5))
def test_rows_hold_every_sample_once_and_no_row_too_much(seed: int) -> None:
    rng = random.Random(seed)
    lengths = [rng.randint(1, 100) for _ in range(rng.randint(1, 300))]
    rows = pack(lengths, 100)
    assert Counter(i for row in rows for i in row) == Counter(range(len(lengths)))
    filled = [sum(lengths[i] for i in row) for row in rows]
    assert max(filled) <= 100 and filled == sorted(filled, reverse=True)
    # Best fit, longest first, takes at most 11/9 of the fewest rows, and one more.
    assert len(rows) <= 11 / 9 * -(-sum(lengths) // 100) + 1 or sum(x > 50 for x in lengths) > 0
    assert pack(lengths, 100) == rows


def test_nothing_is_packed_to_nothing_and_too_long_is_refused() -> None:
    assert pack([], 10) == []
    assert pack([10, 10], 10) == [[0], [1]]
    with pytest.raises(ValueError, match="a sample of 11 tokens for rows of 10"):
        pack([11], 10)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_runs.write_checkpoint(tmp_path_factory.mktemp("tiny") / "start")


@pytest.fixture(scope="module")
def processor(checkpoint: Path) -> MonoInternVLProcessor:
    return MonoInternVLProcessor.from_pretrained(checkpoint)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[Source]:
    """18 images in two shards and 12 texts, twice each epoch."""
    folder = tmp_path_factory.mktemp("data")
    for number in range(2):
        members = tiny_shards.caption_members(range(number * 9, number * 9 + 9))
        tiny_shards.write_tar(folder / f"{number}.tar", members)
    tiny_runs.write_lines(folder / "t.jsonl", [tiny_runs.text_record(i) for i in range(12)])
    entries = {
        "captions": {"annotation": "*.tar"},
        "text": {"root": ".", "annotation": "t.jsonl", "repeat_time": 2},
    }
    return read_meta(tiny_shards.write_meta(folder / "m.json", entries))


def _plan(processor: MonoInternVLProcessor, **fields: Any) -> BatchPlan:
    given: dict[str, Any] = {
        "batch_size": 14,
        "max_tokens": 80,
        "pad_token_id": 2,
        "image_token_id": processor.image_token_id,
    }
    return BatchPlan(**{**given, **fields})


def _stream(processor: MonoInternVLProcessor, sources: list[Source], **fields: Any) -> PackedStream:
    return PackedStream(
        sources, RecordEncoder(processor, 1), _plan(processor, **fields), CAPACITY, seed=0
    )


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("workers", [0, 2])
def test_epoch_holds_every_sample_for_any_number_of_processes_and_readers(
    processor: MonoInternVLProcessor, sources: list[Source], world: int, workers: int
) -> None:
    if workers and world in (1, 5):
        pytest.skip("two counts of processes are enough with readers")
    shares = [
        list(read_ahead(_stream(processor, sources, rank=r, world_size=world), range(3), workers))
        for r in range(world)
    ]
    assert len(sources[0]) + 2 * len(sources[1]) == 42
    seen: Counter[str] = Counter()
    for step in range(3):
        micro = [share[step] for share in shares]
        assert len({len(batches) for batches in micro}) == 1, "every process takes part"
        rows = [batch for batches in micro for batch in batches]
        assert sum(len(batch.record_ids) for batch in rows) == 14, "a step holds its samples"
        assert all(batch.input_ids.shape[1] <= CAPACITY for batch in rows)
        seen.update(i for batch in rows for i in batch.record_ids)
    expected = Counter({f"{i:09d}": 1 for i in range(18)})
    assert seen == expected + Counter({f"text-{i}": 2 for i in range(12)})


def test_rows_are_the_same_for_any_number_of_processes(
    processor: MonoInternVLProcessor, sources: list[Source]
) -> None:
    def rows(world: int) -> set[tuple[str, ...]]:
        shares = [_stream(processor, sources, rank=r, world_size=world)[1] for r in range(world)]
        return {batch.record_ids for share in shares for batch in share} - {()}

    assert rows(1) == rows(2) == rows(4)


def test_positions_start_anew_and_no_sample_predicts_the_next(
    processor: MonoInternVLProcessor, sources: list[Source]
) -> None:
    for batch in _stream(processor, sources)[0]:
        assert batch.position_ids is not None
        positions = batch.position_ids[0]
        starts = (positions == 0).nonzero().squeeze(1)
        assert len(starts) == len(batch.record_ids)
        lengths = torch.diff(starts, append=torch.tensor([len(positions)]))
        assert torch.equal(positions, torch.cat([torch.arange(n) for n in lengths]))
        assert (batch.labels[0, starts] == -100).all()
        assert (batch.loss_weight[0, starts] == 0).all()
        assert batch.input_ids.shape[1] == batch.num_tokens, "no padding"


@pytest.mark.parametrize("attention", ["sdpa", "eager", "blocked"])
@pytest.mark.parametrize("weighting", ["token", "sample", "square"])
def test_packed_loss_and_gradients_are_those_of_the_samples_alone(
    checkpoint: Path,
    processor: MonoInternVLProcessor,
    sources: list[Source],
    attention: str,
    weighting: Any,
) -> None:
    model = MonoInternVLForConditionalGeneration.from_pretrained(
        checkpoint, dtype=torch.float32, attn_implementation=attention
    )

    def total(batches: Any) -> tuple[float, list[torch.Tensor]]:
        model.zero_grad(set_to_none=True)
        whole = sum(float(batch.loss_weight.sum()) for batch in batches)
        losses = 0.0
        for batch in batches:
            loss = model(
                input_ids=batch.input_ids,
                pixel_values=batch.pixel_values,
                position_ids=batch.position_ids,
                routing=batch.routing,
                labelled=batch.labelled,
                labels=batch.labels,
                loss_weight=batch.loss_weight,
                num_items_in_batch=whole,
                logits_to_keep=None,
            ).loss
            loss.backward()
            losses += float(loss.detach())
        return losses, [p.grad for p in model.parameters() if p.grad is not None]

    plan = _plan(processor, loss_weighting=weighting, window=1)
    alone = BatchStream(sources, RecordEncoder(processor, 1), plan, seed=0)
    packed = PackedStream(sources, RecordEncoder(processor, 1), plan, CAPACITY, seed=0)
    assert len(packed[0]) > 1
    expected, gradients = total([alone[0]])
    found, packed_gradients = total(packed[0])
    assert found == pytest.approx(expected, rel=1e-5)
    for one, other in zip(gradients, packed_gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_length_is_that_of_the_encoded_sample(
    processor: MonoInternVLProcessor, sources: list[Source]
) -> None:
    encode = RecordEncoder(processor, 1)
    for source in sources:
        for index in (0, 5, 8):
            record = source.record(index)
            assert encode.length(encode.measure(record)) == len(encode(record).input_ids)


def test_bad_records_are_said_once_and_a_process_without_samples_takes_part(
    processor: MonoInternVLProcessor, tmp_path: Path
) -> None:
    broken = tiny_shards.picture(1)[:600]  # its header is whole
    members = [
        *(("0.jpg", b"no image"), ("0.txt", b"red")),
        *(("1.jpg", broken), ("1.txt", b"red")),
        *(("2.txt", b"word " * 200),),
        *(("3.txt", b"a few words"),),
    ]
    tiny_shards.write_tar(tmp_path / "0.tar", members)
    entry = {"mine": {"annotation": "0.tar"}}
    sources = read_meta(tiny_shards.write_meta(tmp_path / "m.json", entry))
    fields = {"batch_size": 4, "on_bad_sample": "skip"}
    micro = [
        batch
        for rank in range(3)
        for batch in _stream(processor, sources, rank=rank, world_size=3, **fields)[0]
    ]
    assert Counter(s.reason for b in micro for s in b.skipped) == Counter(
        {"image damaged": 2, "too long": 1}
    )
    assert [b.record_ids for b in micro if b.record_ids] == [("3",)]
    idle = [b for b in micro if not b.record_ids]
    assert len(micro) == 3 and all(float(b.loss_weight.sum()) == 0 for b in idle)
    with pytest.raises(SampleError, match=r"0\.tar:"):
        _stream(processor, sources, batch_size=4)[0]
