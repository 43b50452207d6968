"""The server's paths: who may ask, what is read, and what is sent back."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import time
from collections.abc import AsyncIterator, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mono_internvl.processing.processor import MonoInternVLProcessor
from mono_internvl.serving.http.answers import DONE, AnswerForm, event
from mono_internvl.serving.http.encoding import Asked, RequestEncoder
from mono_internvl.serving.http.engine_thread import Ended, EngineThread, Event, Piece, Ticket
from mono_internvl.serving.http.errors import ApiError, api_error, json_response
from mono_internvl.serving.http.limits import Admission, Held, Limits
from mono_internvl.serving.http.metrics import Metrics
from mono_internvl.serving.http.schema import ChatRequest, parse_request

logger = logging.getLogger(__name__)
CHAT, MODELS, HEALTH, METRICS = "/v1/chat/completions", "/v1/models", "/health", "/metrics"
ENCODING_THREADS = 2
_COPIES_OF_BODY = 4  # as it comes, as text, as the bytes of its images, and room to grow
_CLIENT_LEFT = 499


@dataclass
class Service:
    """A model with everything that answers for it.

    Attributes:
        name: Of the model, as clients write it.
        processor: Of the model.
        encoder: Of requests.
        thread: Answers them.
        admission: Counts them.
        api_key: That clients have to show; None lets everybody ask.
    """

    name: str
    processor: MonoInternVLProcessor
    encoder: RequestEncoder
    thread: EngineThread
    admission: Admission
    api_key: str | None = None
    metrics: Metrics = field(init=False)
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.metrics = Metrics(self.thread.engine, self.admission)
        self.pool = ThreadPoolExecutor(ENCODING_THREADS, thread_name_prefix="encoding")

    @property
    def limits(self) -> Limits:
        """Of the server."""
        return self.admission.limits


def make_app(service: Service) -> FastAPI:
    """The server of a model, as an ASGI application."""

    @contextlib.asynccontextmanager
    async def running(app: FastAPI) -> AsyncIterator[None]:
        service.thread.start()
        yield
        service.pool.shutdown(wait=False, cancel_futures=True)
        service.thread.close()

    # No pages of documentation: they would load scripts from elsewhere.
    app = FastAPI(lifespan=running, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Guard, service=service)
    app.add_exception_handler(HTTPException, _no_such_path)
    app.router.routes.append(Route(CHAT, ChatCompletions(service), methods=["POST"]))

    @app.get(HEALTH)
    async def health() -> Response:
        if not service.thread.is_alive:
            raise ApiError(503, "the engine has stopped; restart the server")
        return json_response({"status": "ok"})

    @app.get(MODELS)
    async def models() -> Response:
        return json_response({"object": "list", "data": [_model(service)]})

    @app.get(MODELS + "/{name:path}")
    async def model(name: str) -> Response:
        _check_model(service, name)
        return json_response(_model(service))

    @app.get(METRICS)
    async def metrics() -> Response:
        return Response(service.metrics.text(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    return app


class Guard:
    """Asks for the key, turns every error into the API's JSON, and counts responses."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 0

        async def noted(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            self._check_key(scope)
            await self._app(scope, receive, noted)
        except ClientDisconnect:
            status = _CLIENT_LEFT
        except Exception as error:
            problem = api_error(error)
            if problem.status >= 500:
                logger.error("a request failed", exc_info=error)
            if status:  # too late to say so; the connection is closed instead
                raise
            await problem.response()(scope, receive, noted)
        finally:
            path = scope["path"]
            known = path if path in (CHAT, MODELS, HEALTH, METRICS) else "other"
            self._service.metrics.responses.labels(known, str(status)).inc()

    def _check_key(self, scope: Scope) -> None:
        key = self._service.api_key
        if key is None or scope["path"] == HEALTH:
            return
        given = dict(scope["headers"]).get(b"authorization", b"")
        if not hmac.compare_digest(given, b"Bearer " + key.encode()):
            raise ApiError(
                401,
                "no valid API key; send it as 'Authorization: Bearer KEY'",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )


class ChatCompletions:
    """`POST /v1/chat/completions`, as a bare ASGI application: it watches its client itself."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        began = time.perf_counter()
        limits = self._service.limits
        with self._service.admission.enter() as held:
            body = await read_body(request, limits, held)
            asked = parse_request(body, self._service.encoder.most_text)
            del body
            _check_model(self._service, asked.model)
            if asked.n > limits.answers:
                raise ApiError(400, f"n: {asked.n}; expected at most {limits.answers}", "n")
            held.add_answers(asked.n - 1)
            await unless_gone(receive, self._answer(asked, held, began, scope, receive, send))

    async def _answer(
        self,
        asked: ChatRequest,
        held: Held,
        began: float,
        scope: Scope,
        receive: Receive,
        send: Send,
    ) -> None:
        service = self._service
        loop = asyncio.get_running_loop()
        prepared = await loop.run_in_executor(service.pool, service.encoder, asked)
        held.set_bytes(prepared.num_bytes)
        events = Events(limit_s=service.limits.answer_s)
        tickets = [
            Ticket(request, number, events.queue, is_streamed=asked.stream)
            for number, request in enumerate(prepared.requests)
        ]
        form = AnswerForm(
            service.name,
            service.processor.tokenizer,
            prepared.num_prompt,
            has_logprobs=asked.logprobs,
        )
        try:
            for ticket in tickets:
                service.thread.submit(ticket)
            if asked.stream:
                ended = await self._stream(asked, prepared, form, events, began, send)
            else:
                ended = await _all_ended(events, len(tickets))
                await json_response(form.completion(ended))(scope, receive, send)
        finally:
            for ticket in tickets:
                ticket.cancel()
        seconds = time.perf_counter() - began
        service.admission.finished(seconds)
        service.metrics.seconds.observe(seconds)
        service.metrics.add([one.result for one in ended.values()])

    async def _stream(
        self,
        asked: ChatRequest,
        prepared: Asked,
        form: AnswerForm,
        events: Events,
        began: float,
        send: Send,
    ) -> dict[int, Ended]:
        """Send chunks as they come; what fails before the first one still has a status."""
        ended: dict[int, Ended] = {}
        seen: set[int] = set()
        is_begun = False

        async def say(data: bytes, *, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": data, "more_body": more})

        try:
            while len(ended) < len(prepared.requests):
                number, what = await events.next()
                if not is_begun:
                    self._service.metrics.first_token.observe(time.perf_counter() - began)
                    await send(_STREAM_START)
                    is_begun = True
                if number not in seen:
                    seen.add(number)
                    await say(form.chunk(number, {"role": "assistant", "content": ""}))
                if isinstance(what, Ended):
                    ended[number] = what
                    await say(form.chunk(number, {}, what.tokens, what.result.finish_reason))
                else:
                    await say(form.chunk(number, {"content": what.text}, what.tokens))
        except Exception as error:
            if not is_begun:
                raise
            logger.error("a stream failed", exc_info=error)
            await say(event(api_error(error).body()), more=False)
            return ended
        if asked.stream_options.include_usage:
            await say(form.last_chunk(one.result for one in ended.values()))
        await say(DONE, more=False)
        return ended


class Events:
    """What comes of the answers to a request, for a limited time.

    Args:
        limit_s: From now on.
    """

    def __init__(self, *, limit_s: float) -> None:
        self.queue: asyncio.Queue[Event] = asyncio.Queue()
        self._end = asyncio.get_running_loop().time() + limit_s

    async def next(self) -> tuple[int, Piece | Ended]:
        """Number of an answer, and what comes of it.

        Raises:
            TimeoutError: The time is over.
            Exception: What ended an answer.
        """
        async with asyncio.timeout_at(self._end):
            number, what = await self.queue.get()
        if isinstance(what, Exception):
            raise what
        return number, what


_STREAM_START: Message = {
    "type": "http.response.start",
    "status": 200,
    "headers": [
        (b"content-type", b"text/event-stream; charset=utf-8"),
        (b"cache-control", b"no-cache"),
    ],
}


async def read_body(request: Request, limits: Limits, held: Held) -> bytes:
    """The body of a request, as JSON is sent.

    Raises:
        ApiError: It is no JSON by its header, too large, or comes too slowly.
        ClientDisconnect: The client left.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # other kinds a web page may send here without asking
        raise ApiError(415, f"content-type: {kind!r:.60}; expected 'application/json'")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise ApiError(415, "content-encoding: compressed bodies are not read; send it plain")
    length = request.headers.get("content-length", "0")
    if length.isdecimal() and int(length[:20]) > limits.body_bytes:
        raise _too_large(limits)
    body = bytearray()
    try:
        async with asyncio.timeout(limits.upload_s):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limits.body_bytes:
                    raise _too_large(limits)
                held.set_bytes(_COPIES_OF_BODY * len(body))
    except TimeoutError:
        raise ApiError(
            408,
            f"the request did not arrive within {limits.upload_s} s",
            headers={"Connection": "close"},
        ) from None
    return bytes(body)


async def unless_gone(receive: Receive, answering: Coroutine[Any, Any, None]) -> None:
    """Run a coroutine to its end, unless the client leaves.

    Raises:
        ClientDisconnect: The client left; the coroutine was cancelled.
    """

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    answer, left = asyncio.ensure_future(answering), asyncio.ensure_future(gone())
    try:
        await asyncio.wait((answer, left), return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            raise ClientDisconnect
        answer.result()
    finally:
        for task in (answer, left):
            task.cancel()
        await asyncio.gather(answer, left, return_exceptions=True)


async def _all_ended(events: Events, count: int) -> dict[int, Ended]:
    ended: dict[int, Ended] = {}
    while len(ended) < count:
        number, what = await events.next()
        if isinstance(what, Ended):
            ended[number] = what
    return ended


def _check_model(service: Service, name: str) -> None:
    if name != service.name:
        raise ApiError(
            404,
            f"model: there is no {name!r:.60} here; expected {service.name!r}",
            "model",
            "model_not_found",
        )


def _model(service: Service) -> dict[str, Any]:
    return {
        "id": service.name,
        "object": "model",
        "created": service.created,
        "owned_by": "mono-internvl",
    }


def _too_large(limits: Limits) -> ApiError:
    return ApiError(413, f"the body has more than {limits.body_bytes:,} bytes; send smaller images")


async def _no_such_path(request: Request, error: Exception) -> Response:
    """404 and 405 of the router in the API's form."""
    assert isinstance(error, HTTPException)
    return ApiError(
        error.status_code, f"{request.method} {request.url.path:.100}: {error.detail}"
    ).response()
