"""The tokenizer that a GGUF file describes, in the files that a language model's folder has.

A file holds the vocabulary, and of how text is cut before merging only a name; a name that is not
known here is refused: the ids would differ where nobody looks, at numbers and blank space.

Source: llama.cpp's vocabulary code, `llm_tokenizer_bpe`; the tokenizers of the models themselves.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    normalizers,
    pre_tokenizers,
    processors,
)
from tokenizers.models import BPE

from mono_internvl.checkpoints.gguf_files import GgufFile
from mono_internvl.errors import CheckpointError, ConfigError
from mono_internvl.processing.tokenizer import SENTENCEPIECE_MODEL, TOKENIZER_CONFIG, TOKENIZER_JSON

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_THREE_DIGITS = _WORDS + r"\p{N}{1,3}" + _REST
_ONE_DIGIT = _WORDS + r"\p{N}" + _REST
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS = {
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "dbrx", "smaug-bpe"), _THREE_DIGITS),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), _ONE_DIGIT),
    "tekken": _TEKKEN,
}
# GPT-2's words, and the same with every digit on its own.
_GPT2 = ("gpt-2", "olmo")
_GPT2_DIGITS = ("smollm", "starcoder", "refact", "codeshell", "command-r", "exaone")
# Their vocabularies hold words that no merges lead to, and BOS unless the file says otherwise.
_LLAMA3 = ("llama-bpe", "llama3", "llama-v3")
_WHOLE_WORDS = (*_LLAMA3, "tekken")

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_NAMED = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}


def write_tokenizer(stored: GgufFile, folder: Path) -> None:
    """Write tokenizer files: ids, control tokens and BOS as the file says.

    Raises:
        CheckpointError: The vocabulary is damaged.
        ConfigError: Its kind, or the name of its pre-tokenizer, is not known.
    """
    tokens, types = _vocabulary(stored)
    kind = stored.metadata.get("tokenizer.ggml.model")
    named = _named_tokens(stored, tokens)
    if kind == "gpt2":
        pre = stored.metadata.get("tokenizer.ggml.pre")
        adds_bos = _flag(stored, "add_bos_token", pre in _LLAMA3) and "bos_token" in named
        tokenizer = _byte_level(stored, tokens, types, pre)
        if adds_bos:
            bos = named["bos_token"]
            tokenizer.post_processor = processors.TemplateProcessing(
                single=f"{bos} $A",
                pair=f"{bos} $A {bos} $B",
                special_tokens=[(bos, tokens.index(bos))],
            )
        tokenizer.save(str(folder / TOKENIZER_JSON))
        settings: dict[str, Any] = {"add_bos_token": adds_bos, **named}
    elif kind == "llama":
        (folder / SENTENCEPIECE_MODEL).write_bytes(_sentencepiece(stored, tokens, types))
        settings = {
            "add_bos_token": _flag(stored, "add_bos_token", True),
            "added_tokens_decoder": {
                index: {"content": token, "special": True}
                for index, (token, of) in enumerate(zip(tokens, types, strict=True))
                if of in (_CONTROL, _UNKNOWN)
            },
            **named,
        }
    else:
        raise ConfigError(
            f"{stored.path}: a vocabulary of kind {kind!r:.40}; expected gpt2 (byte-level BPE) or "
            "llama (sentencepiece), give the model's safetensors folder"
        )
    (folder / TOKENIZER_CONFIG).write_text(json.dumps(settings), encoding="utf-8")


def _vocabulary(stored: GgufFile) -> tuple[list[str], list[int]]:
    """Tokens and their types, without the unused ones that fill the end of a table."""
    tokens = stored.metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens or not isinstance(tokens[0], str):
        raise CheckpointError(f"{stored.path}: holds no vocabulary; restore the file")
    types = stored.metadata.get("tokenizer.ggml.token_type", [_NORMAL] * len(tokens))
    if not isinstance(types, list) or len(types) != len(tokens):
        raise CheckpointError(f"{stored.path}: {len(tokens)} tokens, types of another number")
    count = len(tokens)
    while count and types[count - 1] == _UNUSED:
        count -= 1
    if len(set(tokens[:count])) != count:
        raise CheckpointError(f"{stored.path}: a token stands in the vocabulary twice")
    return tokens[:count], types[:count]


def _named_tokens(stored: GgufFile, tokens: list[str]) -> dict[str, str]:
    named = {}
    for name, field in _NAMED.items():
        index = stored.metadata.get(f"tokenizer.ggml.{name}_token_id")
        if index is None:
            continue
        if not isinstance(index, int) or not 0 <= index < len(tokens):
            raise CheckpointError(
                f"{stored.path}: {name}_token_id={index!r:.40} of {len(tokens)} tokens; restore it"
            )
        named[field] = tokens[index]
    return named


def _flag(stored: GgufFile, name: str, default: bool) -> bool:
    return bool(stored.metadata.get(f"tokenizer.ggml.{name}", default))


def _byte_level(stored: GgufFile, tokens: list[str], types: list[int], pre: Any) -> Tokenizer:
    merges = [tuple(pair.split(" ")) for pair in stored.metadata.get("tokenizer.ggml.merges", ())]
    if not all(len(pair) == 2 for pair in merges):
        raise CheckpointError(f"{stored.path}: a merge that is not of two tokens; restore the file")
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(BPE(vocabulary, merges, ignore_merges=pre in _WHOLE_WORDS))
    tokenizer.pre_tokenizer = _pre_tokenizer(stored, pre)
    if pre in ("qwen2", "deepseek-r1-qwen"):
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    for index, kind in enumerate(types):
        if kind in (_CONTROL, _USER_DEFINED):
            token = AddedToken(tokens[index], special=kind == _CONTROL, normalized=False)
            tokenizer.add_tokens([token])
    return tokenizer


def _pre_tokenizer(stored: GgufFile, pre: Any) -> Any:
    if pre in _SPLITS:
        return pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_SPLITS[pre]), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if pre in _GPT2:
        return words
    if pre in _GPT2_DIGITS:
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), words])
    known = ", ".join((*_SPLITS, *_GPT2, *_GPT2_DIGITS))
    raise ConfigError(
        f"{stored.path}: tokenizer.ggml.pre={pre!r:.40} names no pre-tokenizer that is known "
        f"({known}); give the model's safetensors folder"
    )


def _sentencepiece(stored: GgufFile, tokens: list[str], types: list[int]) -> bytes:
    """The vocabulary as sentencepiece's own model file; its types of pieces are GGUF's."""
    from sentencepiece import sentencepiece_model_pb2

    scores = stored.metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) < len(tokens) or _UNKNOWN not in types:
        raise CheckpointError(
            f"{stored.path}: a sentencepiece vocabulary without scores or unknown token"
        )
    proto = sentencepiece_model_pb2.ModelProto()
    for token, score, kind in zip(tokens, scores, types, strict=False):
        if kind not in range(_NORMAL, _BYTE + 1):
            raise CheckpointError(f"{stored.path}: token {token!r:.40} is of type {kind!r:.40}")
        proto.pieces.add(piece=token, score=score, type=kind)
    proto.trainer_spec.model_type = proto.trainer_spec.BPE
    proto.trainer_spec.unk_id = types.index(_UNKNOWN)
    proto.trainer_spec.byte_fallback = _BYTE in types
    proto.normalizer_spec.add_dummy_prefix = _flag(stored, "add_space_prefix", True)
    proto.normalizer_spec.remove_extra_whitespaces = False
    return proto.SerializeToString()
