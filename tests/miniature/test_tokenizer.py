"""The miniature's tokenizer."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from mono_internvl.errors import ConfigError
from mono_internvl.miniature.english import load_english
from mono_internvl.miniature.lexicon import COLOURS, POSITIONS, SHAPES, SIZES
from mono_internvl.miniature.tokenizer import (
    CONTROL_TOKENS,
    VISUAL_TOKENS,
    add_visual_tokens,
    train_tokenizer,
)

TEXTS = load_english()[:1500]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(TEXTS, vocab_size=800)


def ids(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def test_control_tokens_come_first_and_bos_in_front(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(tokenizer) == 800
    assert tokenizer.convert_tokens_to_ids(list(CONTROL_TOKENS)) == list(range(9))
    assert tokenizer("red").input_ids == [1, *ids(tokenizer, "red")]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert len(ids(tokenizer, "<|im_start|>user\n")) == 3


@settings(max_examples=150, deadline=None)
@given(text=st.text(max_size=60))
def test_any_text_round_trips(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    if not any(token in text for token in CONTROL_TOKENS):
        assert tokenizer.decode(ids(tokenizer, text)) == text


@pytest.mark.parametrize(
    "text",
    [
        "a  b\n\n c\t",
        " leading",
        "tail ",
        "don't [[1, 2]] x,1",
        "été 你好 🙂",
        "<box>[[120, 3]]</box>",
    ],
)
def test_hard_texts_round_trip(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assert tokenizer.decode(ids(tokenizer, text)) == text


def test_world_words_are_single_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    words = {word for place in POSITIONS for word in place.split()}.union(COLOURS, SHAPES, SIZES)
    for word in sorted(words):
        assert len(ids(tokenizer, word)) == 1
        assert len(ids(tokenizer, f" {word}")) == 1


def test_digits_and_capitals_are_spelt(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer.convert_ids_to_tokens(ids(tokenizer, "ZORA")) == list("ZORA")
    assert tokenizer.convert_ids_to_tokens(ids(tokenizer, "1000")) == list("1000")
    spelt = ids(tokenizer, "says ZO 12.")
    assert set(ids(tokenizer, "ZO")) | set(ids(tokenizer, "12")) <= set(spelt)


def test_visual_tokens_are_appended_in_order_and_saved(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    tokenizer.save_pretrained(tmp_path / "text")
    wide = AutoTokenizer.from_pretrained(tmp_path / "text")
    assert add_visual_tokens(wide) == 9
    assert add_visual_tokens(wide) == 0
    wide.save_pretrained(tmp_path / "vision")
    again = AutoTokenizer.from_pretrained(tmp_path / "vision")
    assert again.convert_tokens_to_ids(list(VISUAL_TOKENS)) == list(range(800, 809))
    text = "<ref>red circle</ref><box>[[1, 2, 3, 4]]</box>"
    assert again.decode(again(text).input_ids) == "<s>" + text
    assert again(text).input_ids[1] == 805


def test_training_is_deterministic(tokenizer: PreTrainedTokenizerFast) -> None:
    again = train_tokenizer(TEXTS, vocab_size=800)
    assert again.get_vocab() == tokenizer.get_vocab()


def test_too_small_a_vocabulary_is_refused() -> None:
    with pytest.raises(ConfigError, match="vocab_size"):
        train_tokenizer(TEXTS, vocab_size=200)
