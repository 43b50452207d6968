"""Attention in blocks of queries: `attn_implementation="blocked"`.

On a CPU, PyTorch's sdpa runs bf16 at the speed of fp32, and an explicit mask makes it slower still.
Plain batched products use the bf16 units; blocks of queries that stop at the diagonal compute
little more than the causal half of them and never hold more than one block of scores.

Legend: B batch, T tokens, H heads, K key-value heads, G = H / K, d head width, R = rows of a block.

Source: `docs/performance.md` for what it gains; the definition is `eager_attention_forward`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

BLOCKED = "blocked"
"""Name of this attention, as `attn_implementation` takes it."""

QUERIES_PER_BLOCK = 128
"""Queries of a block: measured best of 64, 128, 256 and 512 at head widths 64 and 128."""


def blocked_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as the eager definition has it, block by block; weights are not returned.

    Args:
        module: The attention module; says whether it trains.
        query: (B, H, T, d), the last T of the keys' positions.
        key: (B, K, T_kv, d).
        value: (B, K, T_kv, d).
        attention_mask: (B or 1, 1, T, T_kv) bool, True where a query sees a key, or added to the
            scores; None is causal, unless the module is not.
        scaling: Of the scores.
        dropout: Of the weights.
        **kwargs: `is_causal` counts more than the module's own; others are not read.

    Returns:
        (B, T, H, d).
    """
    batch, heads, tokens, width = query.shape
    kv_heads, kv_tokens = key.shape[1], key.shape[2]
    groups = heads // kv_heads
    is_causal = kwargs.get("is_causal")
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    is_cut = attention_mask is None and is_causal  # at the diagonal
    # Autocast leaves rotated queries and keys, and what a cache holds, in fp32; casting them here
    # saves casting them for every block.
    kind = query.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else value.dtype
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    keys = key.reshape(batch * kv_heads, kv_tokens, width).transpose(1, 2)  # (B*K, d, T_kv)
    values = value.reshape(batch * kv_heads, kv_tokens, width)
    grouped = query.unflatten(1, (kv_heads, groups))  # (B, K, G, T, d)
    unused = query.new_empty(1, 1, 1)  # what is added to the scores, times 0
    # The lowest finite number: a row of padding sees nothing and must not become nan.
    lowest = torch.finfo(query.dtype).min
    blocks = []
    for start in range(0, tokens, QUERIES_PER_BLOCK):
        stop = min(start + QUERIES_PER_BLOCK, tokens)
        rows = stop - start
        seen = kv_tokens - tokens + stop if is_cut else kv_tokens
        q = grouped[:, :, :, start:stop].reshape(batch * kv_heads, groups * rows, width)
        scores = torch.baddbmm(unused, q, keys[:, :, :seen], beta=0, alpha=scaling)
        scores = scores.view(batch, heads, rows, seen)
        if attention_mask is not None:
            mask = attention_mask[:, :, start:stop, :seen]
            is_bool = mask.dtype == torch.bool
            scores = scores.masked_fill_(~mask, lowest) if is_bool else scores + mask
        elif is_cut and rows > 1:
            future = torch.ones(rows, rows, dtype=torch.bool, device=scores.device).triu(1)
            scores[..., seen - rows :].masked_fill_(future, lowest)
        # On scores of half precision, softmax still computes in fp32.
        weights = scores.softmax(dim=-1).to(value.dtype)
        weights = F.dropout(weights, dropout, module.training)
        y = torch.bmm(weights.view(batch * kv_heads, groups * rows, seen), values[:, :seen])
        blocks.append(y.view(batch, heads, rows, width).transpose(1, 2))  # (B, R, H, d)
    return torch.cat(blocks, dim=1) if len(blocks) > 1 else blocks[0], None


def blocked_mask(
    *,
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    local_size: int | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """The boolean mask of sdpa, or None where nothing but the future is hidden.

    Args:
        batch_size: B.
        q_length: T.
        kv_length: T_kv.
        q_offset: Position of the first query.
        attention_mask: (B, T_kv) bool, False at padding.
        allow_is_causal_skip: Whether the mask is causal and nothing more, or a window of it.
        local_size: Tokens that a query looks back on; None is all.
        **kwargs: As `sdpa_mask` takes them.
    """
    are_last = isinstance(q_offset, int) and q_offset + q_length == kv_length
    is_padded = attention_mask is not None and not bool(attention_mask.all())
    hides_past = local_size is not None and kv_length > local_size
    if allow_is_causal_skip and are_last and not is_padded and not hides_past:
        return None
    return sdpa_mask(  # type: ignore[no-any-return]
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        attention_mask=attention_mask,
        allow_is_causal_skip=False,
        local_size=local_size,
        **kwargs,
    )


def register_blocked_attention() -> None:
    """Make `attn_implementation="blocked"` known to transformers."""
    AttentionInterface.register(BLOCKED, blocked_attention_forward)
    AttentionMaskInterface.register(BLOCKED, blocked_mask)
