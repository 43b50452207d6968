"""The decoder: shared attention and norms, and in every layer one expert per token.

A fixed router sends visual tokens through a visual expert and text tokens through the language
model's own weights. What has a visual copy (`config.visual_experts`) carries the suffix `_visual`.

Legend: B batch, T tokens, N = B * T rows, D width, H heads, K key-value heads, d head width.

Source: arXiv 2410.08202, section 3.1; numbers as the released code gives them (`tests/parity`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import ModelOutput

from mono_internvl.experts import Routing, check_expert_path, run_fast_path
from mono_internvl.model.blocked_attention import BLOCKED, register_blocked_attention
from mono_internvl.model.configuration import MonoInternVLConfig, MonoInternVLTextConfig
from mono_internvl.model.decoder_knobs import LAYER_TYPES
from mono_internvl.model.image_layout import ImageLayout, check_attention_and_cache
from mono_internvl.model.visual_tokens import PatchEmbedder


@dataclass
class MonoInternVLOutput(ModelOutput):
    """What a forward pass returns.

    Attributes:
        loss: Scalar, fp32; only with labels.
        logits: (B, T', V) fp32, T' the rows that `logits_to_keep` asks for, or None.
        last_hidden_state: (B, T, D), after the final norm (base model only).
        past_key_values: The cache, if one is in use.
        hidden_states: L + 1 tensors (B, T, D): the embeddings, the output of each layer but the
            last, and the final norm of the last one.
        attentions: L tensors (B, H, T, T_kv), with eager attention only.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    last_hidden_state: Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass(frozen=True)
class KeptRows:
    """The rows of the last layer whose output somebody reads; it computes no others.

    Keys and values it computes for all rows: later tokens will read those.

    Attributes:
        rows: Indices into the N rows, int64; its shape is that of the output, without D.
        first_token: Place in the sequence before which no row is kept.
        routing: Of the kept rows.
    """

    rows: Tensor
    first_token: int
    routing: Routing


def route(x: Tensor, routing: Routing, text: nn.Module, visual: nn.Module | None) -> Tensor:
    """Each row through one module only: this is the definition of the visual expert.

    Where rows of both kinds meet, `routing.path` may name a faster way to the same numbers.

    Args:
        x: (N, D) rows.
        routing: Which of them are visual.
        text: The language model's module.
        visual: Its visual copy, or None where all rows share `text`.
    """
    if visual is None or routing.num_visual == 0:
        return text(x)
    if routing.num_text == 0:
        return visual(x)
    y = run_fast_path(x, routing, text, visual)
    if y is not None:
        return y
    assert routing.text_rows is not None and routing.visual_rows is not None
    assert routing.row_order is not None
    y_text = text(x.index_select(0, routing.text_rows))
    y_visual = visual(x.index_select(0, routing.visual_rows))
    return torch.cat((y_text, y_visual)).index_select(0, routing.row_order)


def slides(config: MonoInternVLTextConfig, layer_idx: int) -> bool:
    """Whether a layer looks back on the last `sliding_window` tokens only."""
    return config.sliding_layers is not None and bool(config.sliding_layers[layer_idx])


class RMSNorm(nn.Module):
    """Root-mean-square norm: computed in fp32, cast back, then scaled in the weight's dtype."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        x32 = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * x32.to(x.dtype)


class FeedForward(nn.Module):
    """SwiGLU: the text expert and, as a second instance, the visual expert."""

    def __init__(self, config: MonoInternVLTextConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def rotary_embeddings(
    config: MonoInternVLTextConfig, position_ids: Tensor, kv_length: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the rotary angles, (B, T, d) each; angles in fp32, the result in `dtype`.

    Nothing is cached: with "dynamic" scaling a long call leaves no trace in later short ones.
    Differs: the released code keeps the enlarged table.

    Args:
        config: Its `rope_parameters` and `head_dim` are read.
        position_ids: (B, T), integers or floats.
        kv_length: Tokens seen so far, this call included; decides dynamic scaling.
        dtype: Of the activations.
    """
    rope, d = config.rope_parameters, config.head_dim
    base, factor = rope["rope_theta"], rope.get("factor", 1.0)
    if rope["rope_type"] == "dynamic" and kv_length > config.max_position_embeddings:
        stretch = factor * kv_length / config.max_position_embeddings - (factor - 1)
        base = base * stretch ** (d / (d - 2))
    magnitude = 1.0
    if rope["rope_type"] in ("llama3", "yarn"):
        scaled = ROPE_INIT_FUNCTIONS[rope["rope_type"]]
        frequencies, magnitude = scaled(config, position_ids.device)
    else:
        exponents = torch.arange(0, d, 2, device=position_ids.device, dtype=torch.float32) / d
        frequencies = 1.0 / base**exponents
    positions = position_ids.float()
    if rope["rope_type"] == "linear":
        positions = positions / factor
    angles = positions[:, :, None] * frequencies  # (B, T, d/2)
    angles = torch.cat((angles, angles), dim=-1)
    return (angles.cos() * magnitude).to(dtype), (angles.sin() * magnitude).to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate (B, H, T, d) by the angles of (B, T, d), the two halves of d as one complex pair."""
    x1, x2 = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat((-x2, x1), dim=-1) * sin[:, None]


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Attention in plain matrix products; softmax in fp32. Returns (B, T, H, d) and the weights."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) if groups > 1 else x for x in (key, value))
    scores = query @ key.transpose(2, 3) * scaling  # (B, H, T, T_kv)
    if attention_mask is not None:
        scores = scores + attention_mask[..., : key.shape[-2]]
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, dropout, module.training)
    return (weights @ value).transpose(1, 2), weights


class Attention(nn.Module):
    """Grouped-query attention over all tokens alike; projections may have a visual copy."""

    def __init__(
        self, config: MonoInternVLTextConfig, layer_idx: int, visual_experts: tuple[str, ...]
    ):
        super().__init__()
        self.config, self.layer_idx, self.is_causal = config, layer_idx, True
        self.head_dim = config.head_dim
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.uses_rope = config.no_rope_layers is None or bool(config.no_rope_layers[layer_idx])
        self.sliding_window = config.sliding_window if slides(config, layer_idx) else None
        width, q_width = config.hidden_size, config.num_attention_heads * self.head_dim
        kv_width = config.num_key_value_heads * self.head_dim

        def linears(suffix: str, names: str) -> None:
            shapes = {"q": (width, q_width), "k": (width, kv_width), "v": (width, kv_width)}
            shapes["o"] = (q_width, width)
            for name in names:
                bias = config.o_bias if name == "o" else config.qkv_bias
                setattr(self, f"{name}_proj{suffix}", nn.Linear(*shapes[name], bias=bias))

        linears("", "qkvo")
        linears(
            "_visual",
            ("qkv" if "qkv" in visual_experts else "") + ("o" if "o" in visual_experts else ""),
        )
        self.q_norm = (
            RMSNorm(self.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        )
        self.k_norm = (
            RMSNorm(self.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        )

    def project(self, name: str, x: Tensor, routing: Routing) -> Tensor:
        """Rows (N, ...) through projection `name`, each through its own expert if there is one."""
        return route(x, routing, getattr(self, name), getattr(self, f"{name}_visual", None))

    def forward(
        self,
        x: Tensor,
        routing: Routing,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        past_key_values: Cache | None,
        kept: KeptRows | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Rows (B, T, D) -> (B, T, D), or those of `kept` alone, (R, D)."""
        batch, tokens, _ = x.shape
        rows = x.flatten(0, 1)  # (N, D)

        def heads(name: str, norm: Callable[[Tensor], Tensor]) -> Tensor:
            y = self.project(name, rows, routing).view(batch, tokens, -1, self.head_dim)
            return norm(y).transpose(1, 2)  # (B, H or K, T, d)

        cos, sin = position_embeddings
        q, k = heads("q_proj", self.q_norm), heads("k_proj", self.k_norm)
        if self.uses_rope:
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        v = heads("v_proj", lambda y: y)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        dropout = self.attention_dropout if self.training else 0.0
        first = 0 if kept is None else self._first_query(kept, q, k, attention_mask)
        if first:
            q = q[:, :, first:]
            attention_mask = None if attention_mask is None else attention_mask[:, :, first:]
        if self.sliding_window is not None:  # flash attention has no mask to see it in
            kwargs["sliding_window"] = self.sliding_window
        y, weights = attend(
            self, q, k, v, attention_mask, scaling=self.scaling, dropout=dropout, **kwargs
        )  # (B, T, H, d)
        if kept is None:
            y = self.project("o_proj", y.reshape(batch * tokens, -1), routing)
            return y.view(batch, tokens, -1), weights
        flat = kept.rows.flatten()
        flat = flat - first * (1 + flat // tokens)  # the same rows among those not cut off
        y = y.reshape(batch * (tokens - first), -1).index_select(0, flat)
        return self.project("o_proj", y, kept.routing), weights

    def _first_query(
        self, kept: KeptRows, q: Tensor, k: Tensor, attention_mask: Tensor | None
    ) -> int:
        """The first query that attention must see; 0 where it cannot do with a part of them.

        Without a mask, sdpa takes several queries for the first ones of the keys, and a single one
        sees every key: right if the keys end with it, wrong in a static cache.
        """
        name, last = self.config._attn_implementation, q.shape[2] - 1
        if name == BLOCKED or (name in ("eager", "sdpa") and attention_mask is not None):
            return min(kept.first_token, last)
        is_single = kept.first_token >= last and k.shape[2] == q.shape[2]
        return last if name == "sdpa" and is_single else 0


class DecoderLayer(GradientCheckpointingLayer):
    """Pre-norm block: attention, then one feed-forward expert per token."""

    def __init__(
        self, config: MonoInternVLTextConfig, layer_idx: int, visual_experts: tuple[str, ...]
    ):
        super().__init__()
        width, eps = config.hidden_size, config.rms_norm_eps
        norms, ffn = "norms" in visual_experts, "ffn" in visual_experts
        self.self_attn = Attention(config, layer_idx, visual_experts)
        self.mlp = FeedForward(config)
        self.mlp_visual = FeedForward(config) if ffn else None
        self.input_layernorm = RMSNorm(width, eps)
        self.input_layernorm_visual = RMSNorm(width, eps) if norms else None
        self.post_attention_layernorm = RMSNorm(width, eps)
        self.post_attention_layernorm_visual = RMSNorm(width, eps) if norms else None

    def forward(
        self, x: Tensor, routing: Routing, kept: KeptRows | None = None, **attention: Any
    ) -> tuple[Tensor, Tensor | None]:
        """(B, T, D) -> (B, T, D), or (..., D) of the `kept` rows; attention weights if any."""
        shape: tuple[int, ...] = x.shape
        rows = x.flatten(0, 1)  # (N, D)
        y = route(rows, routing, self.input_layernorm, self.input_layernorm_visual)
        y, weights = self.self_attn(y.view(shape), routing, kept=kept, **attention)
        if kept is not None:
            shape, routing = (*kept.rows.shape, shape[-1]), kept.routing
            rows = rows.index_select(0, kept.rows.flatten())
        rows = rows + y.flatten(0, -2)
        y = route(
            rows, routing, self.post_attention_layernorm, self.post_attention_layernorm_visual
        )
        rows = rows + route(y, routing, self.mlp, self.mlp_visual)
        return rows.view(shape), weights


class MonoInternVLPreTrainedModel(PreTrainedModel):
    """What transformers needs to know to host the model."""

    config_class = MonoInternVLConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ("DecoderLayer",)
    _skip_keys_device_placement = ("past_key_values",)
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    def set_expert_path(self, name: str) -> None:
        """Choose how the experts are computed; a setting of this run, never of the checkpoint.

        Args:
            name: "auto" (the fastest that was measured for the device and the sizes), "eager" (the
                definition), "grouped", "triton" or "dense" (the released code's blend of both
                experts, a yardstick).

        Raises:
            ExpertPathUnavailable: No such path, or its package is missing. A path that cannot run
                on the device, the dtype or the modules (adapters) raises when rows come.
        """
        check_expert_path(name)
        for module in self.modules():
            if isinstance(module, MonoInternVLTextModel):
                module.expert_path = name

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        config = (
            self.config.get_text_config()
            if hasattr(self.config, "get_text_config")
            else self.config
        )
        std = config.initializer_range
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.normal_(module.weight, std=std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=std)
            if module.padding_idx is not None:
                module.weight[module.padding_idx].zero_()
        elif isinstance(module, RMSNorm | nn.LayerNorm):
            nn.init.ones_(module.weight)
            if isinstance(module, nn.LayerNorm):
                nn.init.zeros_(module.bias)
        elif isinstance(module, PatchEmbedder):
            nn.init.normal_(module.class_embedding, std=std)
            nn.init.normal_(module.position_embedding, std=std)


class MonoInternVLTextModel(MonoInternVLPreTrainedModel):
    """The decoder: token embeddings, layers, final norm."""

    config_class = MonoInternVLTextConfig

    def __init__(self, config: MonoInternVLTextConfig, visual_experts: tuple[str, ...] = ()):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(
            DecoderLayer(config, i, visual_experts) for i in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.expert_path = "auto"
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        routing: Routing | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        rows_to_keep: Tensor | None = None,
        first_token_to_keep: int = 0,
        image_layout: ImageLayout | None = None,
        **kwargs: Any,
    ) -> MonoInternVLOutput:
        """Run the decoder over embedded tokens; without `routing` every row is text.

        Args:
            input_ids: (B, T), or pass `inputs_embeds` (B, T, D).
            routing: Which rows are visual.
            attention_mask: (B, T_kv) with 0 at padding, or a prepared 4D mask.
            position_ids: (B, T), integers or floats; counted on from the cache unless given.
            past_key_values: Cache to read and extend.
            output_hidden_states: Keep the output of every layer, whole.
            output_attentions: Keep the attention weights of every layer, whole.
            rows_to_keep: Rows of the B * T whose last hidden state is asked for; the result has
                its shape, (..., D), and the last layer computes what these rows need. Not with
                `output_hidden_states` or `output_attentions`.
            first_token_to_keep: Place in the sequence before which none of them stands.
            image_layout: What images mean for attention and positions; nothing unless given.
        """
        layout = image_layout if image_layout is not None else ImageLayout()
        check_attention_and_cache(self.config._attn_implementation, past_key_values)
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        batch, tokens, _ = x.shape
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        seen = past_key_values.get_seq_length() if past_key_values is not None else 0
        # Given integers that start anew mark packed segments; fractions mark nothing. Positions
        # that are counted here need no look, for which the host would wait.
        is_marking = position_ids is not None and not position_ids.is_floating_point()
        segments = position_ids if is_marking else None
        if position_ids is None:
            position_ids = (torch.arange(tokens, device=x.device) + seen).expand(batch, -1)
        seen_by = {
            "config": self.config,
            "inputs_embeds": x,
            "attention_mask": attention_mask,
            "past_key_values": past_key_values,
            "position_ids": segments,
            "block_sequence_ids": layout.image_numbers,
        }
        windows = [slides(self.config, i) for i in range(len(self.layers))]
        if isinstance(attention_mask, dict):  # made by `generate`, for layers of several kinds
            mask, near = (attention_mask.get(kind) for kind in LAYER_TYPES)
        else:
            mask = create_causal_mask(**seen_by) if not all(windows) else None
            near = create_sliding_window_causal_mask(**seen_by) if any(windows) else None
        if "flash" in (self.config._attn_implementation or "") and past_key_values is None:
            kwargs["position_ids"] = position_ids  # it has no mask to see packed segments in
        positions, length = position_ids, seen + tokens
        if layout.positions is not None:
            positions, length = layout.positions, layout.length(length)
        angles = rotary_embeddings(self.config, positions, length, x.dtype)
        routing = routing if routing is not None else Routing.all_text(batch * tokens)
        routing = routing.by(self.expert_path)

        # Kept only if asked for: a long prefill would otherwise hold every layer's activations.
        hidden_states: list[Tensor] = [x] if output_hidden_states else []
        attentions: list[Tensor | None] = []
        kept = None
        if rows_to_keep is not None:
            kept_routing = routing.select(rows_to_keep.flatten())
            kept = KeptRows(rows_to_keep, first_token_to_keep, kept_routing)
        last = len(self.layers) - 1
        for number, layer in enumerate(self.layers):
            x, weights = layer(
                x,
                routing,
                kept if number == last else None,
                position_embeddings=angles,
                attention_mask=near if windows[number] else mask,
                past_key_values=past_key_values,
                **kwargs,
            )
            if output_hidden_states:
                hidden_states.append(x)
            if output_attentions:
                attentions.append(weights)
            del weights
        x = self.norm(x)
        return MonoInternVLOutput(
            last_hidden_state=x,
            past_key_values=past_key_values,
            hidden_states=(*hidden_states[:-1], x) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,  # type: ignore[arg-type]
        )


register_blocked_attention()
