"""Which rows of the token stream are visual: decided once per forward, then passed on as data.

Legend: B batch, T tokens, N = B * T rows.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from mono_internvl.configuration.labels import IGNORED_LABEL


@dataclass(frozen=True)
class Routing:
    """The static (modality) routing of one forward pass.

    A row is visual exactly where an image feature was placed, be it in prefill, in a later chunk or
    in a later cached turn. Layers read the counts as host integers, so that no layer waits for the
    device and none re-derives a mask.

    Attributes:
        num_text: Rows for the text expert.
        num_visual: Rows for the visual expert.
        text_rows: (num_text,) int64 indices into the N rows; None where all are of one kind.
        visual_rows: (num_visual,) int64 indices into the N rows; None where all are of one kind.
        row_order: (N,) int64; row `n` of the stream is row `row_order[n]` of "text rows, then
            visual rows". None where all rows are of one kind.
        implementation: Name of what is to compute the experts (`experts/registry.py`); the
            definition unless the model says otherwise.
        sorted_rows: (N,) int64, the inverse of `row_order`: text rows, then visual rows. Derived.

    Source: section 3.1 of arXiv 2410.08202. Differs: the released code drops its mask whenever a
    cache is present, which sends an image of a later turn through the text expert.
    """

    num_text: int
    num_visual: int
    text_rows: Tensor | None = None
    visual_rows: Tensor | None = None
    row_order: Tensor | None = None
    implementation: str = "eager"
    sorted_rows: Tensor | None = field(init=False, default=None, compare=False)

    def __post_init__(self) -> None:
        if self.text_rows is not None and self.visual_rows is not None:
            object.__setattr__(self, "sorted_rows", torch.cat((self.text_rows, self.visual_rows)))

    def is_visual(self, device: torch.device) -> Tensor:
        """(N,) bool, the mask that `from_mask` would make this routing of."""
        if self.row_order is None:
            num_rows = self.num_text + self.num_visual
            return torch.full((num_rows,), self.num_visual > 0, device=device)
        return self.row_order >= self.num_text

    def by(self, implementation: str) -> Routing:
        """The same routing, computed by the implementation of this name."""
        same = implementation == self.implementation
        return self if same else replace(self, implementation=implementation)

    @classmethod
    def all_text(cls, num_rows: int) -> Routing:
        """Every row through the text expert: decoding, text-only chat, language-model training."""
        return cls(num_text=num_rows, num_visual=0)

    @classmethod
    def from_mask(cls, is_visual: Tensor) -> Routing:
        """Routing of a boolean mask, (B, T) or (N,), True where an image feature was placed.

        The index tensors are made on the mask's device. On an accelerator this waits for it (the
        counts come to the host) once per forward, before the first layer; no layer waits again.
        """
        flat = is_visual.reshape(-1)
        num_rows = flat.numel()
        visual_rows = flat.nonzero().squeeze(1)  # (num_visual,)
        num_visual = visual_rows.numel()
        if num_visual in (0, num_rows):
            return cls(num_text=num_rows - num_visual, num_visual=num_visual)
        text_rows = (~flat).nonzero().squeeze(1)  # (num_text,)
        row_order = torch.empty(num_rows, dtype=torch.int64, device=flat.device)
        row_order[text_rows] = torch.arange(num_rows - num_visual, device=flat.device)
        row_order[visual_rows] = torch.arange(num_rows - num_visual, num_rows, device=flat.device)
        return cls(num_rows - num_visual, num_visual, text_rows, visual_rows, row_order)

    def select(self, rows: Tensor) -> Routing:
        """The routing of some of the rows, (R,) int64, in that order.

        Where the rows are of two kinds this waits for the device once, as `from_mask` does.
        """
        if self.row_order is None:
            num_rows = rows.numel()
            return Routing(0, num_rows) if self.num_visual else Routing(num_rows, 0)
        kept = Routing.from_mask(self.row_order.index_select(0, rows) >= self.num_text)
        return kept.by(self.implementation)

    def to(self, device: torch.device) -> Routing:
        """The same routing with its index tensors on `device`."""
        if self.row_order is None:
            return self
        assert self.text_rows is not None and self.visual_rows is not None
        return Routing(
            self.num_text,
            self.num_visual,
            self.text_rows.to(device, non_blocking=True),
            self.visual_rows.to(device, non_blocking=True),
            self.row_order.to(device, non_blocking=True),
            self.implementation,
        )


@dataclass(frozen=True)
class KeptRows:
    """The rows of the last layer whose output somebody reads.

    Attributes:
        rows: Indices into the N rows, int64; its shape is that of the output, without D.
        routing: Of these rows.
    """

    rows: Tensor
    routing: Routing

    @classmethod
    def labelled(cls, labels: Tensor, routing: Routing) -> KeptRows:
        """The rows that a loss reads; made on the host, no training step waits for their number.

        Args:
            labels: (B, T), `IGNORED_LABEL` where nothing is learnt.
            routing: Of all rows.
        """
        rows = labelled_rows(labels)
        return cls(rows, routing.select(rows))

    def by(self, implementation: str) -> KeptRows:
        """The same rows, computed by the implementation of this name."""
        return KeptRows(self.rows, self.routing.by(implementation))

    def to(self, device: torch.device) -> KeptRows:
        """The same rows with their index tensors on `device`."""
        return KeptRows(self.rows.to(device, non_blocking=True), self.routing.to(device))


def labelled_rows(labels: Tensor) -> Tensor:
    """Indices, (R,) int64, of the rows whose next token has a label.

    Args:
        labels: (B, T), `IGNORED_LABEL` where nothing is learnt.
    """
    has_label = labels != IGNORED_LABEL
    has_label = torch.cat((has_label[:, 1:], torch.zeros_like(has_label[:, :1])), dim=1)
    return has_label.flatten().nonzero().squeeze(1)
