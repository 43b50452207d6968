"""Mono-InternVL on vLLM's Transformers backend: visual rows go through the visual experts.

vLLM's runners know where an image's features go in the tokens of a step, whatever the step is made
of: chunks of prompts, prompts whose beginning was found in the cache, generated tokens. They say so
to `embed_input_ids`; it is kept in a buffer until `forward`, which makes a `Routing` of it. Older
runners know no other way; newer ones hand it over themselves (`get_model_state_cls`).

Legend: T tokens of a step, P of them and its padding.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.models.transformers import (
    MultiModalDummyInputsBuilder,
    MultiModalProcessingInfo,
    MultiModalProcessor,
    TransformersMultiModalForCausalLM,
)
from vllm.model_executor.models.transformers.base import Base
from vllm.multimodal import MULTIMODAL_REGISTRY

from mono_internvl.experts import Routing
from mono_internvl.model.layers import Attention
from mono_internvl.released.keys import IN_LAYER, LAYERS, split_wqkv

# vLLM looks for the call of the attention interface in the source of `forward`.
Attention.forward.__wrapped__ = Attention.attend  # type: ignore[attr-defined]


@MULTIMODAL_REGISTRY.register_processor(  # type: ignore[untyped-decorator]
    MultiModalProcessor, info=MultiModalProcessingInfo, dummy_inputs=MultiModalDummyInputsBuilder
)
class MonoInternVLForVllm(TransformersMultiModalForCausalLM):  # type: ignore[misc]
    """The base model in vLLM's hands; `Limits` says with which settings."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        # vLLM has put modules of its own in the experts: only the definition reads no weights.
        self.model.set_experts_implementation("eager")
        most = vllm_config.scheduler_config.max_num_batched_tokens
        self._is_visual = torch.zeros(most, dtype=torch.bool)

    @staticmethod
    def get_model_state_cls() -> type:
        """What hands the routing over in vLLM's second runner."""
        from mono_internvl.serving.plugins.vllm_state import RoutedModelState

        return RoutedModelState

    def _patch_config(self) -> None:
        super()._patch_config()
        rope = self.text_config.rope_parameters
        if rope["rope_type"] == "dynamic":  # not within the trained length, and never by a batch's
            kept = {name: x for name, x in rope.items() if name not in ("factor", "rope_type")}
            self.text_config.rope_parameters = {**kept, "rope_type": "default"}

    def _decorate_for_torch_compile(self) -> None:
        """How many rows are visual is known to the host: the decoder runs eagerly."""

    def embed_input_ids(
        self,
        input_ids: Tensor,
        multimodal_embeddings: Any = None,
        *,
        is_multimodal: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """(T,) ids -> (T, D), features in their places; remembers these places."""
        self._is_visual.zero_()
        if is_multimodal is not None:
            self._is_visual[: len(is_multimodal)] = is_multimodal.to("cpu")
        embedded: Tensor = super().embed_input_ids(
            input_ids, multimodal_embeddings, is_multimodal=is_multimodal, **kwargs
        )
        return embedded

    def take_is_visual(self, rows: int) -> Tensor:
        """(P,) bool, on the host: what was remembered, once; padding is text, as dummy steps are.

        Args:
            rows: P.
        """
        taken = torch.zeros(rows, dtype=torch.bool)
        known = min(rows, len(self._is_visual))
        taken[:known] = self._is_visual[:known]
        self._is_visual.zero_()
        return taken

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        is_visual: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """One step; `is_visual` (P,) bool, on the host, is what was remembered unless given."""
        if is_visual is None:
            is_visual = self.take_is_visual(positions.shape[-1])
        routing = Routing.from_mask(is_visual).to(positions.device)
        return Base.forward(
            self, input_ids, positions, intermediate_tensors, inputs_embeds, routing=routing
        )

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """As the backend does, after the interleaved wqkv was split: it would leave that out."""
        loaded: set[str] = super().load_weights(self._split(weights))
        return loaded

    def _split(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        text = self.text_config
        group = text.num_attention_heads // text.num_key_value_heads
        for name, x in weights:
            module, _, leaf = name.rpartition(".")
            released = ".".join(module.split(".")[-2:])
            own = IN_LAYER.get(released)
            if not isinstance(own, tuple):
                yield name, x
                continue
            layer = module.removesuffix(released).replace(*LAYERS, 1)
            parts = split_wqkv(x, text.num_key_value_heads, group, text.head_dim)
            for path, part in zip(own, parts, strict=True):
                yield f"{layer}{path}.{leaf}", part
