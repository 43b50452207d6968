"""The page in a browser: a question about an image is asked, its answer read, a box drawn."""

from __future__ import annotations

import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mono_internvl import ChatSession, load
from mono_internvl.serving.web.desk import Desk

pytest.importorskip("gradio", reason="`make test-web` has an environment with Gradio")
pytest.importorskip("playwright", reason="`make test-web` installs it")

import uvicorn
from playwright.sync_api import sync_playwright

from mono_internvl.cli.web import offered_questions
from mono_internvl.serving.listening import LOOPBACK, Server, bind, url_of
from mono_internvl.serving.web.desk import Example
from mono_internvl.serving.web.run import page_app

CHROMIUM = shutil.which(os.environ.get("CHROMIUM", "chromium"))
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium on the path; CHROMIUM=FILE names one"
)
Say = Callable[..., None]
WAIT_MS = 60_000
GROUNDED = "<ref>red</ref><box>[[100, 250, 500, 750]]</box>"
OFFLINE = (  # no calls home of the browser itself
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


class Visitor:
    """A tab of a browser, and what it does."""

    def __init__(self, tab: Any, url: str) -> None:
        self.tab, self.requested = tab, list[str]()
        tab.on("request", lambda request: self.requested.append(request.url))
        tab.set_default_timeout(WAIT_MS)
        tab.goto(url)

    def ask(self, question: str, *images: Path) -> None:
        if images:
            files = self.tab.locator("#question input[type=file]")
            files.set_input_files([str(image) for image in images])
            self.tab.locator("#question img").nth(len(images) - 1).wait_for()
        self.tab.fill("#question textarea", question)
        self.tab.press("#question textarea", "Enter")

    def answer(self, number: int = 0) -> str:
        """The text of an answer when it has come to its end."""
        text = self.tab.locator("#chat .bot.message").nth(number)
        text.wait_for()
        self.tab.locator("#question textarea:enabled").wait_for()
        return str(text.inner_text()).strip()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_playwright() as engine:
        found = engine.chromium.launch(executable_path=CHROMIUM, args=list(OFFLINE))
        yield found
        found.close()


Visit = Callable[..., Visitor]


@pytest.fixture
def visit(
    browser: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Visitor]]:
    """Opens the page of a desk; afterwards nothing may have been asked of another machine."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "shown"))
    ends: list[Callable[[], object]] = []
    visitors: list[Visitor] = []

    def open_page(desk: Desk, *examples: Example) -> Visitor:
        listener, ready = bind(LOOPBACK[0], 0), threading.Event()
        app = page_app(desk, "tiny", LOOPBACK[0], examples)
        server = Server(uvicorn.Config(app, log_level="error"), ready.set)
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        assert ready.wait(60)
        tab = browser.new_page(viewport={"width": 1280, "height": 900})

        def end() -> None:
            tab.close()
            server.should_exit = True
            thread.join(60)

        ends.append(end)
        visitors.append(Visitor(tab, url_of(listener)))
        return visitors[-1]

    yield open_page
    for end in ends:
        end()
    own = re.compile(r"http://127\.0\.0\.1:\d+/|data:|blob:")
    assert all(own.match(url) for one in visitors for url in one.requested)


def _picture(folder: Path, *size: int) -> Path:
    file = folder / f"{size}.png"
    Image.new("RGB", size, (200, 30, 30)).save(file)
    return file


def test_answer_is_read_and_its_box_is_drawn(
    desk: Desk, say: Say, visit: Visit, tmp_path: Path
) -> None:
    visitor = visit(desk, Example("where is red?", (_picture(tmp_path, 56, 56),)))
    say(GROUNDED)
    visitor.ask("where is <ref>red</ref>?", _picture(tmp_path, 112, 56))
    assert visitor.answer() == "red[[100, 250, 500, 750]]"
    assert visitor.tab.locator("#boxes .legend").inner_text().strip() == "red"
    assert visitor.tab.locator("#boxes img").count() == 2  # the image, and the box over it
    assert visitor.tab.locator("#tiles .grid-wrap img").count() == 1
    assert "<ref>red</ref>" in visitor.tab.locator("#chat .user.message").last.inner_text()
    visitor.tab.click("#look")
    visitor.tab.locator("#attention img").wait_for()
    say("one <b>two</b> <img src=http://example.org/a.png>")
    visitor.ask("say it")  # a later turn; what tags ask for is not done
    assert visitor.answer(1) == "one <b>two</b> <img src=http://example.org/a.png>"
    assert visitor.tab.locator("#boxes img").count() == 1


def test_bad_image_is_said_and_the_question_kept(
    desk: Desk, say: Say, visit: Visit, tmp_path: Path
) -> None:
    visitor = visit(desk)
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG no")
    visitor.ask("what is this?", broken)
    toast = visitor.tab.locator(".toast-body").inner_text()
    assert "image broken.png: cannot be decoded" in toast and str(tmp_path) not in toast
    assert visitor.tab.locator("#question textarea").input_value() == "what is this?"
    assert visitor.tab.locator("#chat .message").count() == 0
    say("red")
    visitor.tab.click("#anew")
    visitor.ask("what colour is this?", _picture(tmp_path, 56, 56))
    assert visitor.answer() == "red"


def test_answer_can_be_stopped(desk: Desk, say: Say, visit: Visit) -> None:
    visitor = visit(desk)
    say("one two three four five six " * 40, pause_s=0.05)
    visitor.ask("say all")
    visitor.tab.locator("#chat .bot.message").wait_for()
    visitor.tab.click("#stop")
    assert visitor.answer().endswith("[…stopped]")


RUN = os.environ.get("RUN")


@pytest.mark.skipif(RUN is None, reason="RUN=DIR names the folder of a quickstart")
def test_model_of_the_quickstart_draws_a_box(visit: Visit) -> None:
    run = Path(str(RUN))
    session: ChatSession = load(run / "model", device="cpu")
    examples = offered_questions(run / "data" / "validation.jsonl")
    (grounded,) = (one for one in examples if "<ref>" in one.question)
    desk = Desk(session)
    visitor = visit(desk, *examples)
    visitor.ask(grounded.question, *grounded.images)
    assert "[[" in visitor.answer()
    assert visitor.tab.locator("#boxes img").count() == 2
    visitor.tab.click("#look")
    visitor.tab.locator("#attention img").wait_for()
    if "SCREENSHOT" in os.environ:
        visitor.tab.wait_for_timeout(1000)  # images fade in
        visitor.tab.screenshot(path=os.environ["SCREENSHOT"])
    desk.close()
