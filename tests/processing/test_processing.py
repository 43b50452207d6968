"""Prompts, image counts, refusals, generic hosts, and the processor's files."""

import base64
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from processing_helpers import (
    CLEAN,
    GOLDEN,
    SQUARE,
    SYSTEM,
    WIDE,
    P,
    assistant,
    make,
    part_of,
    prompt_of,
    question_of,
    user,
)

from mono_internvl.errors import CheckpointError, ConfigError, ImageError, PromptError
from mono_internvl.processing.encoding import pad_left
from mono_internvl.processing.images import MonoInternVLImageProcessor
from mono_internvl.processing.processor import MonoInternVLProcessor
from mono_internvl.processing.prompts import (
    BOS,
    render,
    to_turns,
)
from mono_internvl.processing.tiling import TokenLayout

# ------------------------------------------------------------------------------- prompts and counts


def test_encode_prompt_writes_the_template_and_opens_the_answer() -> None:
    batch = P.encode_prompt([{"role": "user", "content": "Hi"}])
    assert prompt_of(batch) == (
        "<s><|im_start|>system\nBe brief.<|im_end|>"
        "<|im_start|>user\nHi<|im_end|><|im_start|>assistant\n"
    )
    assert set(batch) == {"input_ids", "attention_mask"}


@pytest.mark.parametrize("default", ["", "Talk."])
def test_empty_system_prompt_leaves_its_block_out(default: str) -> None:
    processor = make(default_system_prompt=default)
    messages = [{"role": "user", "content": "Hi"}]
    assert ("system" in prompt_of(processor.encode_prompt(messages))) is bool(default)
    assert ("system" in processor.apply_chat_template(messages)) is bool(default)
    given_one = [{"role": "system", "content": "X"}, *messages]
    assert "system\nX<|im_end|>" in prompt_of(processor.encode_prompt(given_one))


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ([WIDE, "Q"], "#3\nQ"),
        ([WIDE, SQUARE, "Q"], "<image 1> (图1):#3<image 2> (图2):#1\nQ"),
        (["<image> or <image>?", WIDE, SQUARE], "#3 or #1?"),
        ([SQUARE, "Q\n<image>"], "Q\n#1"),
        (["Q", SQUARE], "Q\n#1"),
        (["A: ", SQUARE, "\nB: ", SQUARE, "\nQ"], "A: #1\nB: #1\nQ"),
        (["A", SQUARE, SQUARE, "Q"], "A\n#1\n#1\nQ"),
        ([SQUARE], "#1\n"),
    ],
)
def test_images_stand_where_the_message_puts_them(parts: list[Any], expected: str) -> None:
    batch = P.encode_prompt([user(*parts)])
    assert question_of(batch) == expected
    P.check_image_tokens(
        batch["input_ids"],
        [TokenLayout(len(batch["pixel_values"]), P.tokens_per_tile * len(batch["pixel_values"]))],
    )
    rendered = P.apply_chat_template([user(*parts)]).rpartition("user\n")[2]
    spelled = expected.replace("#3", "<IMG_CONTEXT>").replace("#1", "<IMG_CONTEXT>")
    assert rendered.removesuffix("<|im_end|>") == spelled


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.lists(st.one_of(CLEAN, st.just(SQUARE)), min_size=1, max_size=4), max_size=3),
    st.lists(CLEAN, min_size=3, max_size=3),
    st.one_of(st.none(), CLEAN),
    st.booleans(),
)
def test_chat_template_renders_what_the_pieces_spell(
    questions: list[list[Any]], answers: list[str], system: str | None, is_open: bool
) -> None:
    messages: list[dict[str, Any]] = (
        [] if system is None else [{"role": "system", "content": system}]
    )
    for parts, answer in zip(questions, answers, strict=False):
        messages += [user(*parts), assistant(answer)]
    if not messages:
        return
    pieces = render(to_turns(messages), default_system_prompt=SYSTEM, add_generation_prompt=is_open)
    spelled = "".join(p.text if p.kind != "image" else "<IMG_CONTEXT>" for p in pieces)
    assert P.apply_chat_template(messages, add_generation_prompt=is_open) == BOS + spelled


def test_image_sources_of_every_form_give_the_same_pixels(tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    WIDE.save(path)
    plain = base64.b64encode(path.read_bytes()).decode()
    uri = "data:image/png;base64," + plain
    parts = [
        {"type": "image", "image": WIDE},
        {"type": "image", "path": str(path)},
        {"type": "image", "url": uri},
        {"type": "image", "base64": plain},
        {"type": "image_url", "image_url": {"url": uri}},
        {"type": "image_url", "image_url": uri},
    ]
    expected = P.encode_prompt([user(WIDE, "Q")])
    for part in parts:
        content = [part, {"type": "text", "text": "Q"}]
        batch = P.encode_prompt([{"role": "user", "content": content}])
        assert torch.equal(batch["pixel_values"], expected["pixel_values"])
        assert torch.equal(batch["input_ids"], expected["input_ids"])


def test_images_of_a_sample_share_the_budget_only_on_request() -> None:
    wide = Image.new("RGB", (112, 28))
    messages = [user(wide, wide, "Q")]
    assert len(P.encode_prompt(messages)["pixel_values"]) == 10
    assert len(P.encode_prompt(messages, share_budget=True)["pixel_values"]) == 6
    assert P.encode_conversation([*messages, assistant("A")]).num_tiles == (3, 3)
    one_each = P.encode_prompt(messages, max_tiles=[4, 1])
    assert len(one_each["pixel_values"]) == 6
    for wrong in ([4], [4, 1, 1]):
        with pytest.raises(PromptError, match=f"{len(wrong)} values"):
            P.encode_prompt(messages, max_tiles=wrong)


def test_forty_tiles_fill_their_context() -> None:
    batch = P.encode_prompt([user(Image.new("RGB", (40, 1)), "Q")], max_tiles=40)
    assert batch["pixel_values"].shape == (41, 3, 28, 28)
    assert int((batch["input_ids"] == P.image_token_id).sum()) == 41 * P.tokens_per_tile


def test_batch_is_padded_on_the_left_and_equals_its_rows() -> None:
    conversations = [[user(WIDE, "A long question")], [user("Q")], [user(SQUARE, SQUARE, "Q")]]
    batch = P.encode_prompts(conversations)
    alone = [P.encode_prompt(messages) for messages in conversations]
    for row, single in enumerate(alone):
        length = single["input_ids"].shape[1]
        mask = batch["attention_mask"][row]
        assert mask.tolist() == [0] * (mask.numel() - length) + [1] * length
        assert torch.equal(batch["input_ids"][row, -length:], single["input_ids"][0])
        assert set(batch["input_ids"][row, :-length].tolist()) <= {P.tokenizer.pad_token_id}
    pixels = [single["pixel_values"] for single in alone if "pixel_values" in single]
    assert torch.equal(batch["pixel_values"], torch.cat(pixels))


def test_pad_left_needs_a_padding_token_only_for_ragged_rows() -> None:
    assert pad_left([[1, 2], [3, 4]], None)["input_ids"].tolist() == [[1, 2], [3, 4]]
    with pytest.raises(ConfigError, match="pad_token"):
        pad_left([[1, 2], [3]], None)


@pytest.mark.parametrize("name", ["tokenizer", "tokenizer_dummy_prefix"])
@pytest.mark.parametrize("closed", [True, False])
def test_encode_turn_continues_a_cached_conversation(name: str, closed: bool) -> None:
    processor = make(name)
    first, second = user(WIDE, "What is in the picture?"), user("And now?", SQUARE)
    answer = "A red bus stands <ref>near</ref> it."
    whole = processor.encode_prompt([first, assistant(answer), second])
    sample = processor.encode_conversation([first, assistant(answer)])
    cached = sample.input_ids if closed else sample.input_ids[:-1]
    suffix = processor.encode_turn(second, close_previous=not closed)
    assert torch.cat([cached, suffix["input_ids"][0]]).tolist() == whole["input_ids"][0].tolist()
    assert suffix["attention_mask"].tolist() == [[1] * suffix["input_ids"].shape[1]]
    pixels = torch.cat([sample.pixel_values, suffix["pixel_values"]])  # type: ignore[list-item]
    assert torch.equal(pixels, whole["pixel_values"])


# ---------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "empty"),
        ([{"role": "tool", "content": "x"}], "'tool'"),
        ([{"role": "user", "content": 3}], "int"),
        ([{"role": "user", "content": [{"type": "video", "video": "x"}]}], "'video'"),
        ([{"role": "user", "content": [{"type": "image"}]}], "'image'"),
        ([{"role": "user", "content": [{"type": "image", "base64": "@"}]}], "base64"),
        ([{"role": "user", "content": ["x"]}], "None"),
        ([assistant("x"), {"role": "system", "content": "x"}], "must be the first"),
        ([{"role": "assistant", "content": [part_of(SQUARE)]}], "only users show images"),
    ],
)
def test_malformed_messages_are_refused(messages: list[Any], reason: str) -> None:
    with pytest.raises(PromptError, match=reason):
        P.encode_prompt(messages)


@pytest.mark.parametrize(
    ("parts", "placeholders", "images"),
    [(["<image>"], 1, 0), (["<image> <image>", SQUARE], 2, 1), (["<image>", SQUARE, SQUARE], 1, 2)],
)
def test_placeholder_mismatch_names_both_numbers(
    parts: list[Any], placeholders: int, images: int
) -> None:
    with pytest.raises(PromptError, match=f"{placeholders} <image> placeholders but {images} imag"):
        P.encode_prompt([user(*parts)])


def test_feature_count_mismatch_names_both_numbers() -> None:
    batch = P.encode_prompt([user(WIDE, "Q")])
    with pytest.raises(PromptError, match=r"3 <IMG_CONTEXT> but 2 visual tokens of 2 tiles"):
        P.check_image_tokens(batch["input_ids"], [TokenLayout(2, P.tokens_per_tile * 2)])


def test_calling_with_rendered_text_checks_the_number_of_images() -> None:
    text = P.apply_chat_template([user(WIDE, "Q")], add_generation_prompt=True)
    for images, given_number in (([WIDE, WIDE], 2), (None, 0)):
        with pytest.raises(PromptError, match=f"1 <IMG_CONTEXT> placeholders but {given_number} "):
            P(text=text, images=images)
    with pytest.raises(PromptError, match="frames"):
        P(text="x", videos=["x"])


def test_broken_image_and_url_are_refused_by_the_prompt() -> None:
    for source, reason in ((b"broken", "decoded"), ("https://a.b/c.png", "nothing is fetched")):
        content = [part_of("Q"), {"type": "image", "image": source}]
        with pytest.raises(ImageError, match=reason):
            P.encode_prompt([{"role": "user", "content": content}])
        with pytest.raises(ImageError, match=reason):
            P(text="<IMG_CONTEXT>", images=[source])


def test_unknown_on_control_is_refused() -> None:
    with pytest.raises(PromptError, match="'ignore'"):
        P.encode_prompt([user("Q")], on_control="ignore")  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------ generic hosts


def test_generic_call_equals_encode_prompt() -> None:
    messages = [user(WIDE, SQUARE, "What is <ref>it</ref>?")]
    expected = P.encode_prompt(messages)
    text = P.apply_chat_template(messages, add_generation_prompt=True)
    called = P(text=text, images=[WIDE, SQUARE], return_tensors="pt")
    templated = P.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    for batch in (called, templated):
        assert set(batch) == {"input_ids", "attention_mask", "pixel_values"}
        for key in batch:
            assert torch.equal(batch[key], expected[key]), key
    assert "num_tiles" not in P.model_input_names


def test_generic_call_takes_max_tiles() -> None:
    text = P.apply_chat_template([user(WIDE, "Q")], add_generation_prompt=True)
    batch = P(text=text, images=[WIDE], max_tiles=1, return_tensors="pt")
    assert len(batch["pixel_values"]) == 1


def test_token_counts_are_known_without_pixels() -> None:
    counts = P._get_num_multimodal_tokens(image_sizes=[(28, 56), (28, 28)])
    assert counts.num_image_patches == [3, 1]
    assert counts.num_image_tokens == [5, 3]
    assert P._get_num_multimodal_tokens(image_sizes=[(28, 56)], max_tiles=1).num_image_tokens == [3]
    assert P._get_num_multimodal_tokens().num_image_tokens is None


def test_tokens_per_tile_follow_the_tile() -> None:
    tokenizer = P.tokenizer
    for side, tokens in ((448, 256), (112, 16), (56, 4)):
        cutter = MonoInternVLImageProcessor(image_size=side)
        assert MonoInternVLProcessor(cutter, tokenizer).tokens_per_tile == tokens


def test_processor_refuses_tiles_that_are_not_whole_visual_tokens() -> None:
    with pytest.raises(ConfigError, match="image_size=50"):
        MonoInternVLProcessor(MonoInternVLImageProcessor(image_size=50), P.tokenizer)
    with pytest.raises(ConfigError, match="give both"):
        MonoInternVLProcessor(MonoInternVLImageProcessor())


# -------------------------------------------------------------------------------------------- files


def released_folder(folder: Path, **changes: Any) -> Path:
    """A folder as released: config.json and the tokenizer's files, nothing of ours."""
    shutil.copytree(GOLDEN / "tokenizer", folder)
    config = json.loads((GOLDEN / "mono_a" / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


def test_processor_round_trips_through_its_folder(tmp_path: Path) -> None:
    processor = make(default_system_prompt='Say "你好".\n')
    processor.image_processor.max_tiles = 3
    processor.save_pretrained(tmp_path)
    again = MonoInternVLProcessor.from_pretrained(tmp_path)
    messages = [user(Image.new("RGB", (200, 50)), "Q<|im_end|>"), assistant("A"), user("你是")]
    expected = processor.encode_prompt(messages)
    for key, value in again.encode_prompt(messages).items():
        assert torch.equal(value, expected[key])
    clean = [user("你是")]
    assert again.apply_chat_template(clean) == processor.apply_chat_template(clean)
    again.save_pretrained(tmp_path / "twice")
    for file in tmp_path.iterdir():
        if file.is_file():
            assert (tmp_path / "twice" / file.name).read_bytes() == file.read_bytes(), file.name


def test_from_pretrained_reads_a_released_folder(tmp_path: Path) -> None:
    folder = released_folder(tmp_path / "m", max_dynamic_patch=5, min_dynamic_patch=2)
    processor = MonoInternVLProcessor.from_pretrained(folder, trust_remote_code=False)
    cutter = processor.image_processor
    assert (cutter.image_size, cutter.min_tiles, cutter.max_tiles) == (56, 2, 5)
    assert cutter.use_thumbnail
    assert processor.tokens_per_tile == 4
    assert "书生多模态" in prompt_of(processor.encode_prompt([user("Q")]))
    (folder / "preprocessor_config.json").write_text(
        '{"image_processor_type": "CLIPImageProcessor"}'
    )
    assert MonoInternVLProcessor.from_pretrained(folder).image_processor.max_tiles == 5


def test_from_pretrained_without_dynamic_tiling_gives_one_padded_tile(tmp_path: Path) -> None:
    folder = released_folder(tmp_path / "m", dynamic_image_size=False, pad2square=True)
    cutter = MonoInternVLProcessor.from_pretrained(folder).image_processor
    assert cutter.layout_of(900, 100).num_tiles == 1
    assert cutter.pad2square


def test_from_pretrained_takes_overrides(tmp_path: Path) -> None:
    folder = released_folder(tmp_path / "m")
    for source in (folder, tmp_path / "ours"):
        processor = MonoInternVLProcessor.from_pretrained(
            source, max_tiles=2, use_thumbnail=False, default_system_prompt=""
        )
        assert processor.image_processor.layout_of(900, 100).num_tiles == 2
        assert "system" not in prompt_of(processor.encode_prompt([user("Q")]))
        assert "system" not in processor.apply_chat_template([user("Q")])
        if source == folder:
            MonoInternVLProcessor.from_pretrained(folder).save_pretrained(tmp_path / "ours")


def test_from_pretrained_refuses_other_templates_and_empty_folders(tmp_path: Path) -> None:
    folder = released_folder(tmp_path / "m", template="vicuna")
    with pytest.raises(ConfigError, match="vicuna"):
        MonoInternVLProcessor.from_pretrained(folder)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json"):
        MonoInternVLProcessor.from_pretrained(folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="tokenizer"):
        MonoInternVLProcessor.from_pretrained(tmp_path / "empty")
