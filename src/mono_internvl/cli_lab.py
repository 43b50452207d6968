"""Verbs of `mono-internvl lab` that measure the quickstart itself: its seeds and its rates."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

lab = typer.Typer(help="Experiments in the miniature.", no_args_is_help=True)


@lab.command("seeds")
def lab_seeds(
    out: Annotated[Path, typer.Option(help="Run folder.")] = Path("runs/seeds"),
    seeds: Annotated[
        list[int] | None, typer.Option("--seed", help="One run each; 0, 1 and 2.")
    ] = None,
    precision: Annotated[str, typer.Option(help="auto, bf16 or fp32.")] = "auto",
    processes: Annotated[int, typer.Option(min=1, help="Runs side by side.")] = 1,
) -> None:
    """Run the quickstart with several seeds; a row for each."""
    from mono_internvl.pipelines.lab_seeds import compare_seeds
    from mono_internvl.recipes.miniature import SEEDS

    rows = compare_seeds(out, seeds=seeds or SEEDS, precision=precision, processes=processes)
    typer.echo(f"rows: {rows}")


@lab.command("rates")
def lab_rates(
    out: Annotated[Path, typer.Option(help="Run folder.")] = Path("runs/rates"),
    factors: Annotated[
        list[float] | None, typer.Option("--factor", help="One run each; 0.5, 1 and 2.")
    ] = None,
    quick: Annotated[bool, typer.Option(help="The same path with small numbers.")] = False,
    processes: Annotated[int, typer.Option(min=1, help="Runs side by side.")] = 1,
) -> None:
    """Multiply all rates by factors and score each on the validation split."""
    from mono_internvl.pipelines.lab_rates import compare_rates
    from mono_internvl.recipes.miniature import RATE_FACTORS

    rows = compare_rates(out, factors=factors or RATE_FACTORS, quick=quick, processes=processes)
    typer.echo(f"rows: {rows}")
