"""How long a recipe will take on this machine, from a few real steps of each stage."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mono_internvl.compute import ComputePlan
from mono_internvl.training.loop import StepTime, time_steps
from mono_internvl.training.recipe import Stage

_AROUND_TRAINING = 1.1
"""Time of a whole quickstart over that of its training steps: evaluations, set-up, states. The
evaluations were 7 % of the training in fp32 (2.4 of 35 CPU minutes)."""


@dataclass(frozen=True)
class Estimate:
    """What is still to be done.

    Attributes:
        seconds: Wall seconds of each stage that is left, by its name, in order.
        cpu_minutes: Of all of them, all processes together.
    """

    seconds: Mapping[str, float]
    cpu_minutes: float

    def describe(self) -> str:
        """The estimate as one line."""
        return (
            f"estimate: {in_minutes(sum(self.seconds.values()))}, {self.cpu_minutes:.1f} CPU "
            "minutes (a few steps of each stage were timed)"
        )

    def seconds_left(self, done: Sequence[str], took_s: float) -> float:
        """Wall seconds that are left, corrected by what the stages before took.

        Args:
            done: Names of the stages that were trained since the estimate.
            took_s: Wall seconds that they took.
        """
        expected = sum(self.seconds.get(name, 0.0) for name in done)
        left = sum(seconds for name, seconds in self.seconds.items() if name not in done)
        return left * took_s / expected if expected else left


def estimate(stages: Sequence[Stage], start: Path, data: Path, compute: ComputePlan) -> Estimate:
    """Time a few steps of each stage in this process, as one of the plan's processes takes them.

    What processes wait for each other is not in it.

    Args:
        stages: That are left.
        start: Checkpoint with the shapes of all of them.
        data: Folder of their meta files.
        compute: What they are trained with.
    """
    times: dict[str, StepTime] = {}
    for stage in stages:
        own = dataclasses.replace(stage, batch_size=max(1, stage.batch_size // compute.processes))
        times[stage.name] = time_steps(own, start, data, compute)
    steps = {stage.name: stage.steps * _AROUND_TRAINING for stage in stages}
    cpu_s = sum(steps[name] * time.cpu_s for name, time in times.items())
    return Estimate(
        seconds={name: steps[name] * time.wall_s for name, time in times.items()},
        cpu_minutes=compute.processes * cpu_s / 60,
    )


def in_minutes(seconds: float) -> str:
    """A time as a person waits for it."""
    if seconds < 90:
        return f"about {max(10, 10 * round(seconds / 10))} seconds"
    return f"about {round(seconds / 60)} minutes"
