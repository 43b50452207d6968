"""`mono-internvl serve`: a checkpoint behind the OpenAI API."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mono_internvl.cli.options import AnswerPrecision, Attention, Device, Experts, Model, Revision
from mono_internvl.errors import MissingDependency
from mono_internvl.serving.terminal import quieten

KEY_VARIABLE = "MONO_INTERNVL_API_KEY"


def serve(
    model: Model,
    host: Annotated[str, typer.Option(help="Address; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 for a free one.")] = 8000,
    name: Annotated[str | None, typer.Option(help="Of the model for clients; --model.")] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help=f"Key of clients; {KEY_VARIABLE}.")
    ] = None,
    max_tiles: Annotated[int | None, typer.Option(min=1, help="Most tiles of an image.")] = None,
    rows: Annotated[int, typer.Option(min=1, help="Answers at once.")] = 32,
    queue: Annotated[int, typer.Option(min=1, help="Answers that may wait.")] = 64,
    answer_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 1024,
    body_mb: Annotated[int, typer.Option(min=1, help="Largest request, MiB.")] = 16,
    image_mp: Annotated[int, typer.Option(min=1, help="Megapixels of a request.")] = 16,
    memory_mb: Annotated[int, typer.Option(min=1, help="Of all requests, MiB.")] = 1024,
    kv_mb: Annotated[
        int | None, typer.Option(min=1, help="Keys and values, MiB; half of what is free.")
    ] = None,
    prefix_mb: Annotated[int, typer.Option(min=0, help="Kept beginnings, MiB; 0: none.")] = 256,
    answer_s: Annotated[int, typer.Option(min=1, help="Longest wait for an answer.")] = 300,
    drain_s: Annotated[int, typer.Option(min=1, help="To finish answers at the end.")] = 60,
    device: Device = "auto",
    precision: AnswerPrecision = "auto",
    attention: Attention = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Of PyTorch.")] = None,
    experts: Experts = "auto",
    revision: Revision = None,
) -> None:
    """Serve a checkpoint over HTTP, in the form of the OpenAI API."""
    try:
        from mono_internvl.serving.http.limits import MIB, Limits
        from mono_internvl.serving.http.run import make_server, make_service, read_key
        from mono_internvl.serving.listening import LOOPBACK, bind, url_of
    except ModuleNotFoundError as error:
        raise MissingDependency(
            f"serve needs the package {error.name!r}, which is not installed; "
            "pip install 'mono-internvl[serve]'"
        ) from error
    from mono_internvl.serving.loading import load

    quieten()
    limits = Limits(
        rows=rows,
        queue=queue,
        answer_tokens=answer_tokens,
        body_bytes=body_mb * MIB,
        image_pixels=image_mp * 1_000_000,
        memory_bytes=memory_mb * MIB,
        answer_s=answer_s,
        drain_s=drain_s,
    )
    key = read_key(api_key_file, KEY_VARIABLE)
    listener = bind(host, port)
    session = load(
        model,
        device=device,
        precision=precision,
        attention=attention,
        threads=threads,
        experts=experts,
        revision=revision,
    )
    service = make_service(
        session,
        name or model,
        limits=limits,
        kv_bytes=None if kv_mb is None else kv_mb * MIB,
        prefix_bytes=prefix_mb * MIB,
        max_tiles=max_tiles,
        api_key=key,
    )
    if session.plan is not None:
        typer.echo(session.plan.describe(), err=True)
    where = listener.getsockname()[0]
    if key is None and where not in LOOPBACK:
        typer.echo(f"anybody who reaches {where} may ask; set {KEY_VARIABLE}", err=True)
    ready = f"serving {service.name!r} at {url_of(listener)}/v1"
    make_server(service, lambda: typer.echo(ready, err=True)).run(sockets=[listener])
