"""What is compared computes the same thing."""

from typing import Any

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mono_internvl.attention.blocked import BLOCKED, blocked_attention_forward
from mono_internvl.bench.models import (
    last_logits_of_llama,
    last_logits_of_ours,
    make_dense,
    plain_llama,
    prompt_of,
    random_model,
    size_of,
)

CPU = torch.device("cpu")


@pytest.mark.parametrize("attention", ["sdpa", BLOCKED])
@torch.inference_mode()
def test_llama_computes_what_ours_does_on_text(
    attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[None] = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        return blocked_attention_forward(*args, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, BLOCKED, counted)
    size = size_of("tiny")
    ours = random_model(size, "v1", torch.float32, CPU, "sdpa")
    ids = prompt_of(size, ours.config, torch.float32, CPU).input_ids[:, :3]
    theirs = last_logits_of_llama(plain_llama(ours, attention), ids)
    assert len(calls) == (size.layers if attention == BLOCKED else 0)
    assert torch.allclose(ours(ids).logits[:, -1], theirs, atol=1e-5)


def test_dense_computes_what_ours_does() -> None:
    size = size_of("tiny")
    ours = random_model(size, "v1", torch.float32, CPU, "sdpa")
    prompt = prompt_of(size, ours.config, torch.float32, CPU)
    dense = make_dense(ours, "eager")
    assert torch.allclose(
        last_logits_of_ours(dense, prompt, has_skip=False),
        last_logits_of_ours(ours, prompt),
        atol=1e-5,
    )
    weight = "model.language_model.layers.0.mlp_visual.up_proj.weight"
    assert dense.get_parameter(weight).data_ptr() == ours.get_parameter(weight).data_ptr()
