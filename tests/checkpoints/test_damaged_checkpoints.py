"""Damaged or hostile files of a checkpoint: an error of ours, in one line, at once."""

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from processing_helpers import GOLDEN
from safetensors.torch import load_file, save_file
from sentencepiece import sentencepiece_model_pb2
from tiny_models import tiny_model
from transformers import LlamaConfig

from mono_internvl.checkpoints.llm_families import read_text_config
from mono_internvl.errors import CheckpointError, ConfigError
from mono_internvl.model.modeling import MonoInternVLForConditionalGeneration as Model
from mono_internvl.processing.processor import MonoInternVLProcessor
from mono_internvl.processing.tokenizer import load_tokenizer
from mono_internvl.released.keys import read_config

WEIGHTS = "model.safetensors"


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    tiny_model().save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def _edit(file: Path, place: str, value: Any) -> None:
    """Set a value in a JSON file; `place` is a path with dots."""
    stored = json.loads(file.read_text())
    *way, name = place.split(".")
    inner = stored
    for step in way:
        inner = inner[step]
    inner[name] = value
    file.write_text(json.dumps(stored))


def _deep(levels: int) -> Any:
    return json.loads("[" * levels + "]" * levels)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("llm_config.num_hidden_layers", 1_000_000),
        ("llm_config.num_hidden_layers", 10**30),
        ("llm_config.hidden_size", 2**40),
        ("llm_config.vocab_size", 2**31),
        ("llm_config.intermediate_size", 2**62),
        ("llm_config.num_attention_heads", 10**9),
        ("llm_config.head_dim", 2**30),
        ("llm_config.pad_token_id", 10**6),
        ("llm_config.pad_token_id", "<pad>"),
        ("llm_config.rope_scaling", {"type": ["linear"], "factor": 2}),
        ("llm_config.rope_scaling", {"type": {}, "factor": 2}),
        ("llm_config.eos_token_id", {"a": 1}),
        ("llm_config.use_cache", "perhaps"),
        ("vision_config.image_size", 280_000_000),
        ("vision_config.hidden_size", 2**50),
        ("vision_config.num_channels", 10**9),
        ("force_image_size", 280_000_000),
        ("max_dynamic_patch", 100_000),
        ("torch_dtype", "nonsense"),
        ("torch_dtype", "load"),
        ("torch_dtype", "int8"),
        ("torch_dtype", 3),
        ("dtype", "nonsense"),
        ("dtype", ["float32"]),
        ("note", _deep(800)),
        ("visual_experts", [["ffn"]]),
        ("visual_experts", {"ffn": 1}),
    ],
    ids=lambda value: str(value)[:40],
)
def test_absurd_config_is_refused_at_once(saved: Path, place: str, value: Any) -> None:
    _edit(saved / "config.json", place, value)
    start = time.process_time()
    with pytest.raises((ConfigError, CheckpointError)) as caught:
        Model.from_pretrained(saved)
    assert time.process_time() - start < 5
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


@pytest.mark.parametrize("kind", [torch.int64, torch.bool, torch.float8_e4m3fn, torch.uint8])
def test_tensor_that_is_no_weight_is_refused(saved: Path, kind: torch.dtype) -> None:
    tensors = load_file(saved / WEIGHTS)
    key = "language_model.model.norm.weight"
    save_file({**tensors, key: tensors[key].to(kind)}, saved / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"1 of a type that is not read, first {key}"):
        Model.from_pretrained(saved)


def test_index_without_metadata_is_read(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path, max_shard_size="60KB")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": json.loads(index.read_text())["weight_map"]}))
    assert Model.from_pretrained(tmp_path).config.text_config.hidden_size == 64


@pytest.mark.parametrize("content", ["", "{", "[]", '{"peft_type": 3}'])
def test_broken_adapter_beside_weights_changes_nothing(saved: Path, content: str) -> None:
    (saved / "adapter_config.json").write_text(content)
    assert Model.from_pretrained(saved).config.text_config.hidden_size == 64


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_settings_file_without_end_is_not_read(saved: Path, name: str) -> None:
    (saved / name).unlink(missing_ok=True)
    with (saved / name).open("wb") as file:
        file.truncate(6 << 30)
    with pytest.raises(CheckpointError, match="expected at most"):
        Model.from_pretrained(saved)


def test_config_that_is_a_pipe_is_refused(saved: Path) -> None:
    (saved / "config.json").unlink()
    os.mkfifo(saved / "config.json")
    with pytest.raises(CheckpointError, match=r"config\.json: is no file"):
        read_config(saved)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_hidden_layers", 10**9),
        ("hidden_size", "wide"),
        ("architectures", {"a": 1}),
        ("architectures", 3),
        ("rope_scaling", {"type": ["linear"]}),
        ("attention_bias", "perhaps"),
        ("vocab_size", 2**40),
    ],
    ids=str,
)
def test_absurd_language_model_is_refused_at_once(tmp_path: Path, field: str, value: Any) -> None:
    LlamaConfig(architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
    _edit(tmp_path / "config.json", field, value)
    with pytest.raises(ConfigError, match=r"config\.json"):
        read_text_config(tmp_path)


# ---------------------------------------------------------------------------------- tokenizers


@pytest.fixture
def tokenizer_folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(GOLDEN / "tokenizer", tmp_path / "tokenizer"))


def _edit_model(folder: Path, change: Any) -> None:
    file = folder / "tokenizer.model"
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(file.read_bytes())
    change(proto)
    file.write_bytes(proto.SerializeToString())


def test_piece_that_is_nearly_a_byte_is_text(tokenizer_folder: Path) -> None:
    _edit_model(tokenizer_folder, lambda proto: setattr(proto.pieces[5], "piece", "<0xZZ>"))
    assert load_tokenizer(tokenizer_folder).decode([5]) == "<0xZZ>"


@pytest.mark.parametrize("charsmap", [b"\xff\xff\xff\xff", b"\0" * 7, b"\4\0\0\0" + b"\xff" * 40])
def test_broken_character_map_is_refused(tokenizer_folder: Path, charsmap: bytes) -> None:
    _edit_model(
        tokenizer_folder,
        lambda proto: setattr(proto.normalizer_spec, "precompiled_charsmap", charsmap),
    )
    with pytest.raises(CheckpointError, match="tokenizer"):
        load_tokenizer(tokenizer_folder)


def test_piece_of_a_million_characters_is_refused(tokenizer_folder: Path) -> None:
    _edit_model(tokenizer_folder, lambda proto: setattr(proto.pieces[400], "piece", "a" * 10**6))
    with pytest.raises(CheckpointError, match="a piece of 1000000 characters"):
        load_tokenizer(tokenizer_folder)


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("tokenizer_config.json", "added_tokens_decoder", {"x": 3}),
        ("tokenizer_config.json", "added_tokens_decoder", [1]),
        ("tokenizer_config.json", "additional_special_tokens", 3),
        ("tokenizer_config.json", "model_max_length", "long"),
        ("tokenizer_config.json", "bos_token", {"a": 1}),
        ("special_tokens_map.json", "additional_special_tokens", {"a": {}}),
        ("added_tokens.json", "<img>", "x"),
        ("added_tokens.json", "<img>", -1),
    ],
)
def test_broken_tokenizer_settings_raise_our_error(
    tokenizer_folder: Path, name: str, field: str, value: Any
) -> None:
    file = tokenizer_folder / name
    if not file.exists():
        file.write_text("{}")
    _edit(file, field, value)
    try:
        load_tokenizer(tokenizer_folder)
    except CheckpointError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("image_processor", 3),
        ("image_processor.image_mean", "x"),
        ("image_processor.image_std", [0, "a", None]),
        ("image_processor.image_size", "448"),
        ("image_processor.max_tiles", 1e9),
        ("image_processor.use_thumbnail", "perhaps"),
        ("visual_token_size", 0),
        ("visual_token_size", "x"),
        ("prompt_form", ["a"]),
        ("default_system_prompt", {"a": 1}),
    ],
    ids=str,
)
def test_broken_processor_settings_raise_our_error(tmp_path: Path, place: str, value: Any) -> None:
    config, tokenizer = tiny_model().config, load_tokenizer(GOLDEN / "tokenizer")
    MonoInternVLProcessor.from_config(config, tokenizer).save_pretrained(tmp_path)
    _edit(tmp_path / "processor_config.json", place, value)
    with pytest.raises((CheckpointError, ConfigError)):
        MonoInternVLProcessor.from_pretrained(tmp_path)


def test_template_that_is_no_text_is_refused(tmp_path: Path) -> None:
    config, tokenizer = tiny_model().config, load_tokenizer(GOLDEN / "tokenizer")
    MonoInternVLProcessor.from_config(config, tokenizer).save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match="UnicodeDecodeError"):
        MonoInternVLProcessor.from_pretrained(tmp_path)
