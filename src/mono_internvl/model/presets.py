"""Configurations by name, for recipes, accounting and fresh models.

Source: the tensor shapes of the released checkpoints; rope and limits as in the same model family
(a released config.json always takes precedence over these).
"""

from collections.abc import Callable

from mono_internvl.errors import ConfigError
from mono_internvl.model.configuration import (
    MonoInternVLConfig,
    MonoInternVLTextConfig,
    MonoInternVLVisionConfig,
)


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


PRESETS: dict[str, Callable[[], MonoInternVLConfig]] = {"mono-internvl-2b": mono_internvl_2b}
"""Name -> function that makes a fresh configuration."""


def preset(name: str) -> MonoInternVLConfig:
    """A fresh configuration by name.

    Raises:
        ConfigError: There is none of that name.
    """
    if name not in PRESETS:
        raise ConfigError(f"preset {name!r} is not known; choose from {', '.join(sorted(PRESETS))}")
    return PRESETS[name]()
