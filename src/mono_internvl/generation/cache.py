"""Keys and values of a batch whose requests come and go: a row each, every row from column 0 on.

A row's token t stands in column t. Rows of any length lie side by side, one that joins moves no
other, and the window of a sliding layer counts columns. Sliding layers keep all columns, so that a
prompt may begin with what an earlier one left behind, wherever its window ends.

Legend: S rows there is room for, C columns there is room for, B rows of a pass, T tokens of a pass,
K key-value heads, d head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from mono_internvl.configuration.model import MonoInternVLTextConfig


class BatchCache:
    """Room for S rows of C tokens; grown geometrically, within a number of tokens.

    Args:
        config: Layers, key-value heads and their width are read.
        dtype: Of the keys and values.
        device: Where they lie.
        max_tokens: S * C never exceeds it.
    """

    def __init__(
        self,
        config: MonoInternVLTextConfig,
        dtype: torch.dtype,
        device: torch.device,
        max_tokens: int,
    ) -> None:
        self.max_tokens = max_tokens
        shape = (0, config.num_key_value_heads, 0, config.head_dim)
        self._layers = [
            [torch.empty(shape, dtype=dtype, device=device) for _ in range(2)]
            for _ in range(config.num_hidden_layers)
        ]

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns there is room for."""
        keys = self._layers[0][0]
        return keys.shape[0], keys.shape[2]

    @property
    def num_bytes(self) -> int:
        """Bytes of all keys and values."""
        return sum(x.numel() * x.element_size() for layer in self._layers for x in layer)

    def reserve(self, rows: int, columns: int, lengths: Sequence[int], max_columns: int) -> None:
        """Make room; what is held stays.

        Args:
            rows: Rows that are needed.
            columns: Columns that are needed.
            lengths: Columns in use of each row that is held.
            max_columns: Columns that the longest row can ever need; with `rows` of them it must
                fit into `max_tokens`.
        """
        num_rows, num_columns = self.shape
        if rows <= num_rows and columns <= num_columns:
            return
        most = max(columns, min(max_columns, self.max_tokens // rows))
        if columns > num_columns:
            num_columns = max(columns, 2 * num_columns)
        num_columns = min(num_columns, most)
        if rows > num_rows:
            num_rows = max(rows, 2 * num_rows)
        num_rows = max(rows, min(num_rows, self.max_tokens // num_columns))
        used = slice(0, len(lengths)), slice(None), slice(0, max(lengths, default=0))
        for layer in self._layers:
            for number, old in enumerate(layer):  # one at a time: old and new never lie whole
                # Zeros: what no row has written is seen with weight 0, and must be a number.
                new = old.new_zeros(num_rows, old.shape[1], num_columns, old.shape[3])
                new[used] = old[used]
                layer[number] = new

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` columns of a row over another row."""
        self.begin(target, self.row(source), length)

    def blank(self, row: int) -> None:
        """Set a row to zeros: it holds what is no number, and a later row in its place sees it."""
        for layer in self._layers:
            for x in layer:
                x[row] = 0

    def row(self, row: int) -> list[Tensor]:
        """Keys and values of a row as they lie there, (K, C, d) per layer, keys before values."""
        return [x[row] for layer in self._layers for x in layer]

    def begin(self, row: int, tensors: Sequence[Tensor], length: int) -> None:
        """Begin a row with the first `length` columns of tensors as `row` gives them."""
        for x, source in zip(self.row(row), tensors, strict=True):
            x[:, :length] = source[:, :length]

    def release(self) -> None:
        """Let go of all rows and their memory."""
        for layer in self._layers:
            layer[:] = [x.new_empty(0, x.shape[1], 0, x.shape[3]) for x in layer]

    def rows(self, first: int, starts: Sequence[int], tokens: int) -> Rows:
        """The rows from `first` on, for one pass of `tokens` more tokens each, behind `starts`."""
        return Rows(self._layers, first, starts, tokens)


class Rows(Cache):
    """Neighbouring rows of a batch, as the model reads and extends them in one pass.

    Padding of a pass stands behind a row's own tokens: nobody sees it, the next pass replaces it.

    Attributes:
        starts: (B,) int64 columns in use before the pass.
        columns: (B, T) int64 columns of the pass.
        is_level: Whether all rows are equally long before the pass.
    """

    def __init__(
        self, layers: list[list[Tensor]], first: int, starts: Sequence[int], tokens: int
    ) -> None:
        super().__init__(layers=[])
        self._tensors = layers
        self._rows = slice(first, first + len(starts))
        self._seen, self._tokens = max(starts), tokens
        self.is_level = min(starts) == self._seen
        device = layers[0][0].device
        self.starts = torch.tensor(starts, device=device)
        self.columns = self.starts[:, None] + torch.arange(tokens, device=device)
        self._row_numbers = torch.arange(len(starts), device=device)[:, None]

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """Write (B, K, T, d) keys and values; returns (B, K, L, d) of all columns in use."""
        stop = self._seen + self._tokens
        keys, values = (x[self._rows, :, :stop] for x in self._tensors[layer_idx])
        for x, new in ((keys, key_states), (values, value_states)):
            if self.is_level:
                x[:, :, self._seen :] = new
            else:
                x[self._row_numbers, :, self.columns] = new.transpose(1, 2).to(x.dtype)
        return keys, values

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns in use of the longest row, before the pass."""
        return self._seen

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Columns that the pass sees, from column 0 on."""
        return self._seen + query_length, 0
