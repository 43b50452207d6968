"""The expert paths by name, and which of them runs where.

The definition (`eager`) lives in the model file; every path here imitates it. A path that was asked
for by name and cannot run raises; only `auto` may choose.

Legend: N rows, D width, I feed-forward width.
"""

from __future__ import annotations

import importlib
from typing import Protocol, cast

from torch import Tensor, nn

from mono_internvl.errors import ExpertPathUnavailable
from mono_internvl.experts import dense, grouped
from mono_internvl.experts.crossovers import fastest_path
from mono_internvl.experts.pairs import LinearPair, SwiGLUPair, expert_pair
from mono_internvl.experts.routing import Routing

EAGER, AUTO = "eager", "auto"
EXPERT_PATHS = (AUTO, EAGER, "grouped", "triton", "dense")


class ExpertPath(Protocol):
    """What a module behind a name has to offer: two functions and a reason not to run.

    Every function takes all rows of the stream in their own order, (N, D), and gives all rows back
    in that order; `routing` may send any number of them, none and all too, to either expert.
    """

    def unavailable(self, x: Tensor) -> str | None:
        """Why this path cannot take `x` here (device, dtype, package), or None."""
        ...

    def swiglu(self, x: Tensor, routing: Routing, pair: SwiGLUPair) -> Tensor:
        """(N, D) rows through their feed-forward expert."""
        ...

    def linear(self, x: Tensor, routing: Routing, pair: LinearPair) -> Tensor:
        """(N, D) rows through their projection."""
        ...


# Looked up while `torch.compile` traces, where nothing can be imported; Triton joins on demand.
_PATHS: dict[str, ExpertPath] = {
    "grouped": cast(ExpertPath, grouped),
    "dense": cast(ExpertPath, dense),
}


def check_expert_path(name: str) -> None:
    """Refuse a name that is not known, or whose package is not installed.

    Device, dtype and modules are looked at when the first rows come, since a model may be moved
    after the setting.

    Raises:
        ExpertPathUnavailable: With the names there are, or with what is missing.
    """
    if name not in EXPERT_PATHS:
        raise ExpertPathUnavailable(
            f"expert_path={name!r}: there is no such path; expected one of "
            f"{', '.join(EXPERT_PATHS)}"
        )
    if name not in (AUTO, EAGER):
        expert_path(name)


def expert_path(name: str) -> ExpertPath:
    """The path behind a name of `EXPERT_PATHS` other than "auto" and "eager".

    Raises:
        ExpertPathUnavailable: A package that it needs is not installed.
    """
    if name not in _PATHS:
        try:
            module = importlib.import_module("mono_internvl.experts.triton_path")
        except ModuleNotFoundError as error:
            raise ExpertPathUnavailable(
                f"expert_path={name!r} needs the package {error.name!r}, which is not installed; "
                "pip install 'mono-internvl[gpu]', or take expert_path='auto'"
            ) from error
        _PATHS[name] = cast(ExpertPath, module)
    return _PATHS[name]


def run_fast_path(x: Tensor, routing: Routing, text: nn.Module, visual: nn.Module) -> Tensor | None:
    """Rows through the path that `routing.path` asks for, or None where eager is to do it.

    Norms have no fast path: they cost next to nothing and are always eager.

    Args:
        x: (N, D), of both kinds.
        routing: Which rows are visual, and by which path.
        text: The text expert: a feed-forward network or a projection.
        visual: Its visual copy.

    Raises:
        ExpertPathUnavailable: The path was asked for by name and cannot take these rows or modules.
    """
    if routing.path == EAGER:
        return None
    pair = expert_pair(text, visual)
    if pair is None:
        return None
    name = routing.path
    if name == AUTO:
        if isinstance(pair, str):
            return None
        name = fastest_path(x, routing)
        if name == EAGER:
            return None
    if isinstance(pair, str):
        raise ExpertPathUnavailable(
            f"expert_path={name!r}: {pair}, which only eager handles; take expert_path='auto'"
        )
    path = expert_path(name)
    if reason := path.unavailable(x):
        raise ExpertPathUnavailable(f"expert_path={name!r}: {reason}; take expert_path='auto'")
    if isinstance(pair, SwiGLUPair):
        return path.swiglu(x, routing, pair)
    return path.linear(x, routing, pair)
