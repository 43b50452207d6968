"""`mono-internvl attention-map`: where the tokens of a prompt look, as a picture and numbers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mono_internvl.cli.options import AnswerPrecision, Device, Json, Model, Revision
from mono_internvl.cli.pictures import check_picture_path
from mono_internvl.serving.terminal import Picture, print_json, quieten

if TYPE_CHECKING:
    from mono_internvl.generation.attention_maps import AttentionMaps


def attention_map(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="The question.")],
    image: Annotated[list[str], typer.Option(metavar="FILE", help="Again for each further image.")],
    out: Annotated[Path, typer.Option(metavar="PNG", help="The picture to write.")],
    max_tiles: Annotated[int | None, typer.Option(min=1, help="Most tiles of an image.")] = None,
    device: Device = "auto",
    precision: AnswerPrecision = "auto",
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Draw where a prompt's tokens attend, layer by layer."""
    from mono_internvl.generation.attention_maps import attention_maps
    from mono_internvl.reports.attention_pages import attention_picture
    from mono_internvl.runs.folder import write_whole
    from mono_internvl.serving.loading import load

    quieten()
    check_picture_path(out, "--out", (".png",))
    pictures = [Picture.load(name) for name in image]
    session = load(model, device=device, precision=precision, revision=revision)
    parts = [{"type": "image", "image": picture.image} for picture in pictures]
    message = {"role": "user", "content": [*parts, {"type": "text", "text": prompt}]}
    batch = session.processor.encode_prompt([message], max_tiles=max_tiles)
    found = attention_maps(
        session.model,
        batch["input_ids"][0].tolist(),
        batch["pixel_values"],
        feature_order=batch.get("feature_order"),
    )
    title = f"{model} — {prompt}" if len(prompt) <= 80 else f"{model} — {prompt[:79]}…"
    picture = attention_picture(
        title,
        [layer.weights for layer in found.layers],
        [(segment.name, segment.start, segment.stop) for segment in found.segments],
        found.lines,
    )
    write_whole(out, picture)
    _print(found, out, as_json)


def _print(found: AttentionMaps, out: Path, as_json: bool) -> None:
    import dataclasses

    if as_json:
        layers = [
            {name: value for name, value in vars(layer).items() if name != "weights"}
            for layer in found.layers
        ]
        segments = [dataclasses.asdict(segment) for segment in found.segments]
        values = {"num_tokens": found.num_tokens, "segments": segments, "layers": layers}
        print_json({**values, "picture": str(out)})
        return
    spans = ", ".join(f"{s.name} {s.stop - s.start}" for s in found.segments)
    typer.echo(f"{found.num_tokens} tokens: {spans}")
    typer.echo("in brackets: the same of attention spread evenly over what a token sees")
    distance, to_image, to_text = found.lines
    typer.echo(f"layer   {distance:<32}{to_image:<20}{to_text}")
    for one in found.layers:
        distance = f"{one.visual_distance:.2f} ({one.uniform_visual_distance:.2f})"
        to_image = f"{one.text_to_image:.3f} ({one.uniform_text_to_image:.3f})"
        to_text = f"{one.image_to_text:.3f} ({one.uniform_image_to_text:.3f})"
        typer.echo(f"{one.layer:>5}   {distance:<32}{to_image:<20}{to_text}")
    typer.echo(f"picture: {out}")
