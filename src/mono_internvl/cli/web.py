"""`mono-internvl web`: a page to talk to a checkpoint in a browser."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mono_internvl.cli.options import AnswerPrecision, Attention, Device, Experts, Model, Revision
from mono_internvl.errors import MissingDependency
from mono_internvl.serving.terminal import quieten

if TYPE_CHECKING:
    from mono_internvl.serving.web.desk import Example

EXAMPLES_PER_KIND = 1


def web(
    model: Model,
    host: Annotated[str, typer.Option(help="Address; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 for a free one.")] = 7860,
    name: Annotated[str | None, typer.Option(help="Title of the page; --model.")] = None,
    examples: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="JSON lines of questions to offer, one of a kind."),
    ] = None,
    system: Annotated[str | None, typer.Option(help="System message; '' for none.")] = None,
    max_tiles: Annotated[int | None, typer.Option(min=1, help="Most tiles of an image.")] = None,
    device: Device = "auto",
    precision: AnswerPrecision = "auto",
    attention: Attention = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Of PyTorch.")] = None,
    experts: Experts = "auto",
    revision: Revision = None,
) -> None:
    """Talk to a checkpoint in a browser: images, boxes, tiles; all of it on this machine."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # it is read while Gradio is imported
    try:
        from mono_internvl.serving.listening import LOOPBACK, bind, url_of
        from mono_internvl.serving.web.desk import Desk
        from mono_internvl.serving.web.run import serve_page
    except ModuleNotFoundError as error:
        raise MissingDependency(
            f"web needs the package {error.name!r}, which is not installed; "
            "pip install 'mono-internvl[ui]'"
        ) from error
    from mono_internvl.serving.loading import load

    quieten()
    offered = [] if examples is None else offered_questions(examples)
    listener = bind(host, port)
    session = load(
        model,
        device=device,
        precision=precision,
        attention=attention,
        threads=threads,
        experts=experts,
        revision=revision,
        system=system,
        max_tiles=max_tiles,
    )
    if session.plan is not None:
        typer.echo(session.plan.describe(), err=True)
    where = listener.getsockname()[0]
    if where not in LOOPBACK:
        typer.echo(f"anybody who reaches {where} may ask", err=True)
    ready = f"{name or model} at {url_of(listener)}"
    serve_page(Desk(session), name or model, listener, lambda: typer.echo(ready, err=True), offered)


def offered_questions(file: Path) -> list[Example]:
    """The first question of each kind in a file as `evaluate` reads it.

    Raises:
        SampleError: The file or a record of it is malformed.
    """
    from mono_internvl.data.sources import FileImage
    from mono_internvl.evaluation.questions import first_of_each_kind, read_records
    from mono_internvl.serving.web.desk import Example

    return [
        Example(
            question.text,
            tuple(image.path for image in question.sample.images if isinstance(image, FileImage)),
        )
        for question in first_of_each_kind(read_records(file), EXAMPLES_PER_KIND)
    ]
