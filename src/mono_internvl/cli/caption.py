"""`mono-internvl data caption`: short captions for shards of images."""

from __future__ import annotations

import glob
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mono_internvl.cli.options import Json
from mono_internvl.errors import ConfigError
from mono_internvl.serving.terminal import print_json, quieten

if TYPE_CHECKING:
    from mono_internvl.data.captions import Captioned


def data_caption(
    shards: Annotated[list[str], typer.Argument(metavar="TAR...", help="Or quoted patterns.")],
    url: Annotated[str, typer.Option(help="Of an OpenAI-compatible server, up to /v1.")],
    model: Annotated[str, typer.Option(help="As the server calls it.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the new shards.")],
    prompt: Annotated[str | None, typer.Option(help="Asked of each; S1.1's.")] = None,
    min_words: Annotated[int, typer.Option(min=1, help="Of a caption.")] = 3,
    max_words: Annotated[int, typer.Option(min=1, help="Of a caption.")] = 60,
    concurrency: Annotated[int, typer.Option(min=1, help="Questions at once, a machine.")] = 32,
    requests_per_minute: Annotated[
        float | None, typer.Option(min=0.1, help="Of a machine; no limit.")
    ] = None,
    engine: Annotated[str, typer.Option(help="threads, or ray on a cluster.")] = "threads",
    as_json: Json = False,
) -> None:
    """Describe the images of tar shards; call it again to go on after a stop."""
    from mono_internvl.data.caption_filters import CaptionFilter
    from mono_internvl.data.captions import CaptionJob, caption
    from mono_internvl.data.records import CAPTION_PROMPT

    quieten()
    if engine not in ("threads", "ray"):
        raise ConfigError(f"engine={engine!r}; expected threads or ray")
    if min_words > max_words:
        raise ConfigError(f"min_words={min_words} is above max_words={max_words}; lower it")
    files = [Path(name) for one in shards for name in sorted(glob.glob(one)) or [one]]
    job = CaptionJob(
        url,
        model,
        prompt=prompt or CAPTION_PROMPT,
        limits=CaptionFilter(min_words, max_words),
        concurrency=concurrency,
        requests_per_minute=requests_per_minute,
    )

    def say(done: Captioned) -> None:
        left = sum(done.left_out.values())
        typer.echo(f"{done.shard.name}: {done.captions:,} captions, {left:,} left out", err=True)

    found = caption(files, out, job, engine="ray" if engine == "ray" else "threads", on_shard=say)
    captions = sum(done.captions for done in found)
    reasons: Counter[str] = Counter()
    for done in found:
        reasons.update(done.left_out)
    if as_json:
        print_json({"shards": len(found), "captions": captions, "left_out": dict(reasons)})
        return
    typer.echo(f"{captions:,} captions in {len(found):,} shards of {out}")
    for reason, count in reasons.most_common():
        typer.echo(f"  {count:>10,}  left out: {reason}")
