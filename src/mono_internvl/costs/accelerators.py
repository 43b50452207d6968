"""What accelerators can do by their data sheets."""

from __future__ import annotations

from dataclasses import dataclass

from mono_internvl.errors import ConfigError


@dataclass(frozen=True)
class Accelerator:
    """One accelerator.

    Attributes:
        name: On the command line.
        model: Part of the name that its driver gives.
        memory_bytes: Of the device.
        peak_tflops: Dense bf16 products, 1e12 operations per second.
    """

    name: str
    model: str
    memory_bytes: int
    peak_tflops: float


ACCELERATORS: dict[str, Accelerator] = {
    one.name: one
    for one in (
        Accelerator("a100-40g", "A100", 40 * 10**9, 312.0),
        Accelerator("a100-80g", "A100", 80 * 10**9, 312.0),
        Accelerator("h100-80g", "H100", 80 * 10**9, 989.0),
        Accelerator("h200-141g", "H200", 141 * 10**9, 989.0),
        Accelerator("l40s-48g", "L40S", 48 * 10**9, 362.0),
        Accelerator("mi300x-192g", "MI300X", 192 * 10**9, 1307.0),
    )
}
"""By name; the SXM form where there are several.

Source: data sheets of NVIDIA and AMD, without sparsity.
"""


def accelerator(name: str) -> Accelerator:
    """An accelerator by its name.

    Raises:
        ConfigError: There is none of that name.
    """
    if name.lower() not in ACCELERATORS:
        raise ConfigError(f"gpu={name!r} is not known; choose from {', '.join(ACCELERATORS)}")
    return ACCELERATORS[name.lower()]


def peak_tflops_of(device: str) -> float | None:
    """Peak rate of a device by the name that its driver gives; None where it is not known."""
    return next((one.peak_tflops for one in ACCELERATORS.values() if one.model in device), None)
