"""Conversations of several visitors with one model, answered one after another.

Knows nothing of pages. One thread asks the model, whatever becomes of those who wait for it.
"""

from __future__ import annotations

import contextlib
import io
import threading
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Literal

from PIL import Image

from mono_internvl.processing.image_files import ImageSource, load_image
from mono_internvl.reports.attention_pages import attention_picture
from mono_internvl.reports.boxes import Box, boxes_to_draw
from mono_internvl.serving.session import Answer, ChatSession

FinishReason = Literal["stop", "length", "stopped"]


@dataclass(frozen=True)
class Example:
    """A question to begin with.

    Attributes:
        question: Its text.
        images: Files that are shown with it.
    """

    question: str
    images: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Exchange:
    """A question and its answer.

    Attributes:
        question: As it was asked.
        sources: What the images were read from.
        images: Shown with it.
        max_tiles: Most tiles of each of them; None is the session's own.
        text: The answer, without control tokens.
        boxes: In the answer, each with the name that the model gives it.
        finish_reason: "stop" if the model ended the answer, "length" if it had to be cut, "stopped"
            if the visitor did.
    """

    question: str
    sources: tuple[ImageSource, ...]
    images: tuple[Image.Image, ...]
    max_tiles: int | None
    text: str
    boxes: tuple[Box, ...]
    finish_reason: FinishReason


@dataclass(frozen=True)
class Tile:
    """A crop of an image as the model reads it.

    Attributes:
        image: Its pixels.
        name: Which image, and which crop of it.
    """

    image: Image.Image
    name: str


class Desk:
    """A model that visitors talk to.

    Args:
        session: Its model, settings and engine serve every conversation.
    """

    def __init__(self, session: ChatSession) -> None:
        self._session = session
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="model")

    def open(self) -> Conversation:
        """A new conversation. What conversations begin with alike is read once for all."""
        own = self._session
        session = ChatSession(
            own.model,
            own.processor,
            system=own.system,
            max_tiles=own.max_tiles,
            sampling=own.sampling,
            plan=own.plan,
            engine=own.engine,
        )
        return Conversation(session, self._pool)

    def close(self) -> None:
        """Answer nobody any more; an answer under way is finished first."""
        self._pool.shutdown(cancel_futures=True)


class Conversation:
    """One visitor's conversation; `Desk.open` makes it.

    Args:
        session: Of this conversation alone.
        pool: The thread that asks the model.
    """

    def __init__(self, session: ChatSession, pool: ThreadPoolExecutor) -> None:
        self.session = session
        self.exchanges: list[Exchange] = []
        self._pool = pool
        self._is_stopped = threading.Event()

    def ask(
        self,
        question: str,
        images: Sequence[ImageSource] = (),
        *,
        max_tiles: int | None = None,
        **sampling: Any,
    ) -> Generator[str, None, Exchange]:
        """Yields the answer's text as far as it has come; returns the exchange.

        A caller that leaves early stops the answer.

        Args:
            question: As in `ChatSession.ask`.
            images: Shown with it.
            max_tiles: Most tiles of each of them.
            **sampling: Fields of `Sampling`.

        Raises:
            MonoInternVLError: As by `ChatSession.ask`; the conversation is then as it was before.
        """
        pieces: SimpleQueue[str | None] = SimpleQueue()
        stop = self._is_stopped = threading.Event()

        def answer() -> None:
            try:
                shown = tuple(load_image(image) for image in images)
                stream = self.session.ask_stream(question, shown, max_tiles=max_tiles, **sampling)
                text, reason = _send(stream, pieces, stop)
                said = self.session.history[-1]["content"]  # boxes have their names there
                boxes = boxes_to_draw(said)
                self.exchanges.append(
                    Exchange(question, tuple(images), shown, max_tiles, text, boxes, reason)
                )
            finally:
                pieces.put(None)

        done, text = self._pool.submit(answer), ""
        try:
            while (piece := pieces.get()) is not None:
                text += piece
                yield text
        finally:
            stop.set()
        done.result()
        return self.exchanges[-1]

    def stop(self) -> None:
        """End the answer that is under way, if one is; what there is of it stays."""
        self._is_stopped.set()

    def attention_picture(self) -> Image.Image:
        """Where all tokens up to the last answer look, layer by layer, with its numbers.

        Raises:
            PromptError: As by `ChatSession.attention`.
        """

        def draw() -> bytes:
            found = self.session.attention()
            return attention_picture(
                f"{self.exchanges[-1].question:.80}",
                [layer.weights for layer in found.layers],
                [(one.name, one.start, one.stop) for one in found.segments],
                found.lines,
            )

        return Image.open(io.BytesIO(self._pool.submit(draw).result()))

    def tiles_of(self, exchange: Exchange) -> list[Tile]:
        """The crops that the model read of the images of an exchange, in its order."""
        processor = self.session.processor.image_processor
        limit = self.session.max_tiles if exchange.max_tiles is None else exchange.max_tiles
        tiling = processor.tiling_with(max_tiles=limit)
        found = []
        for number, image in enumerate(exchange.images, 1):
            crops = tiling.cut(image)
            for place, crop in enumerate(crops, 1):
                name = f"image {number}, tile {place} of {len(crops)}"
                found.append(Tile(Image.fromarray(crop), name))
        return found


def _send(
    stream: Generator[str, None, Answer], pieces: SimpleQueue[str | None], stop: threading.Event
) -> tuple[str, FinishReason]:
    """Hand an answer over piece by piece; its text, and why it ended."""
    text = ""
    with contextlib.closing(stream):
        while not text or not stop.is_set():  # a conversation holds no question without an answer
            try:
                piece = next(stream)
            except StopIteration as end:
                answer: Answer = end.value
                return answer.text, answer.finish_reason
            text += piece
            pieces.put(piece)
    return text, "stopped"
