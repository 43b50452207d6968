"""What a device can do with products of such sizes: one large product, timed in the same run."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import torch

from mono_internvl.bench.models import Setting
from mono_internvl.bench.rows import BenchRow
from mono_internvl.bench.timing import Subject

GEMM = "one matrix product"
_ROWS = {"cpu": 1024, "cuda": 8192}


def one_product(setting: Setting) -> Subject:
    """A product as large as one of an expert's, of many rows."""
    random = functools.partial(torch.randn, dtype=setting.dtype, device=setting.device)
    a = random(_ROWS[setting.device.type], setting.size.width)
    b = random(setting.size.width, setting.size.ffn_width)
    return Subject(GEMM, functools.partial(torch.mm, a, b))


def rate_of_one_product(rows: Sequence[BenchRow]) -> float:
    """1e9 operations per second of the row that `one_product` gave."""
    row = next(row for row in rows if row.subject == GEMM)
    return (row.gflop or 0.0) / row.p50


def against_one_product(rows: Sequence[BenchRow]) -> list[BenchRow]:
    """The other rows, each with the share of that rate which its weight products reach.

    The time of a row is all of it: attention, norms and copies lower its `share_of_gemm_rate`.
    """
    rate = rate_of_one_product(rows)
    return [
        dataclasses.replace(
            row,
            notes={
                **row.notes,
                "share_of_gemm_rate": round((row.gflop or 0.0) / row.p50 / rate, 3),
            },
        )
        for row in rows
        if row.subject != GEMM
    ]
