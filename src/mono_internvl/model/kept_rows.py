"""Which rows of the decoder's output are read: the last layer computes no others.

In prefill only the last row's logits are asked for, in training only rows with a label have a loss;
what the last layer computes for other rows after attention's keys and values, nobody reads.

Legend: B batch, T tokens, N = B * T rows, R rows that are read.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mono_internvl.configuration.labels import IGNORED_LABEL


@dataclass(frozen=True)
class RowsRead:
    """Rows whose last hidden state is read.

    Attributes:
        rows: Numbers among the N rows, int64, (B, T') or (R,).
        first_token: Place in the sequence before which none of them stands.
    """

    rows: Tensor
    first_token: int


def labelled_rows(labels: Tensor) -> Tensor:
    """Numbers, (R,) int64, of the rows whose next token has a label.

    Args:
        labels: (B, T), `IGNORED_LABEL` where nothing is learnt.
    """
    has_label = labels != IGNORED_LABEL
    has_label = torch.cat((has_label[:, 1:], torch.zeros_like(has_label[:, :1])), dim=1)
    return has_label.flatten().nonzero().squeeze(1)


def rows_read(
    batch: int,
    tokens: int,
    device: torch.device,
    labelled: Tensor | None,
    logits_to_keep: int | Tensor | None,
) -> RowsRead | None:
    """The rows that loss and logits read; None where all rows are computed.

    Args:
        batch: B.
        tokens: T.
        device: Of the rows.
        labelled: (R,) rows with a label, or None without labels.
        logits_to_keep: As the model's `forward` takes it.
    """
    if labelled is not None:
        if logits_to_keep is not None:
            return None  # training that also looks at logits: not worth a case of its own
        first = int((labelled % tokens).min()) if labelled.numel() else tokens - 1
        return RowsRead(labelled, first)
    if isinstance(logits_to_keep, int) and 0 < logits_to_keep < tokens:
        first = tokens - logits_to_keep
        places = torch.arange(first, tokens, device=device)
        starts = torch.arange(0, batch * tokens, tokens, device=device)
        return RowsRead(starts[:, None] + places, first)
    return None
