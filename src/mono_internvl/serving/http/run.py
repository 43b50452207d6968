"""`mono-internvl serve`: a model behind a socket, until the process is told to stop."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from pathlib import Path

import uvicorn

from mono_internvl.errors import ConfigError
from mono_internvl.generation.context import most_tokens
from mono_internvl.generation.engine import PREFIX_BYTES, Engine
from mono_internvl.serving.http.app import Service, make_app
from mono_internvl.serving.http.encoding import RequestEncoder
from mono_internvl.serving.http.engine_thread import EngineThread
from mono_internvl.serving.http.limits import Admission, Limits
from mono_internvl.serving.http.protocol import PatientProtocol
from mono_internvl.serving.listening import Server
from mono_internvl.serving.session import ChatSession

_LONGEST_KEY = 4096


def make_service(
    session: ChatSession,
    name: str,
    *,
    limits: Limits,
    kv_bytes: int | None = None,
    prefix_bytes: int = PREFIX_BYTES,
    max_tiles: int | None = None,
    api_key: str | None = None,
) -> Service:
    """A service with the model of a session.

    Args:
        session: Its model and processor are taken.
        name: Of the model, as clients write it.
        limits: Of the server.
        kv_bytes: As `Engine` takes it.
        prefix_bytes: As `Engine` takes it.
        max_tiles: Most tiles of an image; None takes the processor's own.
        api_key: That clients have to show.

    Raises:
        ConfigError: A number is out of range.
    """
    engine = Engine(
        session.model, max_rows=limits.rows, kv_bytes=kv_bytes, prefix_bytes=prefix_bytes
    )
    most = min(most_tokens(session.model.config), engine.cache.max_tokens)
    return Service(
        name,
        session.processor,
        RequestEncoder(session.processor, most, limits, max_tiles),
        EngineThread(engine),
        Admission(limits),
        api_key,
    )


def read_key(file: Path | None, variable: str) -> str | None:
    """The API key: of a file if one is named, else of the environment; None if there is none.

    Args:
        file: That holds it.
        variable: Of the environment.

    Raises:
        ConfigError: The file cannot be read, or there is no key in it.
    """
    if file is None:
        if variable not in os.environ:
            return None
        source, text = variable, os.environ[variable]
    else:
        source = f"--api-key-file {file}"
        try:
            text = file.read_text("ascii")
        except (OSError, UnicodeError) as error:
            raise ConfigError(f"{source}: {error}; expected a file with a key") from error
    key = text.strip()
    if not (key.isascii() and key.isprintable() and 1 <= len(key) <= _LONGEST_KEY):
        raise ConfigError(f"{source}: no key; expected printable ASCII on one line")
    return key


def make_server(service: Service, on_ready: Callable[[], object]) -> uvicorn.Server:
    """A server whose `run(sockets=[...])` serves until SIGTERM or Ctrl-C.

    Answers under way are finished first, for `drain_s` at most.

    Args:
        service: What is served.
        on_ready: Called when requests are answered.
    """
    limits = service.limits
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)  # not a line for each bad request
    config = uvicorn.Config(
        make_app(service),
        http=functools.partial(PatientProtocol, limits=limits),  # type: ignore[arg-type]
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=limits.connections,
        timeout_graceful_shutdown=limits.drain_s,
    )
    return Server(config, on_ready)
