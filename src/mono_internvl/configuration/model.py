"""The one configuration: patches or vision tower, which experts exist, the language model's knobs.

On disk it is the released layout (`model_type: internvl_chat`, nested `vision_config` and
`llm_config`); in memory it has the form that generic hosts expect (nested `text_config`,
transformers' field names) and names of its own, which no other InternVL shares. Fields of a
released file that we do not know are kept and written back.

Source: OpenGVLab/Mono-InternVL at 5b17ab4 (configuration classes and their defaults, which apply
where a file omits a key).
"""

import copy
from typing import Any, ClassVar

import torch
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from mono_internvl.configuration.checks import (
    MOST_OF_TEXT,
    check_choice,
    check_flag,
    check_integer,
    check_number,
    check_share,
    checked_object,
)
from mono_internvl.configuration.options import (
    MAX_TILE_PX,
    MAX_TILES,
    check_image_attention,
    check_position_step,
    check_tiling,
    visual_expert_set,
)
from mono_internvl.configuration.released_fields import (
    RELEASED_ARCHITECTURE,
    RELEASED_LLM_DEFAULTS,
    RELEASED_MODEL_TYPE,
    RELEASED_TOP_DEFAULTS,
)
from mono_internvl.configuration.text_fields import LAYER_TYPES, check_layers, check_rope
from mono_internvl.configuration.vision import (
    VISION_KINDS,
    MonoInternVLVisionConfig,
    vision_from_released,
    vision_to_released,
)
from mono_internvl.errors import ConfigError
from mono_internvl.runs.files import reading

# The nine visual tokens close the vocabulary in a fixed order; <IMG_CONTEXT> is the third of them.
IMAGE_TOKEN_OFFSET_FROM_END = 7

_ARCHITECTURE = "MonoInternVLForConditionalGeneration"
# What loaders add to the fields of a file; never written back.
_NOT_OF_THE_FILE = frozenset({"name_or_path", "attn_implementation", "_commit_hash"})
_TEXT_ARCHITECTURE_WITH_EXPERTS = "InternLM2VEForCausalLM"
_TEXT_ARCHITECTURE_PLAIN = "InternLM2ForCausalLM"


class MonoInternVLTextConfig(PreTrainedConfig):
    """The decoder: InternLM2's shape by default, with the knobs of its Llama-like relatives.

    Attributes:
        head_dim: Width of one attention head; `hidden_size / num_attention_heads` unless given.
        qkv_bias: Whether the query, key and value projections have a bias.
        o_bias: Whether the output projection of attention has a bias.
        qk_norm: Whether queries and keys are RMS-normalised per head.
        rope_parameters: `rope_theta`, `rope_type` and what belongs to the type, in transformers'
            words (`decoder_knobs.ROPE_FIELDS`).
        sliding_layers: For each layer 1 if it looks back on `sliding_window` tokens only, 0 if on
            all; None: all layers do. From it follows `layer_types`, transformers' name of it, which
            stands only where a layer slides.
        sliding_window: Tokens that a sliding layer looks back on, the present one included.
        no_rope_layers: For each layer 1 if it turns queries and keys by their positions, 0 if it
            does not (the name is transformers'); None: all do.
        family: `model_type` of the language model that this decoder was made from.
    """

    model_type = "mono_internvl_text"
    base_config_key = "text_config"
    keys_to_ignore_at_inference = ("past_key_values",)

    vocab_size: int = 92553
    hidden_size: int = 2048
    intermediate_size: int = 8192
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    num_key_value_heads: int = 8
    head_dim: int = None  # type: ignore[assignment]  # set in __post_init__
    hidden_act: str = "silu"
    max_position_embeddings: int = 32768
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-5
    use_cache: bool = True
    pad_token_id: int | None = 2
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: bool = False
    rope_parameters: dict[str, Any] = None  # type: ignore[assignment]  # set in __post_init__
    attention_dropout: float = 0.0
    sliding_layers: list[int] | None = None
    sliding_window: int | None = None
    no_rope_layers: list[int] | None = None
    family: str = "internlm2"

    def __post_init__(self, **kwargs: Any) -> None:
        if self.rope_parameters is None and "rope_theta" not in kwargs:
            self.rope_parameters = {"rope_type": "default", "rope_theta": 1_000_000.0}
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        for name, most in MOST_OF_TEXT.items():
            check_integer(f"llm_config.{name}", getattr(self, name), most=most)
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        super().__post_init__(**kwargs)
        self._check()
        if self.sliding_layers is not None:  # for transformers' caches and its generate
            self.layer_types = [LAYER_TYPES[slides] for slides in self.sliding_layers]

    def _check(self) -> None:
        check_integer("llm_config.head_dim", self.head_dim, least=2, most=1 << 14)
        if self.pad_token_id is not None:
            check_integer(
                "llm_config.pad_token_id", self.pad_token_id, least=0, most=self.vocab_size - 1
            )
        if self.head_dim % 2:
            raise ConfigError(
                f"llm_config.head_dim={self.head_dim}; expected an even number, rotary positions "
                "turn pairs: correct hidden_size, num_attention_heads or head_dim"
            )
        ends = self.eos_token_id if isinstance(self.eos_token_id, list) else [self.eos_token_id]
        for index in (self.bos_token_id, *ends):
            if index is not None:  # -1, too, is none
                check_integer("llm_config.bos_token_id and eos_token_id", index, least=-1)
        check_choice("llm_config.hidden_act", self.hidden_act, ACT2FN)
        check_number("llm_config.rms_norm_eps", self.rms_norm_eps, above=0)
        check_number("llm_config.initializer_range", self.initializer_range)
        check_share("llm_config.attention_dropout", self.attention_dropout)
        for name in ("qkv_bias", "o_bias", "qk_norm", "tie_word_embeddings", "use_cache"):
            check_flag(f"llm_config.{name}", getattr(self, name))
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}; every key-value head serves an "
                "equal group"
            )
        check_rope(self.rope_parameters, self.head_dim)
        check_layers(
            self.num_hidden_layers, self.sliding_layers, self.sliding_window, self.no_rope_layers
        )
        if getattr(self, "partial_rotary_factor", None):
            raise ConfigError(
                f"partial_rotary_factor={self.partial_rotary_factor!r} is not implemented by this "
                "decoder; use a language model without it"
            )


class MonoInternVLConfig(PreTrainedConfig):
    """Everything about a model but its weights.

    Attributes:
        text_config: The decoder.
        vision_config: Patches or vision tower.
        visual_experts: Which parts of each decoder layer have a visual copy; `()` is a plain
            language model, `("ffn",)` is Mono-InternVL, more is Mono-InternVL-1.5's direction.
            "attention" and "qkvo" are understood as `("qkv", "o")`.
        image_attention: "causal", or "bidirectional": the visual tokens of one image (a run without
            another token between) attend to each other both ways. Text is causal in any case.
        visual_position_step: How far a visual token moves the rotary position; 1 as text does. Text
            after an image goes on at the next whole number.
        visual_position_steps: In training, each image's step is drawn from these; none takes
            `visual_position_step`.
        image_token_id: Id of `<IMG_CONTEXT>`; the third of the nine tokens that close the
            vocabulary unless given.
        downsample_ratio: Side ratio of the pixel shuffle; 0.5 merges 2x2 patches to one token.
        select_layer: Which of the vision tower's hidden states is read, counted as Python does:
            0 the embeddings, -1 the last layer's output. Without a tower it means nothing.
        ps_version: `"v2"`; `"v1"` is the transposed token order of the first InternVL releases.
        force_image_size: Side of a tile, px.
        min_dynamic_patch, max_dynamic_patch: Least and most tiles of an image, without thumbnail.
        tiling: How an image is cut and its tokens are laid out, of `TILINGS`.
        template: Name of the chat template of the released checkpoints.
    """

    model_type = "mono_internvl"
    sub_configs: ClassVar[dict[str, type[PreTrainedConfig]]] = {
        "text_config": MonoInternVLTextConfig,
        "vision_config": MonoInternVLVisionConfig,
    }
    has_no_defaults_at_init = False
    # Where transformers looks for the code of a checkpoint: none is ever run, whatever a file says.
    auto_map: ClassVar[dict[str, str]] = {}

    # Set by __init__, whatever they are given as.
    text_config: MonoInternVLTextConfig = None  # type: ignore[assignment]
    vision_config: MonoInternVLVisionConfig = None  # type: ignore[assignment]
    visual_experts: tuple[str, ...] = None  # type: ignore[assignment]
    image_attention: str = "causal"
    visual_position_step: float = 1.0
    visual_position_steps: tuple[float, ...] = ()
    image_token_id: int = None  # type: ignore[assignment]
    downsample_ratio: float = 0.5
    ps_version: str = "v2"
    select_layer: int = -1
    force_image_size: int = None  # type: ignore[assignment]
    dynamic_image_size: bool = True
    use_thumbnail: bool = True
    min_dynamic_patch: int = 1
    max_dynamic_patch: int = 12
    tiling: str = "internvl"
    pad2square: bool = False
    template: str | None = "internlm2-chat"
    tie_word_embeddings: bool = False

    def __init__(self, **kwargs: Any) -> None:
        released = {}
        if "llm_config" in kwargs:
            released = {
                name: copy.deepcopy(value)
                for name, value in kwargs.items()
                if name not in _NOT_OF_THE_FILE and not isinstance(value, torch.dtype)
            }
            kwargs = _from_released(kwargs)
        text, vision = kwargs.pop("text_config", None), kwargs.pop("vision_config", None)
        own = {name: kwargs.pop(name) for name in list(kwargs) if name in _OWN_FIELDS}
        for name in _OWN_FIELDS:
            setattr(self, name, own.get(name, getattr(type(self), name)))
        self.text_config = _sub_config(MonoInternVLTextConfig, text, "text_config")
        self.vision_config = _sub_config(MonoInternVLVisionConfig, vision, "vision_config")
        self._released = released
        super().__init__(**kwargs)
        self.tie_word_embeddings = self.text_config.tie_word_embeddings
        if self.visual_experts is None:
            self.visual_experts = ("ffn",) if self.vision_config.kind == "patch" else ()
        if self.image_token_id is None:
            self.image_token_id = self.text_config.vocab_size - IMAGE_TOKEN_OFFSET_FROM_END
        if self.force_image_size is None:
            self.force_image_size = self.vision_config.image_size
        self._check()

    def _check(self) -> None:
        self.visual_experts = visual_expert_set(self.visual_experts)
        if not isinstance(self.visual_position_steps, list | tuple):
            raise ConfigError(
                f"visual_position_steps={self.visual_position_steps!r}; expected a list of numbers"
            )
        self.visual_position_steps = tuple(self.visual_position_steps)
        check_integer("force_image_size", self.force_image_size, most=MAX_TILE_PX)
        for name in ("min_dynamic_patch", "max_dynamic_patch"):
            check_integer(name, getattr(self, name), most=MAX_TILES)
        is_type = isinstance(self.dtype, torch.dtype) and self.dtype.is_floating_point
        if self.dtype is not None and not is_type:
            raise ConfigError(
                f"torch_dtype={self.dtype!r:.60}; expected a floating type, float32 or bfloat16"
            )
        if self.min_dynamic_patch > self.max_dynamic_patch:
            raise ConfigError(
                f"min_dynamic_patch={self.min_dynamic_patch} is above max_dynamic_patch="
                f"{self.max_dynamic_patch}; expected least <= most tiles"
            )
        check_integer("img_context_token_id", self.image_token_id, least=0)
        if self.image_token_id >= self.text_config.vocab_size:
            raise ConfigError(
                f"img_context_token_id={self.image_token_id}; expected an id of the vocabulary of "
                f"{self.text_config.vocab_size} tokens, correct it or vocab_size"
            )
        vision = self.vision_config
        check_choice("vision_config.kind", vision.kind, tuple(VISION_KINDS.values()))
        depth = vision.num_hidden_layers
        if vision.kind == "vit" and not (
            isinstance(self.select_layer, int) and -depth - 1 <= self.select_layer <= depth
        ):
            raise ConfigError(
                f"select_layer={self.select_layer!r}; expected {-depth - 1} to {depth}: the vision "
                f"tower has {depth} layers, and -1 is the output of the last"
            )
        check_choice("ps_version", self.ps_version, ("v1", "v2"))
        if self.downsample_ratio != 0.5:
            raise ConfigError(
                f"downsample_ratio={self.downsample_ratio}; only 0.5 (2x2 patches) is known"
            )
        check_tiling(self)
        check_image_attention(self.image_attention)
        check_position_step("visual_position_step", self.visual_position_step)
        for step in self.visual_position_steps:
            check_position_step("visual_position_steps", step)
        side = self.force_image_size
        if side % (2 * self.vision_config.patch_size):
            raise ConfigError(
                f"force_image_size={side} is not a multiple of {2 * self.vision_config.patch_size} "
                "(a visual token covers 2x2 patches)"
            )

    @property
    def has_image_marks(self) -> bool:
        """Whether learned tokens stand among the visual tokens of an image."""
        return self.tiling == "xcomposer_4khd"

    @property
    def num_image_tokens_per_tile(self) -> int:
        """Visual tokens of one tile (448 px: 256)."""
        patches_per_side = self.force_image_size // self.vision_config.patch_size
        return (patches_per_side // 2) ** 2

    def get_text_config(self, *args: Any, **kwargs: Any) -> MonoInternVLTextConfig:
        """The decoder's configuration, whatever is asked (`decoder`, `encoder`)."""
        return self.text_config

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: Any, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The fields of a config.json, under this class's `model_type`."""
        fields, rest = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if fields.get("model_type") == RELEASED_MODEL_TYPE:
            fields["model_type"] = cls.model_type
        return fields, rest

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As transformers does it; how to compute counts if asked for, not in a file.

        Raises:
            ConfigError: A field, of the file or among `kwargs`, is not what it may be.
        """
        asked = kwargs.get("attn_implementation")
        for name in ("dtype", "torch_dtype"):
            if isinstance(kwargs.get(name), str) and kwargs[name] == "auto":  # as the file says
                del kwargs[name]
        fields = cls.take_fields(kwargs)
        with reading("config.json", ConfigError):
            result = super().from_dict(_facts_of_the_model(config_dict), **kwargs)
            config = result[0] if isinstance(result, tuple) else result
            config.change(fields)
        if asked is not None:
            config._attn_implementation = asked
        return result

    @staticmethod
    def take_fields(options: dict[str, Any]) -> dict[str, Any]:
        """Move the fields of a configuration out of the options of a `from_pretrained`."""
        return {name: options.pop(name) for name in list(options) if name in _OWN_FIELDS}

    def change(self, fields: dict[str, Any]) -> None:
        """Set fields of the top level, and check the whole again.

        Raises:
            ConfigError: A value, or what it makes of the others, is not what it may be.
        """
        for name, value in fields.items():
            setattr(self, name, value)
        self._check()

    def to_dict(self) -> dict[str, Any]:
        """This configuration in the released layout, with unknown released fields kept."""
        out = copy.deepcopy(self._released)
        out.update({name: getattr(self, name) for name in RELEASED_TOP_DEFAULTS})
        out["force_image_size"] = self.force_image_size
        out["tie_word_embeddings"] = self.tie_word_embeddings
        out["model_type"] = RELEASED_MODEL_TYPE
        out.setdefault("architectures", [RELEASED_ARCHITECTURE])
        out["llm_config"] = {**out.get("llm_config", {}), **_text_to_released(self)}
        out["vision_config"] = {
            **out.get("vision_config", {}),
            **vision_to_released(self.vision_config),
        }
        out["img_context_token_id"] = self.image_token_id
        out["visual_experts"] = list(self.visual_experts)
        for name in _OPTIONS:
            out.pop(name, None)
            if (value := getattr(self, name)) != getattr(type(self), name):
                out[name] = list(value) if isinstance(value, tuple) else value
        if self.dtype is not None:
            out["torch_dtype"] = str(self.dtype).removeprefix("torch.")
        return out

    def to_diff_dict(self) -> dict[str, Any]:
        """As `to_dict`: a released file states its values, defaults included."""
        return self.to_dict()


_OWN_FIELDS = tuple(
    name
    for name in MonoInternVLConfig.__annotations__
    if name not in ("text_config", "vision_config")
)

# Written only where they are not as in the released models.
_OPTIONS = ("image_attention", "visual_position_step", "visual_position_steps", "tiling")
_FACTS = {*_OWN_FIELDS, "text_config", "vision_config", "dtype", "torch_dtype", "architectures"}
_NOT_OF_THE_MODEL = frozenset(
    (
        *("attn_implementation", "experts_implementation", "fusion_config", "distributed_config"),
        *("transformers_weights", "per_layer_config", "quantization_config", "kernel_config"),
    )
)


def _facts_of_the_model(stored: dict[str, Any]) -> dict[str, Any]:
    """What a stored configuration says about the model, without what it tells a loader to do.

    In transformers' own form a file could name other weights, kernels to fetch, patches to apply.
    The released form (with `llm_config`) is read field by field anyway, and kept for writing.
    """
    if "llm_config" in stored:
        return dict(stored)
    facts = {k: v for k, v in stored.items() if k in _FACTS}
    for name in ("text_config", "vision_config"):
        if isinstance(fields := facts.get(name), dict):
            facts[name] = {
                k: v for k, v in fields.items() if k[:1] != "_" and k not in _NOT_OF_THE_MODEL
            }
    return facts


def _sub_config(cls: type[PreTrainedConfig], value: Any, field: str) -> Any:
    if value is None:
        return cls()
    if isinstance(value, cls):
        return value
    if isinstance(value, dict):
        return cls(**{k: v for k, v in value.items() if k != "model_type"})
    raise ConfigError(f"{field} is a {type(value).__name__}; expected {cls.__name__} or a dict")


def _from_released(released: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments of `MonoInternVLConfig` from the fields of a released config.json."""
    top = {**RELEASED_TOP_DEFAULTS, **released}
    llm = {**RELEASED_LLM_DEFAULTS, **checked_object("llm_config", top.pop("llm_config"))}
    vision = checked_object("vision_config", top.pop("vision_config", None))

    architectures = llm.pop("architectures", None)
    architecture = architectures[0] if isinstance(architectures, list) and architectures else None
    if architecture not in (_TEXT_ARCHITECTURE_WITH_EXPERTS, _TEXT_ARCHITECTURE_PLAIN):
        raise ConfigError(
            f"llm_config.architectures[0]={architecture!r} is not supported; expected "
            f"{_TEXT_ARCHITECTURE_WITH_EXPERTS} (monolithic) or {_TEXT_ARCHITECTURE_PLAIN} "
            "(modular); other InternVL repositories are loaded by transformers with "
            "trust_remote_code=True"
        )
    bias = llm.pop("bias")
    llm.setdefault("qkv_bias", bias)
    llm.setdefault("o_bias", bias)
    scaling = checked_object("llm_config.rope_scaling", llm.pop("rope_scaling"))
    check_number("llm_config.rope_theta", llm["rope_theta"], above=0)
    llm["rope_parameters"] = {
        **{k: v for k, v in scaling.items() if k != "type"},
        "rope_type": scaling.get("type", scaling.get("rope_type", "default")),
        "rope_theta": float(llm.pop("rope_theta")),
    }
    llm.setdefault("num_key_value_heads", llm["num_attention_heads"])
    llm["family"] = llm.pop("model_type", MonoInternVLTextConfig.family)
    experts = ("ffn",) if architecture == _TEXT_ARCHITECTURE_WITH_EXPERTS else ()

    known = set(_OWN_FIELDS) | {"torch_dtype", "dtype"}
    return {
        **{name: value for name, value in top.items() if name in known},
        "architectures": [_ARCHITECTURE],
        "visual_experts": top.get("visual_experts", experts),
        "image_token_id": top.get("img_context_token_id"),
        "text_config": _only_fields(MonoInternVLTextConfig, llm),
        "vision_config": vision_from_released(vision),
    }


def _only_fields(cls: type[PreTrainedConfig], values: dict[str, Any]) -> dict[str, Any]:
    return {name: values[name] for name in cls.__annotations__ if name in values}


def _text_to_released(config: MonoInternVLConfig) -> dict[str, Any]:
    text = config.text_config
    out = {name: getattr(text, name) for name in MonoInternVLTextConfig.__annotations__}
    rope = dict(out.pop("rope_parameters"))
    theta, rope_type = rope.pop("rope_theta"), rope.pop("rope_type", "default")
    qkv_bias, o_bias = out.pop("qkv_bias"), out.pop("o_bias")
    out["bias"] = qkv_bias
    if o_bias != qkv_bias:
        out["o_bias"] = o_bias
    for knob, usual in (
        ("head_dim", text.hidden_size // text.num_attention_heads),
        ("qk_norm", False),
        ("attention_dropout", 0.0),
        ("sliding_layers", None),
        ("sliding_window", None),
        ("no_rope_layers", None),
    ):
        if out[knob] == usual:
            del out[knob]
    out["rope_theta"] = theta
    out["rope_scaling"] = {"type": rope_type, **rope} if rope or rope_type != "default" else None
    out["model_type"] = out.pop("family")
    out["architectures"] = [
        _TEXT_ARCHITECTURE_WITH_EXPERTS if config.visual_experts else _TEXT_ARCHITECTURE_PLAIN
    ]
    return out
