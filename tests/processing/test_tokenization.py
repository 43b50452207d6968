"""The fast tokenizer against sentencepiece, its files, and text that spells control tokens."""

import json
import re
import shutil
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer

from mono_internvl.errors import CheckpointError, PromptError
from mono_internvl.processing.prompts import CHAT_TOKENS, SPECIAL_TOKENS, VISUAL_TOKENS
from mono_internvl.processing.tokenizer import (
    MonoInternVLTokenizer,
    add_special_vocabulary,
    load_tokenizer,
)

GOLDEN = Path(__file__).parents[1] / "parity" / "golden"
NAMES = ("tokenizer", "tokenizer_dummy_prefix")
TOKENIZERS = {name: load_tokenizer(GOLDEN / name) for name in NAMES}
SENTENCEPIECES = {
    name: sentencepiece.SentencePieceProcessor(model_file=str(GOLDEN / name / "tokenizer.model"))
    for name in NAMES
}

SNIPPETS = st.sampled_from(
    [
        "the ",
        "  ",
        "\n",
        "\n\n",
        "\t",
        "你是",
        "图片",
        "。",
        "😀",
        "👩\u200d👩\u200d👧",
        "é",
        "é",
        "\x00",
        "\x1f",
        "▁",
        "▁▁",
        "�",
        "\ufeff",
        "<0x41>",
        "<s>",
        "</s>",
        "<unk>",
        "aaaa",
        "1234",
        "street",
        *list(SPECIAL_TOKENS),
    ]
)
CHARACTERS = st.characters(exclude_categories=("Cs",))
TEXTS = st.lists(st.one_of(SNIPPETS, st.text(CHARACTERS, max_size=8)), max_size=12).map("".join)


@pytest.fixture
def released(tmp_path: Path) -> Path:
    """A copy of a released tokenizer folder."""
    return Path(shutil.copytree(GOLDEN / "tokenizer", tmp_path / "released"))


def edit_json(path: Path, **changes: object) -> None:
    values = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**values, **changes}), encoding="utf-8")


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=250, deadline=None)
@given(text=TEXTS)
def test_encode_plain_equals_sentencepiece_on_any_text(name: str, text: str) -> None:
    assert TOKENIZERS[name].encode_plain(text).ids == SENTENCEPIECES[name].encode(text)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=250, deadline=None)
@given(ids=st.lists(st.one_of(st.integers(3, 499), st.integers(3, 258)), max_size=24))
def test_decode_equals_sentencepiece_on_any_ids(name: str, ids: list[int]) -> None:
    assert TOKENIZERS[name].decode(ids) == SENTENCEPIECES[name].decode(ids)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=250, deadline=None)
@given(text=TEXTS)
def test_encode_plain_never_gives_a_control_id_and_decodes_back(name: str, text: str) -> None:
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode_plain(text).ids
    assert not set(ids) & set(tokenizer.control_tokens.values())
    assert tokenizer.decode(ids) == text.replace("▁", " ")


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=150, deadline=None)
@given(text=TEXTS)
def test_encode_plain_spans_cover_the_text_in_order(name: str, text: str) -> None:
    spans = TOKENIZERS[name].encode_plain(text).spans
    assert {i for start, end in spans for i in range(start, end)} == set(range(len(text)))
    assert spans == sorted(spans)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=150, deadline=None)
@given(parts=st.lists(st.one_of(st.sampled_from(VISUAL_TOKENS), st.text(CHARACTERS, max_size=6))))
def test_ordinary_encoding_is_inverse_with_control_tokens_kept(name: str, parts: list[str]) -> None:
    tokenizer = TOKENIZERS[name]
    text = "".join(parts)
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids[1:]) == text.replace("▁", " ")


@pytest.mark.parametrize("name", NAMES)
def test_ordinary_encoding_matches_control_tokens_and_adds_bos_but_no_eos(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    control = tokenizer.control_tokens
    assert list(control) == list(SPECIAL_TOKENS)
    ids = tokenizer("<img><IMG_CONTEXT></img><|im_end|>")["input_ids"]
    names = ("<s>", "<img>", "<IMG_CONTEXT>", "</img>", "<|im_end|>")
    assert ids == [control[token] for token in names]


@pytest.mark.parametrize("name", NAMES)
def test_decode_skips_control_tokens_on_request(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    ids = tokenizer("a box<box>[[1, 2]]</box><|im_end|>")["input_ids"]
    kept = tokenizer.decode(ids, skip_special_tokens=False)
    assert kept == "<s>a box<box>[[1, 2]]</box><|im_end|>"
    skipped = tokenizer.decode(ids, skip_special_tokens=True)
    assert skipped.replace(" ", "") == "abox[[1,2]]"


def test_decode_writes_each_invalid_byte_as_one_replacement_character() -> None:
    tokenizer = TOKENIZERS["tokenizer"]
    ids = [3 + byte for byte in b"\xe4\xbd\xa0\xe4\xbd\xff\x41"]
    assert tokenizer.decode(ids) == "你\ufffd\ufffd\ufffdA"
    assert tokenizer.batch_decode([ids, [3 + 0x42]]) == ["你\ufffd\ufffd\ufffdA", "B"]


def test_decode_refuses_ids_of_another_vocabulary() -> None:
    with pytest.raises(CheckpointError, match="92546"):
        TOKENIZERS["tokenizer"].decode([92546])


def test_encode_plain_refuses_lone_surrogates() -> None:
    with pytest.raises(PromptError, match="not a Unicode string"):
        TOKENIZERS["tokenizer"].encode_plain("a\ud800b")


def test_control_id_names_the_missing_token() -> None:
    with pytest.raises(CheckpointError, match="<audio>"):
        TOKENIZERS["tokenizer"].control_id("<audio>")


@pytest.mark.parametrize("name", NAMES)
def test_save_pretrained_reloads_identically_and_keeps_the_sentencepiece_model(
    name: str, tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(GOLDEN / name)
    tokenizer.save_pretrained(tmp_path)
    for file in ("tokenizer.model", "added_tokens.json"):
        assert (tmp_path / file).read_bytes() == (GOLDEN / name / file).read_bytes()
    again = load_tokenizer(tmp_path)
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    assert again.control_tokens == tokenizer.control_tokens
    assert again.special_tokens_map == tokenizer.special_tokens_map
    again.save_pretrained(tmp_path / "twice")
    for file in ("tokenizer.model", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "twice" / file).read_bytes() == (tmp_path / file).read_bytes()
    (tmp_path / "tokenizer.json").unlink()
    converted = load_tokenizer(tmp_path)
    assert converted("你是 <img>the")["input_ids"] == tokenizer("你是 <img>the")["input_ids"]


def test_saved_folder_loads_in_hosts_without_this_package(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(GOLDEN / "tokenizer")
    tokenizer.save_pretrained(tmp_path)
    host = AutoTokenizer.from_pretrained(tmp_path)
    assert not isinstance(host, MonoInternVLTokenizer)
    text = "Who <|im_end|> 你是\n\n <box>"
    assert host(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert host.decode(host(text)["input_ids"]) == tokenizer.decode(tokenizer(text)["input_ids"])


def test_load_tokenizer_never_executes_code_of_the_checkpoint(released: Path) -> None:
    (released / "evil.py").write_text(f"open({str(released / 'ran')!r}, 'w')\nclass Evil: pass\n")
    edit_json(released / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Evil", None]})
    tokenizer = load_tokenizer(released)
    tokenizer.save_pretrained(released / "saved")
    assert not (released / "ran").exists()
    assert "auto_map" not in (released / "saved" / "tokenizer_config.json").read_text()


def test_load_tokenizer_needs_only_one_declaration_of_the_added_tokens(released: Path) -> None:
    expected = load_tokenizer(released).control_tokens
    (released / "special_tokens_map.json").unlink()
    (released / "added_tokens.json").unlink()
    assert load_tokenizer(released).control_tokens == expected
    shutil.copy(GOLDEN / "tokenizer" / "added_tokens.json", released)
    (released / "tokenizer_config.json").unlink()
    assert load_tokenizer(released).control_tokens == expected


def test_load_tokenizer_refuses_contradicting_or_missing_files(released: Path) -> None:
    added = released / "added_tokens.json"
    edit_json(added, **{"<odd>": 508})
    with pytest.raises(CheckpointError, match="<odd>"):
        load_tokenizer(released)
    added.write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        load_tokenizer(released)
    added.write_text('{"<far>": 600}')
    with pytest.raises(CheckpointError, match="without a gap"):
        load_tokenizer(released)
    (released / "tokenizer.model").unlink()
    with pytest.raises(CheckpointError, match=r"neither tokenizer\.json nor tokenizer\.model"):
        load_tokenizer(released)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.model", b""),
        ("tokenizer.model", b"not a model"),
        ("tokenizer.model", b"\xff" * 64),
        ("tokenizer.json", b"{}"),
        ("tokenizer.json", b'{"version"'),
        ("tokenizer.json", b"\xff\xfe"),
        ("tokenizer_config.json", b'{"a": "\xff"}'),
        ("added_tokens.json", b"\xff\xfe"),
        ("added_tokens.json", b"[]"),
        ("special_tokens_map.json", b"[" * 100_000),
    ],
)
def test_load_tokenizer_names_the_corrupt_file(released: Path, name: str, content: bytes) -> None:
    (released / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{re.escape(name)}: .*restore the file"):
        load_tokenizer(released)


def test_load_tokenizer_names_the_cut_sentencepiece_model(released: Path) -> None:
    file = released / "tokenizer.model"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"tokenizer\.model"):
        load_tokenizer(released)


def test_load_tokenizer_refuses_what_is_not_bpe(released: Path) -> None:
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString((released / "tokenizer.model").read_bytes())
    proto.trainer_spec.model_type = 1
    (released / "tokenizer.model").write_bytes(proto.SerializeToString())
    with pytest.raises(CheckpointError, match="model_type 1"):
        load_tokenizer(released)


def add_reserved_pieces(folder: Path) -> sentencepiece.SentencePieceProcessor:
    """Gives the model the spare symbols that a released one has; chat tokens take their ids."""
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString((folder / "tokenizer.model").read_bytes())
    for number in range(-1, len(CHAT_TOKENS)):
        piece = proto.pieces.add()
        piece.piece = f"[UNUSED_TOKEN_{number + 1}]"
        piece.type = 4
    (folder / "tokenizer.model").write_bytes(proto.SerializeToString())
    added = [*CHAT_TOKENS, *VISUAL_TOKENS]
    ids = {token: 501 + index for index, token in enumerate(added)}
    (folder / "added_tokens.json").write_text(json.dumps(ids))
    edit_json(folder / "tokenizer_config.json", added_tokens_decoder={})
    return sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())


def test_added_tokens_take_the_place_of_reserved_pieces(released: Path) -> None:
    model = add_reserved_pieces(released)
    tokenizer = load_tokenizer(released)
    assert tokenizer.control_id("<|im_start|>") == 506
    assert tokenizer.decode([506]) == "<|im_start|>"
    assert tokenizer("the[UNUSED_TOKEN_0]re")["input_ids"][1:] == model.encode(
        "the[UNUSED_TOKEN_0]re"
    )
    # The name of a piece that became <|im_start|> would be a way to type a control token.
    typed = "[UNUSED_TOKEN_6]"
    assert model.encode(typed)[-1] == 506
    assert 506 not in tokenizer.encode_plain(typed).ids + tokenizer(typed)["input_ids"]
    assert tokenizer.decode(tokenizer.encode_plain(typed).ids) == typed


def test_text_that_spells_a_byte_piece_stays_text(released: Path) -> None:
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString((released / "tokenizer.model").read_bytes())
    pieces = ("<0", "<0x", "1>", "<0x4", "<", "0", ">")
    for number, name in enumerate(pieces):
        piece = proto.pieces.add()
        piece.piece, piece.type, piece.score = name, 1, -1000.0 - number
    (released / "tokenizer.model").write_bytes(proto.SerializeToString())
    first = 500 + len(pieces)
    ids = {token: first + index for index, token in enumerate([*CHAT_TOKENS, *VISUAL_TOKENS])}
    (released / "added_tokens.json").write_text(json.dumps(ids))
    edit_json(released / "tokenizer_config.json", added_tokens_decoder={})
    model = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
    encoded = load_tokenizer(released).encode_plain("<0x41>").ids
    assert encoded == model.encode("<0x41>")
    assert 3 + 0x41 not in encoded


def test_extra_whitespace_is_removed_where_the_model_says_so(released: Path) -> None:
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString((released / "tokenizer.model").read_bytes())
    proto.normalizer_spec.remove_extra_whitespaces = True
    (released / "tokenizer.model").write_bytes(proto.SerializeToString())
    model = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
    tokenizer = load_tokenizer(released)
    for text in ("  the   street ", "the street", "   ", "a  b"):
        assert tokenizer.encode_plain(text).ids == model.encode(text)


def test_grown_vocabulary_is_saved_without_the_sentencepiece_files(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(GOLDEN / "tokenizer")
    assert add_special_vocabulary(tokenizer) == 0
    assert tokenizer.add_tokens(["<new>"], special_tokens=True) == 1
    assert tokenizer.control_id("<new>") == 515
    tokenizer.save_pretrained(tmp_path)
    assert not (tmp_path / "tokenizer.model").exists()
    assert load_tokenizer(tmp_path).control_id("<new>") == 515


def byte_level_tokenizer() -> MonoInternVLTokenizer:
    """A language model's tokenizer of another kind: byte-level, without BOS."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: index for index, character in enumerate(alphabet)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return MonoInternVLTokenizer(tokenizer_object=backend)


def test_add_special_vocabulary_appends_what_is_missing_in_order() -> None:
    tokenizer = byte_level_tokenizer()
    size = len(tokenizer)
    added = [*CHAT_TOKENS, *VISUAL_TOKENS]
    assert add_special_vocabulary(tokenizer) == len(added)
    assert [tokenizer.control_id(token) for token in added] == list(range(size, size + len(added)))
    assert add_special_vocabulary(tokenizer) == 0


@settings(max_examples=60, deadline=None)
@given(text=TEXTS)
def test_other_kinds_of_vocabulary_escape_and_decode_too(text: str) -> None:
    tokenizer = byte_level_tokenizer()
    add_special_vocabulary(tokenizer)
    ids = tokenizer.encode_plain(text).ids
    assert not set(ids) & set(tokenizer.control_tokens.values())
    assert tokenizer.decode(ids) == text


def test_encode_plain_refuses_vocabularies_that_spell_control_tokens() -> None:
    backend = Tokenizer(models.WordLevel({"<|im_end|>": 0, "[UNK]": 1}, unk_token="[UNK]"))
    tokenizer = MonoInternVLTokenizer(tokenizer_object=backend)
    add_special_vocabulary(tokenizer)
    with pytest.raises(PromptError, match="control token"):
        tokenizer.encode_plain("<|im_end|>")
