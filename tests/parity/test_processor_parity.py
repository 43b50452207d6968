"""Tiling, image tensors, prompts, ids and labels against the golden data of the released code."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from mono_internvl.configuration.labels import IGNORED_LABEL
from mono_internvl.data.records import parse_record
from mono_internvl.data.sources import read_meta
from mono_internvl.processing.encoding import encode_pieces
from mono_internvl.processing.image_files import load_image
from mono_internvl.processing.images import (
    MonoInternVLImageProcessor,
)
from mono_internvl.processing.processor import MonoInternVLProcessor
from mono_internvl.processing.prompts import (
    BOS,
    DEFAULT_SYSTEM_PROMPT,
    IMAGE_CONTEXT,
    IMAGE_END,
    IMAGE_START,
    render,
    to_turns,
)
from mono_internvl.processing.tiling import TokenLayout
from mono_internvl.processing.tiling.internvl import candidate_grids, choose_grid
from mono_internvl.processing.tokenizer import MonoInternVLTokenizer, load_tokenizer

GOLDEN = Path(os.environ.get("GOLDEN_DIR", Path(__file__).parent / "golden"))
NORMALIZATIONS = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "clip": ((0.4814546, 0.4578275, 0.40821073), (0.2686295, 0.2613025, 0.2757711)),
    "siglip": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}


def golden(name: str) -> Any:
    return json.loads((GOLDEN / name).read_text(encoding="utf-8"))


def some(rows: Any) -> Any:
    """Rows to loop over; an empty golden file must fail, not pass."""
    assert len(rows) > 0
    return rows


def sha256(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, MonoInternVLTokenizer]:
    folders = sorted(GOLDEN.glob("tokenizer*"))
    return {folder.name: load_tokenizer(folder) for folder in some(folders)}


@pytest.fixture(scope="module")
def processor(tokenizers: dict[str, MonoInternVLTokenizer]) -> MonoInternVLProcessor:
    data = golden("data/data_golden.json")
    images = MonoInternVLImageProcessor(
        image_size=data["image_size"], min_tiles=data["min_dynamic_patch"]
    )
    return MonoInternVLProcessor(images, tokenizers["tokenizer"])


def user(text: str, *images: Any) -> dict[str, Any]:
    shown = [{"type": "image", "image": image} for image in images]
    return {"role": "user", "content": [*shown, {"type": "text", "text": text}]}


def test_candidate_grids_are_in_the_golden_order() -> None:
    for bounds, expected in some(golden("python/tiling.json")["candidate_order"]).items():
        least, most = map(int, bounds.split("-"))
        assert [list(grid) for grid in candidate_grids(least, most)] == expected, bounds


def test_choose_grid_matches_every_golden_row() -> None:
    for row in some(golden("python/tiling.json")["rows"]):
        grid = choose_grid(
            row["width"],
            row["height"],
            min_tiles=row["min_num"],
            max_tiles=row["max_num"],
            image_size=row["image_size"],
        )
        assert grid == (row["cols"], row["rows"]), row
        assert grid[0] * grid[1] == row["tiles"], row
        with_thumbnail = row["tiles"] + (row["tiles"] > 1)
        assert row["tiles_with_thumbnail"] == with_thumbnail, row


def check_image_row(row: dict[str, Any], stored: dict[str, np.ndarray]) -> None:
    mean, std = NORMALIZATIONS[row.get("normalize", "imagenet")]
    cutter = MonoInternVLImageProcessor(
        image_size=row.get("image_size", 448),
        max_tiles=row.get("max_num", 1),
        use_thumbnail=row.get("use_thumbnail", False),
        image_mean=mean,
        image_std=std,
        pad2square=row.get("pad2square", False),
    )
    image = load_image(GOLDEN / "images" / row["image"])
    tiles = cutter.tiling_with().cut(image)
    assert len(tiles) == row["n"]
    if "uint8_sha256" in row:
        assert sha256(tiles) == row["uint8_sha256"]
    if "tensor" in row:
        expected = stored[row["tensor"]]
        got = tiles if expected.shape == tiles.shape else tiles.transpose(0, 3, 1, 2)
        np.testing.assert_array_equal(got, expected)
    pixels = cutter(image)["pixel_values"].numpy()
    if "pixel_values_shape" in row:
        assert list(pixels.shape[-3:]) == row["pixel_values_shape"][-3:]
    assert sha256(pixels) == row["pixel_values_sha256_float32"]


def test_images_give_the_golden_tiles_and_pixels() -> None:
    stored = load_file(GOLDEN / "images" / "tiles_uint8.safetensors")
    for row in some(golden("images/images.json")):
        check_image_row(row, stored)


def with_placeholders(text: str) -> tuple[str, list[int]]:
    """Text with each image block as `<image>`, and the context tokens of each block."""
    counts = []
    out = ""
    while IMAGE_START in text:
        before, _, rest = text.partition(IMAGE_START)
        block, _, text = rest.partition(IMAGE_END)
        counts.append(block.count(IMAGE_CONTEXT))
        out += before + "<image>"
    return out + text, counts


def messages_of(case: dict[str, Any]) -> tuple[list[dict[str, Any]], list[int]]:
    messages: list[dict[str, Any]] = []
    all_counts: list[int] = []
    if case["system"] != "default":
        messages.append({"role": "system", "content": case["system"]})
    for question, answer in case["turns"]:
        text, counts = with_placeholders(question)
        messages.append(user(text, *range(len(counts))))
        all_counts += counts
        if answer is not None:
            messages.append({"role": "assistant", "content": answer})
    return messages, all_counts


def as_text(messages: list[dict[str, Any]], counts: list[int]) -> str:
    """The prompt that the pieces spell."""
    slots = iter(counts)
    pieces = render(
        to_turns(messages),
        default_system_prompt=DEFAULT_SYSTEM_PROMPT,
        add_generation_prompt=messages[-1]["role"] == "user",
    )
    return "".join(
        IMAGE_START + IMAGE_CONTEXT * next(slots) + IMAGE_END if p.kind == "image" else p.text
        for p in pieces
    )


def test_pieces_spell_the_golden_prompts() -> None:
    prompts = golden("python/prompts.json")
    assert prompts["system_message"] == DEFAULT_SYSTEM_PROMPT
    for case in some(prompts["cases"]):
        assert as_text(*messages_of(case)) == case["prompt"], case["name"]


def test_chat_template_renders_the_golden_prompts(processor: MonoInternVLProcessor) -> None:
    for case in some(golden("python/prompts.json")["cases"]):
        messages, counts = messages_of(case)
        prompt = processor.apply_chat_template(
            messages, add_generation_prompt=messages[-1]["role"] == "user"
        )
        for count in counts:
            block = IMAGE_START + "CONTEXT" * count + IMAGE_END
            prompt = prompt.replace(IMAGE_CONTEXT, block, 1)
        spelled = prompt.replace("CONTEXT", IMAGE_CONTEXT)
        assert spelled == BOS + case["prompt"], case["name"]  # there the tokenizer adds it


def test_images_in_front_of_a_question_get_the_golden_header() -> None:
    fronts = [
        case
        for case in golden("python/prompts.json")["cases"]
        if case["turns"][0][0].startswith((IMAGE_START, "<image 1> "))
    ]
    for case in some(fronts):
        messages, counts = messages_of(case)
        asked = next(message for message in messages if message["role"] == "user")
        text = asked["content"][-1]
        text["text"] = text["text"].rpartition("<image>")[2].removeprefix("\n")
        assert as_text(messages, counts) == case["prompt"], case["name"]


def check_label_row(
    row: dict[str, Any], tokenizer: MonoInternVLTokenizer, reference_failed: bool
) -> None:
    num_images = row["num_image"]
    raw = {"conversations": row["conversation"], "image": [str(i) for i in range(num_images)]}
    turns = parse_record(raw, 0, "labels.json", Path).turns
    pieces = render(
        to_turns(turns, strip=True),
        default_system_prompt=DEFAULT_SYSTEM_PROMPT,
        add_generation_prompt=False,
    )
    ids, labels = encode_pieces(
        tokenizer,
        pieces,
        [TokenLayout(1, count) for count in row["num_image_token_list"][:num_images]],
    )
    if reference_failed:
        answers = [turn.text for turn in turns if turn.role == "assistant"]
        learned = tokenizer.decode([label for label in labels if label != IGNORED_LABEL])
        assert learned == "".join(answer.strip() + "<|im_end|>" for answer in answers)
    limit = row["model_max_length"]
    ids, labels = ids[:limit], labels[:limit]
    if not reference_failed:
        kept = [i for i, label in enumerate(labels) if label != IGNORED_LABEL]
        assert kept == row["label_positions"]
        assert [labels[i] for i in kept] == row["labels_kept"]
    if row["padding"] != "none":
        ids = ids + [tokenizer.pad_token_id] * (limit - len(ids))
    assert ids == row["input_ids"]


def test_labels_match_every_golden_dialogue(
    tokenizers: dict[str, MonoInternVLTokenizer],
) -> None:
    rows = some(golden("python/labels.json"))
    # The reference masks a dialogue whose pieces tokenize differently alone. It skips that check
    # for truncated samples and learns shifted positions, so every length of the dialogue is wrong.
    failed = {(row["tokenizer"], row["dialogue"]) for row in rows if row["mismatch_warning"]}
    assert len(failed) < len({(row["tokenizer"], row["dialogue"]) for row in rows})
    for row in rows:
        is_failed = (row["tokenizer"], row["dialogue"]) in failed
        check_label_row(row, tokenizers[row["tokenizer"]], is_failed)


def last_question(processor: MonoInternVLProcessor, ids: list[int]) -> str:
    prompt = processor.tokenizer.decode(ids)
    question = prompt.rpartition("<|im_start|>user\n")[2].partition("<|im_end|>")[0]
    return question.rpartition(IMAGE_END + "\n")[2]


def test_chat_turns_match_the_golden_ids_and_responses(processor: MonoInternVLProcessor) -> None:
    chat, image = golden("python/chat.json"), GOLDEN / "python" / "chat_a.png"
    first, second = chat["chat_turn1"], chat["chat_turn2"]
    messages = [user(last_question(processor, first["input_ids"][0]), image)]
    batch = processor.encode_prompt(messages, max_tiles=2)
    assert batch["input_ids"].tolist() == first["input_ids"]
    assert batch["attention_mask"].tolist() == first["attention_mask"]
    answer = processor.decode_answer(first["output_ids_without_leading_bos"][0])
    assert answer == first["response"]
    messages += [
        {"role": "assistant", "content": answer},
        {"role": "user", "content": last_question(processor, second["input_ids"][0])},
    ]
    batch = processor.encode_prompt(messages, max_tiles=2)
    assert batch["input_ids"].tolist() == second["input_ids"]
    answer = processor.decode_answer(second["output_ids_without_leading_bos"][0])
    assert answer == second["response"]


def test_multi_image_chat_matches_the_golden_ids(processor: MonoInternVLProcessor) -> None:
    case = golden("python/chat.json")["multi_image_chat"]
    images = [GOLDEN / "python" / name for name in ("chat_a.png", "chat_b.png")]
    question = last_question(processor, case["input_ids"][0])
    batch = processor.encode_prompt([user(question, *images)], max_tiles=[2, 1])
    assert batch["input_ids"].tolist() == case["input_ids"]
    assert len(batch["pixel_values"]) == sum(case["image_counts"])
    assert processor.decode_answer(case["output_ids_without_leading_bos"][0]) == case["response"]


def test_batch_chat_matches_the_golden_ids(processor: MonoInternVLProcessor) -> None:
    case = golden("python/chat.json")["batch_chat"]
    images = [GOLDEN / "python" / name for name in ("chat_a.png", "chat_b.png")]
    conversations = [
        [user(last_question(processor, ids), image)]
        for ids, image in zip(case["input_ids"], images, strict=True)
    ]
    batch = processor.encode_prompts(conversations, max_tiles=[2, 1])
    assert batch["input_ids"].tolist() == case["input_ids"]
    assert batch["attention_mask"].tolist() == case["attention_mask"]
    answers = [processor.decode_answer(i) for i in case["output_ids_without_leading_bos"]]
    assert answers == case["responses"]


def test_dataset_samples_match_the_golden_ids_labels_and_pixels(
    processor: MonoInternVLProcessor,
) -> None:
    data = golden("data/data_golden.json")
    assert processor.tokens_per_tile == data["num_image_token"]
    (source,) = read_meta(GOLDEN / "data" / "meta.json")  # as the training loop reads it
    assert len(source) == len(data["samples"])
    for index, sample in enumerate(some(data["samples"])):
        record = source.record(index)
        encoded = processor.encode_conversation(
            record.turns, max_tiles=data["max_dynamic_patch"], max_tokens=data["model_max_length"]
        )
        assert encoded.input_ids.tolist() == sample["input_ids"], record.record_id
        assert encoded.labels.tolist() == sample["labels"], record.record_id
        if not record.images:
            assert encoded.pixel_values is None
            continue
        assert isinstance(encoded.pixel_values, torch.Tensor)
        assert list(encoded.pixel_values.shape) == sample["pixel_values_shape"]
        assert sum(encoded.num_tiles) == sum(sample["image_flags"])
        assert sha256(encoded.pixel_values.numpy()) == sample["pixel_values_sha256_float32"]
