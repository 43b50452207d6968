"""How pixels become patch features: the patch embedding alone, or a vision tower on top of it.

Source: OpenGVLab/Mono-InternVL at 5b17ab4 (configuration of the vision model and its defaults,
which apply where a file omits a key).
"""

from typing import Any

from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from mono_internvl.configuration.checks import (
    MAX_LAYERS,
    check_choice,
    check_flag,
    check_integer,
    check_number,
    check_share,
)
from mono_internvl.configuration.options import MAX_TILE_PX
from mono_internvl.errors import ConfigError

VISION_KINDS = {"intern_vit_patch": "patch", "intern_vit_6b": "vit"}
"""Model type in a released file -> kind; InternViT-300M, too, says `intern_vit_6b`."""

NORM_TYPES = ("layer_norm", "rms_norm")

_MOST = {
    "hidden_size": 1 << 17,
    "image_size": MAX_TILE_PX,
    "patch_size": MAX_TILE_PX,
    "num_channels": 64,
    "num_hidden_layers": MAX_LAYERS,
    "num_attention_heads": 1 << 12,
    "intermediate_size": 1 << 19,
}
_MODEL_TYPES = {kind: name for name, kind in VISION_KINDS.items()}
# What the released code assumes where a file leaves a key out.
_RELEASED_DEFAULTS: dict[str, Any] = {
    "hidden_size": 3200,
    "image_size": 224,
    "num_hidden_layers": 48,
    "num_attention_heads": 25,
    "intermediate_size": 12800,
    "norm_type": "rms_norm",
    "qkv_bias": False,
    "qk_normalization": True,
    "initializer_factor": 0.1,
}


class MonoInternVLVisionConfig(PreTrainedConfig):
    """How pixels become patch features; by default the monolithic 2B model's, or InternViT-300M.

    Attributes:
        kind: `"patch"` is the monolithic model: one convolution and a position embedding;
            `"vit"` is the vision tower of the modular baseline, InternViT. All but the four sizes
            below count for `"vit"` alone.
        hidden_size: Width of a patch feature.
        image_size: Side of a tile, px.
        patch_size: Side of a patch, px.
        num_channels: Of a pixel.
        norm_type: `"layer_norm"` (InternViT-300M) or `"rms_norm"` (6B).
        layer_norm_eps: Of either, and of the query and key norms.
        qkv_bias: Whether queries, keys and values have a bias.
        qk_normalization: Whether queries and keys are RMS-normalised, over all heads together.
        drop_path_rate: Share of tiles that skip a residual branch of the last layer in training;
            grows linearly from 0 at the first layer.
        initializer_factor: Start value of the layer scale.
    """

    model_type = "mono_internvl_vision"
    base_config_key = "vision_config"

    kind: str = "patch"
    hidden_size: int = 1024
    image_size: int = 448
    patch_size: int = 14
    num_channels: int = 3
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    intermediate_size: int = 4096
    hidden_act: str = "gelu"
    norm_type: str = "layer_norm"
    layer_norm_eps: float = 1e-6
    qkv_bias: bool = True
    qk_normalization: bool = False
    drop_path_rate: float = 0.0
    initializer_range: float = 0.02
    initializer_factor: float = 1.0

    def __post_init__(self, **kwargs: Any) -> None:
        for name in ("hidden_size", "image_size", "patch_size", "num_channels"):
            check_integer(f"vision_config.{name}", getattr(self, name), most=_MOST[name])
        if self.kind == "vit":
            self._check_tower()
        super().__post_init__(**kwargs)

    def _check_tower(self) -> None:
        for name in ("num_hidden_layers", "num_attention_heads", "intermediate_size"):
            check_integer(f"vision_config.{name}", getattr(self, name), most=_MOST[name])
        if self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"vision_config.hidden_size={self.hidden_size} is not a multiple of "
                f"num_attention_heads={self.num_attention_heads}; all heads have one width"
            )
        check_choice("vision_config.norm_type", self.norm_type, NORM_TYPES)
        check_choice("vision_config.hidden_act", self.hidden_act, ACT2FN)
        check_number("vision_config.layer_norm_eps", self.layer_norm_eps, above=0)
        check_number("vision_config.initializer_range", self.initializer_range)
        check_number("vision_config.initializer_factor", self.initializer_factor)
        check_share("vision_config.drop_path_rate", self.drop_path_rate)
        for name in ("qkv_bias", "qk_normalization"):
            check_flag(f"vision_config.{name}", getattr(self, name))

    def layers_until(self, select_layer: int) -> int:
        """How many layers run for hidden state `select_layer` of [embeddings, layer 1, ...]."""
        return select_layer if select_layer >= 0 else self.num_hidden_layers + 1 + select_layer


def vision_from_released(stored: dict[str, Any]) -> dict[str, Any]:
    """Fields of `MonoInternVLVisionConfig` from the `vision_config` of a released config.json.

    Raises:
        ConfigError: It is of another kind, or asks for dropout, which no released model uses.
    """
    model_type = stored.get("model_type")
    if model_type not in VISION_KINDS:
        raise ConfigError(
            f"vision_config.model_type={model_type!r} is not supported; expected one of "
            f"{', '.join(VISION_KINDS)}"
        )
    for name in ("dropout", "attention_dropout"):
        if stored.get(name):
            raise ConfigError(
                f"vision_config.{name}={stored[name]!r} is not implemented; set it to 0 and use "
                "drop_path_rate"
            )
    values = {**_RELEASED_DEFAULTS, **stored}
    fields = MonoInternVLVisionConfig.__annotations__
    return {
        **{name: values[name] for name in fields if name in values},
        "kind": VISION_KINDS[model_type],
    }


def vision_to_released(vision: MonoInternVLVisionConfig) -> dict[str, Any]:
    """The inverse of `vision_from_released`, every field stated."""
    out = {name: getattr(vision, name) for name in MonoInternVLVisionConfig.__annotations__}
    out["model_type"] = _MODEL_TYPES[out.pop("kind")]
    is_patch = vision.kind == "patch"
    out["architectures"] = ["InternVisionPatchModel" if is_patch else "InternVisionModel"]
    return out
