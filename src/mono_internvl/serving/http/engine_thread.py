"""The thread that steps the engine, and answers on their way from it to the event loop.

The loop hands requests over and takes texts and results; nothing but this thread calls the engine.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from dataclasses import dataclass, replace

from mono_internvl.generation.engine import Engine
from mono_internvl.generation.request import Generation, Request, Result, Scored

logger = logging.getLogger(__name__)


Tokens = tuple[tuple[int, float, Scored], ...]
"""Ids of an answer, each with its logarithm and the likeliest tokens in its place."""


@dataclass(frozen=True)
class Piece:
    """New text of an answer, and where they are wanted the tokens since the piece before."""

    text: str
    tokens: Tokens = ()


@dataclass(frozen=True)
class Ended:
    """An answer's end, and where they are wanted the tokens since the last piece."""

    result: Result
    tokens: Tokens = ()


Event = tuple[int, Piece | Ended | Exception]
"""What comes of an answer, by its number: pieces if it is streamed, then its end or an error."""


class Ticket:
    """One answer on its way.

    Args:
        request: What is asked; `on_text` is set here.
        number: Among the answers of a request.
        events: Of the running event loop; gets what comes of the answer.
        is_streamed: Whether its text is wanted piece by piece.
    """

    def __init__(
        self, request: Request, number: int, events: asyncio.Queue[Event], *, is_streamed: bool
    ) -> None:
        self.request = replace(request, on_text=self._say) if is_streamed else request
        self.is_cancelled = False
        self._generation: Generation | None = None
        self._number, self._events = number, events
        self._loop = asyncio.get_running_loop()
        self._num_said = 0

    def cancel(self) -> None:
        """Nobody waits for the answer any more."""
        self.is_cancelled = True
        if self._generation is not None:
            self._generation.cancel()

    # ------------------------------------------------------------------ on the engine's thread

    def begin(self, engine: Engine) -> Generation:
        """Submit the request."""
        self._generation = engine.submit(self.request)
        if self.is_cancelled:  # meanwhile, when there was nothing to cancel yet
            self._generation.cancel()
        return self._generation

    def end(self) -> None:
        """The generation has ended."""
        assert self._generation is not None
        self._put(Ended(self._generation.result, self._new_tokens()))

    def fail(self, error: Exception) -> None:
        """There will be no answer."""
        self._put(error)

    def _say(self, text: str) -> None:
        self._put(Piece(text, self._new_tokens()))

    def _new_tokens(self) -> Tokens:
        if not self.request.has_logprobs:
            return ()
        assert self._generation is not None
        tokens = tuple(self._generation.scored(self._num_said))
        self._num_said += len(tokens)
        return tokens

    def _put(self, event: Piece | Ended | Exception) -> None:
        self._loop.call_soon_threadsafe(self._events.put_nowait, (self._number, event))


class EngineThread:
    """Steps an engine as long as there is something to answer.

    Args:
        engine: From now on nobody else's.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._inbox: queue.SimpleQueue[Ticket | None] = queue.SimpleQueue()
        self._tickets: dict[Generation, Ticket] = {}
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    @property
    def is_alive(self) -> bool:
        """Whether it answers."""
        return self._thread.is_alive()

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    def submit(self, ticket: Ticket) -> None:
        """Answer a request when there is room; what comes of it comes to the ticket."""
        self._inbox.put(ticket)

    def close(self) -> None:
        """Cancel what is under way, and wait for the thread's end."""
        self._inbox.put(None)
        self._thread.join()

    def _run(self) -> None:
        while self._take_new():
            try:
                ended = self.engine.step()
            except Exception as error:
                self._fail(error)
            else:
                for generation in ended:
                    if (ticket := self._tickets.pop(generation, None)) is not None:
                        ticket.end()

    def _take_new(self) -> bool:
        """Submit what has come, waiting while there is nothing to do; False at the end."""
        while True:
            try:
                ticket = self._inbox.get(block=not self._tickets)
            except queue.Empty:
                return True
            if ticket is None:
                for waiting in self._tickets.values():
                    waiting.cancel()
                return False
            if ticket.is_cancelled:
                continue
            try:
                self._tickets[ticket.begin(self.engine)] = ticket
            except Exception as error:
                ticket.fail(error)

    def _fail(self, error: Exception) -> None:
        """End the answers that an error of a step belongs to: those it cancelled, or else all."""
        logger.error("a step of the engine failed", exc_info=error)
        waiting = {g: ticket for g, ticket in self._tickets.items() if not ticket.is_cancelled}
        if not waiting:  # the engine cannot even let go of what was cancelled
            self._tickets.clear()
        failed = [ticket for g, ticket in waiting.items() if g.finish_reason == "cancelled"]
        for ticket in failed or waiting.values():
            ticket.cancel()  # the next step lets go of it
            ticket.fail(error)
