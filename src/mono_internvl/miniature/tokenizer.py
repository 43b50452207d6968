"""The miniature's tokenizer: byte-level BPE, small, with InternLM2's control tokens.

A word in capitals and a number are always spelt, one token a character, so that reading a text in a
picture and writing a box are the same step again and again. Any text round-trips exactly.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from mono_internvl.errors import ConfigError
from mono_internvl.miniature.lexicon import COLOURS, POSITIONS, SHAPES, SIZES

CONTROL_TOKENS: Final = (
    "<unk>",
    "<s>",
    "</s>",
    "<|plugin|>",
    "<|interpreter|>",
    "<|action_end|>",
    "<|action_start|>",
    "<|im_end|>",
    "<|im_start|>",
)
"""The control tokens of InternLM2; the first three have the ids 0, 1 and 2."""

VISUAL_TOKENS: Final = (
    "<img>",
    "</img>",
    "<IMG_CONTEXT>",
    "<quad>",
    "</quad>",
    "<ref>",
    "</ref>",
    "<box>",
    "</box>",
)
"""The tokens that a vision-language model appends to the vocabulary, in this order."""

_PIECES = Regex(r" ?[0-9]| ?[A-Z]?[a-z]+|[A-Z]|, (?=[0-9])| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+")
_WHOLE_WORDS = (
    *COLOURS, *SHAPES, *SIZES, *{word for place in POSITIONS for word in place.split()},
    "user", "assistant", "object", "objects", "yes", "no", "how", "many", "what", "where", "which",
    "there", "colour", "shape", "bar", "value", "tallest", "shortest", "caption", "image",
    "sentence", "provide", "bounding", "box", "Detect", "Read", "text",
)  # fmt: skip
_WORD_WEIGHT = 400
_ALPHABET_SIZE = 256


def train_tokenizer(texts: Iterable[str], vocab_size: int = 1024) -> PreTrainedTokenizerFast:
    """Train a tokenizer for a text-only language model.

    The visual tokens are not in it: a vision-language model appends them (`add_visual_tokens`).

    Args:
        texts: training texts.
        vocab_size: number of tokens, control tokens and 256 bytes included.

    Returns:
        A tokenizer that puts `<s>` in front, with `</s>` for end and padding. Tokens that were
        never merged are possible only if `texts` are too few; then the vocabulary is smaller.

    Raises:
        ConfigError: if `vocab_size` leaves no room for a single merge.
    """
    least = _ALPHABET_SIZE + len(CONTROL_TOKENS)
    if vocab_size <= least:
        raise ConfigError(f"vocab_size: got {vocab_size}, expected more than {least}")
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(_PIECES, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[_control(token) for token in CONTROL_TOKENS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_with_whole_words(texts), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        clean_up_tokenization_spaces=False,
    )


def add_visual_tokens(tokenizer: PreTrainedTokenizerFast) -> int:
    """Append the nine visual tokens to the end of a vocabulary, in place.

    Args:
        tokenizer: the tokenizer of a language model.

    Returns:
        How many tokens were new.
    """
    return tokenizer.add_tokens([_control(token) for token in VISUAL_TOKENS], special_tokens=True)


def _control(token: str) -> AddedToken:
    return AddedToken(token, special=True, normalized=False)


def _with_whole_words(texts: Iterable[str]) -> Iterable[str]:
    """Yield the texts, then the words that must be one token, with and without a space."""
    yield from texts
    words = sorted(set(_WHOLE_WORDS))
    for _ in range(_WORD_WEIGHT):
        yield from words
        yield from (f" {word}" for word in words)
