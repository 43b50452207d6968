"""What nobody reads is not computed: same numbers, fewer rows in the last layer."""

from typing import Any

import pytest
import torch
from tiny_models import (
    ALL_EXPERTS,
    image_ids,
    text_ids,
    tile_pixels,
    tiny_model,
)
from torch import Tensor
from torch.nn import functional as F

from mono_internvl.experts import Routing, labelled_rows
from mono_internvl.model.last_layer import rows_read
from mono_internvl.model.modeling import MonoInternVLForConditionalGeneration

ATTENTION = pytest.mark.parametrize("attention", ["eager", "sdpa", "blocked"])
EXPERTS = pytest.mark.parametrize("experts", [("ffn",), ALL_EXPERTS], ids=["ffn", "all"])
Model = MonoInternVLForConditionalGeneration


def _prompt() -> dict[str, Tensor]:
    """An image of two tiles in the middle; it also stands near the end."""
    ids = torch.cat((text_ids(5, 1), image_ids(2), text_ids(3, 2), image_ids(1)), dim=1)
    return {"input_ids": ids, "pixel_values": tile_pixels(3)}


def _batch() -> dict[str, Tensor]:
    """Right-padded: text and image, labels from other places in each row; text alone."""
    first = torch.cat((text_ids(2, 1), image_ids(2), text_ids(7, 2)), dim=1)
    second = text_ids(12, 3)
    pad = first.shape[1] - second.shape[1]
    ids = torch.cat((first, F.pad(second, (0, pad), value=2)))
    labels = torch.full_like(ids, -100)
    labels[0, 13:] = ids[0, 13:]
    labels[1, 4:9] = ids[1, 4:9]
    labels[0, 15] = -100
    mask = torch.ones_like(ids)
    mask[1, 12:] = 0
    weight = torch.rand(ids.shape, generator=torch.Generator().manual_seed(0))
    return {
        "input_ids": ids,
        "pixel_values": tile_pixels(2),
        "labels": labels,
        "attention_mask": mask,
        "loss_weight": weight,
    }


def _count_rows(model: Model) -> dict[str, int]:
    """Rows that the experts of each layer see, counted while the model runs."""
    rows: dict[str, int] = {}
    for name, module in model.named_modules():
        if name.endswith((".mlp", ".mlp_visual", ".o_proj", ".o_proj_visual")):

            def hook(_: Any, args: tuple[Tensor, ...], out: Tensor, name: str = name) -> None:
                part = name.removeprefix("model.language_model.").removesuffix("_visual")
                rows[part] = rows.get(part, 0) + args[0].shape[0]

            module.register_forward_hook(hook)
    return rows


@ATTENTION
@EXPERTS
@pytest.mark.parametrize("keep", [1, 3, 9])
@torch.no_grad()
def test_kept_rows_have_the_logits_of_all(
    attention: str, experts: tuple[str, ...], keep: int
) -> None:
    model, prompt = tiny_model(experts, attention), _prompt()
    full = model(**prompt).logits
    rows = _count_rows(model)
    kept = model(**prompt, logits_to_keep=keep).logits
    assert kept.shape == (1, keep, full.shape[-1])
    torch.testing.assert_close(kept, full[:, -keep:], atol=1e-5, rtol=0)
    num_rows = prompt["input_ids"].shape[1]
    assert rows == {
        "layers.0.self_attn.o_proj": num_rows,
        "layers.0.mlp": num_rows,
        "layers.1.self_attn.o_proj": keep,
        "layers.1.mlp": keep,
    }


@ATTENTION
@torch.no_grad()
def test_kept_rows_of_padded_batch_and_cache_equal_all(attention: str) -> None:
    model, batch = tiny_model(ALL_EXPERTS, attention), _batch()
    inputs = {name: batch[name].flip(1) for name in ("input_ids", "attention_mask")}
    inputs["pixel_values"] = batch["pixel_values"]  # flipped: padded on the left
    full = model(**inputs, use_cache=True)
    kept = model(**inputs, use_cache=True, logits_to_keep=2)
    torch.testing.assert_close(kept.logits, full.logits[:, -2:], atol=1e-5, rtol=0)
    for ours, theirs in zip(kept.past_key_values.layers, full.past_key_values.layers, strict=True):
        assert torch.equal(ours.keys, theirs.keys) and torch.equal(ours.values, theirs.values)


@ATTENTION
@EXPERTS
def test_training_computes_labelled_rows_only(attention: str, experts: tuple[str, ...]) -> None:
    model, batch = tiny_model(experts, attention).train(), _batch()
    model(**batch, logits_to_keep=0).loss.backward()
    everything = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    rows = _count_rows(model)
    loss = model(**batch, logits_to_keep=None).loss
    loss.backward()
    assert rows["layers.1.mlp"] == rows["layers.1.self_attn.o_proj"] == 10
    assert rows["layers.0.mlp"] == batch["input_ids"].numel()
    for name, p in model.named_parameters():
        expected = everything[name]
        if p.grad is None:  # only visual rows reach it, and in the last layer none is read
            assert expected is None or not expected.any(), name
        else:
            torch.testing.assert_close(p.grad, expected, atol=1e-6, rtol=1e-4)


def test_training_loss_equals_loss_over_all_logits() -> None:
    model, batch = tiny_model(), _batch()
    whole = model(**batch, logits_to_keep=0).loss
    torch.testing.assert_close(model(**batch, logits_to_keep=None).loss, whole)


def test_training_without_labels_has_zero_gradients() -> None:
    model, batch = tiny_model().train(), _batch()
    batch["labels"].fill_(-100)
    loss = model(**batch, logits_to_keep=None).loss
    assert loss.item() == 0
    loss.backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_frozen_parameters_get_no_gradient_buffer() -> None:
    model, batch = tiny_model().train(), _batch()
    for name, p in model.named_parameters():
        p.requires_grad_("_visual." in name)
    model(**batch, logits_to_keep=None).loss.backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == {
        n for n, _ in model.named_parameters() if "layers.0." in n and "_visual." in n
    }


@torch.no_grad()
def test_asked_states_and_weights_turn_the_skip_off() -> None:
    model, prompt = tiny_model(), _prompt()
    states = model(**prompt, logits_to_keep=1, output_hidden_states=True).hidden_states
    num_rows = prompt["input_ids"].shape[1]
    assert [h.shape[1] for h in states] == [num_rows] * 3
    weights = model(**prompt, logits_to_keep=1, output_attentions=True).attentions
    assert [w.shape[2] for w in weights] == [num_rows] * 2


def test_labelled_rows_are_one_before_their_label() -> None:
    labels = torch.tensor([[5, -100, 7, -100], [-100, -100, -100, 9]])
    assert labelled_rows(labels).tolist() == [1, 6]  # the label of place 0 has no row before it


@pytest.mark.parametrize("keep", [0, 4, 9])
def test_all_rows_are_no_selection(keep: int) -> None:
    assert rows_read(torch.empty(2, 4), None, keep) is None


def test_routing_of_selected_rows() -> None:
    is_visual = torch.tensor([0, 1, 1, 0, 1, 0], dtype=torch.bool)
    rows = torch.tensor([5, 4, 0, 2])
    chosen = Routing.from_mask(is_visual).select(rows)
    assert chosen.text_rows is not None and chosen.visual_rows is not None
    assert chosen.text_rows.tolist() == [0, 2] and chosen.visual_rows.tolist() == [1, 3]
    assert Routing.from_mask(is_visual).select(rows[:1]) == Routing(1, 0)
    assert Routing.all_text(6).select(rows) == Routing(4, 0)
    assert Routing(0, 6).select(rows) == Routing(0, 4)
