"""The last decoder layer: behind attention it computes no rows whose output nobody reads.

In prefill only the last row's logits are asked for, in training only rows with a label have a loss.
Keys and values are computed for all rows all the same: later tokens will read those. Everything
about this is in this file; a plain `DecoderLayer` in its place gives the same numbers. Products
over fewer rows may differ in their last bits.

Legend: B batch, T tokens, N = B * T rows, R rows that are read, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mono_internvl.experts import KeptRows, Routing
from mono_internvl.model.layers import DecoderLayer, route


class LastLayer(DecoderLayer):
    """A decoder layer that can leave out rows."""

    def forward(
        self, x: Tensor, routing: Routing, kept: KeptRows | None = None, **attention: Any
    ) -> tuple[Tensor, Tensor | None]:
        """(B, T, D) -> (B, T, D), or (..., D) of the `kept` rows; attention weights if any."""
        if kept is None:
            return super().forward(x, routing, **attention)
        rows = x.flatten(0, 1)  # (N, D)
        y = route(rows, routing, self.input_layernorm, self.input_layernorm_visual)
        y, weights = self.self_attn.attend(y.view(x.shape), routing, **attention)  # (N, H * d)
        y, rows = (z.index_select(0, kept.rows.flatten()) for z in (y, rows))  # (R, ...)
        rows = rows + self.self_attn.project_output(y, kept.routing)
        rows = self.feed_forward(rows, kept.routing)
        return rows.view(*kept.rows.shape, x.shape[-1]), weights


def rows_read(
    x: Tensor, labelled: Tensor | None, logits_to_keep: int | Tensor | None
) -> Tensor | None:
    """The rows that loss and logits read, (R,) or (B, T') int64; None where all are computed.

    Args:
        x: (B, T, ...) ids or embeddings.
        labelled: (R,) rows with a label, or None without labels.
        logits_to_keep: As the model's `forward` takes it.
    """
    batch, tokens = x.shape[:2]
    if labelled is not None:  # training that also looks at logits: not worth a case of its own
        return labelled if logits_to_keep is None else None
    if isinstance(logits_to_keep, int) and 0 < logits_to_keep < tokens:
        rows = torch.arange(batch * tokens, device=x.device).view(batch, tokens)
        return rows[:, -logits_to_keep:]
    return None
