"""Answers in the form of the OpenAI API: whole, or as chunks of a stream."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Mapping
from typing import Any

from mono_internvl.generation.request import REPLACEMENT, Result
from mono_internvl.processing.tokenizer import MonoInternVLTokenizer
from mono_internvl.serving.http.engine_thread import Ended, Tokens
from mono_internvl.serving.http.errors import json_bytes

DONE = b"data: [DONE]\n\n"


class AnswerForm:
    """The answers of one request.

    Args:
        model: Name of the model.
        tokenizer: Of the model.
        num_prompt: Tokens of the prompt.
        has_logprobs: Whether logarithms of probabilities are wanted.
    """

    def __init__(
        self,
        model: str,
        tokenizer: MonoInternVLTokenizer,
        num_prompt: int,
        *,
        has_logprobs: bool,
    ) -> None:
        self._head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }
        self._tokenizer, self._num_prompt = tokenizer, num_prompt
        self._has_logprobs = has_logprobs

    def completion(self, answers: Mapping[int, Ended]) -> dict[str, Any]:
        """All answers at once, by number."""
        choices = [
            {
                "index": number,
                "message": {"role": "assistant", "content": ended.result.text, "refusal": None},
                "logprobs": self._logprobs(ended.tokens),
                "finish_reason": ended.result.finish_reason,
            }
            for number, ended in sorted(answers.items())
        ]
        usage = self.usage(ended.result for ended in answers.values())
        return {**self._head, "object": "chat.completion", "choices": choices, "usage": usage}

    def chunk(
        self,
        number: int,
        delta: Mapping[str, str],
        tokens: Tokens = (),
        finish_reason: str | None = None,
    ) -> bytes:
        """A part of one answer, as an event of a stream."""
        choice = {
            "index": number,
            "delta": delta,
            "logprobs": self._logprobs(tokens) if tokens else None,
            "finish_reason": finish_reason,
        }
        return self._event([choice])

    def last_chunk(self, results: Iterable[Result]) -> bytes:
        """What all answers of a stream took."""
        return self._event([], usage=self.usage(results))

    def usage(self, results: Iterable[Result]) -> dict[str, Any]:
        """Tokens read and generated; the prompt counts once, however many answers it has."""
        results = list(results)
        generated = sum(len(result.ids) for result in results)
        cached = min((result.num_cached for result in results), default=0)
        return {
            "prompt_tokens": self._num_prompt,
            "completion_tokens": generated,
            "total_tokens": self._num_prompt + generated,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    def _event(self, choices: list[Any], **more: Any) -> bytes:
        value = {**self._head, "object": "chat.completion.chunk", "choices": choices, **more}
        return event(value)

    def _logprobs(self, tokens: Tokens) -> dict[str, Any] | None:
        if not self._has_logprobs:
            return None
        content = [
            {
                **self._scored(index, logprob),
                "top_logprobs": [self._scored(*one) for one in alternatives],
            }
            for index, logprob, alternatives in tokens
        ]
        return {"content": content, "refusal": None}

    def _scored(self, index: int, logprob: float) -> dict[str, Any]:
        text = token_text(self._tokenizer, index)
        is_whole = REPLACEMENT not in text
        # -inf is no JSON; the API's own servers say -9999 for what has no probability.
        return {
            "token": text,
            "logprob": max(logprob, -9999.0),
            "bytes": list(text.encode()) if is_whole else None,
        }


def event(value: Any) -> bytes:
    """A server-sent event."""
    return b"data: " + json_bytes(value) + b"\n\n"


def token_text(tokenizer: MonoInternVLTokenizer, index: int) -> str:
    """What a token adds to a text; a character of several tokens is a replacement in each."""
    before = tokenizer.encode_plain("a").ids
    text = str(tokenizer.decode([*before, index]))
    return text.removeprefix(str(tokenizer.decode(before)))
