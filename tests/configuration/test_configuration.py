"""The configuration reads the released layout, with its defaults, and writes it back."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from tiny_models import tiny_config

from mono_internvl.configuration.model import MonoInternVLConfig, MonoInternVLTextConfig
from mono_internvl.errors import ConfigError

RELEASED: dict[str, Any] = {
    "architectures": ["InternVLChatModel"],
    "model_type": "internvl_chat",
    "auto_map": {"AutoConfig": "configuration_internvl_chat.InternVLChatConfig"},
    "downsample_ratio": 0.5,
    "dynamic_image_size": True,
    "force_image_size": 448,
    "max_dynamic_patch": 12,
    "min_dynamic_patch": 1,
    "pad2square": False,
    "ps_version": "v2",
    "select_layer": -1,
    "template": "internlm2-chat",
    "torch_dtype": "bfloat16",
    "use_backbone_lora": 0,
    "use_thumbnail": True,
    "llm_config": {
        "architectures": ["InternLM2VEForCausalLM"],
        "model_type": "internlm2ve",
        "bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "max_position_embeddings": 32768,
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "num_key_value_heads": 8,
        "pad_token_id": 2,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {"factor": 2.0, "type": "dynamic"},
        "rope_theta": 1000000,
        "tie_word_embeddings": False,
        "vocab_size": 92553,
        "attn_implementation": "flash_attention_2",
    },
    "vision_config": {
        "architectures": ["InternVisionPatchModel"],
        "model_type": "intern_vit_patch",
        "hidden_size": 1024,
        "image_size": 448,
        "patch_size": 14,
        "use_flash_attn": True,
    },
}


def _read(tmp_path: Path, released: dict[str, Any]) -> MonoInternVLConfig:
    (tmp_path / "config.json").write_text(json.dumps(released))
    return MonoInternVLConfig.from_pretrained(tmp_path)


def _without(part: str, *keys: str) -> dict[str, Any]:
    released = copy.deepcopy(RELEASED)
    for key in keys:
        del (released[part] if part else released)[key]
    return released


def test_config_reads_released_file(tmp_path: Path) -> None:
    config = _read(tmp_path, RELEASED)
    text, vision = config.text_config, config.vision_config
    assert (text.hidden_size, text.num_hidden_layers, text.head_dim) == (2048, 24, 128)
    assert (text.qkv_bias, text.o_bias, text.rms_norm_eps) == (False, False, 1e-5)
    assert text.rope_parameters == {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e6}
    assert (vision.kind, vision.hidden_size, vision.patch_size) == ("patch", 1024, 14)
    assert config.visual_experts == ("ffn",)
    assert config.image_token_id == 92546
    assert config.num_image_tokens_per_tile == 256
    assert config.get_text_config() is text


def test_config_of_released_file_keeps_unknown_fields(tmp_path: Path) -> None:
    config = _read(tmp_path, RELEASED)
    config.save_pretrained(tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    for key, value in RELEASED.items():
        if not isinstance(value, dict) or key == "auto_map":
            assert written[key] == value, key
            continue
        for name, inner in value.items():
            assert written[key][name] == inner, f"{key}.{name}"


def test_config_round_trip_means_the_same(tmp_path: Path) -> None:
    first = _read(tmp_path, RELEASED)
    first.save_pretrained(tmp_path / "out")
    again = MonoInternVLConfig.from_pretrained(tmp_path / "out")
    assert again.to_dict() == first.to_dict()
    assert again.text_config.to_dict() == first.text_config.to_dict()
    assert again.vision_config.to_dict() == first.vision_config.to_dict()
    again.save_pretrained(tmp_path / "twice")
    first_file, second_file = (tmp_path / x / "config.json" for x in ("out", "twice"))
    assert first_file.read_bytes() == second_file.read_bytes()


def test_config_changed_after_reading_is_written_changed(tmp_path: Path) -> None:
    config = _read(tmp_path, RELEASED)
    config.text_config.max_position_embeddings = 4096
    config.max_dynamic_patch = 6
    config.save_pretrained(tmp_path / "out")
    again = MonoInternVLConfig.from_pretrained(tmp_path / "out")
    assert again.text_config.max_position_embeddings == 4096
    assert again.max_dynamic_patch == 6


@pytest.mark.parametrize(
    ("key", "field", "value"),
    [
        ("bias", "qkv_bias", True),
        ("bias", "o_bias", True),
        ("rms_norm_eps", "rms_norm_eps", 1e-6),
        ("max_position_embeddings", "max_position_embeddings", 2048),
        ("vocab_size", "vocab_size", 103168),
        ("pad_token_id", "pad_token_id", 0),
        ("num_key_value_heads", "num_key_value_heads", 16),
        ("rope_scaling", "rope_parameters", {"rope_type": "default", "rope_theta": 1e6}),
        (
            "rope_theta",
            "rope_parameters",
            {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
        ),
    ],
)
def test_config_missing_llm_key_takes_released_default(
    tmp_path: Path, key: str, field: str, value: Any
) -> None:
    config = _read(tmp_path, _without("llm_config", key))
    assert getattr(config.text_config, field) == value


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("select_layer", -4),
        ("ps_version", "v1"),
        ("template", None),
        ("dynamic_image_size", False),
        ("use_thumbnail", False),
        ("max_dynamic_patch", 6),
        ("downsample_ratio", 0.5),
        ("force_image_size", 448),
    ],
)
def test_config_missing_top_key_takes_released_default(
    tmp_path: Path, key: str, value: Any
) -> None:
    assert getattr(_read(tmp_path, _without("", key)), key) == value


@pytest.mark.parametrize(
    ("part", "change", "complaint"),
    [
        ("llm_config", {"architectures": ["LlamaForCausalLM"]}, "LlamaForCausalLM"),
        ("llm_config", {"architectures": None}, "None"),
        ("llm_config", {"num_key_value_heads": 3}, "num_key_value_heads=3"),
        ("llm_config", {"rope_scaling": {"type": "longrope", "factor": 2.0}}, "longrope"),
        ("vision_config", {"model_type": "siglip"}, "siglip"),
        ("", {"ps_version": "v3"}, "v3"),
        ("", {"downsample_ratio": 0.25}, "0.25"),
        ("", {"force_image_size": 450}, "450"),
        ("", {"force_image_size": 0}, "0"),
        ("", {"visual_experts": ["ffn", "head"]}, "head"),
        ("", {"visual_experts": 3}, "visual_experts=3"),
        ("", {"llm_config": [1]}, r"llm_config is a list \(\[1\]\)"),
        ("", {"vision_config": 3}, r"vision_config is a int \(3\)"),
        ("", {"force_image_size": "448"}, "force_image_size='448'"),
        ("", {"min_dynamic_patch": 13}, "min_dynamic_patch=13 is above max_dynamic_patch=12"),
        ("", {"max_dynamic_patch": None}, "max_dynamic_patch=None"),
        ("", {"img_context_token_id": 92553}, "img_context_token_id=92553"),
        ("", {"img_context_token_id": -1}, "img_context_token_id=-1"),
        ("llm_config", {"architectures": "InternLM2VEForCausalLM"}, r"architectures\[0\]=None"),
        ("llm_config", {"vocab_size": 0}, "vocab_size=0"),
        ("llm_config", {"hidden_size": "2048"}, "hidden_size='2048'"),
        ("llm_config", {"hidden_size": 2048.0}, "hidden_size=2048.0"),
        ("llm_config", {"num_hidden_layers": True}, "num_hidden_layers=True"),
        ("llm_config", {"num_attention_heads": 0}, "num_attention_heads=0"),
        ("llm_config", {"num_key_value_heads": 0}, "num_key_value_heads=0"),
        ("llm_config", {"head_dim": 7}, "head_dim=7"),
        ("llm_config", {"hidden_act": "silly"}, "hidden_act='silly'"),
        ("llm_config", {"rms_norm_eps": 0}, "rms_norm_eps=0"),
        ("llm_config", {"bias": "no"}, "qkv_bias='no'"),
        ("llm_config", {"attention_dropout": 1}, "attention_dropout=1"),
        ("llm_config", {"rope_theta": None}, "rope_theta=None"),
        ("llm_config", {"rope_theta": float("nan")}, "rope_theta=nan"),
        ("llm_config", {"rope_scaling": "dynamic"}, r"rope_scaling is a str"),
        ("llm_config", {"rope_scaling": {"type": "linear", "factor": 0}}, "factor=0"),
        ("vision_config", {"patch_size": 0}, "patch_size=0"),
        ("vision_config", {"hidden_size": None}, "hidden_size=None"),
    ],
)
def test_config_refuses_what_is_not_implemented(
    tmp_path: Path, part: str, change: dict[str, Any], complaint: str
) -> None:
    released = copy.deepcopy(RELEASED)
    (released[part] if part else released).update(change)
    with pytest.raises(ConfigError, match=complaint):
        _read(tmp_path, released)


@pytest.mark.parametrize("experts", [(), ("ffn",), ("qkv", "o"), ("norms", "ffn", "o", "qkv")])
def test_config_visual_experts_survive_in_one_order(
    tmp_path: Path, experts: tuple[str, ...]
) -> None:
    config = tiny_config(experts)
    config.save_pretrained(tmp_path)
    again = MonoInternVLConfig.from_pretrained(tmp_path)
    assert again.visual_experts == config.visual_experts
    assert set(again.visual_experts) == set(experts)


@pytest.mark.parametrize(
    "knobs",
    [
        {"qkv_bias": True, "o_bias": False},
        {"qkv_bias": True, "o_bias": True},
        {"qk_norm": True},
        {"head_dim": 8},
        {"tie_word_embeddings": True},
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5}},
    ],
    ids=str,
)
def test_config_decoder_knobs_survive(tmp_path: Path, knobs: dict[str, Any]) -> None:
    tiny_config(**knobs).save_pretrained(tmp_path)
    text = MonoInternVLConfig.from_pretrained(tmp_path).text_config
    assert {name: getattr(text, name) for name in knobs} == knobs


def test_text_config_defaults_to_all_heads() -> None:
    text = MonoInternVLTextConfig(num_attention_heads=8, num_key_value_heads=None, hidden_size=64)
    assert (text.num_key_value_heads, text.head_dim) == (8, 8)


def test_config_without_arguments_is_the_2b_shape() -> None:
    config = MonoInternVLConfig()
    assert config.text_config.vocab_size == 92553
    assert config.visual_experts == ("ffn",)
