"""HTTP/1.1 with patience that ends: clients that send or take too slowly lose their connection."""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from mono_internvl.serving.http.errors import ApiError, json_bytes
from mono_internvl.serving.http.limits import Limits

_GRACE_S = 5  # in which the application may say itself that a body is late


class PatientProtocol(H11Protocol):
    """One connection.

    Args:
        limits: `upload_s` for headers and for a body, `send_s` for the client to take what is
            written.
    """

    def __init__(self, *args: Any, limits: Limits, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._limits = limits
        self._upload: asyncio.TimerHandle | None = None
        self._uploads: Any = None  # what is awaited: state of the other side
        self._send: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        # Whatever is not taken at once counts, an answer's last bytes too.
        transport.set_write_buffer_limits(high=0)
        self._await_request()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._upload, self._send):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._await_request()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._send = self.loop.call_later(self._limits.send_s, self.transport.abort)

    def resume_writing(self) -> None:
        if self._send is not None:
            self._send.cancel()
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        """As the base class does it, in the API's form."""
        self._refuse(ApiError(400, msg))

    def _await_request(self) -> None:
        """Give a request time to arrive: its headers, then its body."""
        state = self.conn.their_state
        if state is self._uploads:
            return
        if self._upload is not None:
            self._upload.cancel()
        self._upload, self._uploads = None, state
        if state is h11.IDLE:
            self._upload = self.loop.call_later(self._limits.upload_s, self._late_headers)
        elif state is h11.SEND_BODY:
            seconds = self._limits.upload_s + _GRACE_S
            self._upload = self.loop.call_later(seconds, self.transport.abort)

    def _late_headers(self) -> None:
        self._refuse(ApiError(408, f"no request within {self._limits.upload_s} s"))

    def _refuse(self, error: ApiError) -> None:
        """Say what is wrong where nothing was said yet, and hang up."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True  # the application is past being heard
            self.cycle.message_event.set()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = json_bytes(error.body())
            headers = [
                (b"content-type", b"application/json"),
                (b"content-length", str(len(body)).encode()),
                (b"connection", b"close"),
            ]
            response = h11.Response(status_code=error.status, headers=headers, reason=b"")
            for event in (response, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
