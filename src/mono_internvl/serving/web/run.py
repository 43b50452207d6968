"""The page behind a socket, until the process is told to stop."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import gradio as gr
import uvicorn
from fastapi import FastAPI
from starlette.middleware.trustedhost import TrustedHostMiddleware

from mono_internvl.serving.listening import LOOPBACK, Server
from mono_internvl.serving.web.desk import Desk, Example
from mono_internvl.serving.web.page import CSS, THEME, Page

if TYPE_CHECKING:
    import socket

LARGEST_FILE = "64mb"
_GRACE_S = 5


def page_app(desk: Desk, name: str, host: str, examples: Sequence[Example] = ()) -> FastAPI:
    """The page as an ASGI application.

    Args:
        desk: Answers.
        name: Of the model.
        host: Address that it is served at.
        examples: Questions to begin with.
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    if host in LOOPBACK:  # no page of elsewhere may pass for one of this machine
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=[*LOOPBACK, "localhost"])
    return gr.mount_gradio_app(
        app,
        Page(desk, name, examples).blocks,
        path="/",
        server_name=host,
        footer_links=[],
        run_history=False,
        max_file_size=LARGEST_FILE,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        theme=THEME,
        css=CSS,
    )


def serve_page(
    desk: Desk,
    name: str,
    listener: socket.socket,
    on_ready: Callable[[], object],
    examples: Sequence[Example] = (),
) -> None:
    """Show the page until SIGTERM or Ctrl-C; images that visitors have shown go when it ends.

    Args:
        desk: Answers; it is closed at the end.
        name: Of the model.
        listener: A bound socket.
        on_ready: Called when the page can be opened.
        examples: Questions to begin with.
    """
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory(prefix="mono-internvl-web-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        config = uvicorn.Config(
            page_app(desk, name, listener.getsockname()[0], examples),
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=_GRACE_S,
        )
        try:
            Server(config, on_ready).run(sockets=[listener])
        finally:
            desk.close()
