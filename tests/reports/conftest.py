"""A small finished run: metrics, losses, predictions and images, made without a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

KINDS = ("caption", "colour", "grounding", "ocr")
ITEMS_PER_KIND = 10
WRONG_PER_KIND = 4


def metrics() -> dict[str, Any]:
    """Contents of `metrics.json`; a test may change its copy."""
    scores = {
        kind: {"score": 0.6, "blind": 0.25, "chance": None, "items": ITEMS_PER_KIND}
        for kind in KINDS
    }
    text = {"perplexity": 35.25, "facts_replayed": 0.9875, "facts_never_replayed": 0.75}

    def stage(name: str, steps: int | None, identical: bool | None) -> dict[str, Any]:
        return {
            "name": name,
            "title": f"title of {name}",
            "steps": steps,
            "samples": steps and steps * 16,
            "cpu_minutes": steps and 1.5,
            "trains": f"what {name} trains",
            "scores": scores if steps else {},
            "text": text,
            "text_logits_identical": identical,
        }

    return {
        "name": "quickstart",
        "quick": False,
        "cpu_minutes": 11.4,
        "minutes": 7.2,
        "command": "mono-internvl quickstart",
        "device": "cpu",
        "processes": 2,
        "versions": {"torch": "2.13.0", "commit": "0123abcd"},
        "targets": [
            _target("grounding, mean IoU", 0.45, 0.6, 0.41, False, "higher"),
            _target("text perplexity", 1.25, 1.1, 1.05, True, "lower"),
            _target("text-only logits", True, True, True, True, "higher"),
        ],
        "stages": [
            stage("start", None, None),
            stage("s11", 40, True),
            stage("s12", 60, True),
            stage("s13", 30, False),
            stage("s2", 20, False),
        ],
        "llm": {"perplexity": 35.25},
    }


def _target(
    name: str, must: object, aim: object, value: object, met: bool, better: str
) -> dict[str, Any]:
    return {"name": name, "must": must, "aim": aim, "value": value, "met": met, "better": better}


def predictions() -> list[dict[str, Any]]:
    """Rows of a predictions file, `WRONG_PER_KIND` of each kind wrong, blind and text rows too."""
    rows = []
    for kind in KINDS:
        for index in range(ITEMS_PER_KIND):
            is_right = index >= WRONG_PER_KIND
            answer, prediction = f"true {kind} {index}", f"said {kind} {index}"
            if kind == "grounding":
                answer = "<ref>red star</ref><box>[[100, 200, 300, 400]]</box>"
                prediction = "<ref>red star</ref><box>[[110, 210, 310, 410]]</box>"
            row = {
                "id": f"heldout-{kind}-{index}",
                "kind": kind,
                "image": f"images/{index % 3}.png",
                "question": f"question {kind} {index}?",
                "answer": answer,
                "prediction": answer if is_right and kind != "grounding" else prediction,
                "score": 1.0 if is_right else 0.0,
                "blind": False,
            }
            rows += [row, {**row, "prediction": "a blind guess", "blind": True}]
    rows.append({**rows[0], "kind": "name_qa", "image": None, "question": "a text question"})
    return rows


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Folder of a finished run."""
    (tmp_path / "metrics.json").write_text(json.dumps(metrics()), encoding="utf-8")
    for stage in metrics()["stages"]:
        rows = [{"step": i + 1, "loss": 3 / (1 + i / 10)} for i in range(stage["steps"] or 0)]
        if rows:
            write_lines(tmp_path / stage["name"] / "metrics.jsonl", rows)
    write_lines(tmp_path / "predictions" / "s2.jsonl", predictions())
    images = tmp_path / "data" / "images"
    images.mkdir(parents=True)
    for index, colour in enumerate(("red", "green", "blue")):
        Image.new("RGB", (56, 28), colour).save(images / f"{index}.png")
    return tmp_path
