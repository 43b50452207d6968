"""What goes wrong with a request, in the JSON form of the OpenAI API."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fastapi import Response

from mono_internvl.door import one_line
from mono_internvl.errors import CheckpointError, MonoInternVLError

_KINDS = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
_LONGEST = 500


@dataclass
class ApiError(Exception):
    """An answer other than 200.

    Attributes:
        status: Of HTTP.
        message: Field, what was found, what was expected, next step.
        param: Path of the field, as "messages[0].content"; None where it is none.
        code: A word for programs.
        headers: Of the response.
    """

    status: int
    message: str
    param: str | None = None
    code: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def body(self) -> dict[str, Any]:
        """The error object."""
        kind = "server_error" if self.status >= 500 else _KINDS.get(self.status)
        return {
            "error": {
                "message": self.message[:_LONGEST],
                "type": kind or "invalid_request_error",
                "param": self.param,
                "code": self.code,
            }
        }

    def response(self) -> Response:
        """The whole response."""
        return json_response(self.body(), self.status, self.headers)


def api_error(error: Exception) -> ApiError:
    """Whatever was raised, as it is told to a client: nothing of the inside of the server."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, MonoInternVLError) and not isinstance(error, CheckpointError):
        return ApiError(400, one_line(error) or "")
    if isinstance(error, TimeoutError):
        return ApiError(504, "the answer took too long; ask for fewer tokens", code="timeout")
    return ApiError(500, "the model could not answer; the server's log says why")


def json_bytes(value: Any) -> bytes:
    """A JSON document in UTF-8; what has no UTF-8 is escaped."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return text.encode("utf-8", "backslashreplace")


def json_response(value: Any, status: int = 200, headers: Mapping[str, str] = {}) -> Response:
    """A JSON response."""
    return Response(json_bytes(value), status, dict(headers), "application/json")
