"""GGUF files: the model says what the dequantised one says; damaged ones are refused at once."""

from __future__ import annotations

import json
import random
import struct
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from tiny_gguf import CHATML, write_gguf
from tiny_llms import TINY_LLMS, tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from mono_internvl.checkpoints.from_gguf import find_gguf, write_language_model
from mono_internvl.checkpoints.from_llm import monolithic_from_llm
from mono_internvl.checkpoints.gguf_files import read_gguf
from mono_internvl.checkpoints.initialize import init
from mono_internvl.configuration.model import MonoInternVLVisionConfig
from mono_internvl.errors import CheckpointError, ConfigError, MonoInternVLError
from mono_internvl.model.modeling import MonoInternVLForConditionalGeneration
from mono_internvl.processing.processor import MonoInternVLProcessor
from mono_internvl.processing.tokenizer import load_tokenizer

TINY: dict[str, Any] = {"tile_px": 56, "patch_width": 16, "max_tiles": 2}
TEXT = " A  red 12 345 circle's\n\n\t caf\u0065\u0301 \U0001f600 99999"
# The tiny models' vocabulary of two merges is too small to tell pre-tokenizers apart.
MERGES = [("1", "2"), ("3", "4"), ("34", "5"), ("9", "9"), ("99", "9"), ("\u0120", "\u0120")]
MERGES += [("\u0120", "12"), ("\u0120", "r"), ("\u010a", "\u010a")]


def _llm(folder: Path, version: str = "smollm2", **options: Any) -> tuple[Path, Any]:
    """A GGUF file alone in its folder, and the model it was written from."""
    model = TINY_LLMS[version].write(folder / "source")
    (folder / "gguf").mkdir()
    return write_gguf(folder / "gguf" / "tiny.gguf", model, tiny_tokenizer(), **options), model


def _made(file: Path, folder: Path) -> MonoInternVLForConditionalGeneration:
    folder.mkdir()
    write_language_model(file, folder)
    vision = MonoInternVLVisionConfig(hidden_size=16, image_size=56)
    return monolithic_from_llm(folder, vision=vision).model


@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.Q8_0, Kind.Q4_1], ids=lambda k: k.name)
@torch.no_grad()
def test_gguf_says_what_transformers_dequantises(kind: Kind, tmp_path: Path) -> None:
    file, source = _llm(tmp_path, "smollm2", kind=kind)
    reference = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    ).eval()
    model = _made(file, tmp_path / "llm")
    ids = torch.randint(4, 250, (2, 40), generator=torch.Generator().manual_seed(1))
    ours, theirs = model(ids).logits[..., : source.config.vocab_size], reference(ids).logits
    assert torch.allclose(ours, theirs, atol=5e-5, rtol=0), (ours - theirs).abs().max()
    exact = {Kind.F32: 5e-5, Kind.F16: 2e-2}.get(kind)
    if exact is not None:
        assert (ours - source(ids).logits).abs().max() < exact
    else:
        assert (ours - source(ids).logits).abs().max() > 1e-3, "was quantised"


@pytest.mark.parametrize("version", ["llama2-linear", "qwen2.5", "qwen3"])
@torch.no_grad()
def test_gguf_family_says_what_its_source_says(version: str, tmp_path: Path) -> None:
    rope = TINY_LLMS[version].fields["rope_parameters"]
    name = {"llama2-linear": "llama", "qwen2.5": "qwen2", "qwen3": "qwen3"}[version]
    fields = {}
    if rope["rope_type"] != "default":
        prefix = f"{name}.rope.scaling"
        fields = {f"{prefix}.type": rope["rope_type"], f"{prefix}.factor": rope["factor"]}
        if "original_max_position_embeddings" in rope:
            length = rope["original_max_position_embeddings"]
            fields[f"{prefix}.original_context_length"] = length
    file, source = _llm(tmp_path, version, fields=fields)
    model = _made(file, tmp_path / "llm")
    ids = torch.randint(4, 250, (2, 70), generator=torch.Generator().manual_seed(1))
    ours, theirs = model(ids).logits[..., : source.config.vocab_size], source(ids).logits
    assert torch.allclose(ours, theirs, atol=5e-5, rtol=0), (ours - theirs).abs().max()


def test_gguf_init_carries_over_tokens_template_and_types(tmp_path: Path) -> None:
    file, source = _llm(tmp_path, kind=Kind.Q8_0)
    made = init(str(file.parent), tmp_path / "made", **TINY)  # the only file of a folder
    processor = MonoInternVLProcessor.from_pretrained(made)
    reference = tiny_tokenizer()
    reference.chat_template = CHATML
    dialogue = [{"role": "user", "content": "a red circle"}]
    prompt = processor.encode_prompt(dialogue)["input_ids"][0].tolist()
    theirs = reference.apply_chat_template(dialogue, add_generation_prompt=True, return_dict=False)
    assert prompt == theirs
    assert processor.turn_end_id == 2
    config = json.loads((made / "config.json").read_text())
    assert config["torch_dtype"] == "float32"
    assert config["llm_config"]["rms_norm_eps"] == source.config.rms_norm_eps
    half, _ = _llm(tmp_path / "half", kind=Kind.F16)
    config = json.loads((init(str(half), tmp_path / "f16", **TINY) / "config.json").read_text())
    assert config["torch_dtype"] == "float16"
    assert not list(tmp_path.glob(".*"))


def _tokenizer(pre: Any, **options: Any) -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<unk>", "<s>", "</s>", *alphabet, *dict.fromkeys(a + b for a, b in MERGES)]
    backend = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, MERGES, **options))
    backend.pre_tokenizer, backend.decoder = pre, decoders.ByteLevel()
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def _own_pre_tokenizer(name: str) -> Any:
    """What the tokenizer.json of a model with this pre-tokenizer has."""
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if name == "gpt-2":
        return words
    if name == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), words])
    from tokenizers import Regex
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    split = PRETOKENIZE_REGEX if name == "qwen2" else PRETOKENIZE_REGEX.replace("N}", "N}{1,3}", 1)
    if name == "llama-bpe":
        split = split.replace(r"[^\r\n\p{L}\p{N}{1,3}]", r"[^\r\n\p{L}\p{N}]")
        split = split.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_gguf_pre_tokenizer_is_restored_by_its_name(pre: str, tmp_path: Path) -> None:
    reference = _tokenizer(_own_pre_tokenizer(pre), ignore_merges=pre == "llama-bpe")
    if pre == "qwen2":
        reference.backend_tokenizer.normalizer = normalizers.NFC()
    model = TINY_LLMS["smollm2"].write(tmp_path / "source", vocab_size=len(reference))
    file = write_gguf(tmp_path / "tiny.gguf", model, reference, pre=pre)
    (tmp_path / "llm").mkdir()
    write_language_model(file, tmp_path / "llm")
    tokenizer = load_tokenizer(tmp_path / "llm")
    theirs = reference(TEXT + "</s>", add_special_tokens=False).input_ids
    assert tokenizer(TEXT + "</s>", add_special_tokens=False).input_ids == theirs
    assert tokenizer.encode_plain(TEXT).ids == theirs[:-1]
    starts = tokenizer("a").input_ids[0] == 1
    assert starts == (pre == "llama-bpe"), "BOS in front, as llama.cpp puts it there"
    digits = tokenizer.tokenize(" 345")
    assert ("345" in digits) == (pre in ("gpt-2", "llama-bpe")) or pre == "gpt-2"


def test_gguf_sentencepiece_vocabulary(tmp_path: Path) -> None:
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{i:02X}>" for i in range(256)),
        "\u2581",
        "a",
        "\u2581a",
    ]
    types = [2, 3, 3, *[6] * 256, 1, 1, 1]
    scores = [0.0] * 259 + [-3.0, -2.0, -1.0]
    source = tiny_tokenizer()
    model = TINY_LLMS["llama2"].write(tmp_path / "source", vocab_size=len(pieces))
    fields = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.scores": scores,
    }
    file = write_gguf(tmp_path / "tiny.gguf", model, source, fields=fields)
    (tmp_path / "llm").mkdir()
    write_language_model(file, tmp_path / "llm")
    tokenizer = load_tokenizer(tmp_path / "llm")
    assert tokenizer("a a").input_ids == [1, 261, 261]
    assert tokenizer("b", add_special_tokens=False).input_ids == [259, 3 + ord("b")]
    assert tokenizer.decode([261, 261, 2]) == "a a</s>"


def test_gguf_llama3_scaling_is_known_by_its_factors(tmp_path: Path) -> None:
    model = TINY_LLMS["llama2"].write(tmp_path / "source")
    rope = {"rope_theta": 1e4, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    plain = LlamaConfig(head_dim=16, rope_parameters={**rope, "rope_type": "linear", "factor": 1.0})
    scaled = LlamaConfig(head_dim=16, rope_parameters=rope)
    factors = ROPE_INIT_FUNCTIONS["linear"](plain)[0] / ROPE_INIT_FUNCTIONS["llama3"](scaled)[0]
    tensors = {"rope_freqs.weight": factors.numpy()}
    file = write_gguf(tmp_path / "a.gguf", model, tiny_tokenizer(), tensors=tensors)
    (tmp_path / "llm").mkdir()
    write_language_model(file, tmp_path / "llm")
    scaling = json.loads((tmp_path / "llm" / "config.json").read_text())["rope_scaling"]
    assert scaling == {k: v for k, v in rope.items() if k != "rope_theta"}
    tensors = {"rope_freqs.weight": 2 * factors.numpy()}
    file = write_gguf(tmp_path / "b.gguf", model, tiny_tokenizer(), tensors=tensors)
    with pytest.raises(ConfigError, match=r"not those of Llama 3\.1"):
        init(str(file), tmp_path / "made", **TINY)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"pre": "poro"}, "tokenizer.ggml.pre='poro' names no pre-tokenizer"),
        ({"leave_out": ("tokenizer.ggml.pre",)}, "tokenizer.ggml.pre=None"),
        ({"fields": {"llama.expert_count": 8}}, "llama.expert_count=8 is not carried over"),
        ({"fields": {"llama.rope.dimension_count": 8}}, "expected 16, the width of a head"),
        ({"fields": {"llama.block_count": 5}}, r"tensor blk\.4\.ffn_down\.weight is missing"),
        ({"fields": {"llama.block_count": 3}}, r"unexpected tensor blk\.3\."),
        ({"fields": {"llama.embedding_length": 1 << 16}}, r"token_embd\.weight \(\d+, 64\)"),
        ({"fields": {"llama.block_count": 10**9}}, "num_hidden_layers=1000000000"),
        ({"fields": {"tokenizer.ggml.eos_token_id": 10**6}}, "eos_token_id=1000000 of"),
        ({"fields": {"split.count": 3}}, "one of 3 parts"),
        ({"leave_out": ("blk.1.ffn_up.weight",)}, "1 tensors missing"),
        ({"leave_out": ("llama.block_count",)}, "says nothing of num_hidden_layers"),
        ({"fields": {"tokenizer.ggml.merges": ["a b c"]}}, "a merge that is not of two tokens"),
    ],
    ids=str,
)
def test_gguf_that_cannot_be_carried_over_is_refused(
    options: dict[str, Any], named: str, tmp_path: Path
) -> None:
    file, _ = _llm(tmp_path, **options)
    with pytest.raises(MonoInternVLError, match=named):
        init(str(file), tmp_path / "made", **TINY)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gguf", "source"]


def test_gguf_folder_with_several_or_none(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=r"2 GGUF files \(a.gguf, b.gguf\); name one"):
        init(str(tmp_path), tmp_path / "made", **TINY)
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert find_gguf(tmp_path) is None, "safetensors come first"
    with pytest.raises(CheckpointError, match="not a GGUF file"):
        read_gguf(tmp_path / "a.gguf")


def test_gguf_without_its_package_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(CheckpointError, match=r"pip install 'mono-internvl\[gguf\]'"):
        read_gguf(tmp_path / "a.gguf")


def test_gguf_damaged_is_refused_in_bounded_time(tmp_path: Path) -> None:
    file, _ = _llm(tmp_path)
    whole = file.read_bytes()
    random_ = random.Random(0)
    header = read_gguf(file).tensors["token_embd.weight"].start
    started = time.monotonic()
    for trial in range(120):
        data = bytearray(whole)
        if trial % 3 == 0:
            data = data[: random_.randrange(len(data))]
        else:
            place = random_.randrange(4, header - 8)
            data[place : place + 8] = random_.choice(
                [b"\xff" * 8, struct.pack("<Q", 1 << 62), struct.pack("<Q", 1 << 33), b"\0" * 8]
            )
        file.write_bytes(data)
        (folder := tmp_path / f"llm-{trial}").mkdir()
        try:
            write_language_model(file, folder)
        except MonoInternVLError as error:
            assert "\n" not in str(error)
        for path in folder.iterdir():
            path.unlink()
    assert time.monotonic() - started < 120, "a hundred tiny files"


def test_gguf_hostile_counts_cost_nothing(tmp_path: Path) -> None:
    file = tmp_path / "hostile.gguf"
    start = b"GGUF" + struct.pack("<I", 3)
    key = struct.pack("<Q", 1) + b"a"
    for body in (
        struct.pack("<QQ", 1 << 60, 0),
        struct.pack("<QQ", 0, 1 << 60),
        struct.pack("<QQ", 0, 1) + key + struct.pack("<IIQ", 9, 8, 1 << 60),
        struct.pack("<QQ", 0, 1) + key + struct.pack("<IIQ", 9, 9, 1 << 20),
        struct.pack("<QQ", 0, 1) + struct.pack("<Q", 1 << 63),
        struct.pack("<QQ", 1, 0) + key + struct.pack("<IQIQ", 1, 1 << 50, 0, 0),
        struct.pack("<QQ", 1, 0) + key + struct.pack("<IQIQ", 1, 4, 0, (1 << 64) - 32),
    ):
        file.write_bytes(start + body + b"\0" * 64)
        with pytest.raises(CheckpointError):
            read_gguf(file)
