"""What a verb says of its compute plan, before anything heavy is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from mono_internvl.compute import ComputePlan


def say_plan(plan: ComputePlan) -> None:
    """A line beside the output proper."""
    typer.echo(plan.describe(), err=True)
