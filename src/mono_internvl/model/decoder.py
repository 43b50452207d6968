"""The decoder: token embeddings, a stack of layers (`layers`), the final norm.

Masks, positions and routing are made here, once per forward, and handed to every layer.

Legend: B batch, T tokens, D width, H heads, L layers, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import (
    create_causal_mask,
    create_sliding_window_causal_mask,
    packed_sequence_mask_function,
)
from transformers.utils import ModelOutput

from mono_internvl.attention.blocked import register_blocked_attention
from mono_internvl.attention.image_layout import ImageLayout, check_attention_and_cache
from mono_internvl.attention.packing import packed_segments
from mono_internvl.configuration.model import MonoInternVLConfig, MonoInternVLTextConfig
from mono_internvl.configuration.text_fields import LAYER_TYPES
from mono_internvl.errors import PromptError
from mono_internvl.experts import KeptRows, Routing, check_implementation
from mono_internvl.experts.registry import AUTO
from mono_internvl.model.last_layer import LastLayer
from mono_internvl.model.layers import DecoderLayer, RMSNorm, rotary_embeddings, slides
from mono_internvl.model.visual_tokens import ImageMarks, PatchEmbedder
from mono_internvl.released.whole import WholeCheckpointModel


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
        label_losses: (R,) fp32, the cross-entropy of every label in order; only where asked for.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    last_hidden_state: Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    label_losses: Tensor | None = None


class MonoInternVLPreTrainedModel(WholeCheckpointModel):
    """What transformers needs to know to host the model."""

    config_class = MonoInternVLConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules: tuple[str, ...] = ("DecoderLayer", "LastLayer")
    _skip_keys_device_placement = ("past_key_values",)
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a checkpoint, see `WholeCheckpointModel`.

        `experts_implementation` is as in `set_experts_implementation`.

        Raises:
            ExpertsUnavailable: There is no implementation of that name.
        """
        implementation = kwargs.pop("experts_implementation", AUTO)
        check_implementation(implementation)
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.set_experts_implementation(implementation)
        return loaded

    def set_experts_implementation(self, experts_implementation: str) -> None:
        """Choose how the experts are computed; a setting of this run, never of the checkpoint.

        Args:
            experts_implementation: "auto" (the fastest that was measured for the device), "eager"
                (the definition) or another registered name (`experts/registry.py`).

        Raises:
            ExpertsUnavailable: There is none of this name, or its package is missing. One that
                cannot run on the device, the dtype or the modules (adapters) raises when rows come.
        """
        check_implementation(experts_implementation)
        for module in self.modules():
            if isinstance(module, MonoInternVLTextModel):
                module.experts_implementation = experts_implementation

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
        elif isinstance(module, ImageMarks):
            nn.init.normal_(module.newline, std=std)
            nn.init.normal_(module.separator, std=std)
        elif isinstance(module, PatchEmbedder):
            nn.init.normal_(module.class_embedding, std=std)
            nn.init.normal_(module.position_embedding, std=std)


class MonoInternVLTextModel(MonoInternVLPreTrainedModel):
    """The decoder: token embeddings, layers, final norm."""

    config_class = MonoInternVLTextConfig

    def __init__(self, config: MonoInternVLTextConfig, visual_experts: tuple[str, ...] = ()):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        last = config.num_hidden_layers - 1
        self.layers = nn.ModuleList(
            (LastLayer if i == last else DecoderLayer)(config, i, visual_experts)
            for i in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.experts_implementation = AUTO
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
        rows_to_keep: Tensor | KeptRows | None = None,
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
                its shape, (..., D), see `last_layer`. Not with `output_hidden_states`. As
                `KeptRows` they bring a routing, for which nothing waits.
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
        packed = None
        if segments is not None and not isinstance(attention_mask, dict):
            packed = self._packed(segments, attention_mask, past_key_values, seen)
        seen_by = {
            "config": self.config,
            "inputs_embeds": x,
            "attention_mask": attention_mask,
            "past_key_values": past_key_values,
            "position_ids": segments,
            "block_sequence_ids": layout.image_numbers,
            "and_mask_function": None if packed is None else packed_sequence_mask_function(packed),
        }
        windows = [slides(self.config, i) for i in range(len(self.layers))]
        if isinstance(attention_mask, dict):  # made by `generate`, for layers of several kinds
            mask, near = (attention_mask.get(kind) for kind in LAYER_TYPES)
        else:
            mask = create_causal_mask(**seen_by) if not all(windows) else None
            near = create_sliding_window_causal_mask(**seen_by) if any(windows) else None
        if "flash" in (self.config._attn_implementation or "") and past_key_values is None:
            kwargs["position_ids"] = position_ids  # it has no mask to see packed segments in
        positions, length = position_ids, self._length(seen, tokens, past_key_values)
        if layout.positions is not None:
            positions, length = layout.positions, layout.length(length)
        angles = rotary_embeddings(self.config, positions, length, x.dtype)
        routing = routing if routing is not None else Routing.all_text(batch * tokens)
        routing = routing.by(self.experts_implementation)

        # Kept only if asked for: a long prefill would otherwise hold every layer's activations.
        hidden_states: list[Tensor] = [x] if output_hidden_states else []
        attentions: list[Tensor | None] = []
        of_last = {}
        if isinstance(rows_to_keep, Tensor):
            of_last["kept"] = KeptRows(rows_to_keep, routing.select(rows_to_keep.flatten()))
        elif rows_to_keep is not None:
            of_last["kept"] = rows_to_keep.by(self.experts_implementation)
        for index, layer in enumerate(self.layers):
            x, weights = layer(
                x,
                routing,
                **(of_last if layer is self.layers[-1] else {}),
                position_embeddings=angles,
                attention_mask=near if windows[index] else mask,
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

    def _packed(
        self, segments: Tensor, mask: Tensor | None, cache: Cache | None, seen: int | Tensor
    ) -> Tensor | None:
        """(B, T) numbers of packed segments, where transformers would not see them by itself.

        Raises:
            PromptError: With flash attention, which sees them in positions or padding in a mask.
        """
        if mask is None and cache is None:
            return None
        if cache is not None and (cache.is_compileable or seen):
            return None  # a later turn, or a cache with room for more than these tokens
        if mask is not None and (mask.dim() != 2 or mask.shape[1] != segments.shape[1]):
            return None
        packed = packed_segments(segments, mask)
        if packed is not None and "flash" in (self.config._attn_implementation or ""):
            raise PromptError(
                "position_ids start anew within a row, beside an attention_mask or a cache: flash "
                "attention sees packed segments in position_ids alone; leave the mask and the "
                "cache out, or use attn_implementation='sdpa'"
            )
        return packed

    def _length(self, seen: int | Tensor, tokens: int, cache: Cache | None) -> int:
        """Tokens seen, this call included, for dynamic rotary scaling.

        A static cache counts on the device, and reading its count waits. Where it has no room
        beyond the trained length nothing is ever scaled, and its room says as much.
        """
        if isinstance(seen, Tensor) and cache is not None and self.config.sliding_layers is None:
            room = max(getattr(layer, "max_cache_len", 0) for layer in cache.layers)
            if tokens <= room <= self.config.max_position_embeddings:
                return int(room)
        return seen + tokens  # type: ignore[return-value]  # a tensor is read where it is needed


register_blocked_attention()
