"""`mono-internvl lab compose`: whether a line of text finds its picture in an album.

Every line is the true caption of one picture of the album, which is planted for it. Asked are: is
it among the four candidates, by the line and by the caption that the model writes; and does the
model choose it. The quickstart's model is taken as it is: nobody has taught it to compose.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from mono_internvl.composition.album import OwnWords, open_album
from mono_internvl.composition.compose import compose
from mono_internvl.composition.prompts import LETTERS, WORDINGS
from mono_internvl.compute import ComputePlan
from mono_internvl.miniature.lab_pages import Figure
from mono_internvl.miniature.neighbours import (
    Ground,
    NeighbourRun,
    block_of,
    compared,
    origins,
    run_seeds,
    verdict,
)
from mono_internvl.miniature.scoring import BENCHMARK, PROTOCOL
from mono_internvl.runs.folder import write_whole
from mono_internvl.runs.provenance import origin
from mono_internvl.runs.schemas import add_cost, cpu_minutes
from mono_internvl.serving.loading import load

RUNS = "compose.jsonl"
CHANCE, MODEL = "chance", "model"
TITLES = {CHANCE: "by chance", MODEL: "the model"}
BY_LINE = "among the four, by the line"
BY_CAPTION = "among the four, by the model's caption"
CHOSEN = "chosen, where it is among the four"


@dataclass(frozen=True)
class Sizes:
    """Of the lab.

    Attributes:
        album: Pictures, each with a line.
    """

    album: int = 40


FULL, QUICK = Sizes(), Sizes(album=6)


def compare_choices(quickstarts: Sequence[Path], run: Path, **options: Any) -> Path:
    """Illustrate lines from an album; `run_seeds` has the options.

    Returns:
        The table.
    """
    return run_seeds(quickstarts, run, RUNS, _run, compose_page, **options)


def _run(ground: Ground, folder: Path, quick: bool, plan: ComputePlan) -> None:
    sizes, began = QUICK if quick else FULL, time.process_time()
    lines = _write_album(ground, folder / "album", sizes.album)
    session = load(ground.checkpoint, device="cpu", precision=plan.precision, max_tiles=1)

    def ask(question: str, images: Sequence[Path], max_new_tokens: int, penalty: float) -> str:
        session.reset()
        most = min(max_new_tokens, 64)
        return session.ask(
            question, list(images), max_new_tokens=most, repetition_penalty=penalty
        ).text

    encoder = OwnWords(str(ground.checkpoint), lambda said, picture: ask(said, [picture], 64, 1.0))
    album = open_album(folder / "album", encoder, folder / "index.json")
    by_line, by_caption, chosen = [], [], []
    for name, line in lines.items():
        planted = folder / "album" / name
        by_line.append(planted in album.nearest(line, encoder, len(LETTERS)))
        article = compose("", album, encoder, ask, WORDINGS["en"], pictures=1, text=line)
        (one,) = article.illustrations
        by_caption.append(planted in one.candidates)
        chosen += [one.picture == planted and one.is_chosen] if by_caption[-1] else []
    add_cost(folder / "cost.json", "all", time.process_time() - began)
    count, guess = len(lines), len(LETTERS) / len(lines)
    row = NeighbourRun(
        seed=ground.seed,
        quick=quick,
        cpu_minutes=cpu_minutes(folder),
        scores={
            CHANCE: {
                BY_LINE: Figure(min(1.0, guess), count),
                BY_CAPTION: Figure(min(1.0, guess), count),
                CHOSEN: Figure(1 / min(len(LETTERS), count), count),
            },
            MODEL: {
                BY_LINE: Figure(fmean(by_line), count),
                BY_CAPTION: Figure(fmean(by_caption), count),
                CHOSEN: Figure(fmean(chosen) if chosen else 0.0, len(chosen)),
            },
        },
        facts={"album": count},
        **origin(plan, PROTOCOL.planned(plan).to_dict()),
    )
    write_whole(folder / "row.json", json.dumps(dataclasses.asdict(row)))


def _write_album(ground: Ground, folder: Path, count: int) -> dict[str, str]:
    """Held-out scenes of different captions, copied into a folder: file name -> caption."""
    folder.mkdir(parents=True, exist_ok=True)
    lines: dict[str, str] = {}
    for question in BENCHMARK.questions(ground.world.heldout):
        caption = str(question.record["answer"])
        if question.kind != "caption" or caption in lines.values() or len(lines) == count:
            continue
        (image,) = question.sample.images
        name = f"{len(lines):03d}.png"
        if not (folder / name).exists():
            shutil.copy(str(image), folder / name)
        lines[name] = caption
    return lines


def compose_page(runs: Sequence[NeighbourRun]) -> str:
    """Markdown: how often the planted picture is found and chosen, and the verdicts."""
    return "\n".join(
        [
            *compared(runs, TITLES),
            "",
            f"An album of {runs[0].facts['album']:.0f} held-out scenes; every line is the true "
            "caption of one of them. An answer that names no letter chooses nothing.",
            "",
            f"- A line finds its picture: {verdict(runs, MODEL, CHANCE, BY_LINE)}.",
            f"- The model's caption finds it: {verdict(runs, MODEL, CHANCE, BY_CAPTION)}.",
            f"- The model chooses it: {verdict(runs, MODEL, CHANCE, CHOSEN)}.",
            "",
            origins(runs),
        ]
    )


compose_block = block_of(RUNS, compose_page)
"""The committed rows of `lab compose`."""
