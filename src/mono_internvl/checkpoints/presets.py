"""Configurations by name, for recipes, accounting and fresh models.

Source: the tensor shapes of the released checkpoints; rope and limits as in the same model family
(a released config.json always takes precedence over these).
"""

from collections.abc import Callable

from mono_internvl.configuration.model import (
    MonoInternVLConfig,
    MonoInternVLTextConfig,
    MonoInternVLVisionConfig,
)
from mono_internvl.configuration.options import EXPERT_PRESETS
from mono_internvl.errors import CheckpointError, ConfigError
from mono_internvl.released.keys import read_config
from mono_internvl.released.weight_files import resolve_checkpoint


def mono_internvl_2b() -> MonoInternVLConfig:
    """Mono-InternVL-2B and its stages S1-1, S1-2 and S1-3: InternLM2-1.8B with visual experts."""
    return MonoInternVLConfig(
        text_config=MonoInternVLTextConfig(
            vocab_size=92553,
            hidden_size=2048,
            intermediate_size=8192,
            num_hidden_layers=24,
            num_attention_heads=16,
            num_key_value_heads=8,
            rms_norm_eps=1e-5,
            max_position_embeddings=32768,
            rope_parameters={"rope_type": "dynamic", "rope_theta": 1_000_000.0, "factor": 2.0},
        ),
        vision_config=MonoInternVLVisionConfig(hidden_size=1024, image_size=448, patch_size=14),
        visual_experts=("ffn",),
        max_dynamic_patch=12,
    )


def mono_internvl_1_5_2b() -> MonoInternVLConfig:
    """Mono-InternVL-1.5 as we reconstruct it: the 2B model with visual attention experts, too.

    Source: the abstract of arXiv 2507.12566 names visual attention experts; neither weights nor
        code were released. Ours: all four projections have a visual copy, norms are shared.
    """
    config = mono_internvl_2b()
    config.visual_experts = EXPERT_PRESETS["v1_5"]
    return config


def mini_internvl_chat_2b_v1_5() -> MonoInternVLConfig:
    """Mini-InternVL-Chat-2B-V1-5, the modular baseline: InternViT-300M before InternLM2-1.8B."""
    config = mono_internvl_2b()
    return MonoInternVLConfig(
        text_config=config.text_config,
        vision_config=MonoInternVLVisionConfig(
            kind="vit",
            hidden_size=1024,
            image_size=448,
            patch_size=14,
            num_hidden_layers=24,
            num_attention_heads=16,
            intermediate_size=4096,
            norm_type="layer_norm",
            qkv_bias=True,
            qk_normalization=False,
            initializer_factor=1.0,
        ),
        visual_experts=(),
        max_dynamic_patch=12,
    )


PRESETS: dict[str, Callable[[], MonoInternVLConfig]] = {
    "mono-internvl-2b": mono_internvl_2b,
    "v1": mono_internvl_2b,
    "v1_5": mono_internvl_1_5_2b,
    "mini-internvl-chat-2b-v1-5": mini_internvl_chat_2b_v1_5,
}
"""Name -> function that makes a fresh configuration; `v1` is another name of the released one."""

PRESET_NOTES: dict[str, str] = {
    "v1_5": "our reconstruction of Mono-InternVL-1.5 from its abstract; it was never released",
}
"""Name -> what must be said wherever the preset is shown."""


def preset(name: str) -> MonoInternVLConfig:
    """A fresh configuration by name.

    Raises:
        ConfigError: There is none of that name.
    """
    if name not in PRESETS:
        raise ConfigError(f"preset {name!r} is not known; choose from {', '.join(sorted(PRESETS))}")
    return PRESETS[name]()


def config_of(model: str | None, otherwise: str, revision: str | None = None) -> MonoInternVLConfig:
    """The configuration of a checkpoint, or that of a preset.

    Args:
        model: Checkpoint folder or hub id.
        otherwise: Name of the preset where there is no `model`.
        revision: Branch, tag or commit of a hub id.

    Raises:
        CheckpointError: There is no configuration.
        ConfigError: There is no such preset.
    """
    if model is None:
        return preset(otherwise)
    folder = resolve_checkpoint(model, revision=revision, patterns=("config.json",))
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{model}: no config.json; expected a checkpoint folder or a hub id")
    return read_config(folder)
