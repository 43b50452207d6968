"""`mono-internvl bench WHAT`: name a comparison, get its rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from mono_internvl.bench.decode import bench_decode, bench_prefix
from mono_internvl.bench.experts import bench_experts, bench_gpu
from mono_internvl.bench.images import bench_images
from mono_internvl.bench.models import Size, size_of
from mono_internvl.bench.prefill import bench_modular, bench_prefill
from mono_internvl.bench.rows import BenchRow, Target
from mono_internvl.bench.serve import bench_serve
from mono_internvl.bench.targets import bench_targets, training_size
from mono_internvl.bench.train import bench_train
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


Rows = Sequence[BenchRow | Target]


def _plain(run: Callable[..., Rows]) -> Callable[[Setting], Rows]:
    def with_setting(setting: Setting) -> Rows:
        return run(
            setting.size,
            dtype=setting.dtype,
            device=setting.device,
            rounds=setting.rounds,
            command=setting.command,
        )

    return with_setting


def _prefill(setting: Setting) -> Rows:
    run = partial(bench_prefill, with_variants=setting.size.name != "2b")
    return _plain(run)(setting)


def _train(setting: Setting) -> Rows:
    return _plain(bench_train)(replace(setting, size=training_size(setting.size)))


def _images(setting: Setting) -> Rows:
    return bench_images(rounds=setting.rounds, command=setting.command)


def _targets(setting: Setting) -> Rows:
    rows, targets = bench_targets(
        setting.size, device=setting.device, rounds=setting.rounds, command=setting.command
    )
    return [*rows, *targets]


COMPARISONS: dict[str, Callable[[Setting], Rows]] = {
    "prefill": _prefill,
    "modular": _plain(bench_modular),
    "decode": _plain(bench_decode),
    "prefix": _plain(bench_prefix),
    "train": _train,
    "serve": _plain(bench_serve),
    "images": _images,
    "targets": _targets,
    "experts": _plain(bench_experts),
    "gpu": _plain(bench_gpu),
}
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
