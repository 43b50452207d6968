"""One decoder layer: shared attention and norms, one expert per token.

A fixed router sends visual tokens through a visual expert and text tokens through the language
model's own weights. What has a visual copy (`config.visual_experts`) carries the suffix `_visual`.

Legend: B batch, T tokens, N = B * T rows, D width, H heads, K key-value heads, d head width.

Source: arXiv 2410.08202, section 3.1; numbers as the released code gives them (`tests/parity`).
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mono_internvl.attention.blocked import BLOCKED
from mono_internvl.configuration.model import MonoInternVLTextConfig
from mono_internvl.configuration.text_fields import is_scaled_dynamically
from mono_internvl.experts import Routing, run_implementation


@dataclass(frozen=True)
class KeptRows:
    """The rows of the last layer whose output somebody reads; it computes no others.

    Keys and values it computes for all rows: later tokens will read those.

    Attributes:
        rows: Indices into the N rows, int64; its shape is that of the output, without D. With two
            dimensions, (B, T'), they are the last T' rows of every sequence.
        first_token: Place in the sequence before which no row is kept.
        routing: Of the kept rows.
    """

    rows: Tensor
    first_token: int
    routing: Routing


def route(x: Tensor, routing: Routing, text: nn.Module, visual: nn.Module | None) -> Tensor:
    """Each row through one module only: this is the definition of the visual expert.

    Where rows of both kinds meet, `routing.implementation` may name a faster way to the same
    numbers; norms, which cost next to nothing, have none.

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
    if not isinstance(text, RMSNorm):
        y = run_implementation(x, routing, text, visual)
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
    if is_scaled_dynamically(config, kv_length):
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

        def heads(y: Tensor, norm: nn.Module) -> Tensor:
            y = y.view(batch, y.shape[0] // batch, -1, self.head_dim)
            return norm(y).transpose(1, 2)  # (B, H or K, T, d)

        cos, sin = position_embeddings
        k = heads(self.project("k_proj", rows, routing), self.k_norm)
        if self.uses_rope:
            k = rotate(k, cos, sin)
        v = self.project("v_proj", rows, routing)
        v = v.view(batch, tokens, -1, self.head_dim).transpose(1, 2)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        dropout = self.attention_dropout if self.training else 0.0
        first = 0 if kept is None else self._first_query(kept, tokens, k, attention_mask)
        q = heads(self._query_rows(x, first, routing, kept), self.q_norm)
        if self.uses_rope:
            q = rotate(q, cos[:, first:], sin[:, first:])
        if first and attention_mask is not None:
            attention_mask = attention_mask[:, :, first:]
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

    def _query_rows(self, x: Tensor, first: int, routing: Routing, kept: KeptRows | None) -> Tensor:
        """Queries of the tokens from `first` on, in rows.

        Where queries have a visual copy, the routing of these rows is at hand only if they are the
        kept ones; otherwise all rows are projected, and those before `first` dropped.
        """
        is_one_kind = not hasattr(self, "q_proj_visual")
        if first and kept is not None and (is_one_kind or kept.rows.dim() == 2):
            return self.project("q_proj", x[:, first:].flatten(0, 1), kept.routing)
        q = self.project("q_proj", x.flatten(0, 1), routing)
        return q.view(*x.shape[:2], -1)[:, first:].flatten(0, 1)

    def _first_query(
        self, kept: KeptRows, tokens: int, k: Tensor, attention_mask: Tensor | None
    ) -> int:
        """The first query that attention must see; 0 where it cannot do with a part of them.

        Without a mask, sdpa takes several queries for the first ones of the keys, and a single one
        sees every key: right if the keys end with it, wrong in a static cache.
        """
        name, last = self.config._attn_implementation, tokens - 1
        if name == BLOCKED or (name in ("eager", "sdpa") and attention_mask is not None):
            return min(kept.first_token, last)
        is_single = kept.first_token >= last and k.shape[2] == tokens
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
