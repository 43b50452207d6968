"""Blocked attention against the eager definition: values, gradients, masks, caches."""

import pytest
import torch
from tiny_models import image_ids, text_ids, tile_pixels, tiny_model
from torch import Tensor, nn
from transformers import DynamicCache

from mono_internvl.attention import blocked as blocked_attention
from mono_internvl.attention.blocked import blocked_attention_forward, blocked_mask
from mono_internvl.model.layers import eager_attention_forward


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocked_attention, "QUERIES_PER_BLOCK", 4)


def _heads(tokens: int, kv_tokens: int, kv_heads: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    shapes = (2, 4, tokens, 8), (2, kv_heads, kv_tokens, 8), (2, kv_heads, kv_tokens, 8)
    q, k, v = (torch.randn(shape, generator=generator).requires_grad_() for shape in shapes)
    return q, k, v


def _causal(tokens: int, kv_tokens: int) -> Tensor:
    sees = torch.ones(tokens, kv_tokens, dtype=torch.bool).tril(kv_tokens - tokens)
    return torch.zeros(tokens, kv_tokens).masked_fill(~sees, -torch.inf)[None, None]


@pytest.mark.parametrize(
    ("tokens", "kv_tokens"), [(1, 1), (1, 9), (4, 4), (5, 5), (11, 11), (3, 10), (9, 14)]
)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_blocked_equals_eager_causal(tokens: int, kv_tokens: int, kv_heads: int) -> None:
    inputs = _heads(tokens, kv_tokens, kv_heads)
    module = nn.Identity().eval()
    ours, weights = blocked_attention_forward(module, *inputs, None, 0.3)
    theirs, _ = eager_attention_forward(module, *inputs, _causal(tokens, kv_tokens), 0.3)
    assert weights is None
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)
    grad = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1))
    for a, b in zip(
        torch.autograd.grad(ours, inputs, grad),
        torch.autograd.grad(theirs, inputs, grad),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=2e-6, rtol=0)


@pytest.mark.parametrize("is_bool", [True, False])
def test_blocked_obeys_any_mask(is_bool: bool) -> None:
    q, k, v = _heads(9, 9)
    sees = torch.rand(2, 1, 9, 9, generator=torch.Generator().manual_seed(3)) > 0.4
    sees |= torch.eye(9, dtype=torch.bool)  # ahead of the diagonal, too
    added = torch.zeros(sees.shape).masked_fill(~sees, torch.finfo(torch.float32).min)
    module = nn.Identity().eval()
    ours, _ = blocked_attention_forward(module, q, k, v, sees if is_bool else added, 0.3)
    theirs, _ = eager_attention_forward(module, q, k, v, added, 0.3)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


def test_blocked_without_causality_sees_everything() -> None:
    inputs = _heads(11, 11, 4)
    module = nn.Identity().eval()
    module.is_causal = False
    ours, _ = blocked_attention_forward(module, *inputs, None, 0.3)
    theirs, _ = eager_attention_forward(module, *inputs, None, 0.3)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


def test_blocked_row_that_sees_nothing_is_finite() -> None:
    q, k, v = _heads(3, 3)
    sees = torch.zeros(2, 1, 3, 3, dtype=torch.bool)
    out, _ = blocked_attention_forward(nn.Identity().eval(), q, k, v, sees, 0.3)
    assert torch.isfinite(out).all()


def test_blocked_in_bf16_is_as_near_as_eager() -> None:
    q, k, v = (x.detach() for x in _heads(40, 40))
    module = nn.Identity().eval()
    exact, _ = eager_attention_forward(module, q, k, v, _causal(40, 40), 0.3)
    low = [x.bfloat16() for x in (q, k, v)]
    ours, _ = blocked_attention_forward(module, *low, None, 0.3)
    theirs, _ = eager_attention_forward(module, *low, _causal(40, 40).bfloat16(), 0.3)
    assert ours.dtype == torch.bfloat16
    assert (ours.float() - exact).abs().mean() <= 1.1 * (theirs.float() - exact).abs().mean()


def test_blocked_dropout_only_while_training() -> None:
    q, k, v = _heads(6, 6)
    module = nn.Identity()
    plain, _ = blocked_attention_forward(module.eval(), q, k, v, None, 0.3)
    kept, _ = blocked_attention_forward(module.eval(), q, k, v, None, 0.3, dropout=0.5)
    dropped, _ = blocked_attention_forward(module.train(), q, k, v, None, 0.3, dropout=0.5)
    assert torch.equal(kept, plain) and not torch.equal(dropped, plain)


def test_blocked_mask_is_none_only_where_the_future_alone_is_hidden() -> None:
    fields = {"batch_size": 1, "q_length": 3, "kv_length": 5, "q_offset": 2}
    assert blocked_mask(**fields) is None
    assert blocked_mask(**fields, attention_mask=torch.ones(1, 5, dtype=torch.bool)) is None
    padded = torch.tensor([[0, 1, 1, 1, 1]], dtype=torch.bool)
    assert blocked_mask(**fields, attention_mask=padded)[..., 0].sum() == 0
    assert blocked_mask(**fields, allow_is_causal_skip=False).shape == (1, 1, 3, 5)
    longer = blocked_mask(**{**fields, "kv_length": 8})  # a static cache
    assert longer is not None and longer[..., 5:].sum() == 0


@torch.no_grad()
def test_blocked_model_equals_eager_through_cache() -> None:
    blocked, eager = tiny_model(attention="blocked"), tiny_model(attention="eager")
    ids = torch.cat((text_ids(5, 1), image_ids(2), text_ids(6, 2)), dim=1)
    expected = eager(ids, pixel_values=tile_pixels(2)).logits
    cache = DynamicCache(config=blocked.config)
    out = blocked.prefill(ids, cache, tile_pixels(2), chunk_tokens=6)
    torch.testing.assert_close(out.logits[:, -1], expected[:, -1], atol=1e-5, rtol=0)


def test_blocked_under_autocast_stays_near_fp32() -> None:
    model = tiny_model(attention="blocked").train()
    ids = torch.cat((image_ids(2), text_ids(9, 2)), dim=1)
    batch = {"input_ids": ids, "pixel_values": tile_pixels(2), "labels": ids}
    exact = model(**batch).loss
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(**batch).loss
    rough.backward()
    torch.testing.assert_close(rough, exact, atol=0.05, rtol=0)


@torch.no_grad()
def test_blocked_under_autocast_with_cache_and_padding() -> None:
    model = tiny_model(attention="blocked")
    ids = torch.cat((image_ids(1), text_ids(9, 2)), dim=1).repeat(2, 1)
    mask = torch.ones_like(ids)
    mask[0, 6:8] = 0  # between two turns
    exact = model(ids, pixel_values=tile_pixels(2), attention_mask=mask).logits
    cache = DynamicCache(config=model.config)
    with torch.autocast("cpu", torch.bfloat16):
        model(
            ids[:, :9],
            pixel_values=tile_pixels(2),
            attention_mask=mask[:, :9],
            past_key_values=cache,
        )
        rough = model(ids[:, 9:], attention_mask=mask, past_key_values=cache).logits
    assert (rough[:, -1] - exact[:, -1]).abs().mean() < 0.05 * exact.std()
