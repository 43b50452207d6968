"""`mono-internvl export`: a training run becomes a checkpoint in the released layout."""

from pathlib import Path
from typing import Annotated, Any, cast

import typer

from mono_internvl.cli.options import Json
from mono_internvl.serving.terminal import print_json, quieten


def export(
    run: Annotated[Path, typer.Argument(help="Folder of a run, a stage or a state.")],
    out: Annotated[Path, typer.Option(help="New folder of the checkpoint.")],
    step: Annotated[int | None, typer.Option(min=1, help="State of that step; the latest.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    as_json: Json = False,
) -> None:
    """Write what a run has trained in the released layout, finished or not."""
    from mono_internvl.training.export import export as export_run

    quieten()
    made = export_run(run, out, step=step, dtype=cast(Any, dtype))
    if as_json:
        print_json({name: str(x) if isinstance(x, Path) else x for name, x in vars(made).items()})
        return
    typer.echo(f"checkpoint: {made.out}")
    typer.echo(
        f"made of:    {made.source}, stage {made.stage} after {made.step} of {made.of} steps"
    )
