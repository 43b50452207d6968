"""`mono-internvl plan`: what a recipe costs on a cluster."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mono_internvl.cli.options import Json
from mono_internvl.errors import ConfigError
from mono_internvl.serving.terminal import print_json, quieten

if TYPE_CHECKING:
    from mono_internvl.costs.budget import Fleet, StageBudget


def plan(
    recipe: Annotated[str, typer.Argument(help="Name, or a Python file.")],
    gpus: Annotated[int, typer.Option(min=1, help="How many.")],
    gpu: Annotated[str, typer.Option(help="a100-40g, a100-80g, h100-80g, h200-141g, ...")],
    mfu: Annotated[
        float, typer.Option(help="Assumed: operations owed per second over the peak rate.")
    ] = 0.4,
    tokens: Annotated[
        str | None,
        typer.Option(metavar="visual=N,text=N", help="Mean sample; as long as a stage allows."),
    ] = None,
    records: Annotated[
        int | None, typer.Option(min=1, help="Of the data, for stages that count epochs.")
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="Of the model: v1 or v1_5; as the recipe's name says.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(metavar="DIR|HUB_ID", help="Or a checkpoint's configuration.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Say what a recipe costs before it is run: memory, operations, days, data, disk."""
    from mono_internvl.checkpoints.presets import config_of
    from mono_internvl.cli.recipes import RECIPES
    from mono_internvl.costs.accelerators import accelerator
    from mono_internvl.costs.budget import Fleet, budget
    from mono_internvl.costs.info import parse_tokens
    from mono_internvl.training.recipe import load_recipe

    if model is not None and preset is not None:
        raise typer.BadParameter("give --model or --preset, not both")
    quieten()
    fleet = Fleet(gpus, accelerator(gpu), mfu)
    chosen = load_recipe(recipe, RECIPES)
    is_plus_plus = chosen.name.startswith("evip-plus-plus")
    config = config_of(model, preset or ("v1_5" if is_plus_plus else "v1"))
    sample = None
    if tokens is not None:
        visual, text, images = parse_tokens(tokens)
        if images:
            raise ConfigError(f"tokens={tokens!r}: say visual=N; sizes of images are for `info`")
        sample = (visual, text)
    stages = budget(chosen, config, fleet, tokens=sample, records=records)
    if as_json:
        print_json(_values(chosen.name, fleet, stages))
    else:
        _print(chosen.name, fleet, stages, are_given=tokens is not None)


def _values(name: str, fleet: Fleet, stages: list[StageBudget]) -> dict[str, Any]:
    """The budget as plain data."""
    found = [dataclasses.asdict(stage) for stage in stages]
    for values, stage in zip(found, stages, strict=True):
        for one, layout in zip(values["layouts"], stage.layouts, strict=True):
            one["memory"]["total"] = layout.memory.total
    return {"recipe": name, "fleet": dataclasses.asdict(fleet), "stages": found}


def _print(name: str, fleet: Fleet, stages: list[StageBudget], *, are_given: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    length = "of the length that was given" if are_given else "as long as their stage allows"
    typer.echo(f"{name} on {fleet.gpus:,} x {fleet.gpu.name}, samples {length}")
    table = Table()
    table.add_column("", no_wrap=True)
    for stage in stages:
        table.add_column(stage.name, justify="right", overflow="fold")
    rows = [
        ("visual tokens", [f"{s.sample.visual_tokens:,}" for s in stages]),
        ("text tokens", [f"{s.sample.text_tokens:,}" for s in stages]),
        ("samples", [f"{s.samples:,}" for s in stages]),
        ("tokens", [f"{s.tokens:.3g}" for s in stages]),
        ("FLOPs owed", [f"{s.flops:.3g}" for s in stages]),
        (f"days, MFU {fleet.mfu:g}", [f"{s.days:.2f}" for s in stages]),
        ("data, about", [_bytes(s.data_bytes) for s in stages]),
        ("checkpoint", [_bytes(s.checkpoint_bytes) for s in stages]),
        ("saved state", [_bytes(s.state_bytes) for s in stages]),
    ]
    for number, title in enumerate(("replicated", "sharded")):
        layouts = [s.layouts[number] for s in stages]
        owned = [one.memory.total - one.memory.kept for one in layouts]
        rows += [
            (f"GPU, {title}", [_bytes(one.memory.total) for one in layouts]),
            ("  weights, Adam", [_bytes(count) for count in owned]),
            ("  for backward", [_bytes(one.memory.kept) for one in layouts]),
            ("  accumulation", [str(one.accumulation or "packed") for one in layouts]),
            ("  recompute", [one.recompute for one in layouts]),
            ("  fits", ["yes" if one.fits else "no" for one in layouts]),
        ]
    for title, cells in rows:
        if title.startswith("GPU"):
            table.add_section()
        table.add_row(title, *cells)
    Console().print(table)
    tokens, flops, days = (sum(getattr(s, n) for s in stages) for n in ("tokens", "flops", "days"))
    typer.echo(f"in all: {tokens:.3g} tokens, {flops:.3g} operations owed, {days:.1f} days")


def _bytes(count: int) -> str:
    """Bytes as a person reads them, in powers of 1,000."""
    value, units = float(count), ["B", "kB", "MB", "GB", "TB", "PB"]
    while value >= 1000 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:.3g} {units[0]}"
