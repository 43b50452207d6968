"""`mono-internvl bench WHAT`: name a comparison, get its rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from mono_internvl.bench.models import Size, size_of
from mono_internvl.bench.prefill import bench_prefill
from mono_internvl.bench.rows import BenchRow, Target
from mono_internvl.errors import ConfigError
from mono_internvl.model.devices import choose_device

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Setting:
    """What a comparison is run with.

    Attributes:
        size: Model and prompt.
        dtype: Of weights and activations.
        device: Where.
        rounds: Interleaved runs of every subject.
        command: What gives the rows again.
    """

    size: Size
    dtype: torch.dtype
    device: torch.device
    rounds: int
    command: str


Rows = list[BenchRow] | list[Target] | list[BenchRow | Target]


def _prefill(setting: Setting) -> Rows:
    return bench_prefill(
        setting.size,
        dtype=setting.dtype,
        device=setting.device,
        rounds=setting.rounds,
        command=setting.command,
        with_variants=setting.size.name != "2b",
    )


COMPARISONS: dict[str, Callable[[Setting], Rows]] = {"prefill": _prefill}
"""Name -> what runs it."""


def bench(
    what: str,
    *,
    size: str = "middle",
    layers: int | None = None,
    dtype: str = "bfloat16",
    device: str = "cpu",
    rounds: int = 5,
) -> Rows:
    """Run one comparison.

    Args:
        what: One of `COMPARISONS`.
        size: "tiny", "middle" or "2b".
        layers: Decoder layers, where they should differ from the size's own.
        dtype: "float32" or "bfloat16".
        device: "auto", "cpu", "cuda" or "cuda:1".
        rounds: Interleaved runs of every subject.

    Raises:
        ConfigError: A name or number out of range.
    """
    if what not in COMPARISONS:
        raise ConfigError(f"bench {what!r} is not known; choose from {', '.join(COMPARISONS)}")
    if dtype not in DTYPES:
        raise ConfigError(f"dtype={dtype!r}; expected one of {', '.join(DTYPES)}")
    if rounds < 1 or (layers is not None and layers < 1):
        raise ConfigError(f"rounds={rounds}, layers={layers}; expected numbers >= 1")
    chosen = size_of(size)
    command = f"mono-internvl bench {what} --size {size} --dtype {dtype} --rounds {rounds}"
    if layers is not None:
        chosen = replace(chosen, layers=layers)
        command += f" --layers {layers}"
    place = choose_device(device)
    if place.type != "cpu":
        command += f" --device {device}"
    return COMPARISONS[what](Setting(chosen, DTYPES[dtype], place, rounds, command))
