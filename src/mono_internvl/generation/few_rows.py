"""Linear layers over the few rows of a decoding batch, in the order that a CPU multiplies faster.

In fp32, `x @ w.T` over 8 rows takes a multiple of its time over one, although both read the same
weights; `w @ x.T` gives the same numbers sooner (`docs/performance.md`).

Legend: N rows, out and in: sides of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter
from torch.overrides import TorchFunctionMode

LEAST_ROWS, MOST_ROWS = 4, 32
"""Where it was measured faster; up to 3 rows the usual order is, from 64 on both are alike."""
LEAST_WIDTH = 512
"""Of a model: at 192 looking at every call of torch costs more than the order saves, at 1,024 the
order saves a multiple of it."""


class FewRows(TorchFunctionMode):
    """Within this context `F.linear` multiplies weights first where that is faster."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is F.linear and not kwargs and _is_faster(args[0], args[1]):
            return _weights_first(*args)
        return func(*args, **(kwargs or {}))


def few_rows(x: Tensor) -> AbstractContextManager[object]:
    """`FewRows` where it can be of use to a pass over the rows of x, (N, 1, D); else nothing.

    It looks at every call of torch, which costs a single row some percent of its time.
    """
    is_of_use = x.shape[-1] >= LEAST_WIDTH and _are_few(x.flatten(0, 1))
    return FewRows() if is_of_use else nullcontext()


def _is_faster(x: Tensor, weight: Tensor) -> bool:
    # A quantised or sharded weight has products of its own.
    return type(weight) is Parameter and weight.dtype == x.dtype and _are_few(x)


def _are_few(x: Tensor) -> bool:
    return (
        x.dim() == 2
        and LEAST_ROWS <= x.shape[0] <= MOST_ROWS
        and x.device.type == "cpu"
        and x.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
    )


def _weights_first(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """(N, in) rows times (out, in) weights, to (N, out)."""
    if bias is None:
        return torch.mm(weight, x.t()).t().contiguous()
    return torch.addmm(bias[:, None], weight, x.t()).t().contiguous()
