"""Conversations at a desk: each its own, answered in turn, whatever becomes of who asked."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from tiny_runs import image_record, text_record, write_lines

from mono_internvl import ChatSession
from mono_internvl.cli.app import main
from mono_internvl.cli.web import offered_questions
from mono_internvl.errors import ConfigError, ImageError, PromptError
from mono_internvl.reports.boxes import Box
from mono_internvl.serving.web.desk import Conversation, Desk, Exchange

Say = Callable[..., None]
GROUNDED = "<ref>red</ref><box>[[100, 250, 500, 750]]</box>"


def _ask(conversation: Conversation, question: str, *images: object, **options: int) -> Exchange:
    stream = conversation.ask(question, images, **options)  # type: ignore[arg-type]
    while True:
        try:
            next(stream)
        except StopIteration as end:
            found: Exchange = end.value
            return found


def _picture(*size: int) -> Image.Image:
    return Image.new("RGB", size or (56, 56), (200, 30, 30))


def test_answer_is_that_of_a_session(session: ChatSession, desk: Desk) -> None:
    first, other = desk.open(), desk.open()
    alone = ChatSession(session.model, session.processor)
    questions = ["what colour is this?", "say one", "say two"]
    expected = [alone.ask(question, max_new_tokens=8).text for question in questions]
    got = []
    for question in questions:
        got.append(_ask(first, question, max_new_tokens=8).text)
        _ask(other, "say six", max_new_tokens=4)  # in between, and not heard by the first
    assert got == expected
    assert first.session.ids == alone.ids
    assert len(other.session.history) == 6


def test_boxes_have_the_names_the_model_gives(desk: Desk, say: Say) -> None:
    say(GROUNDED)
    exchange = _ask(desk.open(), "where is <ref>red</ref>?", _picture())
    assert exchange.boxes == (Box("red", 100, 250, 500, 750),)
    assert exchange.finish_reason == "stop" and "<" not in exchange.text


def test_stop_keeps_what_was_said_and_goes_on(desk: Desk, say: Say) -> None:
    conversation = desk.open()
    say("one two three four five six " * 20, pause_s=0.02)
    stream = conversation.ask("say all")
    next(stream)
    conversation.stop()
    assert len(list(stream)) < 100
    (exchange,) = conversation.exchanges
    assert exchange.finish_reason == "stopped" and exchange.text.strip().startswith("one")
    assert conversation.session.history[-1]["content"] == exchange.text.strip()
    say("two")
    assert _ask(conversation, "and now?").text == "two"


def test_answer_nobody_waits_for_stops(desk: Desk, say: Say) -> None:
    conversation = desk.open()
    say("one two three four five six " * 20, pause_s=0.02)
    stream = conversation.ask("say all")
    next(stream)
    stream.close()
    _ask(desk.open(), "and now?")  # the desk is free again
    assert [one.finish_reason for one in conversation.exchanges] == ["stopped"]


def test_visitors_at_once_get_their_own_answers(desk: Desk) -> None:
    conversations = [desk.open() for _ in range(4)]
    alone = [_ask(desk.open(), f"say {n}", max_new_tokens=6).text for n in range(4)]
    threads = [
        threading.Thread(target=_ask, args=(one, f"say {n}"), kwargs={"max_new_tokens": 6})
        for n, one in enumerate(conversations)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [one.exchanges[0].text for one in conversations] == alone


def test_bad_question_leaves_the_conversation_as_it_was(desk: Desk, tmp_path: Path) -> None:
    conversation = desk.open()
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG no")
    with pytest.raises(PromptError, match="expected some text"):
        _ask(conversation, " ")
    with pytest.raises(ImageError, match=r"broken\.png"):
        _ask(conversation, "what is this?", broken)
    with pytest.raises(ConfigError, match="temperature"):
        _ask(conversation, "hm?", temperature=-1)
    assert not conversation.exchanges and not conversation.session.history


def test_tiles_are_those_the_model_reads(session: ChatSession, desk: Desk) -> None:
    conversation = desk.open()
    left, right = Image.new("RGB", (56, 56), (250, 0, 0)), Image.new("RGB", (56, 56), (0, 0, 250))
    wide = Image.new("RGB", (112, 56))
    wide.paste(left, (0, 0))
    wide.paste(right, (56, 0))
    exchange = _ask(conversation, "hm?", wide, _picture(), max_tiles=2, max_new_tokens=2)
    tiles = conversation.tiles_of(exchange)
    pixels = session.processor.image_processor(images=[wide, _picture()], max_tiles=2)
    assert len(tiles) == len(pixels["pixel_values"]) == 3
    assert [tile.name for tile in tiles][::2] == ["image 1, tile 1 of 2", "image 2, tile 1 of 1"]
    assert tiles[0].image.tobytes() == left.tobytes()
    assert tiles[1].image.tobytes() == right.tobytes()


def test_attention_reads_the_conversation_to_its_last_answer(desk: Desk, say: Say) -> None:
    conversation = desk.open()
    say("red")
    _ask(conversation, "what colour is this?", _picture())
    with pytest.raises(PromptError, match="no image"):
        desk.open().attention_picture()
    found = conversation.session.attention()
    assert [one.name for one in found.segments] == ["system", "image", "user", "answer"]
    assert found.num_tokens == len(conversation.session.ids)
    answer = found.segments[-1]
    said = conversation.session.processor.decode_answer(
        list(conversation.session.ids[answer.start : answer.stop])
    )
    assert said == "red"
    assert conversation.attention_picture().size > (100, 100)
    assert _ask(conversation, "and now?").text == "red"  # it attends as before


def test_missing_gradio_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in [name for name in sys.modules if name.startswith("mono_internvl.serving.web.")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.setattr(sys, "argv", ["mono-internvl", "web", "--model", "nowhere"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 1
    assert capsys.readouterr().err.endswith(
        "web needs the package 'gradio', which is not installed; pip install 'mono-internvl[ui]'\n"
    )


def test_examples_are_the_first_question_of_each_kind(tmp_path: Path) -> None:
    records = [image_record(tmp_path, 0), image_record(tmp_path, 1), text_record(2)]
    first, second = offered_questions(write_lines(tmp_path / "asked.jsonl", records))
    assert (first.question, second.question) == ("what colour is this?", "say one two three")
    assert [image.name for image in first.images] == ["0.png"] and not second.images
