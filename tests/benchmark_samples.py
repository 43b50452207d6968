"""Made-up rows of every published benchmark, five or so each, in the form it is published in."""

from __future__ import annotations

import base64
import csv
import io
import json
from pathlib import Path
from typing import Any

from PIL import Image
from tiny_videos import write_clip

COLOURS = ((220, 30, 30), (30, 200, 40), (40, 60, 230), (200, 200, 20), (20, 20, 20))
LETTERS = "ABCD"
NO_ANSWERS = ("mmbench-test", "docvqa-test", "infovqa-test", "vqav2-testdev")


def png(number: int, size: tuple[int, int] = (56, 56)) -> bytes:
    """A picture of one colour, another for every number."""
    colour = tuple((value + 7 * (number // len(COLOURS))) % 256 for value in COLOURS[number % 5])
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


def encoded(number: int) -> str:
    """The same as base64."""
    return base64.b64encode(png(number)).decode()


def write_tsv(file: Path, rows: list[dict[str, Any]]) -> Path:
    """As pandas writes a tab-separated file: quotes where a cell has a line feed or a quote."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with file.open("w", encoding="utf-8", newline="") as out:
        table = csv.DictWriter(out, columns, delimiter="\t", lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
    return file


def write_jsonl(file: Path, rows: list[dict[str, Any]]) -> Path:
    """JSON lines; `image` numbers become files in `images/` beside them."""
    for row in rows:
        numbers = row["image"] if isinstance(row["image"], list) else [row["image"]]
        for number in numbers:
            place = file.parent / "images" / f"{number}.png"
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(png(number))
        names = [f"images/{number}.png" for number in numbers]
        row["image"] = names if isinstance(row["image"], list) else names[0]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def _rotated() -> list[dict[str, Any]]:
    """Questions of three and of two rotations; later ones refer to the first one's image."""
    rows = []
    for number, texts in enumerate((("cat", "dog", "a red bus"), ("yes", "no"))):
        for turn in range(len(texts)):
            shown = [texts[(i + turn) % len(texts)] for i in range(len(texts))]
            rows.append(
                {
                    "index": number + 1 + turn * 1_000_000,
                    "question": 'What is "this"?\nLook.',
                    "hint": "A hint." if number else "",
                    **dict(zip(LETTERS, [*shown, "", ""], strict=False)),
                    "answer": LETTERS[shown.index(texts[0])],
                    "category": "identity",
                    "split": "dev",
                    "image": str(number + 1) if turn else encoded(number),
                }
            )
    return rows


def _options(number: int) -> dict[str, Any]:
    return {"A": "cat", "B": "dog", "C": "bus", "D": "tree", "answer": LETTERS[number % 4]}


def _ten(number: int) -> list[str]:
    return [f"word{number}"] * 6 + ["other"] * 4


def _plain(number: int) -> dict[str, Any]:
    return {"index": number, "question": f"question {number}?", "image": encoded(number)}


def _mme(number: int) -> dict[str, Any]:
    pair, is_first = divmod(number, 2)
    return {
        **_plain(number),
        "image": encoded(pair),
        "image_path": f"{pair}.jpg",
        "category": "count" if pair < 2 else "OCR",
        "question": f"Is it {number}? Please answer yes or no.",
        "answer": "No" if is_first else "Yes",
    }


def _mathvista(number: int) -> dict[str, Any]:
    kinds = (
        {"question_type": "multi_choice", "answer_type": "text", "choices": "['3/11', '8/11']",
         "answer": "8/11", "answer_option": "B"},
        {"question_type": "free_form", "answer_type": "integer", "answer": "14"},
        {"question_type": "free_form", "answer_type": "float", "answer": "1.45", "precision": "2"},
    )  # fmt: skip
    return {**_plain(number), "choices": "", **kinds[number % 3]}


def _hallusion(number: int) -> dict[str, Any]:
    figure, question = divmod(number, 2)
    return {
        **_plain(number),
        "index": f"VD_figure_1_0_{figure}_{question}",
        "category": "VD",
        "l2-category": "figure",
        "answer": "Yes" if question else "No",
    }


def _mmmu(number: int) -> dict[str, Any]:
    row = {**_plain(number), "question": "What is <image 1>?", "split": "validation"}
    if number == 4:
        return {**row, "A": "", "B": "", "C": "", "D": "", "question_type": "open", "answer": "12"}
    if number == 3:  # two images
        row["image"] = str([encoded(3), encoded(4)])
    return {**row, **_options(number), "question_type": "multiple-choice"}


def _rows(name: str) -> list[dict[str, Any]]:
    five = range(5)
    if name.startswith("mmbench") or name == "ccbench":
        return _rotated()
    if name == "mme":
        return [_mme(n) for n in range(6)]
    if name == "mathvista":
        return [_mathvista(n) for n in five]
    if name == "hallusionbench":
        return [_hallusion(n) for n in range(6)]
    if name == "mmmu":
        return [_mmmu(n) for n in five]
    if name in ("seed-image", "ai2d", "scienceqa"):
        return [{**_plain(n), **_options(n)} for n in five]
    if name == "ocrbench":
        kinds = ("Regular Text Recognition", "Doc-oriented VQA", "Key Information Extraction")
        return [{**_plain(n), "answer": str([f"TEXT{n}"]), "category": kinds[n % 3]} for n in five]
    if name == "mmvet":
        return [{**_plain(n), "answer": f"a{n}", "category": "rec,ocr"} for n in five]
    if name == "textvqa":
        return [{**_plain(n), "answer": str(_ten(n))} for n in five]
    if name == "chartqa":
        return [{**_plain(n), "answer": str(10 + n), "type": ("human", "augmented")[n % 2]}
                for n in five]  # fmt: skip
    if name in ("gqa", "docvqa", "infovqa"):
        return [{**_plain(n), "answer": f"answer{n}"} for n in five]
    return [_plain(n) for n in five]  # a server has the answers


def write_sample(name: str, root: Path) -> Path:
    """The file of a benchmark below a root: TSV where it is published so, else JSON lines."""
    root.mkdir(parents=True, exist_ok=True)
    if name in ("coco", "flickr30k", "nocaps"):
        rows = [
            {"image": n, "id": n, "caption": [f"a cat number{n} sits on the mat"] * 5}
            for n in range(5)
        ]
        return write_jsonl(root / f"{name}.jsonl", rows)
    if name in ("vqav2", "okvqa"):
        rows = [
            {"image": n, "question": "what?", "question_id": n,
             "answers": [{"answer": word} for word in _ten(n)]}
            for n in range(5)
        ]  # fmt: skip
        return write_jsonl(root / f"{name}.jsonl", rows)
    if name == "vqav2-testdev":
        rows = [{"image": n, "question": "what?", "question_id": n} for n in range(5)]
        return write_jsonl(root / f"{name}.jsonl", rows)
    if name == "videomme":
        rows = [
            {"image": [8 * n + i for i in range(8)], "question": "who?", "id": n,
             "options": ["A. he.", "B. she."], "answer": "AB"[n % 2], "duration": "short"}
            for n in range(5)
        ]  # fmt: skip
        return write_jsonl(root / f"{name}.jsonl", rows)
    if name == "videomme-subtitles":
        for n in range(5):
            write_clip(root / "video" / f"clip{n}.mp4", [COLOURS[n]] * 9)
            subtitles = root / "subtitle" / f"clip{n}.srt"
            subtitles.parent.mkdir(exist_ok=True)
            subtitles.write_text(
                f"1\n00:00:00,000 --> 00:00:00,450\nearly {n}\n\n"
                f"2\n00:00:30,000 --> 00:00:40,000\nnever {n}\n"
            )
        rows = [
            {"videoID": f"clip{n}", "question_id": f"{n}-1", "question": "who?", "domain": "Film",
             "sub_category": "Cartoon", "task_type": "Counting" if n else "Order",
             "options": ["A. he.", "B. she."], "answer": "AB"[n % 2],
             "duration": "short" if n < 3 else "long"}
            for n in range(5)
        ]  # fmt: skip
        file = root / "Video-MME.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return file
    rows = _rows(name)
    if name in NO_ANSWERS:
        rows = [{key: value for key, value in row.items() if key != "answer"} for row in rows]
    return write_tsv(root / f"{name}.tsv", rows)
