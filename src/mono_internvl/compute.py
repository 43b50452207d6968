"""What this machine computes with, decided once: device, precision, attention, threads, processes.

Nothing here knows processors by name. A CPU without bf16 instructions runs bf16 products some ten
to a hundred times slower than fp32, with nothing in its description that says so on every
architecture; a timed product of a few milliseconds does.
"""

from __future__ import annotations

import dataclasses
import math
import os
import statistics
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from mono_internvl.errors import ConfigError
from mono_internvl.experts.registry import AUTO, EAGER, default_implementation

Precision = Literal["auto", "bf16", "fp32"]
"""What can be asked of training; inference also knows "int8"."""
Resolved = Literal["bf16", "fp32", "int8"]
"""What a plan computes in. "int8" is inference alone: int8 weights, fp32 activations."""

ACCELERATORS = ("cuda", "xpu", "mps")
"""Devices that "auto" prefers to a CPU, best first. `xpu` and `mps` are reached by PyTorch's
documented interface and have not been tried on such hardware."""

_DEVICE_NAMES = "auto, cpu, cuda, cuda:N, xpu or mps"
_SHAPE = {"cpu": (64, 512)}
_SHAPE_ELSEWHERE = (4096, 4096)  # smaller products would time the launch
"""Rows and width of the timed products, (rows, width) x (width, width)."""
_ROUNDS = 5
_MOST_BF16 = {"cpu": 0.8}
_MOST_BF16_ELSEWHERE = 1.25
"""Time of bf16 over that of fp32 up to which bf16 is taken. A tie on a CPU goes to the accuracy of
fp32; on an accelerator, whose memory is the scarcer, to half the bytes."""
_HEADROOM = 1.25
"""Memory over that of the weights which a model needs to answer: activations, cache, image."""


@dataclass(frozen=True, kw_only=True)
class ComputePlan:
    """How a run computes.

    Attributes:
        device: As `torch.device` takes it.
        precision: "bf16" (autocast over fp32 weights in training, bf16 weights in inference),
            "fp32", or in inference "int8" (int8 weights, fp32 activations).
        attention: Attention implementation, as `attn_implementation` takes it.
        experts: Implementation of the experts, as `set_experts_implementation` takes it.
        threads: Of each process.
        processes: That share the work.
        bf16_cost: Time of a bf16 product over that of fp32 on this device; None if not measured.
        reason: Why this precision, in a few words; empty where it was asked for.
    """

    device: str
    precision: Resolved
    attention: str
    experts: str
    threads: int
    processes: int
    bf16_cost: float | None = None
    reason: str = ""

    def describe(self) -> str:
        """The plan as one line, printed before anything is computed."""
        why = f" ({self.reason})" if self.reason else ""
        many, more = "es" if self.processes != 1 else "", "s" if self.threads != 1 else ""
        return (
            f"plan: {self.device}, {self.precision}{why}, attention {self.attention}, experts "
            f"{self.experts}, {self.processes} process{many} x {self.threads} thread{more}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for run folders and result rows; with what this build of PyTorch uses."""
        return {**dataclasses.asdict(self), "cpu_capability": cpu_capability()}

    def with_precision(self, precision: str, reason: str = "as the run began") -> ComputePlan:
        """The same plan in another precision, with the attention that goes with it."""
        if precision == self.precision:
            return self
        attention = self.attention
        if attention == default_attention(self.device, self.precision):
            attention = default_attention(self.device, precision)
        resolved: Any = precision
        return dataclasses.replace(self, precision=resolved, attention=attention, reason=reason)


def make_plan(
    device: str = "auto",
    precision: str = "auto",
    *,
    attention: str | None = None,
    experts: str = "auto",
    threads: int | None = None,
    processes: int | None = None,
    batch_size: int = 1,
    process_bytes: int | None = None,
    fp32_bytes: int | None = None,
) -> ComputePlan:
    """Decide what is not given by what this machine can do.

    Args:
        device: "auto" (an accelerator if there is any, else the CPU), "cpu", "cuda", "cuda:1",
            "xpu" or "mps".
        precision: "auto", "bf16", "fp32", or where `fp32_bytes` is given "int8".
        attention: Attention implementation; by device and precision unless given.
        experts: Implementation of the experts; "auto" takes what was measured to be the fastest.
        threads: Of each process; the cores that the processes leave each of them unless given.
        processes: That share the work; on a CPU, unless given, the largest divisor of `batch_size`
            that has a core for each.
        batch_size: Samples that processes can share; 1 where they cannot.
        process_bytes: That each process holds; no more processes than fit are chosen.
        fp32_bytes: Of the weights in fp32, for inference alone: where they do not fit into the
            memory of the CPU, "auto" takes "int8".

    Raises:
        ConfigError: Device or precision is unknown or not there, or a number is out of range.
    """
    place = choose_device(device)
    for name, value in (("threads", threads), ("processes", processes)):
        if value is not None and value < 1:
            raise ConfigError(f"{name}={value}; expected a number >= 1, or leave it out")
    choices = (*get_args(Precision), *(("int8",) if fp32_bytes is not None else ()))
    if precision not in choices:
        raise ConfigError(f"precision={precision!r}; expected one of {', '.join(choices)}")
    if precision == "int8" and place.type != "cpu":
        raise ConfigError(f"precision='int8' on {place}: it is for a CPU; take bf16 or fp32")
    resolved, cost, reason = _precision(place, precision, fp32_bytes)
    if processes is None:
        most = cores() if place.type == "cpu" else 1
        if process_bytes and (free := available_bytes()) is not None:
            most = min(most, max(1, free // process_bytes))
        processes = _largest_divisor(batch_size, most)
    return ComputePlan(
        device=str(place),
        precision=resolved,
        attention=attention or default_attention(str(place), resolved),
        experts=_experts(experts, place),
        threads=threads or _threads(processes),
        processes=processes,
        bf16_cost=cost,
        reason=reason,
    )


def choose_device(name: str) -> torch.device:
    """The device of a name; "auto" takes an accelerator if there is any.

    Raises:
        ConfigError: The name is unknown, or there is no such device.
    """
    if name == "auto":
        name = next((kind for kind in ACCELERATORS if _count(kind)), "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device={name!r}; expected {_DEVICE_NAMES}") from error
    if device.type not in ("cpu", *ACCELERATORS):
        raise ConfigError(f"device={name!r}; expected {_DEVICE_NAMES}")
    if device.type != "cpu" and (device.index or 0) >= _count(device.type):
        raise ConfigError(
            f"device={name!r}: this machine has {_count(device.type)} {device.type} devices that "
            f"torch {torch.__version__} can use; take device='cpu'"
        )
    return device


def default_attention(device: str, precision: str) -> str:
    """The one answer to which attention runs fastest where.

    On a CPU, sdpa computes bf16 at the speed of fp32, blocks of plain products at that of the bf16
    units; in fp32 sdpa is the faster. See `docs/machines.md` for the figures.
    """
    return "blocked" if torch.device(device).type == "cpu" and precision == "bf16" else "sdpa"


@cache
def bf16_cost(device_type: str) -> float:
    """Time of a bf16 product over that of the same product in fp32, measured once per process.

    Interleaved, so that other work on the machine slows both; the median, so that one
    interruption does not count. Infinite where the device refuses bf16.
    """
    rows, width = _SHAPE.get(device_type, _SHAPE_ELSEWHERE)
    device = torch.device(device_type)
    try:
        operands = {
            dtype: (
                torch.ones(rows, width, dtype=dtype, device=device),
                torch.ones(width, width, dtype=dtype, device=device),
            )
            for dtype in (torch.float32, torch.bfloat16)
        }
        ratios = []
        for _ in range(_ROUNDS + 1):
            fp32, bf16 = (seconds_of_product(*pair) for pair in operands.values())
            ratios.append(bf16 / fp32)
    except RuntimeError:  # PyTorch's word for a dtype or product that a device does not have
        return math.inf
    return statistics.median(ratios[1:])  # the first run compiles


def seconds_of_product(x: torch.Tensor, weight: torch.Tensor) -> float:
    """Wall seconds of one product, waited for on an accelerator."""
    _wait(x.device)
    began = time.perf_counter()
    torch.nn.functional.linear(x, weight)
    _wait(x.device)
    return max(1e-9, time.perf_counter() - began)


def cpu_capability() -> str:
    """Vector instructions that PyTorch's own CPU kernels use here: "AVX2", "AVX512", "DEFAULT"."""
    return torch.backends.cpu.get_cpu_capability()


@cache
def cores() -> int:
    """Physical cores that this process may use: by affinity, and by the quota of its container."""
    if hasattr(os, "sched_getaffinity"):
        allowed = os.sched_getaffinity(0)
        found = len({_core_of(number) for number in allowed})
    else:
        found = os.cpu_count() or 1
    return max(1, min(found, _quota()))


def available_bytes() -> int | None:
    """Memory that can still be taken without swapping; None where the system does not say."""
    found = []
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        fields = dict(line.split(":", 1) for line in lines)
        found.append(1024 * int(fields["MemAvailable"].split()[0]))
    except (OSError, KeyError, ValueError):
        pass
    group = Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text())
        found.append(limit - int((group / "memory.current").read_text()))
    except (OSError, ValueError):  # no such file, or "max"
        pass
    if not found and "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}):
        found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min(found, default=None)


def _precision(
    place: torch.device, asked: str, fp32_bytes: int | None
) -> tuple[Resolved, float | None, str]:
    """The precision, what bf16 costs, and why."""
    if asked != "auto":
        resolved: Any = asked
        return resolved, None, ""
    cost = bf16_cost(place.type)
    if cost <= _MOST_BF16.get(place.type, _MOST_BF16_ELSEWHERE):
        return "bf16", cost, f"bf16 products {1 / cost:.1f}x faster"
    slow = f"bf16 products {cost:.0f}x slower" if cost >= 2 else "bf16 products no faster"
    known = None if math.isinf(cost) else cost
    slow = slow if known else "no bf16 here"
    free = available_bytes() if fp32_bytes is not None and place.type == "cpu" else None
    if fp32_bytes is not None and free is not None and _HEADROOM * fp32_bytes > free:
        needed, left = _HEADROOM * fp32_bytes / 1e9, free / 1e9
        return "int8", known, f"{slow}, fp32 needs {needed:.1f} GB of {left:.1f} GB"
    return "fp32", known, slow


def _count(kind: str) -> int:
    """Devices of a kind, by the interface that all of PyTorch's accelerators have."""
    return int(getattr(torch, kind).device_count())


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize()


def _experts(asked: str, place: torch.device) -> str:
    """ "auto" where another implementation than eager is the default of this device, else eager."""
    is_settled = asked == AUTO and default_implementation(place.type) == EAGER
    return EAGER if is_settled else asked


def _threads(processes: int) -> int:
    """The cores that so many processes leave each of them, or what OMP_NUM_THREADS asks for."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return int(asked) if asked.isdigit() and int(asked) else max(1, cores() // processes)


def _largest_divisor(number: int, most: int) -> int:
    return next(n for n in range(min(number, most), 0, -1) if number % n == 0)


def _core_of(cpu: int) -> tuple[str, ...]:
    """What tells the physical core of a logical one; itself where the system does not say."""
    topology = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology")
    try:
        return tuple((topology / name).read_text() for name in ("physical_package_id", "core_id"))
    except OSError:
        return (str(cpu),)


def _quota() -> int:
    """Whole cores of the container's quota, rounded up; without limit, more than any machine."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, math.ceil(int(quota) / int(period)))
    except (OSError, ValueError):  # no such file, or "max"
        return 1 << 20
