"""A server on a socket: where it listens, and how it begins and ends."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

import uvicorn

from mono_internvl.errors import ConfigError

LOOPBACK = ("127.0.0.1", "::1")


def bind(host: str, port: int) -> socket.socket:
    """A socket that will listen; 0 takes a free port.

    Raises:
        ConfigError: The address cannot be had.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        found = socket.socket(family, kind, protocol)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
        return found
    except (OSError, OverflowError, UnicodeError) as error:
        raise ConfigError(
            f"--host {host} --port {port}: {error}; take another port, or 0 for a free one"
        ) from error


def url_of(listener: socket.socket) -> str:
    """`http://` with the address and port of a bound socket."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Server(uvicorn.Server):
    """A server that says when it is ready, and ends with 0 when it is told to stop.

    Args:
        config: Of uvicorn.
        on_ready: Called when requests are answered.
    """

    def __init__(self, config: uvicorn.Config, on_ready: Callable[[], object]) -> None:
        super().__init__(config)
        self._on_ready = on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_ready()

    def handle_exit(self, sig: int, frame: Any) -> None:
        """As the base class, but a stop that was asked for ends the process with 0."""
        super().handle_exit(sig, frame)
        self._captured_signals.clear()
