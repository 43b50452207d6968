"""What is measured: models of a given size with random weights, and prompts for them.

The plain language model of every comparison is transformers' own Llama over the *same* weights as
the text part of ours, so that a big comparison needs the memory of one model.

Legend: B batch, T tokens, S tile side.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import DynamicCache

from mono_internvl.attention.blocked import BLOCKED
from mono_internvl.bench.dense import DENSE, register_dense
from mono_internvl.configuration.model import (
    MonoInternVLConfig,
    MonoInternVLTextConfig,
    MonoInternVLVisionConfig,
)
from mono_internvl.errors import ConfigError
from mono_internvl.model.modeling import MonoInternVLForConditionalGeneration

VARIANTS: dict[str, tuple[str, ...]] = {
    "v1": ("ffn",),
    "v1.5": ("ffn", "qkv", "o"),
    "modular": (),
}
"""Name of a variant -> its visual experts; "modular" has a vision tower instead."""


@dataclass(frozen=True)
class Size:
    """Sizes of a model and of the prompt that it is measured with.

    Attributes:
        name: "tiny" (tests), "middle" or "2b"; "middle" has the proportions of "2b".
        width: Of the decoder.
        ffn_width: Of an expert.
        layers: Decoder layers.
        heads: Query heads.
        kv_heads: Key-value heads.
        vocabulary: Rows of the head.
        vision_width: Of a patch feature.
        tile_px: Side of a tile.
        text_before: Text tokens before the image.
        tiles: Tiles of the image.
        text_after: Text tokens after the image.
    """

    name: str
    width: int
    ffn_width: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    vision_width: int
    tile_px: int
    text_before: int
    tiles: int
    text_after: int

    @property
    def visual_tokens(self) -> int:
        """Visual tokens of the prompt."""
        return self.tiles * (self.tile_px // 28) ** 2

    @property
    def tokens(self) -> int:
        """Tokens of the prompt."""
        return self.text_before + self.visual_tokens + self.text_after

    @property
    def shapes(self) -> dict[str, int]:
        """The sizes that a row shows."""
        return {
            "batch": 1,
            "tokens": self.tokens,
            "visual_tokens": self.visual_tokens,
            "width": self.width,
            "ffn_width": self.ffn_width,
            "heads": self.heads,
            "kv_heads": self.kv_heads,
            "vocabulary": self.vocabulary,
        }


@dataclass(frozen=True)
class Setting:
    """What a comparison is run with.

    Attributes:
        size: Model and prompt.
        dtype: Of weights and activations.
        device: Where.
        rounds: Interleaved runs of every subject.
        command: What gives the rows again.
    """

    size: Size
    dtype: torch.dtype
    device: torch.device
    rounds: int
    command: str

    @property
    def attention(self) -> str:
        """The fastest attention that this device has without further packages."""
        return BLOCKED if self.device.type == "cpu" else "sdpa"


SIZES = {
    "tiny": Size("tiny", 64, 160, 2, 4, 2, 256, 32, 56, 3, 2, 5),
    "middle": Size("middle", 1024, 4096, 8, 16, 8, 92553, 512, 448, 40, 3, 216),
    "2b": Size("2b", 2048, 8192, 24, 16, 8, 92553, 1024, 448, 40, 3, 216),
}
"""Name -> size; "2b" has the shapes of Mono-InternVL-2B."""


def size_of(name: str) -> Size:
    """A size by name.

    Raises:
        ConfigError: There is none of that name.
    """
    if name not in SIZES:
        raise ConfigError(f"size {name!r} is not known; choose from {', '.join(SIZES)}")
    return SIZES[name]


def random_model(
    size: Size, variant: str, dtype: torch.dtype, device: torch.device, attention: str
) -> MonoInternVLForConditionalGeneration:
    """A model of this size with random weights, in eval mode."""
    config = MonoInternVLConfig(
        text_config=MonoInternVLTextConfig(
            vocab_size=size.vocabulary,
            hidden_size=size.width,
            intermediate_size=size.ffn_width,
            num_hidden_layers=size.layers,
            num_attention_heads=size.heads,
            num_key_value_heads=size.kv_heads,
        ),
        vision_config=_vision_config(size, has_tower=variant == "modular"),
        visual_experts=VARIANTS[variant],
    )
    with torch.device("meta"):
        model = MonoInternVLForConditionalGeneration(config)
    model = model.to(dtype).to_empty(device=device).eval()
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 1:
                p.fill_(0.0 if name.endswith("bias") else 1.0)
            else:
                p.normal_(std=0.02, generator=generator)
    model.set_attn_implementation(attention)
    return model


def _vision_config(size: Size, has_tower: bool) -> MonoInternVLVisionConfig:
    """Patches, or a tower of the proportions of InternViT-300M, as deep as the decoder."""
    return MonoInternVLVisionConfig(
        kind="vit" if has_tower else "patch",
        hidden_size=size.vision_width,
        image_size=size.tile_px,
        num_hidden_layers=size.layers,
        num_attention_heads=max(1, size.vision_width // 64),
        intermediate_size=4 * size.vision_width,
        initializer_factor=1.0,
    )


def plain_llama(
    model: MonoInternVLForConditionalGeneration, attention: str = "sdpa"
) -> LlamaForCausalLM:
    """transformers' Llama over the text weights of `model`, which stay shared."""
    text = model.config.text_config
    config = LlamaConfig(
        vocab_size=text.vocab_size,
        hidden_size=text.hidden_size,
        intermediate_size=text.intermediate_size,
        num_hidden_layers=text.num_hidden_layers,
        num_attention_heads=text.num_attention_heads,
        num_key_value_heads=text.num_key_value_heads,
        rms_norm_eps=text.rms_norm_eps,
        rope_parameters=text.rope_parameters,
        max_position_embeddings=text.max_position_embeddings,
        attn_implementation=attention,
    )
    with torch.device("meta"):
        llama = LlamaForCausalLM(config)
    ours = model.model.language_model
    state = {f"model.{k}": v for k, v in ours.state_dict().items() if "_visual." not in k}
    state["lm_head.weight"] = model.lm_head.weight
    llama.load_state_dict(state, assign=True)
    rotary = llama.model.rotary_emb  # its buffers are made, not loaded
    llama.model.rotary_emb = type(rotary)(config).to(model.device)
    return llama.eval()


def twin(
    model: MonoInternVLForConditionalGeneration, attention: str
) -> MonoInternVLForConditionalGeneration:
    """The same model with another attention; weights stay shared."""
    with torch.device("meta"):
        other = MonoInternVLForConditionalGeneration(copy.deepcopy(model.config))
    other.load_state_dict(model.state_dict(), assign=True)
    other.set_attn_implementation(attention)
    return other.eval()


def make_dense(
    model: MonoInternVLForConditionalGeneration, attention: str
) -> MonoInternVLForConditionalGeneration:
    """The same model, its experts computed the official way; weights stay shared."""
    dense = twin(model, attention)
    register_dense()
    dense.set_experts_implementation(DENSE)
    return dense


@dataclass(frozen=True)
class Prompt:
    """Text, an image of some tiles, text.

    Attributes:
        input_ids: (B, T).
        pixel_values: (tiles, 3, S, S).
    """

    input_ids: Tensor
    pixel_values: Tensor


def prompt_of(
    size: Size, config: MonoInternVLConfig, dtype: torch.dtype, device: torch.device, batch: int = 1
) -> Prompt:
    """The prompt that a size is measured with: random text, random pixels."""
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(
        3, size.vocabulary - 9, (batch, size.text_before + size.text_after), generator=generator
    )
    visual = torch.full((batch, size.visual_tokens), config.image_token_id)
    ids = torch.cat((text[:, : size.text_before], visual, text[:, size.text_before :]), dim=1)
    pixels = torch.randn(batch * size.tiles, 3, size.tile_px, size.tile_px, generator=generator)
    return Prompt(ids.to(device), pixels.to(device, dtype))


@torch.inference_mode()
def last_logits_of_llama(llama: LlamaForCausalLM, input_ids: Tensor) -> Tensor:
    """Prefill with a cache and the logits of the last row, the honest way, (B, V).

    The head gets a 2-D row: `logits_to_keep=1` gives it a 3-D one, for which bf16 on a CPU copies
    the whole head.
    """
    cache = DynamicCache(config=llama.config)
    x = llama.model(input_ids, past_key_values=cache, use_cache=True).last_hidden_state
    logits: Tensor = nn.functional.linear(x[:, -1], llama.lm_head.weight)
    return logits.float()


@torch.inference_mode()
def last_logits_of_ours(
    model: MonoInternVLForConditionalGeneration, prompt: Prompt, has_skip: bool = True
) -> Tensor:
    """Prefill with a cache, patch embedding and placing included; last row's logits (B, V).

    Args:
        model: Ours, or its dense twin.
        prompt: What to read.
        has_skip: Whether the last layer computes only what the last row needs.
    """
    cache = DynamicCache(config=model.config.text_config)
    if has_skip:
        out = model(prompt.input_ids, prompt.pixel_values, past_key_values=cache, logits_to_keep=1)
        return out.logits[:, -1]  # type: ignore[no-any-return]
    x = model.model(prompt.input_ids, prompt.pixel_values, past_key_values=cache).last_hidden_state
    return model.lm_head(x[:, -1]).float()  # type: ignore[no-any-return]


@torch.inference_mode()
def all_logits_of_ours(model: MonoInternVLForConditionalGeneration, prompt: Prompt) -> Tensor:
    """Prefill with the logits of every row, as the official code does it, (B, T, V)."""
    cache = DynamicCache(config=model.config.text_config)
    x = model.model(prompt.input_ids, prompt.pixel_values, past_key_values=cache).last_hidden_state
    return model.lm_head(x.flatten(0, 1)).float()  # type: ignore[no-any-return]


@torch.inference_mode()
def image_features(model: MonoInternVLForConditionalGeneration, prompt: Prompt) -> Tensor:
    """What the decoder gets of the images alone, (tiles, tokens of a tile, width)."""
    return model.get_image_features(prompt.pixel_values)  # type: ignore[no-any-return]
