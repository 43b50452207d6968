"""The page of `mono-internvl web`: a conversation on the left, what the model saw on the right.

Everything comes from this machine: no fonts, scripts or counters of others.
"""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from mono_internvl.door import one_line
from mono_internvl.errors import PromptError
from mono_internvl.generation.sampling import GREEDY
from mono_internvl.reports.boxes import BOX_SCALE
from mono_internvl.serving.web.desk import Conversation, Desk, Example, Exchange

FORGOTTEN_AFTER_S = 3600
"""After so long a conversation is forgotten whose tab was closed."""
CSS = "#chat div:has(> button[title=Share]) {display: none}"  # it would send the image to a hub
THEME = gr.themes.Base(font=("system-ui", "sans-serif"), font_mono=("monospace",))
_ENDS = {"stop": "", "length": " […cut]", "stopped": " […stopped]"}

Changes = dict[Any, Any]
"""Component -> what it shows next."""


@dataclass(frozen=True)
class Upload:
    """A file that a visitor shows; messages know it by its own name.

    Attributes:
        path: Where it is kept.
    """

    path: Path

    def read(self, size: int = -1, /) -> bytes:
        """Its bytes, as open files give them."""
        with self.path.open("rb") as file:
            return file.read(size)

    def __str__(self) -> str:
        return self.path.name


class Page:
    """The components of the page, and what they do.

    Args:
        desk: Answers.
        name: Of the model, for the title.
        examples: Questions to begin with.
    """

    def __init__(self, desk: Desk, name: str, examples: Sequence[Example] = ()) -> None:
        self._desk = desk
        self._examples = [
            [{"text": example.question, "files": [str(image) for image in example.images]}]
            for example in examples
        ]
        with gr.Blocks(title=name, analytics_enabled=False, fill_width=True) as self.blocks:
            self._conversation = gr.State(
                None, time_to_live=FORGOTTEN_AFTER_S, delete_callback=_forget
            )
            gr.Markdown(f"## {name}")
            with gr.Row():
                with gr.Column(scale=3):
                    self._make_chat()
                with gr.Column(scale=2):
                    self._make_view()
            self._connect()

    def _make_chat(self) -> None:
        self._chat = gr.Chatbot(
            label="Conversation",
            height=440,
            render_markdown=False,
            elem_id="chat",
            buttons=["copy"],
        )
        self._question = gr.MultimodalTextbox(
            show_label=False,
            placeholder="Ask; drop or paste images",
            file_types=["image"],
            file_count="multiple",
            elem_id="question",
            autofocus=True,
        )
        with gr.Row():
            self._stop = gr.Button("Stop", elem_id="stop")
            self._anew = gr.Button("New conversation", elem_id="anew")
        if self._examples:
            gr.Examples(self._examples, self._question, cache_examples=False, elem_id="examples")

    def _make_view(self) -> None:
        self._boxes = gr.AnnotatedImage(label="Boxes of the answer", elem_id="boxes", height=300)
        self._tiles = gr.Gallery(
            label="What the model reads",
            elem_id="tiles",
            columns=4,
            height=220,
            format="png",
            object_fit="contain",
            fit_columns=False,
            buttons=["fullscreen"],
        )
        self._look = gr.Button("Attention of the answer", elem_id="look")
        self._attention = gr.Image(
            label="Attention", elem_id="attention", visible=False, buttons=["fullscreen"]
        )
        own = GREEDY
        with gr.Accordion("Sampling", open=False):
            self._settings = {
                "temperature": gr.Slider(
                    0, 2, own.temperature, step=0.05, label="Temperature; 0 is greedy"
                ),
                "top_p": gr.Slider(0.05, 1, own.top_p, step=0.05, label="Top p"),
                "repetition_penalty": gr.Slider(
                    1, 2, own.repetition_penalty, step=0.05, label="Repetition penalty"
                ),
                "max_new_tokens": gr.Slider(
                    1, 2048, own.max_new_tokens, step=1, label="Longest answer, tokens"
                ),
                "seed": gr.Number(None, precision=0, label="Seed; empty: another each time"),
                "max_tiles": gr.Number(
                    None, precision=0, label="Most tiles of an image; empty: the model's own"
                ),
            }

    def _connect(self) -> None:
        asked = [self._question, self._conversation, *self._settings.values()]
        changed = [self._chat, self._question, self._conversation]
        changed += [self._boxes, self._tiles, self._attention]
        own: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        self._question.submit(self._ask, asked, changed, **own)
        self._stop.click(_forget, self._conversation, None, queue=False, **own)
        self._look.click(self._attend, self._conversation, self._attention, **own)
        for begins_anew in (self._anew.click, self._chat.clear):
            begins_anew(self._begin_anew, self._conversation, changed, queue=False, **own)

    # ------------------------------------------------------------------ what happens

    def _ask(
        self, asked: dict[str, Any], conversation: Conversation | None, *settings: Any
    ) -> Iterator[Changes]:
        """Ask, and show the answer as it comes; what is wrong with a question is said beside it."""
        conversation = conversation or self._desk.open()
        question, files = asked["text"], [Upload(Path(file)) for file in asked["files"]]
        options = {
            name: value
            for name, value in zip(self._settings, settings, strict=True)
            if value is not None
        }
        shown = _messages(conversation)
        pending = _question(question, files)
        # The empty box that refuses input says that an answer is on its way.
        yield {
            self._chat: [*shown, *pending],
            self._question: gr.MultimodalTextbox(value=None, interactive=False),
            self._conversation: conversation,
        }
        try:
            for text in conversation.ask(question, files, **options):
                yield {self._chat: [*shown, *pending, _message("assistant", text)]}
        except Exception as error:
            if (message := one_line(error)) is None:
                raise
            gr.Warning(html.escape(message))
            yield {
                self._chat: shown,
                self._question: gr.MultimodalTextbox(value=asked, interactive=True),
            }
            return
        yield {
            self._chat: _messages(conversation),
            self._question: gr.MultimodalTextbox(interactive=True),
            **self._view(conversation),
        }

    def _view(self, conversation: Conversation) -> Changes:
        """What the model saw, and what it points at: of the last answer, in the last images."""
        exchange = conversation.exchanges[-1]
        seen = next((one for one in reversed(conversation.exchanges) if one.images), None)
        if seen is None:
            return self._nothing_seen()
        tiles = [(tile.image, tile.name) for tile in conversation.tiles_of(seen)]
        drawn = _drawn(seen, exchange)
        return {**self._nothing_seen(), self._boxes: drawn, self._tiles: tiles}

    def _nothing_seen(self) -> Changes:
        hidden = gr.Image(value=None, visible=False)
        return {self._boxes: None, self._tiles: None, self._attention: hidden}

    def _attend(self, conversation: Conversation | None) -> Any:
        """The attention map of the last answer."""
        try:
            picture = (conversation or self._desk.open()).attention_picture()
        except PromptError as error:
            gr.Warning(html.escape(str(error)))
            return gr.Image(value=None, visible=False)
        return gr.Image(value=picture, visible=True)

    def _begin_anew(self, conversation: Conversation | None) -> Changes:
        _forget(conversation)
        return {
            self._chat: [],
            self._question: gr.MultimodalTextbox(value=None, interactive=True),
            self._conversation: None,
            **self._nothing_seen(),
        }


def _forget(conversation: Conversation | None) -> None:
    """Stop what is under way in a conversation that nobody follows any more."""
    if conversation is not None:
        conversation.stop()


def _message(role: str, text: str) -> dict[str, Any]:
    """Text that is shown as it is: a chat would else show what tags in it ask for."""
    return {"role": role, "content": html.escape(text, quote=False)}


def _question(text: str, files: Sequence[Any]) -> list[dict[str, Any]]:
    images = [{"role": "user", "content": {"path": str(file.path)}} for file in files]
    return [*images, _message("user", text)]


def _messages(conversation: Conversation) -> list[dict[str, Any]]:
    shown = []
    for one in conversation.exchanges:
        shown += _question(one.question, one.sources)
        shown.append(_message("assistant", one.text + _ENDS[one.finish_reason]))
    return shown


def _drawn(seen: Exchange, answered: Exchange) -> tuple[Any, list[tuple[Any, str]]]:
    """The last image, and the boxes of the answer in its pixels."""
    image = seen.images[-1]
    width, height = image.width / BOX_SCALE, image.height / BOX_SCALE
    boxes = []
    for number, box in enumerate(answered.boxes, 1):
        edges = (box.x1 * width, box.y1 * height, box.x2 * width, box.y2 * height)
        boxes.append((tuple(round(edge) for edge in edges), box.label or f"box {number}"))
    return image, boxes
