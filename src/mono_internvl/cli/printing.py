"""What `info`, `init` and `convert` print: tables and lines of plain values."""

from __future__ import annotations

import dataclasses
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

from mono_internvl.checkpoints.convert import RoundTrip
from mono_internvl.costs.info import ModelInfo


def info_values(info: ModelInfo) -> dict[str, Any]:
    """A model\'s figures as plain data, with the totals of its costs."""
    values = {name: value for name, value in dataclasses.asdict(info).items() if value is not None}
    if info.costs is not None:
        for phase in ("prefill", "decode"):
            values["costs"][phase]["total"] = getattr(info.costs, phase).total
    return values


def print_info(title: str, info: ModelInfo) -> None:
    """The figures as a table."""
    values = info_values(info)
    groups, costs = values["parameters"].pop("groups"), values.get("costs", {})
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column(overflow="fold")
    table.add_column(justify="right", overflow="fold")
    for heading, rows in (
        ("parameters", values["parameters"]),
        ("parameters by group", groups),
        ("parameters that learn", values.get("trainable", {})),
        ("configuration", values["config"]),
        ("operations of the prefill", costs.pop("prefill", {})),
        ("operations of a decoded token", costs.pop("decode", {})),
        ("prompt", costs),
    ):
        if rows:
            table.add_section()
            table.add_row(f"[bold]{heading}[/]")
        for name, value in rows.items():
            table.add_row(f"  {name.replace('_', ' ')}", in_words(value))
    Console().print(table)


def in_words(value: Any) -> str:
    """A value as a person reads it."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(value) or "none"
    return f"{value:,}" if isinstance(value, int) else str(value)


def print_round_trip(name: str, result: RoundTrip) -> None:
    """What a round trip found, line by line."""
    typer.echo(f"checkpoint  {name}")
    typer.echo(f"tensors     {result.tensors:,}")
    typer.echo(f"parameters  {result.parameters:,}")
    typer.echo(f"dtype       {', '.join(f'{k} ({n})' for k, n in result.dtypes.items())}")
    typer.echo(f"tokenizer   {'none' if result.tokens is None else f'{result.tokens:,} tokens'}")
    typer.echo(f"sha256      {result.digest}")
    if result.out is not None:
        typer.echo(f"copy        {result.out}")
    for difference in result.differences:
        typer.secho(f"differs     {difference}", fg=typer.colors.RED)
    if not result.differences:
        typer.echo("round trip  identical: every tensor bit for bit, the configuration in meaning")
