"""The routing order inside the matrix products: four Triton kernels, forward and backward.

Rows are never gathered into a copy: a tile belongs to one expert, reads its rows of the stream
through the sorted order, and writes its results either sorted (between two products) or back where
the rows came from. A tile never spans both experts, so a pure image run costs no masked work.

Legend: N rows, "sorted": text rows first; M, N, K sides of a product's tile; D width, I
feed-forward width. All tensors are contiguous; `linear_kernel` is told its weights' strides.
"""

import triton
import triton.language as tl


@triton.jit
def _place(
    num_text: tl.tensor,
    num_rows: tl.tensor,
    num_columns: tl.tensor,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP_M: tl.constexpr,
) -> tl.tensor:
    """Expert, first sorted row, end of the expert's rows and column tile of this program.

    Neighbouring programs share GROUP_M row tiles, so that weights and rows stay in the cache.
    """
    program = tl.program_id(0)
    text_tiles = tl.cdiv(num_text, BLOCK_M)
    row_tiles = text_tiles + tl.cdiv(num_rows - num_text, BLOCK_M)
    column_tiles = tl.cdiv(num_columns, BLOCK_N)
    first = program // (GROUP_M * column_tiles) * GROUP_M
    size = tl.minimum(row_tiles - first, GROUP_M)
    within = program % (GROUP_M * column_tiles)
    row_tile = first + within % size
    is_visual = row_tile >= text_tiles
    start = tl.where(is_visual, num_text + (row_tile - text_tiles) * BLOCK_M, row_tile * BLOCK_M)
    stop = tl.where(is_visual, num_rows, num_text)
    return is_visual, start, stop, within // size


@triton.jit
def _either(is_visual: tl.tensor, text: tl.tensor, visual: tl.tensor) -> tl.tensor:
    """The pointer of this tile's expert."""
    chosen = text
    if is_visual:
        chosen = visual
    return chosen


@triton.jit
def _load(
    pointers: tl.tensor, mask: tl.tensor, EVEN: tl.constexpr, UPCAST: tl.constexpr
) -> tl.tensor:
    """A tile; no mask where the sizes divide. UPCAST: the interpreter's bf16 dot is wrong."""
    if EVEN:
        tile = tl.load(pointers)
    else:
        tile = tl.load(pointers, mask=mask, other=0.0)
    if UPCAST:
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def _stream_rows(
    order: tl.tensor, rows: tl.tensor, is_row: tl.tensor, SORTED: tl.constexpr
) -> tl.tensor:
    """Where sorted rows lie: in place where the tensor is sorted itself, else by the order."""
    if SORTED:
        found = tl.where(is_row, rows, 0).to(tl.int64)
    else:
        found = tl.load(order + rows, mask=is_row, other=0)
    return found


@triton.jit(do_not_specialize=["num_text", "num_rows"])
def linear_kernel(
    x: tl.tensor,
    text: tl.tensor,
    visual: tl.tensor,
    x2: tl.tensor,
    text2: tl.tensor,
    visual2: tl.tensor,
    text_bias: tl.tensor,
    visual_bias: tl.tensor,
    order: tl.tensor,
    y: tl.tensor,
    num_text: tl.tensor,
    num_rows: tl.tensor,
    num_in: tl.tensor,
    num_out: tl.tensor,
    stride_out: tl.tensor,
    stride_in: tl.tensor,
    IN_SORTED: tl.constexpr,
    OUT_SORTED: tl.constexpr,
    PAIRED: tl.constexpr,
    BIASED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    EVEN_K: tl.constexpr,
    EVEN_N: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """y = x W + b with the W of each row's expert; PAIRED adds x2 W2 before rounding.

    Rows are read sorted or through the order and written likewise. `stride_out` and `stride_in` are
    the weight's: swapped, the same kernel gives the gradient of the rows.
    """
    is_visual, start, stop, column_tile = _place(
        num_text, num_rows, num_out, BLOCK_M, BLOCK_N, GROUP_M
    )
    rows = start + tl.arange(0, BLOCK_M)
    is_row = rows < stop
    columns = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    is_column = (columns < num_out)[None, :]
    steps = tl.arange(0, BLOCK_K)
    x_rows = _stream_rows(order, rows, is_row, IN_SORTED)[:, None] * num_in + steps[None, :]
    w_tile = columns[None, :].to(tl.int64) * stride_out + steps[:, None].to(tl.int64) * stride_in
    w = _either(is_visual, text, visual)
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, num_in, BLOCK_K):
        inside = steps + k < num_in
        a = _load(x + x_rows + k, inside[None, :], EVEN_K, UPCAST)
        offset = w_tile + tl.cast(k, tl.int64) * stride_in
        b = _load(w + offset, inside[:, None] & is_column, EVEN_K and EVEN_N, UPCAST)
        total = tl.dot(a, b, total, input_precision=PRECISION)
    if PAIRED:
        w2 = _either(is_visual, text2, visual2)
        for k in range(0, num_in, BLOCK_K):
            inside = steps + k < num_in
            a = _load(x2 + x_rows + k, inside[None, :], EVEN_K, UPCAST)
            offset = w_tile + tl.cast(k, tl.int64) * stride_in
            b = _load(w2 + offset, inside[:, None] & is_column, EVEN_K and EVEN_N, UPCAST)
            total = tl.dot(a, b, total, input_precision=PRECISION)
    if BIASED:
        bias = _either(is_visual, text_bias, visual_bias)
        total += tl.load(bias + columns, mask=columns < num_out, other=0.0).to(tl.float32)[None, :]
    out_rows = _stream_rows(order, rows, is_row, OUT_SORTED)
    tl.store(
        y + out_rows[:, None] * num_out + columns[None, :],
        total.to(y.dtype.element_ty),
        mask=is_row[:, None] & is_column,
    )


@triton.jit(do_not_specialize=["num_text", "num_rows"])
def hidden_kernel(
    x: tl.tensor,
    gate_text: tl.tensor,
    up_text: tl.tensor,
    gate_visual: tl.tensor,
    up_visual: tl.tensor,
    order: tl.tensor,
    hidden: tl.tensor,
    num_text: tl.tensor,
    num_rows: tl.tensor,
    width: tl.tensor,
    ffn_width: tl.tensor,
    SORTED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    EVEN_K: tl.constexpr,
    EVEN_N: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """hidden = silu(x Wg) * (x Wu), (N, I) sorted; gate and up stay in registers, in fp32."""
    is_visual, start, stop, column_tile = _place(
        num_text, num_rows, ffn_width, BLOCK_M, BLOCK_N, GROUP_M
    )
    rows = start + tl.arange(0, BLOCK_M)
    is_row = rows < stop
    columns = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    is_column = (columns < ffn_width)[None, :]
    steps = tl.arange(0, BLOCK_K)
    x_rows = _stream_rows(order, rows, is_row, SORTED)[:, None] * width + steps[None, :]
    w_tile = columns[None, :].to(tl.int64) * width + steps[:, None]
    w_gate = _either(is_visual, gate_text, gate_visual)
    w_up = _either(is_visual, up_text, up_visual)
    gate = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    up = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, width, BLOCK_K):
        inside = steps + k < width
        is_weight = inside[:, None] & is_column
        a = _load(x + x_rows + k, inside[None, :], EVEN_K, UPCAST)
        b = _load(w_gate + w_tile + k, is_weight, EVEN_K and EVEN_N, UPCAST)
        gate = tl.dot(a, b, gate, input_precision=PRECISION)
        b = _load(w_up + w_tile + k, is_weight, EVEN_K and EVEN_N, UPCAST)
        up = tl.dot(a, b, up, input_precision=PRECISION)
    tl.store(
        hidden + rows[:, None].to(tl.int64) * ffn_width + columns[None, :],
        (gate * tl.sigmoid(gate) * up).to(hidden.dtype.element_ty),
        mask=is_row[:, None] & is_column,
    )


@triton.jit(do_not_specialize=["num_text", "num_rows"])
def hidden_backward_kernel(
    x: tl.tensor,
    dy: tl.tensor,
    gate_text: tl.tensor,
    up_text: tl.tensor,
    down_text: tl.tensor,
    gate_visual: tl.tensor,
    up_visual: tl.tensor,
    down_visual: tl.tensor,
    order: tl.tensor,
    hidden: tl.tensor,
    d_gate: tl.tensor,
    d_up: tl.tensor,
    num_text: tl.tensor,
    num_rows: tl.tensor,
    width: tl.tensor,
    ffn_width: tl.tensor,
    SORTED: tl.constexpr,
    KEEP_HIDDEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    EVEN_K: tl.constexpr,
    EVEN_N: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """Gate, up and dy Wd in one sweep over D; writes their gradients and the hidden rows, sorted.

    The forward pass keeps nothing that is I wide; three products with the same K make it again.
    """
    is_visual, start, stop, column_tile = _place(
        num_text, num_rows, ffn_width, BLOCK_M, BLOCK_N, GROUP_M
    )
    rows = start + tl.arange(0, BLOCK_M)
    is_row = rows < stop
    columns = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    is_column = (columns < ffn_width)[None, :]
    steps = tl.arange(0, BLOCK_K)
    x_rows = _stream_rows(order, rows, is_row, SORTED)[:, None] * width + steps[None, :]
    w_tile = columns[None, :].to(tl.int64) * width + steps[:, None]
    down_tile = steps[:, None].to(tl.int64) * ffn_width + columns[None, :]
    w_gate = _either(is_visual, gate_text, gate_visual)
    w_up = _either(is_visual, up_text, up_visual)
    w_down = _either(is_visual, down_text, down_visual)
    gate = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    up = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    d_hidden = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, width, BLOCK_K):
        inside = steps + k < width
        is_weight = inside[:, None] & is_column
        a = _load(x + x_rows + k, inside[None, :], EVEN_K, UPCAST)
        b = _load(w_gate + w_tile + k, is_weight, EVEN_K and EVEN_N, UPCAST)
        gate = tl.dot(a, b, gate, input_precision=PRECISION)
        b = _load(w_up + w_tile + k, is_weight, EVEN_K and EVEN_N, UPCAST)
        up = tl.dot(a, b, up, input_precision=PRECISION)
        a = _load(dy + x_rows + k, inside[None, :], EVEN_K, UPCAST)
        offset = down_tile + tl.cast(k, tl.int64) * ffn_width
        b = _load(w_down + offset, is_weight, EVEN_K and EVEN_N, UPCAST)
        d_hidden = tl.dot(a, b, d_hidden, input_precision=PRECISION)
    opened = tl.sigmoid(gate)
    silu = gate * opened
    place = rows[:, None].to(tl.int64) * ffn_width + columns[None, :]
    mask = is_row[:, None] & is_column
    dtype: tl.constexpr = d_gate.dtype.element_ty
    tl.store(d_up + place, (d_hidden * silu).to(dtype), mask=mask)
    slope = opened * (1 + gate * (1 - opened))
    tl.store(d_gate + place, (d_hidden * up * slope).to(dtype), mask=mask)
    if KEEP_HIDDEN:
        tl.store(hidden + place, (silu * up).to(dtype), mask=mask)


@triton.jit(do_not_specialize=["start", "stop"])
def weight_gradient_kernel(
    dy: tl.tensor,
    x: tl.tensor,
    order: tl.tensor,
    dw: tl.tensor,
    start: tl.tensor,
    stop: tl.tensor,
    num_out: tl.tensor,
    num_in: tl.tensor,
    DY_SORTED: tl.constexpr,
    X_SORTED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """dw (out, in) = the sum over one expert's sorted rows [start, stop) of dy^T x."""
    program = tl.program_id(0)
    row_tiles = tl.cdiv(num_out, BLOCK_M)
    column_tiles = tl.cdiv(num_in, BLOCK_N)
    first = program // (GROUP_M * column_tiles) * GROUP_M
    size = tl.minimum(row_tiles - first, GROUP_M)
    within = program % (GROUP_M * column_tiles)
    outs = (first + within % size) * BLOCK_M + tl.arange(0, BLOCK_M)
    ins = within // size * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(start, stop, BLOCK_K):
        rows = k + tl.arange(0, BLOCK_K)
        is_row = rows < stop
        dy_rows = _stream_rows(order, rows, is_row, DY_SORTED)[None, :] * num_out
        x_rows = _stream_rows(order, rows, is_row, X_SORTED)[:, None] * num_in
        is_a = (outs < num_out)[:, None] & is_row[None, :]
        a = _load(dy + dy_rows + outs[:, None], is_a, False, UPCAST)
        is_b = is_row[:, None] & (ins < num_in)[None, :]
        b = _load(x + x_rows + ins[None, :], is_b, False, UPCAST)
        total = tl.dot(a, b, total, input_precision=PRECISION)
    tl.store(
        dw + outs[:, None].to(tl.int64) * num_in + ins[None, :],
        total.to(dw.dtype.element_ty),
        mask=(outs < num_out)[:, None] & (ins < num_in)[None, :],
    )
