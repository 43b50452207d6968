"""Pictures that a verb writes; their paths are checked before anything heavy is loaded."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from mono_internvl.errors import ConfigError, PromptError

if TYPE_CHECKING:
    from PIL.Image import Image


def check_picture_path(path: Path, option: str, suffixes: Sequence[str]) -> None:
    """Refuse a path that no picture can be written to.

    Args:
        path: Of the picture.
        option: That named it.
        suffixes: Of the forms that can be written.

    Raises:
        ConfigError: The suffix is another, the path is a folder, or its folder is not there.
    """
    if path.suffix.lower() not in suffixes:
        raise ConfigError(f"{option} {path}: expected a file name that ends in {suffixes[0]}")
    if path.is_dir():
        raise ConfigError(f"{option} {path} is a folder; give a file name")
    if not path.parent.is_dir():
        raise ConfigError(f"{option} {path}: the folder {path.parent} is not there; make it first")


def draw_answer(text: str, image: Image, out: Path) -> None:
    """Write an image with the boxes of an answer, and say so on standard error.

    Args:
        text: The answer, control tokens kept: `<ref>` names what a `<box>` holds.
        image: That was asked about.
        out: File to write, whole or not at all.

    Raises:
        PromptError: The answer holds no box that can be drawn.
    """
    from mono_internvl.reports.boxes import boxes_to_draw, draw_boxes
    from mono_internvl.runs.folder import write_whole

    boxes = boxes_to_draw(text)
    if not boxes:
        raise PromptError(
            f"{out} was not written: the answer {text!r:.120} holds no box "
            "[[x1, y1, x2, y2]] in thousandths of the image that can be drawn; ask for one as "
            "the model was taught to give it"
        )
    form = {".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}.get(out.suffix.lower(), "PNG")
    encoded = io.BytesIO()
    draw_boxes(image, boxes).save(encoded, form)
    write_whole(out, encoded.getvalue())
    typer.echo(f"picture: {out}", err=True)
