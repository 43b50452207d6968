"""One decoder layer: shared attention and norms, one expert per token.

A fixed router sends visual tokens through a visual expert and text tokens through the language
model's own weights. What has a visual copy (`config.visual_experts`) carries the suffix `_visual`.

Legend: B batch, T tokens, N = B * T rows, D width, H heads, K key-value heads, d head width.

Source: arXiv 2410.08202, section 3.1; numbers as the released code gives them (`tests/parity`).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mono_internvl.configuration.model import MonoInternVLTextConfig
from mono_internvl.configuration.text_fields import is_scaled_dynamically
from mono_internvl.experts import Routing, run_implementation


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
    rope, d, device = config.rope_parameters, config.head_dim, position_ids.device
    kind, is_scaled = rope["rope_type"], is_scaled_dynamically(config, kv_length)
    if kind in ("llama3", "yarn") or is_scaled:
        seq_len = int(kv_length) if is_scaled else None
        frequencies, magnitude = ROPE_INIT_FUNCTIONS[kind](config, device, seq_len=seq_len)
    else:
        turned = int(d * rope.get("partial_rotary_factor", 1.0))
        exponents = torch.arange(0, turned, 2, device=device, dtype=torch.float32) / turned
        frequencies, magnitude = 1.0 / rope["rope_theta"] ** exponents, 1.0  # (d/2,)
        if turned < d:  # a frequency of zero turns nothing
            frequencies = F.pad(frequencies, (0, d // 2 - len(frequencies)))
    positions = position_ids.float()
    if kind == "linear":
        positions = positions / rope["factor"]
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

        has_qkv, has_o = "qkv" in visual_experts, "o" in visual_experts
        self.q_proj = nn.Linear(width, q_width, bias=config.qkv_bias)
        self.k_proj = nn.Linear(width, kv_width, bias=config.qkv_bias)
        self.v_proj = nn.Linear(width, kv_width, bias=config.qkv_bias)
        self.o_proj = nn.Linear(q_width, width, bias=config.o_bias)
        self.q_proj_visual = nn.Linear(width, q_width, bias=config.qkv_bias) if has_qkv else None
        self.k_proj_visual = nn.Linear(width, kv_width, bias=config.qkv_bias) if has_qkv else None
        self.v_proj_visual = nn.Linear(width, kv_width, bias=config.qkv_bias) if has_qkv else None
        self.o_proj_visual = nn.Linear(q_width, width, bias=config.o_bias) if has_o else None
        eps = config.rms_norm_eps
        self.q_norm = RMSNorm(self.head_dim, eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(self.head_dim, eps) if config.qk_norm else nn.Identity()

    def forward(
        self, x: Tensor, routing: Routing, **attention: Any
    ) -> tuple[Tensor, Tensor | None]:
        """(B, T, D) -> (B, T, D), and the weights (B, H, T, T_kv) if any; see `attend`."""
        y, weights = self.attend(x, routing, **attention)
        return self.project_output(y, routing).view(x.shape), weights

    def attend(
        self,
        x: Tensor,
        routing: Routing,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        past_key_values: Cache | None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """(B, T, D) -> what all heads read, (N, H * d); attention weights if any."""
        batch, tokens, _ = x.shape
        rows = x.flatten(0, 1)  # (N, D)
        k = route(rows, routing, self.k_proj, self.k_proj_visual)  # (N, K * d)
        v = route(rows, routing, self.v_proj, self.v_proj_visual)  # (N, K * d)
        q = route(rows, routing, self.q_proj, self.q_proj_visual)  # (N, H * d)
        q, k, v = (y.view(batch, tokens, -1, self.head_dim) for y in (q, k, v))
        q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))  # (B, H or K, T, d)
        if self.uses_rope:
            cos, sin = position_embeddings
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)  # (B, K, T_kv, d)
        if self.sliding_window is not None:  # flash attention has no mask to see it in
            kwargs["sliding_window"] = self.sliding_window
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        dropout = self.attention_dropout if self.training else 0.0
        y, weights = attention(
            self, q, k, v, attention_mask, scaling=self.scaling, dropout=dropout, **kwargs
        )  # (B, T, H, d)
        return y.reshape(batch * tokens, -1), weights

    def project_output(self, y: Tensor, routing: Routing) -> Tensor:
        """Rows (N, H * d) -> (N, D)."""
        return route(y, routing, self.o_proj, self.o_proj_visual)


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
        self, x: Tensor, routing: Routing, **attention: Any
    ) -> tuple[Tensor, Tensor | None]:
        """(B, T, D) -> (B, T, D), and attention weights if any."""
        rows = x.flatten(0, 1)  # (N, D)
        y = route(rows, routing, self.input_layernorm, self.input_layernorm_visual)
        y, weights = self.self_attn(y.view(x.shape), routing, **attention)
        rows = rows + y.flatten(0, 1)
        return self.feed_forward(rows, routing).view(x.shape), weights

    def feed_forward(self, rows: Tensor, routing: Routing) -> Tensor:
        """Rows (N, D) -> (N, D): norm, one expert per row, residual."""
        norm, norm_visual = self.post_attention_layernorm, self.post_attention_layernorm_visual
        y = route(rows, routing, norm, norm_visual)
        return rows + route(y, routing, self.mlp, self.mlp_visual)
