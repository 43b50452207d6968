"""A request of chat completions: what is read, what is refused, and what changes nothing.

Nothing is passed over in silence: a field that would change an answer and is not understood is
refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import pydantic_core
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from mono_internvl.serving.http.errors import ApiError

MOST_MESSAGES, MOST_STOPS, LONGEST_STOP = 1000, 4, 200
IGNORED = frozenset(
    ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")
)
"""Fields that say nothing about the answer."""
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}
"""Fields that are not understood, and the values with which they change nothing."""
_SEPARATORS = b",:[{"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class TextPart(_Strict):
    """Text of a message."""

    type: Literal["text"]
    text: str


class ImageUrl(_Strict):
    """An image as a data URI or in base64; `detail="low"` reads it in one tile."""

    url: str
    detail: Literal["auto", "low", "high"] = "auto"


class ImagePart(_Strict):
    """An image of a message."""

    type: Literal["image_url"]
    image_url: ImageUrl


class Message(_Strict):
    """One message; a developer's is a system message."""

    role: Literal["system", "developer", "user", "assistant"]
    content: list[Annotated[TextPart | ImagePart, Field(discriminator="type")]] = Field(
        min_length=1, max_length=MOST_MESSAGES
    )
    name: str | None = None

    @field_validator("content", mode="before")
    @classmethod
    def _as_parts(cls, value: Any) -> Any:
        return [{"type": "text", "text": value}] if isinstance(value, str) else value


class StreamOptions(_Strict):
    """Options of a streamed answer."""

    include_usage: bool = False


class ChatRequest(_Strict):
    """A request; greedy unless a temperature is given."""

    model: str
    messages: list[Message] = Field(min_length=1, max_length=MOST_MESSAGES)
    n: int = Field(1, ge=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(0.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int | None = Field(None, ge=0, lt=2**64)
    stop: list[Annotated[str, Field(min_length=1, max_length=LONGEST_STOP)]] = Field(
        [], max_length=MOST_STOPS
    )
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=20)
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()

    @field_validator("stop", mode="before")
    @classmethod
    def _as_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value


def parse_request(body: bytes, most_text: int) -> ChatRequest:
    """A request from its body.

    Args:
        body: JSON.
        most_text: About how many characters of text a prompt may have; it bounds what the parsed
            body may grow to in memory.

    Raises:
        ApiError: 400, with the path of the field.
    """
    # Beside text and images a body has little structure; lists of millions of nothings have much.
    if sum(body.count(mark) for mark in _SEPARATORS) > most_text + 10_000:
        raise ApiError(400, f"the body has more structure than {most_text:,} characters of text")
    try:
        found = pydantic_core.from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON: {error}", code="invalid_json") from error
    if not isinstance(found, dict):
        raise ApiError(400, f"the body is a JSON {type(found).__name__}; expected an object")
    fields = {name: value for name, value in found.items() if value is not None}
    for name in IGNORED & set(fields):
        del fields[name]
    for name, allowed in NEUTRAL.items():
        if fields.pop(name, allowed[0]) not in allowed:
            raise ApiError(400, f"{name}: not supported; leave it out", name, "unsupported")
    try:
        request = ChatRequest.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        param = _path(first["loc"])
        what = "unknown field; leave it out" if first["type"] == "extra_forbidden" else first["msg"]
        raise ApiError(400, f"{param}: {what}", param, first["type"]) from error
    if request.top_logprobs and not request.logprobs:
        raise ApiError(400, "top_logprobs: needs logprobs=true", "top_logprobs")
    return request


def _path(loc: tuple[int | str, ...]) -> str:
    """The path of a field, without the tags of alternatives that pydantic puts between."""
    out = ""
    for before, part in zip(("", *loc), loc, strict=False):
        if isinstance(part, int):
            out += f"[{part}]"
        elif not (isinstance(before, int) and part in ("text", "image_url")):
            name = part if re.fullmatch(r"\w{1,40}", part) else repr(part)[:40]
            out += f".{name}" if out else name
    return out
