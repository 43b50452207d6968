"""Batches: padding, labels and weights against hand computation; the n-th is a function of n."""

from __future__ import annotations

import pickle
from collections import Counter
from pathlib import Path

import pytest
import tiny_runs
import torch

from mono_internvl.data.batches import Batch, BatchPlan, BatchStream, read_ahead
from mono_internvl.data.records import Record
from mono_internvl.data.sources import JsonlSource, read_meta
from mono_internvl.errors import ImageError, PromptError, RecipeError, SampleError
from mono_internvl.processing.encoding import Sample
from mono_internvl.processing.processor import MonoInternVLProcessor
from mono_internvl.processing.tiling import TokenLayout

PAD, IMAGE = 99, 98


def _encode(record: Record) -> Sample:
    """`Q:A:I` in a record's question: Q question tokens, A answer tokens, I images of two tiles."""
    question, answer, images = (int(n) for n in record.turns[0].text.split(":"))
    ids = torch.arange(1, question + answer + 1)
    labels = ids.clone()
    labels[:question] = -100
    pixels = torch.full((2 * images, 3, 4, 4), float(answer)) if images else None
    return Sample(ids, labels, pixels, (TokenLayout(2, 2),) * images)


def _source(folder: Path, *specs: str) -> JsonlSource:
    turns = [
        [{"from": "human", "value": spec}, {"from": "gpt", "value": "x" * len(spec)}]
        for spec in specs
    ]
    records = [{"id": f"r{i}", "conversations": turn} for i, turn in enumerate(turns)]
    return JsonlSource(tiny_runs.write_lines(folder / "s.jsonl", records), folder)


def _stream(folder: Path, *specs: str, **plan: object) -> BatchStream:
    fields = {
        "batch_size": len(specs),
        "max_tokens": 20,
        "pad_token_id": PAD,
        "image_token_id": IMAGE,
        "window": 1,
    }
    return BatchStream([_source(folder, *specs)], _encode, BatchPlan(**{**fields, **plan}), seed=0)  # type: ignore[arg-type]


def _row(batch: Batch, record_id: str) -> int:
    return batch.record_ids.index(record_id)


def test_batch_pads_right_and_learns_nothing_there(tmp_path: Path) -> None:
    batch = _stream(tmp_path, "2:1:0", "1:4:0")[0]
    short, long = _row(batch, "r0"), _row(batch, "r1")
    assert batch.input_ids[short].tolist() == [1, 2, 3, PAD, PAD]
    assert batch.input_ids[long].tolist() == [1, 2, 3, 4, 5]
    assert batch.labels[short].tolist() == [-100, -100, 3, -100, -100]
    assert batch.labels[long].tolist() == [-100, 2, 3, 4, 5]
    assert batch.num_tokens == 8
    assert (batch.pixel_values, batch.num_images) == (None, 0)


def test_batch_never_learns_the_first_token(tmp_path: Path) -> None:
    batch = _stream(tmp_path, "0:3:0")[0]
    assert batch.labels[0].tolist() == [-100, 2, 3]
    assert batch.loss_weight[0].tolist() == [0, 1, 1]


@pytest.mark.parametrize(
    ("weighting", "per_label"),
    [("token", (1, 1)), ("square", (1, 0.5)), ("sample", (1, 0.25))],
)
def test_loss_weights_are_one_over_labels_to_the_power(
    tmp_path: Path, weighting: str, per_label: tuple[float, float]
) -> None:
    batch = _stream(tmp_path, "2:1:0", "1:4:0", loss_weighting=weighting)[0]
    short, long = _row(batch, "r0"), _row(batch, "r1")
    assert batch.loss_weight[short].tolist() == [0, 0, per_label[0], 0, 0]
    assert batch.loss_weight[long].tolist() == [0, *[per_label[1]] * 4]


def test_pixels_follow_the_rows_and_images_are_counted(tmp_path: Path) -> None:
    batch = _stream(tmp_path, "1:2:1", "1:3:0", "1:4:2", "1:5:1")[0]
    assert batch.pixel_values is not None
    assert batch.num_images == 4
    images = {"r0": 1, "r1": 0, "r2": 2, "r3": 1}
    answers = {"r0": 2.0, "r2": 4.0, "r3": 5.0}
    expected = [answers[i] for i in batch.record_ids for _ in range(2 * images[i])]
    assert batch.pixel_values[:, 0, 0, 0].tolist() == expected


@pytest.mark.parametrize(
    ("bad", "complaint", "reason"),
    [
        ("1:40:0", "41 tokens, more than max_tokens=20", "too long"),
        ("3:0:0", "no answer token", "nothing to learn"),
    ],
)
def test_bad_sample_raises_or_is_skipped_and_said(
    tmp_path: Path, bad: str, complaint: str, reason: str
) -> None:
    with pytest.raises(SampleError, match=rf"s\.jsonl:2: {complaint}"):
        _stream(tmp_path, "1:2:0", bad)[0]
    batch = _stream(tmp_path, "1:2:0", bad, on_bad_sample="skip")[0]
    assert batch.record_ids == ("r0",)
    (skipped,) = batch.skipped
    assert (skipped.source, skipped.reason) == ("s", reason)
    assert skipped.message.startswith(f"{tmp_path / 's.jsonl'}:2: {complaint}")


def test_answer_that_cannot_fit_is_refused_before_it_is_tokenized(tmp_path: Path) -> None:
    def encode(record: Record) -> Sample:
        raise AssertionError("tokenized")

    stream = _stream(tmp_path, "a " * 2_000_000)
    stream.encode = encode
    with pytest.raises(SampleError, match=r"s\.jsonl:1: 8,000,000 characters") as raised:
        stream[0]
    assert raised.value.reason == "too long"


@pytest.mark.parametrize("workers", [0, 1])
def test_error_of_a_reader_arrives_as_it_was_raised(tmp_path: Path, workers: int) -> None:
    stream = _stream(tmp_path, "1:2:0", "1:40:0")
    with pytest.raises(SampleError) as raised:
        list(read_ahead(stream, range(2), workers))
    assert str(raised.value).startswith(f"{tmp_path / 's.jsonl'}:2: 41 tokens")
    assert raised.value.reason == "too long" and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ImageError("broken picture"), "image damaged"),
        (PromptError("no such control"), "prompt refused"),
    ],
)
def test_encoder_errors_name_the_record(tmp_path: Path, error: Exception, reason: str) -> None:
    def encode(record: Record) -> Sample:
        raise error

    stream = _stream(tmp_path, "1:2:0")
    stream.encode = encode
    with pytest.raises(SampleError, match=rf"s\.jsonl:1: {error}") as raised:
        stream[0]
    assert pickle.loads(pickle.dumps(raised.value)).reason == reason, "it may come from a worker"


def test_batch_whose_samples_are_all_bad_takes_what_follows(tmp_path: Path) -> None:
    specs = ["1:2:0"] * 4 + ["1:40:0"] * 4
    plan = {"batch_size": 1, "window": 1, "on_bad_sample": "skip"}
    batches = [_stream(tmp_path, *specs, **plan)[n] for n in range(16)]
    assert all(len(batch.record_ids) == 1 for batch in batches)
    assert sum(len(batch.skipped) for batch in batches) >= 8
    with pytest.raises(SampleError, match=r"all 65 records are bad, first: .*41 tokens"):
        _stream(tmp_path, *["1:40:0"] * 3, **plan)[0]


def test_batch_is_a_function_of_its_number(tmp_path: Path) -> None:
    specs = [f"{1 + i % 5}:{1 + i % 7}:0" for i in range(50)]
    plan = {"batch_size": 4, "window": 3}
    in_order = _stream(tmp_path, *specs, **plan)
    expected = [in_order[n] for n in range(30)]
    back_and_forth = _stream(tmp_path, *specs, **plan)
    for n in (29, 0, 7, 7, 16, 3, 22):
        again = back_and_forth[n]
        assert again.record_ids == expected[n].record_ids
        assert torch.equal(again.input_ids, expected[n].input_ids)
    assert len({batch.record_ids for batch in expected}) == 30


def test_epoch_of_batches_holds_every_record_once(tmp_path: Path) -> None:
    stream = _stream(tmp_path, *[f"1:{1 + i % 9}:0" for i in range(48)], batch_size=4, window=3)
    for epoch in range(2):
        batches = [stream[12 * epoch + n] for n in range(12)]
        counts = Counter(i for batch in batches for i in batch.record_ids)
        assert counts == Counter(f"r{i}" for i in range(48))


def test_run_of_whole_epochs_holds_every_record_equally_often(tmp_path: Path) -> None:
    specs = [f"1:{1 + i % 9}:0" for i in range(10)]
    stream = _stream(tmp_path, *specs, batch_size=4, window=4, num_steps=5)
    counts = Counter(i for n in range(5) for i in stream[n].record_ids)
    assert counts == Counter({f"r{i}": 2 for i in range(10)})


@pytest.mark.parametrize("accumulation", [2, 4])
def test_accumulation_cuts_the_same_steps(tmp_path: Path, accumulation: int) -> None:
    specs = [f"1:{1 + i % 9}:0" for i in range(40)]
    whole = _stream(tmp_path, *specs, batch_size=8, window=2)
    cut = [
        _stream(tmp_path, *specs, batch_size=8, window=2, accumulation=accumulation, rank=rank,
                world_size=2)
        for rank in range(2)
    ]  # fmt: skip
    for step in range(5):
        numbers = range(step * accumulation, (step + 1) * accumulation)
        parts = [share[n].record_ids for share in cut for n in numbers]
        assert {len(part) for part in parts} == {8 // accumulation // 2}
        assert sorted(i for part in parts for i in part) == sorted(whole[step].record_ids)


@pytest.mark.parametrize("world", [2, 4])
def test_processes_share_the_same_global_batches(tmp_path: Path, world: int) -> None:
    specs = [f"1:{1 + i % 9}:0" for i in range(40)]
    alone = _stream(tmp_path, *specs, batch_size=8, window=2)
    shares = [
        _stream(tmp_path, *specs, batch_size=8, window=2, rank=rank, world_size=world)
        for rank in range(world)
    ]
    for n in range(7):
        parts = [share[n].record_ids for share in shares]
        assert {len(part) for part in parts} == {8 // world}
        assert sorted(i for part in parts for i in part) == sorted(alone[n].record_ids)


def test_stream_refuses_what_it_cannot_cut(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"batch_size=3 .* 2 processes .* accumulation=1"):
        _stream(tmp_path, "1:2:0", batch_size=3, world_size=2)
    source = _source(tmp_path, "1:2:0")
    source.repeat = 0.2
    plan = BatchPlan(batch_size=1, max_tokens=20, pad_token_id=PAD, image_token_id=IMAGE)
    with pytest.raises(SampleError, match="an epoch has no record"):
        BatchStream([source], _encode, plan, seed=0)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_runs.write_checkpoint(tmp_path_factory.mktemp("tiny") / "start")


def _real_stream(checkpoint: Path, meta: Path, plan: BatchPlan) -> BatchStream:
    processor = MonoInternVLProcessor.from_pretrained(checkpoint)
    return BatchStream(
        read_meta(meta), lambda record: processor.encode_conversation(record.turns), plan, seed=0
    )


def test_processor_fills_batches_that_the_model_can_place(checkpoint: Path, tmp_path: Path) -> None:
    processor = MonoInternVLProcessor.from_pretrained(checkpoint)
    data = tiny_runs.write_data(tmp_path)
    image_token_id = processor.image_token_id
    plan = BatchPlan(4, max_tokens=128, pad_token_id=2, image_token_id=image_token_id, window=4)
    stream = _real_stream(checkpoint, data / "mixed.json", plan)
    kinds = set()
    for n in range(7):
        batch = stream[n]
        tiles = 0 if batch.pixel_values is None else len(batch.pixel_values)
        is_visual = batch.input_ids == image_token_id
        assert torch.equal(batch.routing.is_visual(torch.device("cpu")), is_visual.flatten())
        assert batch.routing.num_visual == tiles * tiny_runs.TOKENS_PER_TILE
        assert tiles == batch.num_images == sum(i.startswith("image") for i in batch.record_ids)
        kinds |= {i.split("-")[0] for i in batch.record_ids}
    assert kinds == {"image", "text"}


def test_control_tokens_in_data_are_text(checkpoint: Path, tmp_path: Path) -> None:
    processor = MonoInternVLProcessor.from_pretrained(checkpoint)
    typed = "<|im_end|> <|im_start|>system <img><IMG_CONTEXT></img> </s>"
    turns = [{"from": "human", "value": f"say {typed}"}, {"from": "gpt", "value": typed}]
    file = tiny_runs.write_lines(tmp_path / "a.jsonl", [{"conversations": turns}])
    plan = BatchPlan(batch_size=1, max_tokens=400, pad_token_id=2, image_token_id=IMAGE, window=1)
    stream = BatchStream(
        [JsonlSource(file, tmp_path)],
        lambda record: processor.encode_conversation(record.turns),
        plan,
        seed=0,
    )
    ids = stream[0].input_ids[0].tolist()
    counts = {t: ids.count(i) for t, i in processor.tokenizer.control_tokens.items()}
    assert counts["<IMG_CONTEXT>"] == counts["<img>"] == counts["</img>"] == 0
    assert counts["<|im_start|>"] == counts["<|im_end|>"] == 2, "one pair for each of the two turns"
    learned = stream[0].labels[0]
    answer = processor.tokenizer.decode(learned[learned != -100])
    assert answer.startswith(typed)
