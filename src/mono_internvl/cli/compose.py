"""`mono-internvl compose`: an article with pictures from a folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from mono_internvl.cli.options import AnswerPrecision, Device, Json, Model, Revision
from mono_internvl.errors import ConfigError
from mono_internvl.serving.terminal import print_json, quieten


def compose(
    model: Model,
    title: Annotated[str, typer.Option(help="Of the article.")],
    images: Annotated[Path, typer.Option(metavar="DIR", help="Pictures to choose from.")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="article.html or article.md.")],
    text: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Illustrate this; else it is written.")
    ] = None,
    pictures: Annotated[int, typer.Option(min=0, help="At most so many.")] = 4,
    language: Annotated[str, typer.Option(help="Of the questions: en or zh.")] = "en",
    encoder: Annotated[
        str | None,
        typer.Option(metavar="DIR|HUB_ID", help="Finds candidates, as CLIP; own words."),
    ] = None,
    max_tiles: Annotated[int, typer.Option(min=1, help="Most tiles of a picture.")] = 1,
    device: Device = "auto",
    precision: AnswerPrecision = "auto",
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Write an article, or illustrate a text, with pictures from a folder."""
    from mono_internvl.composition.album import Encoder, OwnWords, TwoTowers, open_album
    from mono_internvl.composition.compose import compose as make_article
    from mono_internvl.composition.page import check_page, page
    from mono_internvl.composition.prompts import WORDINGS
    from mono_internvl.runs.folder import write_whole
    from mono_internvl.serving.loading import load

    quieten()
    check_page(out)
    if language not in WORDINGS:
        raise ConfigError(f"language={language!r}; expected {' or '.join(WORDINGS)}")
    words = _read(text) if text is not None else None
    session = load(
        model, device=device, precision=precision, revision=revision, max_tiles=max_tiles
    )

    def ask(question: str, images: Sequence[Path], max_new_tokens: int, penalty: float) -> str:
        session.reset()
        return session.ask(
            question, list(images), max_new_tokens=max_new_tokens, repetition_penalty=penalty
        ).text

    config = Path(model) / "config.json"  # written with the weights: other ones, other words
    name = f"{model} {config.stat().st_mtime_ns}" if config.is_file() else model
    finder: Encoder = OwnWords(name, lambda said, picture: ask(said, [picture], 60, 1.0))
    if encoder is not None:
        finder = TwoTowers(encoder)
    album = open_album(images, finder, out.with_suffix(".index.json"))
    article = make_article(
        title, album, finder, ask, WORDINGS[language], pictures=pictures, text=words
    )
    write_whole(out, page(article, out))
    for note in article.notes:
        typer.echo(f"left out: {note}", err=True)
    chosen = [
        {
            "line": one.line,
            "caption": one.caption,
            "candidates": [str(path) for path in one.candidates],
            "picture": str(one.picture),
            "chosen": one.is_chosen,
        }
        for one in article.illustrations
    ]
    if as_json:
        print_json(
            {"out": str(out), "places_chosen": article.has_chosen_places, "pictures": chosen}
        )
        return
    if not article.has_chosen_places:
        typer.echo("the model named no places: pictures are evenly spread", err=True)
    for row in chosen:
        by = "chosen" if row["chosen"] else "nearest"
        typer.echo(f"line {row['line']}: {row['picture']} ({by}): {row['caption']}")
    typer.echo(f"article: {out}")


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: not a readable text ({error})") from error
