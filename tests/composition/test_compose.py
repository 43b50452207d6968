"""An article with pictures: with scripted answers, and through the command line with a model."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch
from PIL import Image
from typer.testing import CliRunner

from mono_internvl.cli.app import app
from mono_internvl.composition.album import Album, OwnWords, TwoTowers, open_album
from mono_internvl.composition.compose import compose
from mono_internvl.composition.page import check_page, page
from mono_internvl.composition.prompts import WORDINGS
from mono_internvl.errors import ConfigError, PromptError

SAID = {
    "cat.png": "a cat sleeps on a sofa",
    "dog.png": "a dog runs on the beach",
    "boat.png": "a boat on the sea",
    "kite.png": "a red kite in the sky",
    "lamp.png": "a lamp on a table",
    "tree.png": "a tree in the snow",
}
TEXT = "We went to the sea.\n\nThe dog ran.\nAt home the cat slept."


class Model:
    """Answers by script, and remembers what it was asked."""

    def __init__(self, places: str, captions: Sequence[str], choices: Sequence[str]) -> None:
        self.places, self.captions, self.choices = places, list(captions), list(choices)
        self.asked: list[tuple[str, list[str], float]] = []

    def __call__(
        self, question: str, images: Sequence[Path], max_new_tokens: int, penalty: float
    ) -> str:
        self.asked.append((question, [image.name for image in images], penalty))
        assert question.count("<image>") == len(images)
        if "These lines are" in question or "适合插入图像的行是" in question:
            return self.places
        if "caption of a picture" in question or "图像对应的标题" in question:
            return self.captions.pop(0)
        if "The candidates are" in question or "候选图像包括" in question:
            return self.choices.pop(0)
        return "one\n<image>two"


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number, name in enumerate(SAID):
        Image.new("RGB", (20, 20), (30 * number, 0, 0)).save(folder / name)
    return folder


def _words(name: str = "a model") -> tuple[OwnWords, list[str]]:
    described: list[str] = []

    def say(question: str, picture: Path) -> str:
        described.append(picture.name)
        return SAID[picture.name]

    return OwnWords(name, say), described


def _album(pictures: Path) -> tuple[Album, OwnWords]:
    encoder, _ = _words()
    return open_album(pictures, encoder, pictures.parent / "index.json"), encoder


def test_places_captions_and_choices_make_an_article(pictures: Path) -> None:
    album, encoder = _album(pictures)
    captions = ['A boat on the sea." and more', "the dog on the beach”"]
    model = Model("<Seg1>, <Seg 0> and <Seg9>", captions, ["A", "The best is B."])
    found = compose("Holiday", album, encoder, model, WORDINGS["en"], pictures=2, text=TEXT)
    assert found.lines == ("We went to the sea.", "The dog ran.", "At home the cat slept.")
    first, second = found.illustrations
    assert (first.line, second.line) == (0, 1) and found.has_chosen_places
    assert first.caption == "A boat on the sea" and second.caption == "the dog on the beach"
    assert first.picture.name == "boat.png" and first.is_chosen
    assert second.candidates[0].name == "dog.png" and second.picture == second.candidates[1]
    assert first.picture not in second.candidates and len(second.candidates) == 4
    question, images, _ = model.asked[-1]
    assert "We went to the sea.\n<image>\nThe dog ran." in question and images[0] == "boat.png"
    assert [penalty for _, _, penalty in model.asked] == [1.0, 5.0, 5.0, 1.0, 1.0]
    assert "<Seg0>: A boat on the sea." in model.asked[2][0]


def test_answers_that_name_nothing_are_told(pictures: Path) -> None:
    album, encoder = _album(pictures)
    model = Model("none", ["", "<image>"], ["Apples", ""])
    found = compose("Holiday", album, encoder, model, WORDINGS["zh"], pictures=2, text=TEXT)
    assert not found.has_chosen_places and [one.line for one in found.illustrations] == [0, 2]
    assert not any(one.is_chosen for one in found.illustrations)
    assert found.illustrations[0].caption == found.lines[0]
    assert len({one.picture for one in found.illustrations}) == 2


def test_text_is_written_and_limits_hold(pictures: Path) -> None:
    album, encoder = _album(pictures)
    model = Model("<Seg0><Seg1>", ["x", "y"], ["C", "D"])
    found = compose("T", album, encoder, model, WORDINGS["en"], pictures=9)
    assert found.lines == ("one", "two") and len(found.illustrations) == 2
    assert compose("T", album, encoder, model, WORDINGS["en"], pictures=0).illustrations == ()
    with pytest.raises(PromptError, match="the article is empty"):
        compose("T", album, encoder, model, WORDINGS["en"], text=" \n<image>\n")


def test_index_describes_a_picture_once(pictures: Path, tmp_path: Path) -> None:
    index = tmp_path / "index.json"
    (pictures / "broken.png").write_bytes(b"no picture")
    encoder, described = _words()
    album = open_album(pictures, encoder, index)
    assert len(album.pictures) == 6 and "broken.png" in album.unread[0]
    assert len(described) == 6 and len(open_album(pictures, encoder, index).pictures) == 6
    Image.new("RGB", (30, 30)).save(pictures / "cat.png")
    open_album(pictures, encoder, index)
    assert described[6:] == ["cat.png"], "only what has changed"
    other, again = _words("another")
    open_album(pictures, other, index)
    assert len(again) == 6
    near = album.nearest("the cat on the sofa", encoder, 2, [pictures / "cat.png"])
    assert "cat.png" not in {p.name for p in near} and len(near) == 2
    index.write_text("{")
    with pytest.raises(ConfigError, match="no index of pictures"):
        open_album(pictures, encoder, index)


def test_folders_without_pictures_are_refused(tmp_path: Path) -> None:
    encoder, _ = _words()
    with pytest.raises(ConfigError, match="no such folder"):
        open_album(tmp_path / "none", encoder, tmp_path / "i.json")
    with pytest.raises(ConfigError, match="holds no picture"):
        open_album(tmp_path, encoder, tmp_path / "i.json")


def test_encoder_of_two_towers_compares_features(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Towers:
        def eval(self) -> Towers:
            return self

        def get_text_features(self, shade: int) -> torch.Tensor:
            return torch.tensor([[1.0, float(shade)]])

        get_image_features = get_text_features

    def processor(**inputs: Any) -> dict[str, int]:
        image = inputs.get("images")
        return {"shade": len(inputs["text"][0]) if image is None else image.getpixel((0, 0))[0]}

    monkeypatch.setattr("transformers.AutoModel.from_pretrained", lambda name: Towers())
    monkeypatch.setattr(
        "transformers.AutoProcessor.from_pretrained", lambda name, use_fast: processor
    )
    encoder = TwoTowers("towers")
    album = open_album(pictures, encoder, tmp_path / "i.json")
    shades = {name: 30 * number for number, name in enumerate(SAID)}
    near = album.nearest("", encoder, 6)
    assert [shades[p.name] for p in near] == sorted(shades.values())
    with pytest.raises(ConfigError, match="encoder"):
        monkeypatch.undo()
        TwoTowers(str(tmp_path / "nothing"))


def test_pages_escape_what_they_hold(pictures: Path, tmp_path: Path) -> None:
    (pictures / "cat.png").rename(pictures / "a cat & dog.png")
    encoder = OwnWords("m", lambda question, picture: "a cat")
    album = open_album(pictures, encoder, tmp_path / "i.json")
    model = Model("<Seg0>", ["cat <b>*x*"], ["A"])
    title = "<script>"
    found = compose(title, album, encoder, model, WORDINGS["en"], pictures=1, text="1 < 2 *a*")
    as_html = page(found, tmp_path / "a.html")
    assert "<script>" not in as_html and "1 &lt; 2" in as_html and "<b>" not in as_html
    (link,) = re.findall(r'src="([^"]+)"', as_html)
    assert link == "pictures/a%20cat%20%26%20dog.png"
    as_markdown = page(found, tmp_path / "a.md")
    assert "# \\<script\\>" in as_markdown and f"]({link})" in as_markdown
    for wrong in ("a.txt", "none/a.md"):
        with pytest.raises(ConfigError, match=r"expected a file|no folder"):
            check_page(tmp_path / wrong)


def test_model_illustrates_a_text(pictures: Path, tmp_path: Path) -> None:
    checkpoint = tiny_runs.write_checkpoint(tmp_path / "model")
    (tmp_path / "text.txt").write_text("red\n\ngreen\n")
    words = ["compose", "--model", str(checkpoint), "--title", "Colours", "--images"]
    words += [str(pictures), "--out", str(tmp_path / "a.html"), "--pictures", "2"]
    words += ["--text", str(tmp_path / "text.txt"), "--precision", "fp32", "--json"]
    result = CliRunner().invoke(app, words, catch_exceptions=False)
    assert result.exit_code == 0
    rows = json.loads(result.stdout)["pictures"]
    assert len({row["picture"] for row in rows}) == len(rows) >= 1
    assert all(row["picture"] in row["candidates"] for row in rows)
    assert (tmp_path / "a.html").read_text().count("<img ") == len(rows)
    assert len(json.loads((tmp_path / "a.index.json").read_text())["pictures"]) == 6
