"""Which language models can be given vision: by architecture our configuration and its key names.

A family is a row of `FAMILIES`. Anything that a row does not account for - an architecture, a field
of config.json, a type of rotary scaling - is refused by name, never approximated.

Source: the configuration classes of transformers 5, which also give the values of fields that a
config.json leaves out; for InternLM2 and InternLM3, their released config.json files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import (
    GenerationConfig,
    GlmConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from mono_internvl.checkpoints.family_tensors import (
    MULTIPLIERS,
    Unpack,
    glm_tensors,
    granite_tensors,
    phi3_tensors,
)
from mono_internvl.configuration.checks import (
    MOST_OF_TEXT,
    check_integer,
    check_number,
    checked_object,
)
from mono_internvl.configuration.model import (
    MonoInternVLConfig,
    MonoInternVLTextConfig,
)
from mono_internvl.configuration.text_fields import check_rope
from mono_internvl.errors import CheckpointError, ConfigError
from mono_internvl.released.keys import released_name
from mono_internvl.runs.files import read_json, reading

# What all families and our decoder call by the same name.
SHARED_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
    "attention_dropout",
)
# What is translated, and what says nothing about the mathematics.
_UNDERSTOOD_FIELDS = frozenset(
    (
        *SHARED_FIELDS,
        *("vocab_size", "mlp_bias", "rope_parameters", "rope_theta", "rope_scaling"),
        *("pretraining_tp", "model_type", "architectures", "use_cache", "dtype", "torch_dtype"),
        *("transformers_version", "_name_or_path", "auto_map", "attn_implementation"),
        *GenerationConfig().to_dict(),
        # Written by tools that trained or converted the model.
        *("transformers.js_config", "is_llama_config", "max_window_layers"),
        *("unk_token_id", "_model_name_or_path"),
    )
)
# Facts about the file that its maths depends on if they are not the usual ones.
_MUST_BE = {"rope_interleaved": False, "is_causal": True}

_PARTIAL_ROTARY = "partial_rotary_factor"

Knobs = Callable[[Any], dict[str, Any]]


@dataclass(frozen=True)
class LanguageFamily:
    """One architecture.

    Attributes:
        architecture: `architectures[0]` of its config.json.
        config_class: Gives the values of fields that are left out.
        knobs: From that configuration to the fields of ours that the family sets itself.
        fields: Fields of config.json that `knobs` reads.
        renames: Its fields that have another name in `config_class`.
        defaults: Where its values for fields that are left out are not those of `config_class`.
        is_fused: Whether the files are in InternLM2's layout, with one `wqkv` per layer.
        unpack: From its configuration and a stored tensor to tensors under Llama's names that
            compute the same; None where they are stored so.
        turns_parts: Whether its rotary positions may turn a part of each head only.
    """

    architecture: str
    config_class: type[PreTrainedConfig]
    knobs: Knobs
    fields: tuple[str, ...] = ()
    renames: Mapping[str, str] | None = None
    defaults: Mapping[str, Any] | None = None
    is_fused: bool = False
    unpack: Unpack | None = None
    turns_parts: bool = False

    def read(self, stored: Mapping[str, Any]) -> Any:
        """The family's configuration of a stored config.json, with its own defaults."""
        renames = self.renames or {}
        fields = {**(self.defaults or {}), **stored}
        fields = {renames.get(name, name): value for name, value in fields.items()}
        # A bare {"type": ...} of older files is understood by the class.
        return self.config_class.from_dict({k: v for k, v in fields.items() if k != "model_type"})


def _one_bias(config: Any) -> dict[str, Any]:
    return {"qkv_bias": config.attention_bias, "o_bias": config.attention_bias}


def _windows(config: Any) -> dict[str, Any]:
    """Which layers slide, and the window, if any layer does."""
    layers = [int(kind == "sliding_attention") for kind in config.layer_types]
    if not any(layers):
        return {}
    return {"sliding_layers": layers, "sliding_window": config.sliding_window}


def _mistral(config: Any) -> dict[str, Any]:
    window, layers = config.sliding_window, config.num_hidden_layers
    if window is None:
        return {}
    return {"sliding_layers": [1] * layers, "sliding_window": window}


def _smollm3(config: Any) -> dict[str, Any]:
    turned = list(config.no_rope_layers)[: config.num_hidden_layers]
    return {
        **_one_bias(config),
        **_windows(config),
        "no_rope_layers": None if all(turned) else turned,
    }


def _granite(config: Any) -> dict[str, Any]:
    for name in MULTIPLIERS:
        check_number(name, getattr(config, name), above=0)
    return _one_bias(config)


_WINDOW_FIELDS = ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types")

FAMILIES: dict[str, LanguageFamily] = {
    "llama": LanguageFamily(  # Llama 1 to 3.x, SmolLM, SmolLM2
        "LlamaForCausalLM", LlamaConfig, _one_bias, ("attention_bias",)
    ),
    "mistral": LanguageFamily(
        "MistralForCausalLM", MistralConfig, _mistral, ("sliding_window", "layer_types")
    ),
    "qwen2": LanguageFamily(  # Qwen2, Qwen2.5
        "Qwen2ForCausalLM",
        Qwen2Config,
        lambda config: {"qkv_bias": True, "o_bias": False, **_windows(config)},
        _WINDOW_FIELDS,
    ),
    "qwen3": LanguageFamily(
        "Qwen3ForCausalLM",
        Qwen3Config,
        lambda config: {"qk_norm": True, **_one_bias(config), **_windows(config)},
        ("attention_bias", *_WINDOW_FIELDS),
    ),
    "phi3": LanguageFamily(  # Phi-3 and 3.5 of 4k tokens, Phi-4
        "Phi3ForCausalLM",
        Phi3Config,
        _mistral,
        ("sliding_window", "original_max_position_embeddings"),
        unpack=phi3_tensors,
    ),
    "granite": LanguageFamily(  # Granite 3 (dense)
        "GraniteForCausalLM",
        GraniteConfig,
        _granite,
        ("attention_bias", *MULTIPLIERS),
        unpack=granite_tensors,
    ),
    "glm": LanguageFamily(  # GLM-4-9B of 2024
        "GlmForCausalLM",
        GlmConfig,
        lambda config: {"qkv_bias": config.attention_bias, "o_bias": False},
        ("attention_bias", _PARTIAL_ROTARY),
        unpack=glm_tensors,
        turns_parts=True,
    ),
    "smollm3": LanguageFamily(
        "SmolLM3ForCausalLM",
        SmolLM3Config,
        _smollm3,
        ("attention_bias", "no_rope_layers", "no_rope_layer_interval", *_WINDOW_FIELDS),
    ),
    "internlm3": LanguageFamily(
        "InternLM3ForCausalLM",
        LlamaConfig,
        # `bias` is that of the output projection and of the feed-forward.
        lambda config: {"qkv_bias": config.attention_bias, "o_bias": config.mlp_bias},
        ("qkv_bias", "bias"),
        renames={"qkv_bias": "attention_bias", "bias": "mlp_bias"},
        defaults={
            "vocab_size": 128512,
            "hidden_size": 4096,
            "intermediate_size": 10240,
            "num_hidden_layers": 48,
            "num_attention_heads": 32,
            "num_key_value_heads": 2,
            "head_dim": 128,
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-5,
            "pad_token_id": 2,
        },
    ),
    "internlm2": LanguageFamily(  # InternLM2, InternLM2.5: the reader of released checkpoints reads
        "InternLM2ForCausalLM", LlamaConfig, _one_bias, ("bias",), is_fused=True
    ),
}
"""`model_type` of config.json -> family."""

_OUTPUT_NORMS = "norms behind attention and feed-forward"
_MISSING = {
    "gemma2": f"{_OUTPUT_NORMS}, soft-capped logits",
    "gemma3": f"{_OUTPUT_NORMS}, rotary frequencies of their own in sliding layers",
    "gemma3_text": f"{_OUTPUT_NORMS}, rotary frequencies of their own in sliding layers",
    "glm4": _OUTPUT_NORMS,
    "olmo2": f"{_OUTPUT_NORMS} instead of before them, query and key norms over all heads",
    "olmo3": f"{_OUTPUT_NORMS} instead of before them, query and key norms over all heads",
}
"""Known families that cannot take vision -> what this decoder does not have."""

_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")


def read_text_config(folder: Path) -> MonoInternVLTextConfig:
    """Our decoder's configuration for the checkpoint of a language model.

    Raises:
        CheckpointError: There is no readable config.json.
        ConfigError: The architecture is not in the table, or a field asks for what our decoder does
            not do.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise CheckpointError(f"{file}: is missing; give the folder of a language model")
    stored = read_json(file)
    with reading(str(file), ConfigError):
        family = family_of(stored, str(file))
        _check_fields(stored, family, str(file))
        try:
            return _checked_text_config(stored, family)
        except ConfigError as error:
            raise ConfigError(f"{file}: {error}") from error


def _checked_text_config(
    stored: Mapping[str, Any], family: LanguageFamily
) -> MonoInternVLTextConfig:
    for name, most in MOST_OF_TEXT.items():  # before transformers makes lists of that length
        if stored.get(name) is not None:
            check_integer(name, stored[name], most=most)
    field = "rope_parameters" if stored.get("rope_parameters") else "rope_scaling"
    rope = _of_whole_heads(checked_object(field, stored.get(field)))
    if not family.turns_parts and _PARTIAL_ROTARY in rope:
        raise ConfigError(
            f"{_PARTIAL_ROTARY}={rope[_PARTIAL_ROTARY]!r} is not something this decoder does for "
            f"{family.architecture}"
        )
    kind = rope.get("rope_type", rope.get("type", "default"))
    check_rope({"rope_theta": 1.0, **rope, "rope_type": kind} if rope else {"rope_theta": 1.0})
    return _text_config(stored, family, family.read(stored))


def _of_whole_heads(rope: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary parameters without the remark that all of a head is turned."""
    return {k: v for k, v in rope.items() if k != _PARTIAL_ROTARY or v != 1.0}


def family_of(stored: Mapping[str, Any], name: str) -> LanguageFamily:
    """The family of a stored config.json.

    Raises:
        ConfigError: It is not in the table.
    """
    known = ", ".join(f"{key} ({row.architecture})" for key, row in FAMILIES.items())
    family = FAMILIES.get(str(stored.get("model_type")))
    if family is None:
        missing = _MISSING.get(str(stored.get("model_type")))
        if any(stored.get(field) for field in _EXPERT_COUNTS):
            missing = "a mixture of experts in its feed-forward, chosen by the token"
        raise ConfigError(
            f"{name}: model_type={stored.get('model_type')!r} cannot take vision"
            f"{f' (this decoder does not have: {missing})' if missing else ''}; known: {known}"
        )
    architectures = stored.get("architectures") or [family.architecture]
    if architectures[0] != family.architecture:
        raise ConfigError(
            f"{name}: architectures[0]={architectures[0]!r}; expected {family.architecture}, the "
            f"language model of model_type={stored['model_type']!r}"
        )
    return family


def _check_fields(stored: Mapping[str, Any], family: LanguageFamily, name: str) -> None:
    defaults = family.config_class().to_dict()
    for field, value in stored.items():
        if field in _MUST_BE:
            is_fine = value in (None, _MUST_BE[field])
        elif field in _UNDERSTOOD_FIELDS or field in family.fields:
            is_fine = True
        else:  # what is off or usual changes nothing
            is_fine = value is None or value is False or value == defaults.get(field)
        if not is_fine:
            raise ConfigError(f"{name}: {field}={value!r} is not something this decoder does")
    if stored.get("mlp_bias") or (stored.get("bias") and "qkv_bias" in family.fields):
        field = "mlp_bias" if stored.get("mlp_bias") else "bias"
        raise ConfigError(f"{name}: {field}=True; the experts of this decoder have no bias")


def _text_config(
    stored: Mapping[str, Any], family: LanguageFamily, config: Any
) -> MonoInternVLTextConfig:
    if family.is_fused:
        # The same file with vision is a released checkpoint: one reader, one set of defaults.
        as_released = MonoInternVLConfig(
            llm_config={**stored, "architectures": [family.architecture]},
            vision_config={"model_type": "intern_vit_patch"},
        )
        return as_released.text_config
    rope = _of_whole_heads(config.rope_parameters)
    rope = {k: v for k, v in rope.items() if k != "type" and v is not None}
    shared = {name: getattr(config, name, None) for name in SHARED_FIELDS}
    return MonoInternVLTextConfig(
        vocab_size=config.vocab_size,
        rope_parameters=rope,
        family=str(stored["model_type"]),
        **shared,
        **family.knobs(config),
    )


def unpacked(
    stored: Mapping[str, Any], family: LanguageFamily, tensors: Iterator[tuple[str, Tensor]]
) -> Iterator[tuple[str, Tensor]]:
    """Stored tensors as `LanguageFamily.unpack` says, one at a time.

    Args:
        stored: config.json.
        family: Of the files.
        tensors: As they are stored.
    """
    if family.unpack is None:
        yield from tensors
        return
    config = family.read(stored)
    for key, tensor in tensors:
        yield from family.unpack(config, key, tensor)


def stored_name(name: str, family: LanguageFamily) -> tuple[str, int | None]:
    """Where the family's files keep one of our text parameters.

    Args:
        name: Of a parameter of the decoder or the head, without a visual copy.
        family: Of the files.

    Returns:
        The key, and for a part of a fused wqkv its place (0 query, 1 key, 2 value), else None.
    """
    if family.is_fused:
        key, place = released_name(name)
        return key.removeprefix("language_model."), place
    return name.replace("model.language_model.", "model.", 1), None
