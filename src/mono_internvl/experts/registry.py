"""The implementations of the experts by name, where each runs, and where it is the default.

The definition (`eager`) lives in the model file; what is registered here imitates it. One that was
asked for by name and cannot run raises; only `auto` may choose.

Legend: N rows, D width, I feed-forward width.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Protocol, cast

from torch import Tensor, nn

from mono_internvl.errors import ExpertsUnavailable
from mono_internvl.experts.pairs import LinearPair, SwiGLUPair, expert_pair
from mono_internvl.experts.routing import Routing

EAGER, AUTO = "eager", "auto"


class Implementation(Protocol):
    """What a module behind a name has to offer.

    `swiglu` and `linear` take all rows of the stream in their own order, (N, D), and give all rows
    back in that order; `routing` may send any number of them, none and all too, to either expert.
    """

    def check(self, x: Tensor) -> None:
        """Refuse rows that it cannot take, by their dtype or by what their device can do.

        Raises:
            ExpertsUnavailable: With the reason.
        """
        ...

    def swiglu(self, x: Tensor, routing: Routing, pair: SwiGLUPair) -> Tensor:
        """(N, D) rows through their feed-forward expert."""
        ...

    def linear(self, x: Tensor, routing: Routing, pair: LinearPair) -> Tensor:
        """(N, in) rows through their projection, to (N, out)."""
        ...


@dataclass(frozen=True)
class Entry:
    """A registered implementation.

    Attributes:
        module: Full name of the module, an `Implementation`.
        devices: Types of the devices on which it runs.
        default_devices: Those of them on which a measurement found it the fastest: `auto` takes it.
        extra: Of this package, which installs what the module needs; None where nothing is needed.
    """

    module: str
    devices: tuple[str, ...]
    default_devices: tuple[str, ...] = ()
    extra: str | None = None


_ENTRIES: dict[str, Entry] = {}
# Looked up while `torch.compile` traces, where nothing can be imported.
_LOADED: dict[str, Implementation] = {}


def register_implementation(name: str, entry: Entry) -> None:
    """Make an implementation known by its name.

    Raises:
        ValueError: The name is taken, a default device is none of its devices, or a device has
            another default already.
    """
    if name in (AUTO, EAGER) or _ENTRIES.get(name, entry) != entry:
        raise ValueError(f"an implementation {name!r} is registered already")
    for device in entry.default_devices:
        if device not in entry.devices:
            raise ValueError(f"{name!r} does not run on its default device {device!r}")
        if default_implementation(device) not in (EAGER, name):
            raise ValueError(f"{default_implementation(device)!r} is the default on {device!r}")
    _ENTRIES[name] = entry


def implementation_names() -> tuple[str, ...]:
    """The names that may be asked for."""
    return (AUTO, EAGER, *_ENTRIES)


def default_implementation(device: str) -> str:
    """What `auto` takes on devices of a type: eager where nothing was measured to be faster."""
    for name, entry in _ENTRIES.items():
        if device in entry.default_devices:
            return name
    return EAGER


def check_implementation(name: str) -> None:
    """Refuse a name that is not known, or whose package is not installed.

    Device, dtype and modules are looked at when the first rows come, since a model may be moved
    after the setting.

    Raises:
        ExpertsUnavailable: With the names there are, or with what is missing.
    """
    if name not in implementation_names():
        raise ExpertsUnavailable(
            f"experts_implementation={name!r}: there is none of this name; expected one of "
            f"{', '.join(implementation_names())}"
        )
    if name not in (AUTO, EAGER):
        load_implementation(name)


def load_implementation(name: str) -> Implementation:
    """The module behind a registered name.

    Raises:
        ExpertsUnavailable: A package that it needs is not installed.
    """
    if name not in _LOADED:
        entry = _ENTRIES[name]
        try:
            module = importlib.import_module(entry.module)
        except ModuleNotFoundError as error:
            raise ExpertsUnavailable(
                f"experts_implementation={name!r} needs the package {error.name!r}, which is not "
                f"installed; pip install 'mono-internvl[{entry.extra}]', or take "
                "experts_implementation='auto'"
            ) from error
        _LOADED[name] = cast(Implementation, module)
    return _LOADED[name]


def implementation_for(name: str, x: Tensor) -> Implementation:
    """A registered implementation, once it is known to take such rows where they are.

    Raises:
        ExpertsUnavailable: A package is missing, or the reason why it cannot take them.
    """
    implementation, devices = load_implementation(name), _ENTRIES[name].devices
    if x.device.type not in devices:
        raise ExpertsUnavailable(f"rows are on {x.device}; it needs {' or '.join(devices)}")
    implementation.check(x)
    return implementation


def run_implementation(
    x: Tensor, routing: Routing, text: nn.Module, visual: nn.Module
) -> Tensor | None:
    """Rows through the implementation that `routing` names, or None where eager is to do it.

    Args:
        x: (N, D).
        routing: Which rows are visual, and who computes them.
        text: The text expert: a feed-forward network or a projection.
        visual: Its visual copy.

    Raises:
        ExpertsUnavailable: It was asked for by name and cannot take these rows or modules.
    """
    asked = routing.implementation
    name = default_implementation(x.device.type) if asked == AUTO else asked
    if name == EAGER:
        return None
    try:
        implementation, pair = implementation_for(name, x), expert_pair(text, visual)
    except ExpertsUnavailable as error:
        if asked == AUTO:
            return None
        raise ExpertsUnavailable(
            f"experts_implementation={name!r}: {error}; take experts_implementation='auto'"
        ) from None
    if isinstance(pair, SwiGLUPair):
        return implementation.swiglu(x, routing, pair)
    return implementation.linear(x, routing, pair)


# No default anywhere: the kernels have not been measured on a device yet.
register_implementation(
    "triton", Entry("mono_internvl.experts.triton_experts", devices=("cuda",), extra="gpu")
)
