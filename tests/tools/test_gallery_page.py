"""The gallery draws its answers by the seed alone and shows wrong ones as they are."""

import io
import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import gallery_page
import pytest
from gallery_page import KINDS, PAGE, PICTURE, chosen_answers, main
from PIL import Image

from mono_internvl.errors import ConfigError
from mono_internvl.runs.schemas import METRICS

ORIGIN = {
    "command": "mono-internvl quickstart",
    "device": "cpu",
    "versions": {"commit": "abc"},
    "date": "2026-01-31",
}


def row(kind: str, number: int, score: float) -> dict:
    """A prediction; boxes and captions get what is read of them."""
    answer = {"grounding": "<ref>red cross</ref><box>[[100, 100, 300, 300]]</box>"}.get(kind, "a|b")
    return {
        "id": f"{kind}-{number}",
        "image": "images/one.png",
        "kind": kind,
        "answer": answer,
        "conversations": [{"from": "human", "value": "what?"}, {"from": "gpt", "value": answer}],
        "question": "what?",
        "prediction": answer if score == 1 else "nothing",
        "score": score,
        "blind": False,
        "attributes": [["large", "red", "cross", "top left"]],
    }


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that looks like a finished quickstart, every third answer wrong."""
    folder = tmp_path / "run"
    (folder / "data" / "images").mkdir(parents=True)
    (folder / "predictions").mkdir()
    Image.new("RGB", (168, 168), "white").save(folder / "data" / "images" / "one.png")
    rows = [row(kind, number, float(number % 3 > 0)) for kind in KINDS for number in range(12)]
    lines = "".join(json.dumps(one) + "\n" for one in rows)
    (folder / "predictions" / "s2.jsonl").write_text(lines)
    (folder / METRICS).touch()
    monkeypatch.setattr(gallery_page, "read_metrics", lambda _: SimpleNamespace(origin=ORIGIN))
    said = SimpleNamespace(text="1")
    session = SimpleNamespace(ask=lambda *a, **k: said, reset=lambda: None)
    monkeypatch.setattr(gallery_page, "load", lambda *a, **k: session)
    return folder


def test_choice_is_the_seeds_whatever_the_order_of_the_file(run: Path) -> None:
    first = chosen_answers(run, 0)
    assert Counter(one.kind for one in first) == KINDS
    file = run / "predictions" / "s2.jsonl"
    file.write_text("".join(reversed(file.read_text().splitlines(keepends=True))))
    assert chosen_answers(run, 0) == first
    assert chosen_answers(run, 1) != first


def test_page_and_picture_hold_wrong_answers_and_dialogues(run: Path, tmp_path: Path) -> None:
    main([str(run), "--root", str(tmp_path / "out")])
    page = (tmp_path / "out" / PAGE).read_text()
    assert "| wrong |" in page and "| right |" in page and "a\\|b" in page
    assert "| dialogue | " in page and "commit abc" in page
    picture = Image.open(io.BytesIO((tmp_path / "out" / PICTURE).read_bytes()))
    assert picture.width == 1200
    colours = {colour for _, colour in picture.convert("RGB").getcolors(1 << 24) or ()}
    assert len(colours) > 10  # boxes, words and frames


def test_unfinished_run_is_refused(run: Path) -> None:
    (run / METRICS).unlink()
    with pytest.raises(ConfigError, match="let it end"):
        chosen_answers(run, 0)
    (run / METRICS).touch()
    (run / "predictions" / "s2.jsonl").write_text("")
    with pytest.raises(ConfigError, match="0 answers of kind grounding"):
        chosen_answers(run, 0)
