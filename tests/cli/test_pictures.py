"""Pictures that verbs write: boxes of an answer, and attention maps."""

import json

import pytest
from PIL import Image
from test_cli import CHAT_A, chat, checkpoint, command  # noqa: F401 - fixtures

from mono_internvl.reports.boxes import Box, draw_boxes
from mono_internvl.serving.session import ChatSession


@pytest.fixture
def answers(monkeypatch):
    """Lets the model say something."""

    def say(text):
        monkeypatch.setattr(ChatSession, "ask", lambda *a, **k: None)
        said = [{"role": "assistant", "content": text}]
        monkeypatch.setattr(ChatSession, "history", property(lambda self: said))

    return say


def test_draw_boxes_marks_edges_and_name():
    image = Image.new("L", (100, 50), 255)
    drawn = draw_boxes(image, [Box("cat", 200, 400, 600, 1000)])
    assert drawn.mode == "RGB" and drawn.size == (500, 250)
    colour = drawn.getpixel((100, 150))
    assert colour != (255, 255, 255)
    assert drawn.getpixel((299, 249)) == colour and drawn.getpixel((200, 200)) == (255, 255, 255)
    assert colour in {drawn.getpixel((x, 90)) for x in range(100, 125)}  # the name's ground
    assert image.getpixel((20, 20)) == 255


@pytest.mark.parametrize("edges", [(0, 0, 1, 1), (0, 0, 1000, 1000), (999, 999, 1000, 1000)])
def test_draw_boxes_stays_within_the_image(edges):
    for size in ((1, 1), (3, 900)):
        assert draw_boxes(Image.new("RGB", size), [Box("x" * 500, *edges)]).size >= size


def test_chat_draws_the_boxes_of_an_answer(chat, answers, tmp_path):  # noqa: F811
    answers("<ref>cat</ref><box>[[100, 100, 900, 900]]</box>")
    out = tmp_path / "drawn.png"
    code, _, err = chat("--image", CHAT_A, "--draw", out, "Where is the cat?")
    assert (code, err) == (0, f"picture: {out}\n")
    assert Image.open(out).format == "PNG"


def test_chat_says_that_an_answer_has_no_box(chat, answers, tmp_path):  # noqa: F811
    answers("a cat [[1, 2, 3]]")
    code, _, err = chat("--image", CHAT_A, "--draw", tmp_path / "drawn.png", "Where?")
    assert code == 1 and "was not written" in err and "a cat [[1, 2, 3]]" in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--draw", "x.png"), "one question about one --image"),
        (("--image", CHAT_A, "--image", CHAT_A, "--draw", "x.png", "Hi?"), "one --image"),
        (("--image", CHAT_A, "--draw", "x.pdf", "Hi?"), "--draw x.pdf"),
        (("--image", CHAT_A, "--draw", "absent/x.png", "Hi?"), "folder absent is not there"),
    ],
)
def test_chat_refuses_what_it_cannot_draw(chat, arguments, said, monkeypatch):  # noqa: F811
    monkeypatch.setattr(ChatSession, "__init__", lambda *a, **k: pytest.fail("was loaded"))
    code, out, err = chat(*arguments)
    assert code in (1, 2) and out == "" and said in " ".join(err.replace("│", " ").split())


def test_attention_map_writes_picture_and_numbers(command, checkpoint, tmp_path):  # noqa: F811
    out = tmp_path / "map.png"
    common = ("--model", checkpoint, "--image", CHAT_A, "--device", "cpu", "--max-tiles", 2)
    code, said, err = command("attention-map", *common, "--out", out, "--json", "What is this?")
    assert (code, err) == (0, "")
    found = json.loads(said)
    assert [segment["name"] for segment in found["segments"]] == ["system", "image", "user"]
    assert all(0 < layer["text_to_image"] < 1 for layer in found["layers"])
    assert Image.open(out).format == "PNG"
    code, said, _ = command("attention-map", *common, "--out", out, "What is this?")
    assert code == 0 and f"{found['num_tokens']} tokens: system" in said
    code, said, err = command("attention-map", *common, "--out", "map.svg", "What is this?")
    assert (code, said) == (1, "") and "ends in .png" in err
