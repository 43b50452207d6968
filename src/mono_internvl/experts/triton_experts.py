"""Fused kernels: feed-forward experts in two launches, projections in one, and their gradients.

Between the two launches lies one (N, I) tensor; rows are not copied, gate and up are not written.
The backward pass keeps the rows alone and makes gate and up again; it writes their two gradients
and, where a down projection learns, the hidden rows. A frozen expert gets no weight gradient.

The launches are custom operators, so that `torch.compile` sees them as single steps. torch's FLOP
counter is told what each owes (the functions named `_..._flop`).

Legend: N rows, "sorted": text rows first, D width, I feed-forward width, out and in: sides of a
projection.
"""

from dataclasses import asdict, dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

from mono_internvl.errors import ExpertsUnavailable
from mono_internvl.experts import triton_kernels as kernels
from mono_internvl.experts.pairs import LinearPair, SwiGLUPair
from mono_internvl.experts.routing import Routing

IS_INTERPRETED = not isinstance(kernels.linear_kernel, triton.JITFunction)
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def check(x: Tensor) -> None:
    """Refuse other rows than bf16, fp16 and fp32, and devices of a capability below 8.0.

    Raises:
        ExpertsUnavailable: With the reason.
    """
    if x.dtype not in _DTYPES:
        raise ExpertsUnavailable(
            f"rows are {x.dtype}; the kernels take bfloat16, float16 and float32"
        )
    is_nvidia = x.is_cuda and torch.version.hip is None
    if is_nvidia and torch.cuda.get_device_capability(x.device) < (8, 0):
        raise ExpertsUnavailable("the device's compute capability is below 8.0")


@dataclass(frozen=True)
class Tiles:
    """Tile sizes and launch settings of one kernel."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    GROUP_M: int = 8
    num_warps: int = 8
    num_stages: int = 3


# Per kernel: for 16-bit and for 32-bit operands. They fit the shared memory of every capability
# from 8.0 on (163 kB); none has been tuned on a device yet.
TILES: dict[str, tuple[Tiles, Tiles]] = {
    "linear": (Tiles(128, 128, 64), Tiles(64, 64, 32, num_warps=4)),
    "hidden": (Tiles(128, 64, 64), Tiles(64, 32, 32, num_warps=4)),
    "hidden_backward": (Tiles(128, 64, 32), Tiles(64, 32, 32, num_warps=4)),
    "weight_gradient": (Tiles(128, 128, 64), Tiles(64, 64, 32, num_warps=4)),
}
_SMALLEST = Tiles(16, 16, 16, num_warps=4)


def tiles_for(kernel: str, dtype: torch.dtype, most_rows: int) -> Tiles:
    """Tile sizes of a launch; few rows get low tiles.

    Args:
        kernel: Key of `TILES`.
        dtype: Of the operands.
        most_rows: Rows of the expert that has more.
    """
    if IS_INTERPRETED:  # small, so that small tests meet several tiles and their tails
        return _SMALLEST
    tiles = TILES[kernel][dtype == torch.float32]
    if kernel == "weight_gradient" or most_rows > tiles.BLOCK_M // 2:
        return tiles
    low = max(16, triton.next_power_of_2(most_rows))
    return Tiles(**{**asdict(tiles), "BLOCK_M": low, "num_warps": 4})


def _launch_settings(tiles: Tiles, num_in: int, num_out: int, dtype: torch.dtype) -> dict[str, Any]:
    return {
        **_common_settings(tiles, dtype),
        "EVEN_K": num_in % tiles.BLOCK_K == 0,
        "EVEN_N": num_out % tiles.BLOCK_N == 0,
    }


def _common_settings(tiles: Tiles, dtype: torch.dtype) -> dict[str, Any]:
    # Full fp32 products unless the user allows TF32, as torch's own products do it.
    is_exact = torch.get_float32_matmul_precision() == "highest"
    return {
        **asdict(tiles),
        "UPCAST": IS_INTERPRETED and dtype == torch.bfloat16,
        "PRECISION": "ieee" if is_exact else "tf32",
    }


def _grid(tiles: Tiles, num_text: int, num_rows: int, num_out: int) -> tuple[int]:
    row_tiles = triton.cdiv(num_text, tiles.BLOCK_M)
    row_tiles += triton.cdiv(num_rows - num_text, tiles.BLOCK_M)
    return (row_tiles * triton.cdiv(num_out, tiles.BLOCK_N),)


@torch.library.custom_op("mono_internvl::routed_linear", mutates_args=())
def _linear(
    x: Tensor,
    x2: Tensor | None,
    weights: list[Tensor],
    biases: list[Tensor],
    order: Tensor | None,
    num_text: int,
    in_sorted: bool,
    out_sorted: bool,
    is_transposed: bool,
) -> Tensor:
    """Rows times the weight of their expert; with `x2`, plus its rows times a second weight pair.

    Args:
        x: (N, in), sorted or as in the stream.
        x2: (N, in) likewise, or None.
        weights: Text and visual (out, in), or (in, out) where `is_transposed`; two more for `x2`.
        biases: Text and visual (out,), or empty.
        order: (N,) sorted order, or None where all rows are of one kind.
        num_text: Rows of the text expert.
        in_sorted: Whether `x` is sorted.
        out_sorted: Whether the result is to be.
        is_transposed: See `weights`.
    """
    weights = [w.contiguous() for w in weights]
    text, visual = weights[:2]
    num_out = text.shape[1 if is_transposed else 0]
    num_rows, num_in = x.shape
    y = x.new_empty(num_rows, num_out)
    tiles = tiles_for("linear", x.dtype, max(num_text, num_rows - num_text))
    strides = (text.stride(1), text.stride(0)) if is_transposed else text.stride()
    if num_rows:
        with torch.cuda.device_of(x):  # Triton launches on the current device
            kernels.linear_kernel[_grid(tiles, num_text, num_rows, num_out)](
                x.contiguous(),
                text,
                visual,
                x if x2 is None else x2.contiguous(),
                *(weights[2:] or weights),
                *(biases or weights[:2]),
                x if order is None else order,
                y,
                num_text,
                num_rows,
                num_in,
                num_out,
                *strides,
                IN_SORTED=in_sorted or order is None,
                OUT_SORTED=out_sorted or order is None,
                PAIRED=x2 is not None,
                BIASED=bool(biases),
                **_launch_settings(tiles, num_in, num_out, x.dtype),
            )
    return y


@_linear.register_fake
def _(
    x: Tensor,
    x2: Tensor | None,
    weights: list[Tensor],
    biases: list[Tensor],
    order: Tensor | None,
    num_text: int,
    in_sorted: bool,
    out_sorted: bool,
    is_transposed: bool,
) -> Tensor:
    return x.new_empty(x.shape[0], weights[0].shape[1 if is_transposed else 0])


@register_flop_formula(torch.ops.mono_internvl.routed_linear)
def _linear_flop(
    x: torch.Size, x2: torch.Size | None, weights: list[torch.Size], *_: Any, **__: Any
) -> int:
    """Of shapes: every row meets one weight, or one of each of two pairs."""
    return (1 if x2 is None else 2) * 2 * x[0] * weights[0].numel()


@torch.library.custom_op("mono_internvl::routed_hidden", mutates_args=())
def _hidden(x: Tensor, weights: list[Tensor], order: Tensor | None, num_text: int) -> Tensor:
    """(N, D) rows of the stream to silu(gate) * up, (N, I) sorted.

    Args:
        x: (N, D).
        weights: Gate and up of the text expert, then of the visual one, (I, D) each.
        order: (N,) sorted order, or None.
        num_text: Rows of the text expert.
    """
    num_rows, width = x.shape
    ffn_width = weights[0].shape[0]
    hidden = x.new_empty(num_rows, ffn_width)
    tiles = tiles_for("hidden", x.dtype, max(num_text, num_rows - num_text))
    if num_rows:
        with torch.cuda.device_of(x):
            kernels.hidden_kernel[_grid(tiles, num_text, num_rows, ffn_width)](
                x.contiguous(),
                *(w.contiguous() for w in weights),
                x if order is None else order,
                hidden,
                num_text,
                num_rows,
                width,
                ffn_width,
                SORTED=order is None,
                **_launch_settings(tiles, width, ffn_width, x.dtype),
            )
    return hidden


@_hidden.register_fake
def _(x: Tensor, weights: list[Tensor], order: Tensor | None, num_text: int) -> Tensor:
    return x.new_empty(x.shape[0], weights[0].shape[0])


@register_flop_formula(torch.ops.mono_internvl.routed_hidden)
def _hidden_flop(x: torch.Size, weights: list[torch.Size], *_: Any, **__: Any) -> int:
    """Of shapes: gate and up."""
    return 2 * 2 * x[0] * weights[0].numel()


@torch.library.custom_op("mono_internvl::routed_hidden_backward", mutates_args=())
def _hidden_backward(
    x: Tensor,
    dy: Tensor,
    weights: list[Tensor],
    order: Tensor | None,
    num_text: int,
    keep_hidden: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of gate and up and the hidden rows, (N, I) sorted each.

    Args:
        x: (N, D) rows of the stream.
        dy: (N, D) gradient of the network's output.
        weights: Gate, up, down of the text expert, then of the visual one.
        order: (N,) sorted order, or None.
        num_text: Rows of the text expert.
        keep_hidden: Whether anyone wants the hidden rows; if not they are (0, I).
    """
    num_rows, width = x.shape
    ffn_width = weights[0].shape[0]
    d_gate, d_up = x.new_empty(num_rows, ffn_width), x.new_empty(num_rows, ffn_width)
    hidden = x.new_empty(num_rows if keep_hidden else 0, ffn_width)
    tiles = tiles_for("hidden_backward", x.dtype, max(num_text, num_rows - num_text))
    if num_rows:
        with torch.cuda.device_of(x):
            kernels.hidden_backward_kernel[_grid(tiles, num_text, num_rows, ffn_width)](
                x.contiguous(),
                dy.contiguous(),
                *(w.contiguous() for w in weights),
                x if order is None else order,
                hidden,
                d_gate,
                d_up,
                num_text,
                num_rows,
                width,
                ffn_width,
                SORTED=order is None,
                KEEP_HIDDEN=keep_hidden,
                **_launch_settings(tiles, width, ffn_width, x.dtype),
            )
    return hidden, d_gate, d_up


@_hidden_backward.register_fake
def _(
    x: Tensor,
    dy: Tensor,
    weights: list[Tensor],
    order: Tensor | None,
    num_text: int,
    keep_hidden: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    shape = x.shape[0], weights[0].shape[0]
    hidden = x.new_empty(shape[0] if keep_hidden else 0, shape[1])
    return hidden, x.new_empty(shape), x.new_empty(shape)


@register_flop_formula(torch.ops.mono_internvl.routed_hidden_backward)
def _hidden_backward_flop(
    x: torch.Size, dy: torch.Size, weights: list[torch.Size], *_: Any, **__: Any
) -> int:
    """Of shapes: the gradient of the hidden rows, which a backward pass owes.

    Gate and up, which the kernel makes again, are not counted, so that all count the same. It
    counts for every row also where neither rows nor gate nor up want a gradient: it is made.
    """
    return 2 * x[0] * weights[0].numel()


@torch.library.custom_op("mono_internvl::routed_weight_gradient", mutates_args=())
def _weight_gradient(
    dy: Tensor,
    x: Tensor,
    order: Tensor | None,
    start: int,
    stop: int,
    dy_sorted: bool,
    x_sorted: bool,
) -> Tensor:
    """(out, in) sum of dy^T x over the sorted rows [start, stop).

    Args:
        dy: (N, out), sorted or as in the stream.
        x: (N, in) likewise.
        order: (N,) sorted order, or None.
        start: First sorted row.
        stop: One past the last.
        dy_sorted: Whether `dy` is sorted.
        x_sorted: Whether `x` is.
    """
    num_out, num_in = dy.shape[1], x.shape[1]
    dw = x.new_empty(num_out, num_in)
    tiles = tiles_for("weight_gradient", x.dtype, stop - start)
    grid = (triton.cdiv(num_out, tiles.BLOCK_M) * triton.cdiv(num_in, tiles.BLOCK_N),)
    with torch.cuda.device_of(x):
        kernels.weight_gradient_kernel[grid](
            dy.contiguous(),
            x.contiguous(),
            x if order is None else order,
            dw,
            start,
            stop,
            num_out,
            num_in,
            DY_SORTED=dy_sorted or order is None,
            X_SORTED=x_sorted or order is None,
            **_common_settings(tiles, x.dtype),
        )
    return dw


@_weight_gradient.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    order: Tensor | None,
    start: int,
    stop: int,
    dy_sorted: bool,
    x_sorted: bool,
) -> Tensor:
    return x.new_empty(dy.shape[1], x.shape[1])


@register_flop_formula(torch.ops.mono_internvl.routed_weight_gradient)
def _weight_gradient_flop(
    dy: torch.Size,
    x: torch.Size,
    order: torch.Size | None,
    start: int,
    stop: int,
    *_: Any,
    **__: Any,
) -> int:
    """Of shapes: the rows of one expert."""
    return 2 * (stop - start) * dy[1] * x[1]


def _weight_gradients(
    dy: Tensor,
    x: Tensor,
    order: Tensor | None,
    num_text: int,
    wanted: tuple[bool, bool],
    dy_sorted: bool = False,
    x_sorted: bool = False,
) -> list[Tensor | None]:
    """Of the text and of the visual weight; None for one that is frozen."""
    parts = ((0, num_text), (num_text, x.shape[0]))
    return [
        _weight_gradient(dy, x, order, *part, dy_sorted, x_sorted) if is_wanted else None
        for part, is_wanted in zip(parts, wanted, strict=True)
    ]


class _SwiGLU(torch.autograd.Function):
    """Arguments: rows, sorted order, number of text rows, six weights."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, order: Tensor | None, num_text: int, *weights: Tensor
    ) -> Tensor:
        gate_text, up_text, down_text, gate_visual, up_visual, down_visual = weights
        ctx.num_text = num_text
        ctx.save_for_backward(x, order, *weights)
        hidden = _hidden(x, [gate_text, up_text, gate_visual, up_visual], order, num_text)  # (N, I)
        down = [down_text, down_visual]
        return _linear(hidden, None, down, [], order, num_text, True, False, False)  # (N, D)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, order, *weights = ctx.saved_tensors
        n, needs = ctx.num_text, ctx.needs_input_grad
        keep_hidden = needs[5] or needs[8]
        hidden, d_gate, d_up = _hidden_backward(x, dy, weights, order, n, keep_hidden)
        dx = None
        if needs[0]:
            pairs = [weights[0], weights[3], weights[1], weights[4]]
            dx = _linear(d_gate, d_up, pairs, [], order, n, True, False, True)
        gate = _weight_gradients(d_gate, x, order, n, (needs[3], needs[6]), dy_sorted=True)
        up = _weight_gradients(d_up, x, order, n, (needs[4], needs[7]), dy_sorted=True)
        down = _weight_gradients(dy, hidden, order, n, (needs[5], needs[8]), x_sorted=True)
        return dx, None, None, gate[0], up[0], down[0], gate[1], up[1], down[1]


class _Projection(torch.autograd.Function):
    """Arguments: rows, sorted order, number of text rows, two weights and two biases."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        order: Tensor | None,
        num_text: int,
        text: Tensor,
        visual: Tensor,
        text_bias: Tensor | None,
        visual_bias: Tensor | None,
    ) -> Tensor:
        ctx.num_text = num_text
        ctx.save_for_backward(x, order, text, visual)
        biases = [] if text_bias is None or visual_bias is None else [text_bias, visual_bias]
        weights = [text, visual]
        return _linear(x, None, weights, biases, order, num_text, False, False, False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, order, text, visual = ctx.saved_tensors
        n, needs = ctx.num_text, ctx.needs_input_grad
        dx = None
        if needs[0]:
            dx = _linear(dy, None, [text, visual], [], order, n, False, False, True)
        weights = _weight_gradients(dy, x, order, n, (needs[3], needs[4]))
        # A bias gradient is a sum over rows: the one place where rows are copied, D wide.
        biases: list[Tensor | None] = [None, None]
        if needs[5] or needs[6]:
            dy = dy if order is None else dy.index_select(0, order)
            biases = [dy[:n].sum(0) if needs[5] else None, dy[n:].sum(0) if needs[6] else None]
        return dx, None, None, *weights, *biases


def swiglu(x: Tensor, routing: Routing, pair: SwiGLUPair) -> Tensor:
    """(N, D) rows through their feed-forward expert."""
    x, pair = pair.under_autocast(x)
    return _SwiGLU.apply(x, routing.sorted_rows, routing.num_text, *pair.weights)


def linear(x: Tensor, routing: Routing, pair: LinearPair) -> Tensor:
    """(N, in) rows through their projection, to (N, out)."""
    x, pair = pair.under_autocast(x)
    text_bias, visual_bias = pair.text_bias, pair.visual_bias
    if (text_bias is None) != (visual_bias is None):
        zeros = torch.zeros_like(next(b for b in (text_bias, visual_bias) if b is not None))
        text_bias, visual_bias = (zeros if b is None else b for b in (text_bias, visual_bias))
    return _Projection.apply(
        x, routing.sorted_rows, routing.num_text, pair.text, pair.visual, text_bias, visual_bias
    )
