"""Packed segments: several sequences in one row, told apart by positions that start anew.

Transformers sees them where there is neither a mask of padding nor a cache; here they are seen
beside a mask, too, which most collators make, and in the pass that fills an empty cache.

Legend: B batch, T tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def packed_segments(position_ids: Tensor, attention_mask: Tensor | None) -> Tensor | None:
    """Numbers of the segments of every row; None where each row is one.

    A segment begins where a position does not follow on the one before. Padding stands in no
    segment: across it, positions only have to grow.

    Args:
        position_ids: (B, T) integers.
        attention_mask: (B, T), 0 at padding, or None without padding.

    Returns:
        (B, T) int64, equal for the tokens of a segment.
    """
    is_token = torch.ones_like(position_ids, dtype=torch.bool)
    if attention_mask is not None:
        is_token = attention_mask.bool().expand_as(is_token)
    columns = torch.arange(is_token.shape[1], device=is_token.device).expand_as(is_token)
    latest = torch.where(is_token, columns, -1).cummax(1).values
    before = F.pad(latest, (1, 0), value=-1)[:, :-1]  # the token before each; -1 for the first
    expected = position_ids.gather(1, before.clamp_min(0)) + 1
    is_next = before == columns - 1
    is_start = torch.where(is_next, position_ids != expected, position_ids < expected)
    is_start &= is_token & (before >= 0)
    return is_start.cumsum(1) if bool(is_start.any()) else None
