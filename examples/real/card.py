"""What a run says of itself: the words of its report, a gallery, the model card."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import sources
from PIL import Image, ImageDraw, ImageFont

from mono_internvl.reports.kinds import Kind, TextChart, Words
from mono_internvl.runs.predictions import Prediction

KINDS = (
    Kind("noto", "Known things, held-out artist", "exact name"),
    Kind("noto-v1", "Known things, the same artist earlier", "exact name"),
    Kind("stamps", "Photographs and stamps", "exact name"),
    Kind("clipart", "Clip art", "exact name"),
    Kind("animal", "Is it an animal?", "yes or no"),
    Kind("ground", "Colour of the ground", "exact match"),
    Kind("count", "How many", "exact match"),
    Kind("left", "What is on the left", "exact name"),
    Kind("word", "Ten words in real fonts", "1 − char. error rate", is_graded=True),
    Kind("never named", "Things never named", "exact name"),
)
WORDS = Words(
    title="A real language model is given sight",
    headline="SmolLM2-135M learns to name pictures that nobody here made",
    lead="The language model is frozen through three stages: its answers to text stay bit for bit "
    "what they were, while visual copies of its feed-forward networks and attention learn.",
    quick_note="<strong>Quick run.</strong> It shows that every part works, no more.",
    limits="One seed, few names, simple pictures. Pixel baselines stand beside every figure: what "
    "does not beat them has learnt colour and coarse shape.",
    kinds=KINDS,
    text_measures={
        "perplexity": "perplexity (lower is better)",
        "language": "plain questions answered",
    },
    text_charts=(TextChart("perplexity", "Perplexity", "held-out English", None, 1),),
)
_SIDE, _CAPTION, _COLUMNS = 112, 34, 6


def gallery(
    data: Path, predictions: Sequence[Prediction], kind: str = "noto", seed: int = 0
) -> Image.Image:
    """Twelve pictures of the held-out artist with what was said, drawn by a seed, right and wrong.

    Args:
        data: Folder of the pictures.
        predictions: Of the last stage.
        kind: Whose pictures.
        seed: Of the draw.
    """
    found = [p for p in predictions if p.kind == kind and not p.is_blind]
    drawn = random.Random(seed).sample(found, min(2 * _COLUMNS, len(found)))
    rows = -(-len(drawn) // _COLUMNS)
    sheet = Image.new("RGB", (_COLUMNS * (_SIDE + 8), rows * (_SIDE + _CAPTION)), (255, 255, 255))
    fonts = Path(matplotlib.get_data_path()) / "fonts/ttf"
    font = ImageFont.truetype(str(fonts / "DejaVuSans.ttf"), 11)
    draw = ImageDraw.Draw(sheet)
    for number, one in enumerate(drawn):
        x, y = number % _COLUMNS * (_SIDE + 8) + 4, number // _COLUMNS * (_SIDE + _CAPTION)
        picture = Image.open(data / str(one.record["image"])).resize((_SIDE, _SIDE))
        sheet.paste(picture, (x, y))
        colour = (0, 110, 40) if one.score >= 1 else (180, 0, 0)
        draw.text((x, y + _SIDE + 2), one.text[:18], font=font, fill=colour)
        if one.score < 1:
            draw.text((x, y + _SIDE + 16), f"is: {one.record['answer']}", font=font, fill=(90,) * 3)
    return sheet


def model_card(row: dict[str, Any]) -> str:
    """`README.md` of the checkpoint: data, licences, figures, limits."""
    last = row["stages"][-1]
    lines = [
        f"| {kind.title} | {last['scores'][kind.name]['score']:.2f} | "
        f"{last['scores'][kind.name]['items']} |"
        for kind in KINDS
        if kind.name in last["scores"]
    ]
    terms = "\n".join(f"- {p.name}: {p.licence}, {p.by}" for p in sources.ALL)
    names = row["data"]["s11"]
    return (
        "---\nlicense: other\nbase_model: HuggingFaceTB/SmolLM2-135M-Instruct\n"
        "pipeline_tag: image-text-to-text\nlanguage: en\n---\n\n"
        "# SmolLM2-135M with eyes\n\n"
        f"Trained on {names:,} renderings of drawings that package registries hold "
        f"({row['variant']}, commit {row['versions']['commit']}). It names a few dozen things in "
        "simple pictures; ask it nothing that matters.\n\n"
        "| held out | reached | items |\n|---|---:|---:|\n" + "\n".join(lines) + "\n\n"
        f"Perplexity on English {last['text']['perplexity']:.1f}, before training "
        f"{row['stages'][0]['text']['perplexity']:.1f}.\n\n"
        "## Limits\n\nOne picture of one tile, white or plain ground, English, names of training "
        "alone: it gives one of them to whatever it sees. One seed.\n\n"
        f"## Terms of what it was made of\n\n{terms}\n"
    )
