"""Compile every kernel for a device that need not be here, as it would be launched."""

import inspect
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mono_internvl.experts import triton_experts, triton_kernels

WIDTH, FFN_WIDTH, ROWS = 2048, 8192, 4096
SIZES = {"num_in": WIDTH, "num_out": FFN_WIDTH, "width": WIDTH, "ffn_width": FFN_WIDTH}
STRIDES = {"stride_out": WIDTH, "stride_in": 1}
TRANSPOSED = {"stride_out": 1, "stride_in": WIDTH}
"""Of a weight that is read the other way round, for the gradient of the rows."""
COUNTS = ("num_text", "num_rows", "start", "stop")
# Shared memory of one thread block, bytes (CUDA C++ programming guide, compute capabilities).
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
FLAGS = {
    "linear": {"IN_SORTED": True, "OUT_SORTED": False, "PAIRED": True, "BIASED": True},
    "hidden": {"SORTED": False},
    "hidden_backward": {"SORTED": False, "KEEP_HIDDEN": True},
    "weight_gradient": {"DY_SORTED": True, "X_SORTED": False},
}


def compile_kernel(
    kernel: str,
    dtype: torch.dtype,
    capability: int,
    rows: int = ROWS,
    strides: dict[str, int] = STRIDES,
) -> Any:
    """The compiled kernel: its PTX, cubin and metadata.

    Args:
        kernel: Key of `TILES`.
        dtype: Of the operands.
        capability: 80, 90 or 100.
        rows: Of the larger expert; few rows get low tiles.
        strides: Of the weights of `linear`.
    """
    function = getattr(triton_kernels, f"{kernel}_kernel")
    tiles = triton_experts.tiles_for(kernel, dtype, rows)
    settings = triton_experts._launch_settings(tiles, WIDTH, FFN_WIDTH, dtype)
    names = list(inspect.signature(function.fn).parameters)
    settings = {k: v for k, v in settings.items() if k in names} | FLAGS[kernel]
    element = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.float16: "*fp16"}[dtype]
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], list[list[object]]] = {}
    for i, name in enumerate(names):
        values = {**settings, **{k: v for k, v in strides.items() if v == 1}}
        if name in values:
            signature[name], constants[name] = "constexpr", values[name]
        elif name in COUNTS:
            signature[name] = "i32"
        else:
            is_size = name in SIZES or name in STRIDES
            signature[name] = "i32" if is_size else "*i64" if name == "order" else element
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(function, signature, constants, attributes)
    target = GPUTarget("cuda", capability, 32)
    options = {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages}
    return triton.compile(source, target=target, options=options)
