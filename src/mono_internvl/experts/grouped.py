"""Rows sorted by expert once, then every product over contiguous slices of one buffer.

Against eager: one gather instead of two, no concatenation, the SwiGLU over all rows at once, and a
hand-written backward pass that keeps gate and up alone of what is (N, I) wide, makes no weight
gradient for a frozen expert and no row gradient that nobody asked for.

Legend: N rows, text rows first ("sorted"), D width, I feed-forward width, out and in: sides of a
projection.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mono_internvl.experts.pairs import LinearPair, SwiGLUPair
from mono_internvl.experts.routing import Routing


def unavailable(x: Tensor) -> str | None:
    """Runs wherever torch multiplies matrices."""
    return None


def _gather(x: Tensor, rows: Tensor | None) -> Tensor:
    return x if rows is None else x.index_select(0, rows)


def _products(
    x: Tensor,
    num_text: int,
    text: Tensor,
    visual: Tensor,
    text_bias: Tensor | None = None,
    visual_bias: Tensor | None = None,
    onto: Tensor | None = None,
) -> Tensor:
    """Sorted rows (N, in) times (in, out) of their expert, written into slices of one (N, out).

    `onto` is added to, in place.
    """
    y = x.new_empty(x.shape[0], text.shape[1]) if onto is None else onto  # (N, out)
    parts = (
        (slice(0, num_text), text, text_bias),
        (slice(num_text, x.shape[0]), visual, visual_bias),
    )
    for part, weight, bias in parts:
        if onto is not None:
            torch.addmm(y[part], x[part], weight, out=y[part])
        elif bias is None:
            torch.mm(x[part], weight, out=y[part])
        else:
            torch.addmm(bias, x[part], weight, out=y[part])
    return y


def _weight_gradients(
    dy: Tensor, x: Tensor, num_text: int, wanted: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """(out, in) gradients of both experts from sorted rows; None for one that is frozen."""
    text, visual = wanted
    return (
        dy[:num_text].t() @ x[:num_text] if text else None,
        dy[num_text:].t() @ x[num_text:] if visual else None,
    )


class _SwiGLU(torch.autograd.Function):
    """Arguments: rows, sorted order, its inverse, number of text rows, six weights."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        order: Tensor | None,
        inverse: Tensor | None,
        num_text: int,
        *weights: Tensor,
    ) -> Tensor:
        gate_text, up_text, down_text, gate_visual, up_visual, down_visual = weights
        rows = _gather(x, order)  # (N, D) sorted
        gate = _products(rows, num_text, gate_text.t(), gate_visual.t())  # (N, I)
        up = _products(rows, num_text, up_text.t(), up_visual.t())
        y = _products(F.silu(gate).mul_(up), num_text, down_text.t(), down_visual.t())
        ctx.num_text = num_text
        ctx.save_for_backward(rows, gate, up, order, inverse, *weights)
        return _gather(y, inverse)  # (N, D)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        rows, gate, up, order, inverse, *weights = ctx.saved_tensors
        gate_text, up_text, down_text, gate_visual, up_visual, down_visual = weights
        num_text, needs = ctx.num_text, ctx.needs_input_grad
        # A gradient made by expanding has strides of 0, which the slices cannot have.
        dy = dy.contiguous() if order is None else dy.index_select(0, order)
        activated = F.silu(gate)
        down = _weight_gradients(dy, activated * up, num_text, (needs[6], needs[9]))
        dx = None
        gates: tuple[Tensor | None, Tensor | None] = (None, None)
        ups = gates
        if needs[0] or needs[4] or needs[5] or needs[7] or needs[8]:
            d_hidden = _products(dy, num_text, down_text, down_visual)  # (N, I)
            d_up = activated.mul_(d_hidden)
            d_gate = torch.ops.aten.silu_backward(d_hidden.mul_(up), gate)
            gates = _weight_gradients(d_gate, rows, num_text, (needs[4], needs[7]))
            ups = _weight_gradients(d_up, rows, num_text, (needs[5], needs[8]))
            if needs[0]:
                dx = _products(d_gate, num_text, gate_text, gate_visual)
                dx = _gather(_products(d_up, num_text, up_text, up_visual, onto=dx), inverse)
        return dx, None, None, None, gates[0], ups[0], down[0], gates[1], ups[1], down[1]


class _Linear(torch.autograd.Function):
    """Arguments: rows, sorted order, its inverse, number of text rows, two weights, two biases."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        order: Tensor | None,
        inverse: Tensor | None,
        num_text: int,
        text: Tensor,
        visual: Tensor,
        text_bias: Tensor | None,
        visual_bias: Tensor | None,
    ) -> Tensor:
        rows = _gather(x, order)  # (N, in) sorted
        y = _products(rows, num_text, text.t(), visual.t(), text_bias, visual_bias)
        ctx.num_text = num_text
        ctx.save_for_backward(rows, order, inverse, text, visual)
        return _gather(y, inverse)  # (N, out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        rows, order, inverse, text, visual = ctx.saved_tensors
        num_text, needs = ctx.num_text, ctx.needs_input_grad
        dy = dy.contiguous() if order is None else dy.index_select(0, order)
        weights = _weight_gradients(dy, rows, num_text, (needs[4], needs[5]))
        dx = _gather(_products(dy, num_text, text, visual), inverse) if needs[0] else None
        text_bias = dy[:num_text].sum(0) if needs[6] else None
        visual_bias = dy[num_text:].sum(0) if needs[7] else None
        return dx, None, None, None, *weights, text_bias, visual_bias


def swiglu(x: Tensor, routing: Routing, pair: SwiGLUPair) -> Tensor:
    """(N, D) rows through their feed-forward expert."""
    x, pair = pair.under_autocast(x)
    order, inverse = routing.sorted_rows, routing.row_order
    return _SwiGLU.apply(x, order, inverse, routing.num_text, *pair.weights)


def linear(x: Tensor, routing: Routing, pair: LinearPair) -> Tensor:
    """(N, in) rows through their projection, to (N, out)."""
    x, pair = pair.under_autocast(x)
    order, inverse = routing.sorted_rows, routing.row_order
    weights = (pair.text, pair.visual, pair.text_bias, pair.visual_bias)
    return _Linear.apply(x, order, inverse, routing.num_text, *weights)
