"""The vision tower of the modular baseline: InternViT, 300M or 6B, between patches and projector.

It reads what the patch embedder gives, class token included, tile by tile; attention is over all
patches of one tile. Parts are named as in the released files.

Own and not transformers' `InternVLVisionModel`: that one has no stochastic depth, fixes the epsilon
of the query and key norms, and would bring a second patch embedding with other names; the tower
that remains is shorter than the translation would be.

Legend: B tiles, P patches with the class token, C width, H heads, d head width.

Source: OpenGVLab/Mono-InternVL at 5b17ab4, vision model of InternVL-1.5 (arXiv 2404.16821); numbers
as that code gives them (`tests/parity`, `vit_300m` and `vit_6b`).
"""

from functools import partial

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mono_internvl.configuration.vision import MonoInternVLVisionConfig
from mono_internvl.model.decoder import MonoInternVLPreTrainedModel
from mono_internvl.model.layers import RMSNorm, eager_attention_forward


def drop_path(x: Tensor, rate: float) -> Tensor:
    """Stochastic depth: zero a residual branch for whole tiles, scale it up for the others.

    Args:
        x: (B, P, C), the output of a branch.
        rate: Share of tiles that lose it; the expectation stays x.
    """
    if rate == 0.0:
        return x
    kept = torch.rand(x.shape[0], 1, 1, device=x.device) >= rate
    return x * (kept / (1 - rate)).to(x.dtype)


class VisionAttention(nn.Module):
    """Multi-head attention over all patches of a tile; no mask, no positions."""

    def __init__(self, config: MonoInternVLVisionConfig):
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_eps
        self.config, self.is_causal = config, False
        self.head_dim = width // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.qkv = nn.Linear(width, 3 * width, bias=config.qkv_bias)
        self.proj = nn.Linear(width, width)
        # Over the full width, all heads together.
        self.q_norm = RMSNorm(width, eps) if config.qk_normalization else nn.Identity()
        self.k_norm = RMSNorm(width, eps) if config.qk_normalization else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)  # (B, P, C) each
        q, k, v = (
            y.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, H, P, d)
            for y in (self.q_norm(q), self.k_norm(k), v)
        )
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        y, _ = attend(self, q, k, v, None, scaling=self.scaling)  # (B, P, H, d)
        return self.proj(y.flatten(2))


class VisionFeedForward(nn.Module):
    """Two linear layers with a GELU (erf) between them."""

    def __init__(self, config: MonoInternVLVisionConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act_fn(self.fc1(x)))


class VisionLayer(GradientCheckpointingLayer):
    """Pre-norm block; each branch is scaled per channel and may be dropped in training."""

    def __init__(self, config: MonoInternVLVisionConfig, drop_path_rate: float):
        super().__init__()
        width = config.hidden_size
        norm = nn.LayerNorm if config.norm_type == "layer_norm" else RMSNorm
        make_norm = partial(norm, width, eps=config.layer_norm_eps)
        self.norm1, self.attn = make_norm(), VisionAttention(config)
        self.norm2, self.mlp = make_norm(), VisionFeedForward(config)
        self.ls1, self.ls2 = (nn.Parameter(torch.empty(width)) for _ in range(2))
        self.drop_path_rate = drop_path_rate

    def forward(self, x: Tensor) -> Tensor:
        rate = self.drop_path_rate if self.training else 0.0
        x = x + drop_path(self.ls1 * self.attn(self.norm1(x)), rate)
        return x + drop_path(self.ls2 * self.mlp(self.norm2(x)), rate)


class VisionTower(MonoInternVLPreTrainedModel):
    """The layers of InternViT; no final norm."""

    config_class = MonoInternVLVisionConfig
    main_input_name = "x"
    _no_split_modules = ("VisionLayer",)

    def __init__(self, config: MonoInternVLVisionConfig):
        super().__init__(config)
        last = max(config.num_hidden_layers - 1, 1)
        self.layers = nn.ModuleList(
            VisionLayer(config, config.drop_path_rate * i / last)
            for i in range(config.num_hidden_layers)
        )
        self.gradient_checkpointing = False
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, VisionLayer):
            for scale in (module.ls1, module.ls2):
                nn.init.constant_(scale, self.config.initializer_factor)

    def forward(self, x: Tensor, select_layer: int = -1) -> Tensor:
        """Run the layers up to the hidden state that is asked for; those behind it cost nothing.

        Args:
            x: (B, P, C), embedded patches behind a class token.
            select_layer: Index into [embeddings, output of layer 1, ..., output of the last].

        Returns:
            (B, P, C).
        """
        for layer in self.layers[: self.config.layers_until(select_layer)]:
            x = layer(x)
        return x
