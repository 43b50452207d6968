"""Every family of language models: what is made of one says on text what transformers says.

The reference is transformers' own class with the same weights; for InternLM2, which transformers 5
does not have, a Llama whose files are written in InternLM2's layout, and outputs of the official
code.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_llms import TINY_LLMS, TRAINED_LENGTH, tiny_tokenizer
from tiny_models import IMAGE_SIZE
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.cache_utils import DynamicCache

from mono_internvl.checkpoints.from_llm import monolithic_from_llm
from mono_internvl.checkpoints.llm_families import FAMILIES
from mono_internvl.configuration.model import MonoInternVLVisionConfig
from mono_internvl.errors import CheckpointError, ConfigError
from mono_internvl.model.modeling import MonoInternVLForConditionalGeneration

VISION = MonoInternVLVisionConfig(hidden_size=32, image_size=IMAGE_SIZE)
ATOL = 5e-5
"""Of logits up to 5.4 in fp32. Transformers' own lie up to 1.1e-5 from the same weights in fp64,
ours up to 1.3e-5, on processors with AVX-512, AVX2 and SSE alone: two orders of the same sums may
be 2.4e-5 apart. Measured between the two: 9.7e-6 with AVX-512, 1.41e-5 with AVX2 (qwen2, windows,
eager). Rejects any knob of a family left out: more than 100 times as much."""
GOLDEN = Path(__file__).resolve().parents[1] / "parity" / "golden" / "mono_a"


def _ids(length: int, rows: int = 2, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, 250, (rows, length), generator=generator)


def _made(folder: Path, **options: Any) -> MonoInternVLForConditionalGeneration:
    return monolithic_from_llm(folder, vision=VISION, **options).model


def _assert_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    ours = ours[..., : theirs.shape[-1]]
    assert torch.allclose(ours, theirs, atol=ATOL, rtol=0), (ours - theirs).abs().max()


@pytest.fixture(params=sorted(TINY_LLMS))
def pair(
    request: pytest.FixtureRequest, tmp_path: Path
) -> tuple[PreTrainedModel, MonoInternVLForConditionalGeneration, Path]:
    """A reference, our model made from its files and saved and loaded again, and their folder."""
    reference = TINY_LLMS[request.param].write(tmp_path / "llm")
    _made(tmp_path / "llm").save_pretrained(tmp_path / "made")
    model = MonoInternVLForConditionalGeneration.from_pretrained(tmp_path / "made").eval()
    return reference, model, tmp_path / "llm"


@torch.no_grad()
def test_family_says_on_text_what_transformers_says(
    pair: tuple[PreTrainedModel, MonoInternVLForConditionalGeneration, Path],
) -> None:
    reference, model, _ = pair
    for length in (TRAINED_LENGTH - 6, 2 * TRAINED_LENGTH + 5):
        ids = _ids(length)
        _assert_close(model(ids).logits, reference(ids).logits)

    mask = torch.ones(2, 30, dtype=torch.long)
    mask[0, :7] = 0  # left padding, positions counted from the first real token
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    ids = _ids(30)
    options = {"attention_mask": mask, "position_ids": positions}
    ours, theirs = model(ids, **options).logits, reference(ids, **options).logits
    _assert_close(ours[0, 7:], theirs[0, 7:])
    _assert_close(ours[1], theirs[1])

    ids = _ids(2 * TRAINED_LENGTH)
    cached = []
    for one in (model, reference):
        cache = DynamicCache(config=one.config.get_text_config())
        parts = [
            one(part, past_key_values=cache).logits for part in ids.split([40, 20, 1, 1, 2], 1)
        ]
        cached.append(torch.cat(parts, dim=1))
    _assert_close(*cached)


def test_family_generates_what_transformers_generates(
    pair: tuple[PreTrainedModel, MonoInternVLForConditionalGeneration, Path],
) -> None:
    reference, model, _ = pair
    mask = torch.ones(2, TRAINED_LENGTH - 8, dtype=torch.long)
    mask[0, :7] = 0
    ids = _ids(TRAINED_LENGTH - 8).masked_fill(mask == 0, 2)
    options = {"attention_mask": mask, "max_new_tokens": 20, "do_sample": False}
    options |= {"eos_token_id": -1, "pad_token_id": 2}  # runs past the trained length
    theirs = reference.generate(ids, **options)
    assert theirs.shape[1] == TRAINED_LENGTH + 12
    assert torch.equal(model.generate(ids, **options), theirs)


@pytest.mark.parametrize("attention", ["eager", "sdpa", "blocked"])
@pytest.mark.parametrize("version", ["mistral-v0.1", "qwen2"])
@torch.no_grad()
def test_family_window_is_kept_by_every_attention(
    version: str, attention: str, tmp_path: Path
) -> None:
    reference, ids = TINY_LLMS[version].write(tmp_path), _ids(150)  # more than a block of queries
    model = _made(tmp_path)
    model.set_attn_implementation(attention)
    theirs = reference(ids).logits
    _assert_close(model(ids).logits, theirs)
    _assert_close(model(ids, logits_to_keep=1).logits, theirs[:, -1:])  # last layer: one row


@pytest.mark.parametrize("version", ["mistral-v0.1", "smollm3-sliding", "qwen3"])
def test_family_generates_with_a_static_cache(version: str, tmp_path: Path) -> None:
    reference, ids = TINY_LLMS[version].write(tmp_path), _ids(12)
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": -1, "pad_token_id": 2}
    options |= {"disable_compile": True}
    ours = _made(tmp_path).generate(ids, cache_implementation="static", **options)
    assert torch.equal(ours, reference.generate(ids, **options))


@pytest.mark.parametrize("version", ["granite3", "phi4", "glm-4-9b"])
def test_family_tensors_of_another_shape_are_refused(version: str, tmp_path: Path) -> None:
    TINY_LLMS[version].write(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"intermediate_size": 64}))
    with pytest.raises(CheckpointError, match=r"gate_(up_)?proj|up_proj|down_proj"):
        _made(tmp_path)


@pytest.mark.parametrize("version", ["llama3.1", "mistral-v0.1", "qwen2.5", "smollm3"])
def test_family_knob_matters(version: str, tmp_path: Path) -> None:
    reference = TINY_LLMS[version].write(tmp_path)
    model, ids = _made(tmp_path), _ids(2 * TRAINED_LENGTH)
    text = model.config.text_config
    text.rope_parameters = {
        "rope_type": "default",
        "rope_theta": text.rope_parameters["rope_theta"],
    }
    for layer in model.model.language_model.layers:
        layer.self_attn.uses_rope = True
    text.sliding_layers = None
    with torch.no_grad():
        far = (model(ids).logits[..., : reference.config.vocab_size] - reference(ids).logits).abs()
    assert far.max() > 100 * ATOL


def test_family_internlm3_is_what_transformers_reads(tmp_path: Path) -> None:
    pytest.importorskip("transformers.models.internlm3", reason="newer than this transformers")
    version = TINY_LLMS["internlm3"]
    version.write(tmp_path)
    theirs, ids = AutoModelForCausalLM.from_pretrained(tmp_path), _ids(2 * TRAINED_LENGTH)
    with torch.no_grad():
        _assert_close(_made(tmp_path)(ids).logits, theirs(ids).logits)


def test_family_internlm2_says_what_the_official_code_said(tmp_path: Path) -> None:
    """The language model inside a golden checkpoint, taken out, its visual parameters new."""
    stored = load_file(GOLDEN / "model.safetensors")
    prefix = "language_model."
    plain = {
        key.removeprefix(prefix): tensor.clone()
        for key, tensor in stored.items()
        if key.startswith(prefix) and "_ve." not in key
    }
    num_old = stored[f"{prefix}output.weight"].shape[0] - 9
    for key in ("model.tok_embeddings.weight", "output.weight"):
        plain[key] = plain[key][:num_old].clone()
    save_file(plain, tmp_path / "model.safetensors")
    kept = ("bias", "hidden_act", "hidden_size", "intermediate_size", "max_position_embeddings")
    kept += ("num_attention_heads", "num_hidden_layers", "num_key_value_heads", "rms_norm_eps")
    kept += ("rope_scaling", "rope_theta", "pad_token_id", "model_type", "tie_word_embeddings")
    llm = json.loads((GOLDEN / "config.json").read_text())["llm_config"]
    config = {name: llm[name] for name in kept} | {"architectures": ["InternLM2ForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps({**config, "vocab_size": num_old}))
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"t{i}": i for i in range(3, num_old)}
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, "<unk>")), eos_token="</s>"
    ).save_pretrained(tmp_path)
    model, case = _made(tmp_path), load_file(GOLDEN / "case_text_only.safetensors")
    ids = case["in.input_ids"]
    assert int(ids.max()) < num_old
    with torch.no_grad():
        ours = model(ids).logits
        theirs = case["out.logits"] if "out.logits" in case else case["out.logits_tail"]
        ours = ours[:, -theirs.shape[1] :, :num_old]
    assert torch.allclose(ours, theirs[..., :num_old], atol=2e-5, rtol=0)


@pytest.mark.parametrize("version", ["qwen3", "internlm2.5", "smollm3"])
def test_family_is_named_on_disk(version: str, tmp_path: Path) -> None:
    TINY_LLMS[version].write(tmp_path / "llm")
    _made(tmp_path / "llm", visual_experts=("ffn", "qkv", "o")).save_pretrained(tmp_path / "made")
    llm = json.loads((tmp_path / "made" / "config.json").read_text())["llm_config"]
    assert (
        llm["model_type"]
        == json.loads((tmp_path / "llm" / "config.json").read_text())["model_type"]
    )
    assert ("no_rope_layers" in llm) == (version == "smollm3")
    assert ("qk_norm" in llm) == (version == "qwen3")
    keys = load_file(tmp_path / "made" / "model.safetensors")
    assert "language_model.model.layers.0.attention.wqkv_ve.weight" in keys
    assert ("language_model.output.weight" in keys) == (version == "internlm2.5")


def test_family_weights_in_bfloat16_are_the_stored_ones(tmp_path: Path) -> None:
    reference = TINY_LLMS["qwen2"].write(tmp_path)
    model = _made(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    theirs = reference.model.layers[1].self_attn.k_proj.bias.bfloat16()
    assert torch.equal(model.model.language_model.layers[1].self_attn.k_proj.bias, theirs)


@pytest.mark.parametrize(
    ("version", "change", "named"),
    [
        ("llama2", {"model_type": "gpt_neox"}, "model_type='gpt_neox' cannot take vision.*qwen3"),
        ("llama2", {"model_type": "olmo2"}, "norms behind attention .* query and key norms over"),
        ("llama2", {"model_type": "gemma3_text"}, "frequencies of their own in sliding layers"),
        ("llama2", {"model_type": "glm4"}, "does not have: norms behind attention"),
        ("qwen3", {"model_type": "qwen3_moe", "num_experts": 8}, "a mixture of experts"),
        ("llama2", {"model_type": "mixtral", "num_local_experts": 8}, "a mixture of experts"),
        ("phi4", {"partial_rotary_factor": 0.75}, "partial_rotary_factor=0.75"),
        (
            "phi4",
            {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.75}},
            "partial_rotary_factor=0.75 is not something this decoder does for Phi3ForCausalLM",
        ),
        ("phi4", {"rope_scaling": {"type": "longrope"}, "rope_parameters": None}, "longrope"),
        ("glm-4-9b", {"partial_rotary_factor": 1.5, "rope_parameters": None}, "factor=1.5"),
        ("granite3", {"logits_scaling": 0.0}, "logits_scaling=0.0; expected a finite number > 0"),
        ("qwen2", {"architectures": ["Qwen2ForRewardModel"]}, "Qwen2ForRewardModel"),
        ("qwen3", {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "longrope"),
        ("mistral-v0.3", {"rope_scaling": {"type": "su", "factor": 2.0}, "rope_parameters": None},
         "rope_type='su'"),
        ("qwen2.5", {"quantization_config": {"bits": 4}}, "quantization_config"),
        ("qwen3", {"num_experts": 8}, "num_experts=8"),
        ("internlm3", {"bias": True}, "bias=True"),
        ("smollm3", {"mlp_bias": True}, "mlp_bias=True"),
        ("llama2", {"rope_interleaved": True}, "rope_interleaved=True"),
        ("llama2", {"is_causal": False}, "is_causal=False"),
        ("llama2", {"rope_parameters": "dynamic"}, "rope_parameters is a str"),
        ("qwen3", {"hidden_size": "64"}, r"config\.json: .*hidden_size"),
        ("internlm2", {"rope_scaling": ["dynamic"]}, "rope_scaling is a list"),
        ("llama3.1", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0}},
         "low_freq_factor"),
        ("mistral-v0.1", {"sliding_window": -1}, "sliding_window"),
    ],
)  # fmt: skip
def test_family_refuses_by_name(
    version: str, change: dict[str, Any], named: str, tmp_path: Path
) -> None:
    TINY_LLMS[version].write(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(ConfigError, match=named):
        _made(tmp_path)


def test_family_refuses_weights_of_another(tmp_path: Path) -> None:
    TINY_LLMS["llama2"].write(tmp_path / "llama")
    TINY_LLMS["internlm2"].write(tmp_path / "internlm2")
    (tmp_path / "internlm2" / "config.json").write_text(
        (tmp_path / "llama" / "config.json").read_text()
    )
    with pytest.raises(CheckpointError, match="unexpected tensor"):
        _made(tmp_path / "internlm2")


def test_family_every_row_has_a_version() -> None:
    covered = {name.split("-")[0].rstrip(".0123456789") for name in TINY_LLMS}
    assert {name.rstrip("0123456789") for name in FAMILIES} <= covered


def test_family_tokenizer_ids_may_have_gaps(tmp_path: Path) -> None:
    TINY_LLMS["llama2"].write(tmp_path, vocab_size=len(tiny_tokenizer()) + 20)
    start = monolithic_from_llm(tmp_path, vision=VISION, more_tokens=("<|im_end|>", "</s>"))
    old = len(tiny_tokenizer())
    assert start.tokenizer.convert_tokens_to_ids("<|im_end|>") == old
    assert start.model.config.image_token_id == old + 1 + 2
    assert start.model.config.text_config.vocab_size == old + 10
