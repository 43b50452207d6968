"""What a model is made of and what it costs, counted from its configuration without allocating it.

Operations are those that the mathematics owes, two per multiplication and addition of a matrix
product: the convolution of the patches, all linear layers, and the two products of attention over
the positions that a query sees (a causal query number t sees t, in a layer with a sliding window no
more than the window; a patch of the vision tower its whole tile and the class token; images that
attend both ways are counted as causal ones). Every row goes through one expert. The head is counted
for one row, as generation needs it. Not counted: norms, biases, activations, softmax, rotary
angles, embedding look-ups; and nothing is taken off for what an implementation may skip or added
for what it wastes.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, fields

import torch
from torch import nn

from mono_internvl.configuration.model import MonoInternVLConfig, MonoInternVLTextConfig
from mono_internvl.errors import ConfigError
from mono_internvl.model.layers import slides
from mono_internvl.model.modeling import MonoInternVLForConditionalGeneration


@dataclass(frozen=True)
class ParameterGroups:
    """Parameters by part; the parts are disjoint and together the whole model.

    Attributes:
        patch_embedding: Convolution and position embedding of tiles, the unused class row included.
        vision_tower: The modular baseline's layers between patches and projector.
        projector: From merged patches to the decoder's width.
        token_embeddings: One row per token; the head as well where they are tied.
        attention: Shared projections of all layers, with query and key norms.
        text_experts: Feed-forward networks of the text tokens.
        visual_experts: Whatever has a visual copy: feed-forward, projections, norms.
        norms: Shared norms of the layers, and the final one.
        head: Output projection; 0 where it is tied to the embeddings.
    """

    patch_embedding: int = 0
    vision_tower: int = 0
    projector: int = 0
    token_embeddings: int = 0
    attention: int = 0
    text_experts: int = 0
    visual_experts: int = 0
    norms: int = 0
    head: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return sum(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters of a model, in total and as one token meets them.

    Attributes:
        total: All parameters.
        activated_text: What a text token goes through: its decoder with the text experts. The whole
            embedding table and head count, as usual.
        activated_visual: What a visual token goes through: patch embedding, vision tower if there
            is one, and projector instead of the token embedding, and the visual experts in place of
            what they are copies of.
        groups: The same parameters by part.
    """

    total: int
    activated_text: int
    activated_visual: int
    groups: ParameterGroups


@dataclass(frozen=True)
class Flops:
    """Operations by part, two per multiplication and addition.

    Attributes:
        patch_embedding: Convolution of all tiles.
        vision_tower: Layers of the modular baseline's tower over all tiles, attention included.
        projector: Over all visual tokens.
        decoder_linear: Projections and experts of all layers, one expert per row.
        decoder_attention: Scores and weighted values of all layers, causal.
        head: One row of logits.
    """

    patch_embedding: int = 0
    vision_tower: int = 0
    projector: int = 0
    decoder_linear: int = 0
    decoder_attention: int = 0
    head: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return sum(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True)
class Costs:
    """What reading one prompt and going on from it costs.

    Attributes:
        visual_tokens: Of the prompt: of pixels, 28 px each, and learned ones among them.
        text_tokens: Of the prompt, everything that is not an image.
        tiles: That the visual tokens come from, thumbnails included.
        prefill: Reading the prompt, up to the logits of its last row.
        decode: The first generated token read back, up to the next logits.
        weight_bytes: All parameters.
        kv_cache_bytes: Keys and values of the prompt that later tokens see.
        dtype: Of both.
    """

    visual_tokens: int
    text_tokens: int
    tiles: int
    prefill: Flops
    decode: Flops
    weight_bytes: int
    kv_cache_bytes: int
    dtype: str


def skeleton(config: MonoInternVLConfig) -> MonoInternVLForConditionalGeneration:
    """A model without memory: names and shapes of all parameters."""
    with torch.device("meta"):
        return MonoInternVLForConditionalGeneration(copy.deepcopy(config))


def prompt_costs(
    config: MonoInternVLConfig,
    visual_tokens: int,
    text_tokens: int,
    dtype: torch.dtype = torch.bfloat16,
    tiles: int | None = None,
) -> Costs:
    """Operations and bytes of one prompt.

    Args:
        config: Of any size; only its shapes are built.
        visual_tokens: A multiple of what one tile gives, or with learned tokens among them.
        text_tokens: Everything else, `<img>` and `</img>` included.
        dtype: Of weights and cache.
        tiles: That the visual tokens come from; they say it themselves where they are whole tiles.

    Raises:
        ConfigError: The visual tokens are no whole tiles, or there is no token at all.
    """
    per_tile, tokens = config.num_image_tokens_per_tile, visual_tokens + text_tokens
    tiles = tiles_of(config, visual_tokens) if tiles is None else tiles
    if text_tokens < 0 or tokens == 0:
        raise ConfigError(f"text={text_tokens}; expected 0 or more, and a token in all")
    model, text = skeleton(config), config.text_config
    decoder_row = 2 * sum(
        module.weight.numel()
        for name, module in model.model.language_model.layers.named_modules()
        if isinstance(module, nn.Linear) and "_visual" not in name
    )
    # Scores and values, a multiplication and an addition each, for one query and one key.
    pair = 4 * text.num_attention_heads * text.head_dim
    windows = attention_windows(text, tokens + 1)
    head = 2 * text.vocab_size * text.hidden_size
    prefill = Flops(
        **_vision_flops(model, config, tiles),
        projector=2 * _linear_weights(model.model.projector) * tiles * per_tile,
        decoder_linear=decoder_row * tokens,
        decoder_attention=pair * sum(_pairs(tokens, window) for window in windows),
        head=head,
    )
    seen = [min(tokens + 1, window) for window in windows]  # by the token after the prompt
    decode = Flops(decoder_linear=decoder_row, decoder_attention=pair * sum(seen), head=head)
    cached = 2 * text.num_key_value_heads * text.head_dim * sum(count - 1 for count in seen)
    return Costs(
        visual_tokens=visual_tokens,
        text_tokens=text_tokens,
        tiles=tiles,
        prefill=prefill,
        decode=decode,
        weight_bytes=sum(p.numel() for p in model.parameters()) * dtype.itemsize,
        kv_cache_bytes=cached * dtype.itemsize,
        dtype=str(dtype).removeprefix("torch."),
    )


def tiles_of(config: MonoInternVLConfig, visual_tokens: int) -> int:
    """Tiles that give so many visual tokens.

    Raises:
        ConfigError: They are no whole tiles, or learned tokens stand among them.
    """
    per_tile = config.num_image_tokens_per_tile
    if visual_tokens and config.has_image_marks:
        raise ConfigError(
            f"visual={visual_tokens}: with tiling={config.tiling!r} the tokens of an image depend "
            "on its shape; say it, for example image=1344x1008"
        )
    if visual_tokens < 0 or visual_tokens % per_tile:
        raise ConfigError(
            f"visual={visual_tokens}; expected a multiple of {per_tile}, the tokens of one tile"
        )
    return visual_tokens // per_tile


def attention_windows(text: MonoInternVLTextConfig, unlimited: int) -> list[int]:
    """For each layer the most positions that one of its queries sees.

    Args:
        text: Of the decoder.
        unlimited: What stands for a layer without a sliding window.
    """
    window = text.sliding_window
    return [
        window if window is not None and slides(text, layer) else unlimited
        for layer in range(text.num_hidden_layers)
    ]


def _pairs(tokens: int, window: int) -> int:
    """Queries and the positions they see: query number t sees t, the window at most."""
    growing = min(tokens, window)
    return growing * (growing + 1) // 2 + (tokens - growing) * window


def _vision_flops(
    model: MonoInternVLForConditionalGeneration, config: MonoInternVLConfig, tiles: int
) -> dict[str, int]:
    vision = config.vision_config
    patches = (config.force_image_size // vision.patch_size) ** 2
    embedding = 2 * model.model.vision_embedder.patch_embedding.weight.numel() * patches
    tower = 0
    if model.model.vision_tower is not None:
        num_run, rows = vision.layers_until(config.select_layer), patches + 1  # the class token
        linear = 2 * _linear_weights(model.model.vision_tower.layers[:num_run]) * rows
        tower = linear + num_run * 4 * vision.hidden_size * rows**2
    return {"patch_embedding": embedding * tiles, "vision_tower": tower * tiles}


def _linear_weights(module: nn.Module) -> int:
    return sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))


def parameter_table(config: MonoInternVLConfig) -> ParameterCounts:
    """Count the parameters of a configuration.

    Args:
        config: Of any size; only its shapes are built.

    Source: 3,111,355,392 parameters of the released 2B checkpoints, 1.8B of them activated for a
    text token (arXiv 2410.08202, table 2).
    """
    model = skeleton(config)
    counts = dict.fromkeys((field.name for field in fields(ParameterGroups)), 0)
    replaced = 0  # text parameters that a visual token does not meet
    parameters = dict(model.named_parameters())
    for name, p in parameters.items():
        counts[_group_of(name)] += p.numel()
        if "_visual." in name:
            replaced += parameters[name.replace("_visual.", ".")].numel()
    groups = ParameterGroups(**counts)
    decoder = groups.attention + groups.text_experts + groups.norms
    output = groups.head or groups.token_embeddings
    embedding = groups.token_embeddings if groups.head else 0
    return ParameterCounts(
        total=groups.total,
        activated_text=embedding + decoder + output,
        activated_visual=(
            groups.patch_embedding
            + groups.vision_tower
            + groups.projector
            + decoder
            - replaced
            + groups.visual_experts
            + output
        ),
        groups=groups,
    )


def _group_of(name: str) -> str:
    for part, group in (
        ("vision_embedder.", "patch_embedding"),
        ("vision_tower.", "vision_tower"),
        ("projector.", "projector"),
        ("embed_tokens.", "token_embeddings"),
        ("_visual.", "visual_experts"),
        (".mlp.", "text_experts"),
        (".self_attn.", "attention"),
        ("lm_head.", "head"),
    ):
        if part in name:
            return group
    return "norms"
