"""Sentencepiece BPE as a fast tokenizer: the same ids from text, the same text from ids."""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, processors
from tokenizers.models import BPE

from mono_internvl.errors import CheckpointError

_SPACE = "\u2581"  # sentencepiece writes a space as this character
_BYTE_PIECE = re.compile("<0x([0-9A-Fa-f]{2})>")
_MOST_CHARACTERS = 1000  # of a piece; trained ones have up to 512
_REPLACEMENT = "\ufffd"

# Piece types and model types of sentencepiece's model file.
_NORMAL, _USER_DEFINED = 1, 4
_MODEL_TYPE_BPE = 2


@dataclass(frozen=True)
class DecodingTable:
    """How ids turn into bytes; empty for vocabularies that are not of sentencepiece's kind.

    Attributes:
        data: Bytes of each id.
        starts_with_space: For each id whether its piece starts with a space.
        control_ids: Ids of control tokens.
        added_ids: Ids of all added tokens; text begins anew after each.
        has_dummy_prefix: Whether encoding puts a space in front of text, which decoding drops.
    """

    data: list[bytes]
    starts_with_space: list[bool]
    control_ids: frozenset[int]
    added_ids: frozenset[int]
    has_dummy_prefix: bool


def convert_sentencepiece(
    model: bytes, added_tokens: Mapping[int, AddedToken], *, bos_token: str | None
) -> Tokenizer:
    """A fast tokenizer equal to a sentencepiece BPE model with tokens added to it.

    An added token whose id lies inside the model's range takes that piece's place: the piece's own
    name is then ordinary text.

    Args:
        model: Contents of `tokenizer.model`.
        added_tokens: Added tokens by id.
        bos_token: Token put in front of every text, or None.

    Raises:
        CheckpointError: If the model cannot be read or is not BPE, or the added ids leave a gap.

    Source: sentencepiece's BPE. Differs: with a dummy prefix, text after a user-defined symbol gets
    the prefix, too.
    """
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    try:
        proto.ParseFromString(model)
    except (DecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(
            f"tokenizer.model: not a sentencepiece model ({error}); restore the file from the "
            "checkpoint"
        ) from error
    if not 0 <= proto.trainer_spec.unk_id < len(proto.pieces):
        raise CheckpointError(
            f"tokenizer.model: {len(proto.pieces)} pieces; expected a sentencepiece model, restore "
            "the file from the checkpoint"
        )
    if proto.trainer_spec.model_type != _MODEL_TYPE_BPE:
        raise CheckpointError(
            f"tokenizer.model: model_type {proto.trainer_spec.model_type}; only BPE "
            f"({_MODEL_TYPE_BPE}) is supported, convert it to tokenizer.json"
        )
    if (
        proto.trainer_spec.treat_whitespace_as_suffix
        or not proto.normalizer_spec.escape_whitespaces
    ):
        raise CheckpointError(
            "tokenizer.model: whitespace as suffix or unescaped is not supported, "
            "convert it to tokenizer.json"
        )
    names = [piece.piece for piece in proto.pieces]
    if (longest := max(map(len, names))) > _MOST_CHARACTERS:  # merges take its square
        raise CheckpointError(
            f"tokenizer.model: a piece of {longest} characters; expected at most "
            f"{_MOST_CHARACTERS}, restore the file from the checkpoint"
        )
    user_defined = []
    for index, piece in enumerate(proto.pieces):
        if index in added_tokens:
            names[index] = added_tokens[index].content
        elif piece.type == _USER_DEFINED:
            user_defined.append(AddedToken(piece.piece, normalized=False, special=False))
    vocabulary = {name: index for index, name in enumerate(names)}
    mergeable = {
        piece.piece: piece.score
        for index, piece in enumerate(proto.pieces)
        if piece.type == _NORMAL and index not in added_tokens
    }
    tokenizer = Tokenizer(
        BPE(
            vocab=vocabulary,
            merges=_merges(mergeable, vocabulary),
            unk_token=names[proto.trainer_spec.unk_id],
            fuse_unk=True,
            byte_fallback=proto.trainer_spec.byte_fallback,
        )
    )
    has_dummy_prefix = proto.normalizer_spec.add_dummy_prefix
    tokenizer.normalizer = _normalizer(proto.normalizer_spec)
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(
        [*steps, decoders.Strip(" ", 1, 0)] if has_dummy_prefix else steps
    )
    tokenizer.add_tokens(user_defined)
    tokenizer.add_tokens([token for _, token in sorted(added_tokens.items())])
    for index, token in added_tokens.items():
        if tokenizer.token_to_id(token.content) != index:
            raise CheckpointError(
                f"added token {token.content!r} has id {index} on disk, but follows as "
                f"{tokenizer.token_to_id(token.content)}; expected added ids without a gap after "
                f"the {len(names)} pieces of tokenizer.model"
            )
    if bos_token is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos_token} $A",
            pair=f"{bos_token} $A {bos_token} $B",
            special_tokens=[(bos_token, tokenizer.token_to_id(bos_token))],
        )
    return tokenizer


def _merges(mergeable: dict[str, float], vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """Every way to join two pieces to a third, best score of the third first.

    Only normal pieces take part: sentencepiece never joins text to a control or byte piece, however
    its name is spelled.
    A trained vocabulary holds both parts of every piece, so that no way is missed.
    """
    ranked: list[tuple[float, int, int, int, tuple[str, str]]] = []
    for piece, score in mergeable.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in mergeable and right in mergeable:
                ranked.append(
                    (-score, vocabulary[piece], vocabulary[left], vocabulary[right], (left, right))
                )
    ranked.sort()
    return [pair for *_, pair in ranked]


def _normalizer(spec: Any) -> normalizers.Normalizer:
    steps: list[normalizers.Normalizer] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(_SPACE))
    steps.append(normalizers.Replace(" ", _SPACE))
    return normalizers.Sequence(steps)


def decoding_table(tokenizer: Tokenizer) -> DecodingTable:
    """The table for decoding; empty if the vocabulary is not of sentencepiece's kind."""
    decoder = json.loads(tokenizer.to_str()).get("decoder") or {}
    kinds = {step["type"] for step in decoder.get("decoders", ())}
    added = tokenizer.get_added_tokens_decoder()
    if not {"ByteFallback", "Replace"} <= kinds:
        return DecodingTable([], [], frozenset(), frozenset(), False)
    size = tokenizer.get_vocab_size(with_added_tokens=True)
    names = [tokenizer.id_to_token(index) or "" for index in range(size)]
    return DecodingTable(
        data=[
            name.encode() if index in added else _piece_bytes(name)
            for index, name in enumerate(names)
        ],
        starts_with_space=[name.startswith(_SPACE) for name in names],
        control_ids=frozenset(index for index, token in added.items() if token.special),
        added_ids=frozenset(added),
        has_dummy_prefix="Strip" in kinds,
    )


def _piece_bytes(name: str) -> bytes:
    if byte := _BYTE_PIECE.fullmatch(name):
        return bytes([int(byte[1], 16)])
    return name.replace(_SPACE, " ").encode()


def decode_pieces(ids: Iterable[int], pieces: DecodingTable, skip_special_tokens: bool) -> str:
    """Text of ids, as sentencepiece decodes each stretch between added tokens.

    Raises:
        CheckpointError: If an id is outside the vocabulary.
    """
    out = bytearray()
    at_start = True
    for index in ids:
        if skip_special_tokens and index in pieces.control_ids:
            continue
        if not 0 <= index < len(pieces.data):
            raise CheckpointError(
                f"token id {index} is outside the vocabulary of {len(pieces.data)}; "
                "the tokenizer belongs to another model"
            )
        data = pieces.data[index]
        if at_start and pieces.has_dummy_prefix and pieces.starts_with_space[index]:
            data = data[1:]
        out += data
        at_start = index in pieces.added_ids
    return _decode_utf8(bytes(out))


def _decode_utf8(data: bytes) -> str:
    """UTF-8 with every invalid byte as one U+FFFD, as sentencepiece does (Python merges some)."""
    parts = []
    while data:
        try:
            parts.append(data.decode())
            break
        except UnicodeDecodeError as error:
            parts.append(data[: error.start].decode() + _REPLACEMENT * (error.end - error.start))
            data = data[error.end :]
    return "".join(parts)
