"""The gallery: held-out answers of a finished quickstart, right and wrong alike, chosen by a seed.

`python tools/gallery_page.py runs/quickstart` writes `docs/gallery.md` and its picture,
`results/quickstart-gallery.png`: boxes drawn, text read, charts, captions, questions, and
conversations of several turns. Nothing is chosen by hand: the seed draws the records.

Source: arXiv 2410.08202, appendix A.4, which shows such answers of the 2B model.
"""

from __future__ import annotations

import argparse
import io
import logging
import random
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw

from mono_internvl.door import pass_through
from mono_internvl.errors import ConfigError
from mono_internvl.evaluation.metrics.metric import normalise
from mono_internvl.miniature.asking import further_questions
from mono_internvl.miniature.report_words import WORDS
from mono_internvl.miniature.scenes import Scene, SceneObject
from mono_internvl.miniature.scoring import PROTOCOL
from mono_internvl.processing.image_files import load_image
from mono_internvl.reports.boxes import Box, boxes_to_draw, draw_boxes, font_of
from mono_internvl.reports.markdown import table
from mono_internvl.runs.folder import write_whole
from mono_internvl.runs.predictions import Answer, Prediction, read_answers, read_predictions
from mono_internvl.runs.provenance import place_of
from mono_internvl.runs.schemas import METRICS, read_metrics
from mono_internvl.serving.loading import load
from mono_internvl.serving.session import ChatSession

LAST_STAGE = "s2"
KINDS = {
    "grounding": 6,
    "ocr": 4,
    "chart": 4,
    "caption": 4,
    "colour": 1,
    "shape": 1,
    "position": 1,
    "existence": 1,
}
"""How many answers of each kind."""
NUM_DIALOGUES, NUM_TURNS = 4, 4
PAGE, PICTURE = Path("docs/gallery.md"), Path("results/quickstart-gallery.png")

_COLUMNS, _CELL_PX, _LINE_PX, _GAP_PX, _CHARACTERS = 4, 300, 15, 10, 42


@dataclass(frozen=True)
class Shown:
    """One picture with what was said about it.

    Attributes:
        kind: Of the question; `dialogue` for several.
        image: What is shown, boxes drawn.
        turns: Question, answer, truth and whether it is right, of every turn.
    """

    kind: str
    image: Image.Image
    turns: tuple[tuple[str, str, str, str], ...]


def chosen_answers(run: Path, seed: int) -> list[Answer]:
    """Held-out answers of every kind, drawn by the seed alone.

    Raises:
        ConfigError: The run is not finished, or has too few answers of a kind.
    """
    if not (run / METRICS).is_file():
        raise ConfigError(f"{run}: no {METRICS}; expected a finished quickstart, let it end")
    answers = read_answers(run, LAST_STAGE)
    chosen = []
    for kind, count in KINDS.items():
        of_kind = sorted((one for one in answers if one.kind == kind), key=lambda one: one.id)
        if len(of_kind) < count:
            raise ConfigError(f"{run}: {len(of_kind)} answers of kind {kind}; expected {count}")
        chosen += random.Random(f"{seed}/{kind}").sample(of_kind, count)
    return chosen


def shown_answer(run: Path, answer: Answer) -> Shown:
    """An answer with its picture; boxes said and true are drawn."""
    image = load_image(run / "data" / answer.image)
    said, true = boxes_to_draw(answer.text), boxes_to_draw(answer.truth)
    boxes = [Box("truth", b.x1, b.y1, b.x2, b.y2) for b in true]
    boxes += [Box("model", b.x1, b.y1, b.x2, b.y2) for b in said]
    kind = WORDS.kind_named(answer.kind)
    is_graded = kind.is_graded or answer.kind == "grounding"
    mark = f"{answer.score:.2f}" if is_graded else ("right" if answer.score == 1 else "wrong")
    turn = (_plain(answer.question), _plain(answer.text), _plain(answer.truth), mark)
    return Shown(answer.kind, draw_boxes(image, boxes), (turn,))


def dialogues(run: Path, seed: int) -> list[Shown]:
    """Conversations about held-out scenes, asked now through the session that `chat` uses."""
    session = load(run / "model", device="cpu", precision="fp32")
    rng = random.Random(f"{seed}/dialogues")
    records = [
        one
        for one in read_predictions(run / "predictions" / f"{LAST_STAGE}.jsonl")
        if one.kind == "caption" and not one.is_blind and not one.record.get("aligned")
    ]
    records.sort(key=lambda one: str(one.record["id"]))
    return [
        _dialogue(run, session, one, rng)
        for one in rng.sample(records, min(NUM_DIALOGUES, len(records)))
    ]


def _dialogue(run: Path, session: ChatSession, one: Prediction, rng: random.Random) -> Shown:
    things = [SceneObject(*attributes) for attributes in one.record["attributes"]]
    image, turns = load_image(run / "data" / str(one.record["image"])), []
    session.reset()
    for number, question in enumerate(further_questions(Scene(tuple(things)), rng, NUM_TURNS)):
        shown = [image] if number == 0 else []
        said = session.ask(question.text, shown, max_new_tokens=PROTOCOL.max_new_tokens).text
        is_right = normalise(said) == normalise(question.answer)
        turns.append((question.text, said, question.answer, "right" if is_right else "wrong"))
    return Shown("dialogue", draw_boxes(image, ()), tuple(turns))


def _plain(text: str) -> str:
    for token in ("<ref>", "</ref>", "<box>", "</box>"):
        text = text.replace(token, " " if token == "</ref>" else "")
    return " ".join(text.split())


# ------------------------------------------------------------------ picture and page


def contact_sheet(shown: Sequence[Shown]) -> bytes:
    """All pictures with their numbers and what was said below them, as a PNG."""
    rows = [shown[start : start + _COLUMNS] for start in range(0, len(shown), _COLUMNS)]
    lines = [
        [_lines(start * _COLUMNS + column + 1, one) for column, one in enumerate(row)]
        for start, row in enumerate(rows)
    ]
    heights = [_CELL_PX + _LINE_PX * max(map(len, row)) + _GAP_PX for row in lines]
    sheet = Image.new("RGB", (_COLUMNS * _CELL_PX, sum(heights)), "white")
    pen, font, side, top = ImageDraw.Draw(sheet), font_of(11), _CELL_PX - 16, 0
    for row, said, height in zip(rows, lines, heights, strict=True):
        for column, (one, text) in enumerate(zip(row, said, strict=True)):
            left = column * _CELL_PX + 8
            picture = one.image.resize((side, side), Image.Resampling.LANCZOS)
            sheet.paste(picture, (left, top + 8))
            pen.rectangle((left - 1, top + 7, left + side, top + side + 8), outline="#cccccc")
            for index, (line, colour) in enumerate(text):
                pen.text((left, top + _CELL_PX - 4 + index * _LINE_PX), line, colour, font)
        top += height
    encoded = io.BytesIO()
    sheet.save(encoded, "PNG", optimize=True)
    return encoded.getvalue()


def _lines(number: int, one: Shown) -> list[tuple[str, str]]:
    """What stands below a picture, line by line, with its colours."""
    lines = [(f"{number}. {one.kind}", "#666666")]
    for question, said, truth, mark in one.turns:
        colour = {"right": "#1a7f37", "wrong": "#b3261e"}.get(mark, "#1f5fbf")
        lines += [(part, "black") for part in textwrap.wrap(question, _CHARACTERS)]
        told = f"→ {said} ({mark})" if said == truth else f"→ {said} (truth: {truth}; {mark})"
        lines += [(part, colour) for part in textwrap.wrap(told, _CHARACTERS)]
    return lines


def markdown(shown: Sequence[Shown], run: Path, seed: int) -> str:
    """The page: how the answers were drawn, the picture, and every word of it as text."""
    made = read_metrics(run).origin
    rows = [
        (str(number) if turn == 0 else "", one.kind if turn == 0 else "", *map(_cell, said))
        for number, one in enumerate(shown, start=1)
        for turn, said in enumerate(one.turns)
    ]
    return "\n".join(
        [
            "# Gallery",
            "",
            "Held-out pictures of the miniature and what the quickstart's model says, right and "
            f"wrong alike: seed {seed} draws the records of each kind, nothing is chosen by hand. "
            "Of boxes both are drawn, the model's and the true one, and the score is their IoU; of "
            "captions it is the part of true attributes that is named, of text 1 − the rate of "
            "wrong characters. Dialogues were asked turn by turn, as `mono-internvl chat` does. "
            "The miniature has charts and no tables.",
            "",
            f"![Answers of the miniature, numbered as below](../{PICTURE})",
            "",
            table(("", "kind", "question", "answer", "truth", "score"), rows, numbers=False),
            f"Trained by `{made['command']}`, {place_of(made)}, commit "
            f"{made['versions'].get('commit', 'unknown')}, {made['date']}. Made again by "
            "`python tools/gallery_page.py runs/quickstart`.",
        ]
    )


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def main(arguments: Sequence[str] | None = None) -> None:
    """Write page and picture of a run."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("run", type=Path, help="folder of a finished quickstart")
    parser.add_argument("--seed", type=int, default=0, help="draws the records")
    parser.add_argument("--root", type=Path, default=Path(), help="checkout to write into")
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    shown = [shown_answer(given.run, one) for one in chosen_answers(given.run, given.seed)]
    shown += dialogues(given.run, given.seed)
    for file in (PAGE, PICTURE):
        (given.root / file).parent.mkdir(parents=True, exist_ok=True)
    write_whole(given.root / PICTURE, contact_sheet(shown))
    write_whole(given.root / PAGE, markdown(shown, given.run, given.seed))
    logging.info("%s: written", given.root / PAGE)


if __name__ == "__main__":
    sys.exit(pass_through(main))
