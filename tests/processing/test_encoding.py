"""Typed control tokens, labels by offsets, answers read back."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from processing_helpers import (
    RESERVED,
    SQUARE,
    TEXTS,
    WIDE,
    P,
    assistant,
    control_count,
    make,
    prompt_of,
    question_of,
    user,
)

from mono_internvl.configuration.labels import IGNORED_LABEL
from mono_internvl.errors import PromptError
from mono_internvl.processing.encoding import Sample, encode_pieces
from mono_internvl.processing.processor import MonoInternVLProcessor
from mono_internvl.processing.prompts import (
    GROUNDING_TOKENS,
    ImagePart,
    Piece,
    Turn,
    parse_boxes,
)
from mono_internvl.processing.tiling import TokenLayout

PROCESSORS = {name: make(name) for name in ("tokenizer", "tokenizer_dummy_prefix")}


# ----------------------------------------------------------------------------- typed control tokens


@settings(max_examples=150, deadline=None)
@given(TEXTS.filter(lambda text: "<image>" not in text), st.sampled_from(["user", "assistant"]))
def test_typed_control_tokens_are_text_in_prompts(text: str, role: str) -> None:
    plain = control_count(P.encode_prompt([user("x"), assistant("x"), user("x")])["input_ids"])
    said = [user(text), assistant("x")] if role == "user" else [user("x"), assistant(text or "x")]
    batch = P.encode_prompt([*said, user("x")])
    assert control_count(batch["input_ids"]) == plain
    assert not (batch["input_ids"] == P.image_token_id).any()
    assert text.replace("▁", " ") in prompt_of(batch)


@settings(max_examples=100, deadline=None)
@given(TEXTS.filter(lambda text: "<image>" not in text))
def test_typed_control_tokens_never_add_image_context(text: str) -> None:
    batch = P.encode_prompt([user(WIDE, text)])
    assert int((batch["input_ids"] == P.image_token_id).sum()) == 3
    turn = P.encode_turn(user(text))
    assert not (turn["input_ids"] == P.image_token_id).any()
    sample = P.encode_conversation([user(text or "x"), assistant(text or "x")])
    assert not (sample.input_ids == P.image_token_id).any()


@pytest.mark.parametrize("token", RESERVED)
def test_typed_control_token_is_escaped_or_refused(token: str) -> None:
    messages = [user(f"a{token}b")]
    batch = P.encode_prompt(messages)
    assert question_of(batch) == f"a{token}b" or token == "<|im_end|>"
    assert f"a{token}b" in prompt_of(batch)
    for call in (P.encode_prompt, P.encode_conversation):
        with pytest.raises(PromptError, match="control token"):
            call(messages, on_control="raise")
    with pytest.raises(PromptError, match="control token"):
        P.encode_turn(messages[0], on_control="raise")
    for split in ([f"a{token}b"], [f"a{token[:2]}", f"{token[2:]}b"]):
        with pytest.raises(PromptError, match="control token"):
            P.apply_chat_template([[user(*split)]])
        with pytest.raises(PromptError, match="control token"):
            P.apply_chat_template(
                [user(*split)], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
            )
    for asked in ({}, {"sanitize_control_tokens": True}):
        ids = P.apply_chat_template(messages, tokenize=True, add_generation_prompt=True, **asked)
        assert torch.as_tensor(ids).tolist() == batch["input_ids"].tolist()
        with pytest.raises(PromptError, match="control token"):
            P.apply_chat_template([user(*split)], tokenize=True, **asked)


def test_grounding_tokens_are_control_in_questions_and_answers() -> None:
    box = "<ref>cat</ref><box>[[1, 2, 3, 4]]</box>"
    sample = P.encode_conversation([user(f"Find {box}"), assistant(box)], on_control="raise")
    assert control_count(sample.input_ids, list(GROUNDING_TOKENS)) == 8
    learned = [int(label) for label in sample.labels if label != IGNORED_LABEL]
    assert P.tokenizer.decode(learned) == box + "<|im_end|>"


# ------------------------------------------------------------------------------------------- labels


def learned_text(processor: MonoInternVLProcessor, sample: Sample) -> str:
    return str(processor.tokenizer.decode([i for i in sample.labels.tolist() if i >= 0]))


@pytest.mark.parametrize("name", ["tokenizer", "tokenizer_dummy_prefix"])
@settings(max_examples=80, deadline=None)
@given(turns=st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=3))
def test_labels_learn_exactly_the_answers_and_their_ends(
    name: str, turns: list[tuple[str, str]]
) -> None:
    processor = PROCESSORS[name]
    messages = [m for q, a in turns for m in (user("x" + q + "x"), assistant("x" + a + "x"))]
    sample = processor.encode_conversation(messages)
    expected = "".join(f"x{answer}x<|im_end|>" for _, answer in turns).replace("▁", " ")
    assert learned_text(processor, sample) == expected
    kept = sample.labels != IGNORED_LABEL
    assert torch.equal(sample.labels[kept], sample.input_ids[kept])
    assert not kept[0]


def test_conversation_drops_outer_whitespace() -> None:
    messages = [
        {"role": "system", "content": "S"},
        user("  Q \n"),
        assistant("\nA "),
    ]
    sample = P.encode_conversation(messages)
    assert learned_text(P, sample) == "A<|im_end|>"
    text = P.tokenizer.decode(sample.input_ids)
    assert "user\nQ<|im_end|>" in text


def test_first_label_is_never_set() -> None:
    ids, labels = encode_pieces(P.tokenizer, [Piece("text", "abc", True)], [], add_bos=False)
    assert labels == [IGNORED_LABEL, *ids[1:]]
    assert encode_pieces(P.tokenizer, [], [], add_bos=False) == ([], [])


def test_encode_pieces_refuses_another_number_of_images() -> None:
    with pytest.raises(PromptError, match="1 image placeholders but 2 images"):
        encode_pieces(P.tokenizer, [Piece("image")], [TokenLayout(1, 4)] * 2)


def test_empty_answer_leaves_its_turn_open_and_learns_nothing() -> None:
    sample = P.encode_conversation([user("Q"), assistant(" ")])
    assert not (sample.labels >= 0).any()
    assert P.tokenizer.decode(sample.input_ids).endswith("assistant\n")


def test_turns_are_encoded_as_the_messages_that_say_the_same() -> None:
    turns = (
        Turn("user", (ImagePart(WIDE), "\nQ")),
        Turn("assistant", ("A",)),
        Turn("user", ("And ", ImagePart(SQUARE), "?")),
        Turn("assistant", ("B",)),
    )
    messages = [
        user("<image>\nQ", WIDE), assistant("A"), user("And <image>?", SQUARE), assistant("B"),
    ]  # fmt: skip
    ours = P.encode_conversation(turns, share_budget=False)
    theirs = P.encode_conversation(messages, share_budget=False)
    assert ours.num_tiles == theirs.num_tiles == (3, 1)
    assert torch.equal(ours.input_ids, theirs.input_ids)
    assert torch.equal(ours.labels, theirs.labels)
    prompts = [P.encode_prompt(form[:-1]) for form in (turns, messages)]
    assert torch.equal(prompts[0]["input_ids"], prompts[1]["input_ids"])


def test_conversation_is_cut_at_max_tokens_but_never_through_an_image() -> None:
    messages = [user(WIDE, "Q"), assistant("A longer answer")]
    whole = P.encode_conversation(messages)
    cut = P.encode_conversation(messages, max_tokens=len(whole.input_ids) - 3)
    assert torch.equal(cut.input_ids, whole.input_ids[:-3])
    assert torch.equal(cut.labels, whole.labels[:-3])
    position = whole.input_ids.tolist().index(P.image_token_id)
    with pytest.raises(PromptError, match=f"max_tokens={position} cuts an image"):
        P.encode_conversation(messages, max_tokens=position)


# ----------------------------------------------------------------------------------------- decoding


def test_decode_answer_stops_at_the_turn_end_and_drops_control_tokens() -> None:
    tokenizer = P.tokenizer
    text = "  It is <ref>here</ref><box>[[1, 2, 3, 4]]</box> <|im_end|>the rest</s>"
    ids = tokenizer(text)["input_ids"]
    assert P.decode_answer(ids) == "It is here[[1, 2, 3, 4]]"
    kept = P.decode_answer(torch.tensor(ids), keep_grounding=True)
    assert kept == "It is <ref>here</ref><box>[[1, 2, 3, 4]]</box>"
    assert P.decode_answer([]) == ""


@pytest.mark.parametrize(
    ("text", "boxes"),
    [
        ("<ref>cat</ref><box>[[1, 2, 30, 400]]</box>", [(1, 2, 30, 400)]),
        ("cat[[1,2,3,4], [5, 6, 7, 1000]]", [(1, 2, 3, 4), (5, 6, 7, 1000)]),
        ("[ 1.0 , 2, 3, 4 ]", [(1, 2, 3, 4)]),
        ("<box>[[1, 2, 3, 4", []),
        ("[[1, 2, 3]] and [1, 2, 3, 4, 5] and none", []),
    ],
)
def test_parse_boxes_reads_boxes_with_and_without_tokens(text: str, boxes: list[Any]) -> None:
    assert parse_boxes(text) == boxes


def test_stop_token_ids_are_looked_up_by_name() -> None:
    names = ("</s>", "<|im_end|>", "<|im_start|>")
    assert P.stop_token_ids == [P.tokenizer.control_id(name) for name in names]
