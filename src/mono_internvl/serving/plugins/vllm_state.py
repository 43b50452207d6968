"""The routing of a step as an input of its own, for vLLM's second model runner."""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.worker.gpu.model_states.default import DefaultModelState


class RoutedModelState(DefaultModelState):  # type: ignore[misc]
    """As the default, with `is_visual` among the inputs; dummy steps are all text."""

    def prepare_inputs(self, input_batch: Any, req_states: Any) -> dict[str, Any]:
        """Called after the tokens of the step were embedded."""
        inputs = super().prepare_inputs(input_batch, req_states)
        rows = input_batch.num_tokens_after_padding
        return {**inputs, "is_visual": self.model.take_is_visual(rows)}

    def prepare_dummy_inputs(self, num_reqs: int, num_tokens: int) -> dict[str, Any]:
        """For profiling."""
        inputs = super().prepare_dummy_inputs(num_reqs, num_tokens)
        return {**inputs, "is_visual": torch.zeros(num_tokens, dtype=torch.bool)}
