"""Recomputing changes memory, not numbers."""

import copy
import warnings
from typing import Any

import pytest
import torch

from mono_internvl.bench.models import prompt_of, random_model, size_of
from mono_internvl.errors import RecipeError
from mono_internvl.training.recompute import checkpointing_options, enable_recompute


def _saved_and_gradients(model: Any, batch: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """Bytes that autograd itself keeps for the backward pass, and the gradients."""
    kept: dict[int, int] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = model(**batch, logits_to_keep=None).loss
    loss.backward()
    return sum(kept.values()), {n: p.grad for n, p in model.named_parameters()}


@pytest.mark.parametrize("attention", ["eager", "sdpa", "blocked"])
@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recompute_changes_no_gradient(attention: str, recompute: Any) -> None:
    size, cpu = size_of("tiny"), torch.device("cpu")
    model = random_model(size, "v1", torch.float32, cpu, attention).train()
    prompt = prompt_of(size, model.config, torch.float32, cpu, batch=2)
    labels = prompt.input_ids.clone()
    labels[:, :-3] = -100
    batch = {"input_ids": prompt.input_ids, "pixel_values": prompt.pixel_values, "labels": labels}
    other = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # as a deprecated name would say
        enable_recompute(other, recompute)
    plain, expected = _saved_and_gradients(model, batch)
    less, found = _saved_and_gradients(other, batch)
    assert less < plain
    for name, gradient in expected.items():
        if gradient is None:
            assert found[name] is None, name
        else:
            assert torch.equal(found[name], gradient), name


def test_recompute_unknown_is_refused() -> None:
    with pytest.raises(RecipeError, match="'some'"):
        checkpointing_options("some")  # type: ignore[arg-type]
