"""A monolithic model made from a Llama says on text what the Llama said."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_llms import tiny_tokenizer
from tiny_models import IMAGE_SIZE, TOKENS_PER_TILE, randomize, tile_pixels
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mono_internvl.checkpoints.from_llm import (
    MonolithicStart,
    copy_text_to_visual,
    export_llama,
    monolithic_from_llm,
)
from mono_internvl.configuration.model import MonoInternVLVisionConfig
from mono_internvl.errors import CheckpointError, ConfigError
from mono_internvl.experts import Routing
from mono_internvl.model.modeling import MonoInternVLForConditionalGeneration
from mono_internvl.processing.prompts import VISUAL_TOKENS

VISION = MonoInternVLVisionConfig(hidden_size=32, image_size=IMAGE_SIZE)
ALL_EXPERTS = ("ffn", "qkv", "o", "norms")


def _write_llama(folder: Path, **fields: Any) -> LlamaForCausalLM:
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        **{
            "vocab_size": len(tokenizer),
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 32,
            "pad_token_id": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 20_000.0},
            **fields,
        }
    )
    llama = LlamaForCausalLM(config).eval()
    randomize(llama)
    llama.save_pretrained(folder)
    return llama


def _start(folder: Path, **options: Any) -> MonolithicStart:
    return monolithic_from_llm(folder, vision=VISION, **options)


def _ids(length: int = 20, rows: int = 2) -> torch.Tensor:
    return torch.randint(3, 250, (rows, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 20_000.0},
        {"rope_type": "linear", "rope_theta": 20_000.0, "factor": 2.0},
        {"rope_type": "dynamic", "rope_theta": 20_000.0, "factor": 2.0},
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_from_llama_says_on_text_what_llama_says(
    tmp_path: Path, tied: bool, bias: bool, rope: dict[str, Any]
) -> None:
    llama = _write_llama(
        tmp_path, tie_word_embeddings=tied, attention_bias=bias, rope_parameters=rope
    )
    model = _start(tmp_path, visual_experts=ALL_EXPERTS).model
    for length in (20, 50):  # within the trained length and beyond it
        ids = _ids(length)
        with torch.no_grad():
            theirs = llama(ids).logits
            ours = model(ids).logits[..., : theirs.shape[-1]]
        assert torch.allclose(ours, theirs, atol=1e-5, rtol=0), (ours - theirs).abs().max()


def test_from_llama_generates_what_llama_generates(tmp_path: Path) -> None:
    llama = _write_llama(tmp_path)
    model = _start(tmp_path).model
    ids = _ids()
    mask = torch.ones_like(ids)
    mask[0, :7] = 0  # left padding
    ids[0, :7] = 2
    options = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "eos_token_id": -1}
    theirs = llama.generate(ids, **options)
    # The new rows are the mean of the old ones: a mean logit never is the largest.
    assert torch.equal(model.generate(ids, **options), theirs)


def test_from_llama_visual_experts_equal_text_experts(tmp_path: Path) -> None:
    _write_llama(tmp_path, attention_bias=True)
    model = _start(tmp_path, visual_experts=ALL_EXPERTS).model
    visual = {n: p for n, p in model.named_parameters() if "_visual." in n}
    assert len(visual) == 2 * (
        3 + 3 * 2 + 2 + 2
    )  # per layer: ffn, qkv with bias, o with bias, norms
    for name, p in visual.items():
        assert torch.equal(p, model.get_parameter(name.replace("_visual.", "."))), name


def test_from_llama_mixed_input_equals_plain_decoder(tmp_path: Path) -> None:
    llama = _write_llama(tmp_path)
    start = _start(tmp_path, visual_experts=ALL_EXPERTS)
    model, image = start.model, start.model.config.image_token_id
    ids = _ids(rows=1)
    ids[0, 5 : 5 + 2 * TOKENS_PER_TILE] = image
    pixels = tile_pixels(2)
    with torch.no_grad():
        ours = model(ids, pixel_values=pixels).logits
        features = model.get_image_features(pixels).flatten(0, 1)
        embeds = model.model.place_features(ids, features, Routing.from_mask(ids == image))
        theirs = llama(inputs_embeds=embeds).logits
    assert torch.allclose(ours[..., : theirs.shape[-1]], theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("tied", [False, True])
def test_from_llama_new_rows_are_mean_of_old(tmp_path: Path, tied: bool) -> None:
    llama = _write_llama(tmp_path, tie_word_embeddings=tied)
    model = _start(tmp_path).model
    for ours, theirs in (
        (model.get_input_embeddings().weight, llama.get_input_embeddings().weight),
        (model.lm_head.weight, llama.lm_head.weight),
    ):
        assert torch.equal(ours[:-9], theirs)
        assert torch.allclose(ours[-9:], theirs.mean(0).expand(9, -1), atol=1e-6)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied


def test_from_llama_vocabulary_ends_with_visual_tokens(tmp_path: Path) -> None:
    llama = _write_llama(tmp_path)
    start = _start(tmp_path)
    old = llama.config.vocab_size
    ids = start.tokenizer.convert_tokens_to_ids(list(VISUAL_TOKENS))
    assert ids == list(range(old, old + 9))
    assert start.model.config.text_config.vocab_size == len(start.tokenizer) == old + 9
    assert start.model.config.image_token_id == old + 2
    assert start.tokenizer("<IMG_CONTEXT>a", add_special_tokens=False).input_ids[0] == old + 2


def test_from_llama_drops_rows_without_token(tmp_path: Path) -> None:
    tokens = len(tiny_tokenizer())
    llama = _write_llama(tmp_path, vocab_size=tokens + 11)
    model = _start(tmp_path).model
    rows = llama.get_input_embeddings().weight[:tokens]
    assert model.config.text_config.vocab_size == tokens + 9
    assert torch.equal(model.get_input_embeddings().weight[:tokens], rows)
    assert torch.allclose(model.get_input_embeddings().weight[tokens:], rows.mean(0), atol=1e-6)


def test_from_llama_is_seeded_and_leaves_global_random_state(tmp_path: Path) -> None:
    _write_llama(tmp_path)
    state = torch.random.get_rng_state()
    first, again, other = (_start(tmp_path, seed=seed).model for seed in (3, 3, 4))
    assert torch.equal(torch.random.get_rng_state(), state)
    name = "model.vision_embedder.patch_embedding.weight"
    assert torch.equal(first.get_parameter(name), again.get_parameter(name))
    assert not torch.equal(first.get_parameter(name), other.get_parameter(name))


def test_from_llama_saves_as_released_checkpoint(tmp_path: Path) -> None:
    _write_llama(tmp_path / "llm", attention_bias=True, tie_word_embeddings=True)
    start = _start(tmp_path / "llm", visual_experts=ALL_EXPERTS, dtype=torch.bfloat16)
    start.model.save_pretrained(tmp_path / "out")
    again = MonoInternVLForConditionalGeneration.from_pretrained(tmp_path / "out", dtype="auto")
    assert again.dtype == torch.bfloat16
    ours = dict(start.model.named_parameters())
    for name, p in again.named_parameters():
        assert torch.equal(p, ours[name]), name


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "gemma2"}, "model_type='gemma2'"),
        ({"architectures": ["LlamaForTokenClassification"]}, "LlamaForTokenClassification"),
        ({"bias": True}, "bias=True"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"sliding_window": 128}, "sliding_window=128"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        (
            {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "factor": 8.0}},
            "rope_type='longrope'",
        ),
        (
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0}},
            "low_freq_factor",
        ),
        (
            {
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 1e4,
                    "partial_rotary_factor": 0.5,
                }
            },
            "partial_rotary_factor",
        ),
        ({"vocab_size": 200}, "vocab_size is 200"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_from_llama_refuses_by_name(tmp_path: Path, change: dict[str, Any], named: str) -> None:
    _write_llama(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(ConfigError, match=named):
        _start(tmp_path)


def test_from_llama_reads_older_config_files(tmp_path: Path) -> None:
    llama = _write_llama(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    del config["rope_parameters"]
    config |= {"rope_theta": 20_000.0, "rope_scaling": None, "torch_dtype": config.pop("dtype")}
    file.write_text(json.dumps(config))
    ids = _ids()
    with torch.no_grad():
        ours = _start(tmp_path).model(ids).logits[..., : llama.config.vocab_size]
        assert torch.allclose(ours, llama(ids).logits, atol=1e-5, rtol=0)


def test_from_llama_refuses_incomplete_weights(tmp_path: Path) -> None:
    _write_llama(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    key = "model.layers.1.mlp.up_proj.weight"
    for damaged, complaint in (
        ({k: v for k, v in tensors.items() if k != key}, "missing"),
        ({**tensors, "model.extra.weight": torch.zeros(1)}, "unexpected tensor model.extra"),
        ({**tensors, key: F.pad(tensors[key], (0, 1))}, "has shape"),
    ):
        save_file(damaged, file)
        with pytest.raises(CheckpointError, match=complaint):
            _start(tmp_path)


def test_from_llama_refuses_tokenizer_with_visual_tokens(tmp_path: Path) -> None:
    _write_llama(tmp_path)
    start = _start(tmp_path)
    start.tokenizer.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    vocab = {"vocab_size": len(start.tokenizer)}
    file.write_text(json.dumps({**json.loads(file.read_text()), **vocab}))
    with pytest.raises(ConfigError, match="has <img> already"):
        _start(tmp_path)


def test_copy_text_to_visual_leaves_text_alone(tmp_path: Path) -> None:
    _write_llama(tmp_path)
    model = _start(tmp_path, visual_experts=ALL_EXPERTS).model
    randomize(model, seed=5)
    text = {n: p.clone() for n, p in model.named_parameters() if "_visual." not in n}
    copy_text_to_visual(model)
    for name, p in model.named_parameters():
        assert torch.equal(p, text[name.replace("_visual.", ".")]), name


@pytest.mark.parametrize("tied", [False, True])
def test_export_llama_round_trip(tmp_path: Path, tied: bool) -> None:
    _write_llama(tmp_path / "llm", tie_word_embeddings=tied, attention_bias=True)
    start = _start(tmp_path / "llm", visual_experts=())
    export_llama(start.model, start.tokenizer, tmp_path / "back")
    llama = LlamaForCausalLM.from_pretrained(tmp_path / "back")
    ids = _ids()
    with torch.no_grad():
        assert torch.allclose(llama(ids).logits, start.model(ids).logits, atol=1e-5, rtol=0)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path / "back")
    assert tokenizer.get_vocab() == start.tokenizer.get_vocab()


def test_export_llama_refuses_visual_experts(tmp_path: Path) -> None:
    _write_llama(tmp_path / "llm")
    start = _start(tmp_path / "llm")
    with pytest.raises(ConfigError, match="visual_experts"):
        export_llama(start.model, start.tokenizer, tmp_path / "back")
