"""What two processes do in tests of sharding; top-level, so that it can be sent there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch.distributed.tensor import DTensor

from mono_internvl.distributed import rank
from mono_internvl.training import loop
from mono_internvl.training.loop import train_stage
from mono_internvl.training.parallel import Parallel
from mono_internvl.training.progress import StageProgress
from mono_internvl.training.recipe import Stage

Plan = tuple[Parallel, Stage, Path, int]
"""A way, a stage, its run folder, and the step after which it is stopped (0: not at all)."""


class Stopped(Exception):
    """Stands for what ends a run before its time."""


def train_plans(plans: list[Plan], start: Path, data: Path, notes: Path) -> None:
    """Train stages one after another; note down what this process holds of each."""
    update, step = StageProgress.update, loop._Loop._step
    held: dict[str, dict[str, tuple[int, int]]] = {}

    def look(self: Any, *arguments: Any) -> Any:
        row = step(self, *arguments)
        moments = [x for of in arguments[2].state.values() for x in of.values() if x.dim()]
        for name, tensors in (("weights", list(self.model.parameters())), ("moments", moments)):
            local = [x.to_local() if isinstance(x, DTensor) else x for x in tensors]
            sizes = (sum(x.numel() for x in local), sum(x.numel() for x in tensors))
            held.setdefault(self.run.name, {})[name] = sizes
        return row

    for parallel, stage, run, last in plans:

        def stop(self: StageProgress, row: dict[str, Any], last: int = last) -> None:
            if row["step"] == last:
                raise Stopped

        try:
            StageProgress.update, loop._Loop._step = stop, look  # type: ignore[method-assign]
            train_stage(stage, start, data, run, parallel=parallel)
        except Stopped:
            pass
        finally:
            StageProgress.update, loop._Loop._step = update, step  # type: ignore[method-assign]
    (notes / f"held-{rank()}.json").write_text(json.dumps(held))
