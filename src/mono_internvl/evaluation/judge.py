"""A model that reads answers, behind any OpenAI-compatible endpoint; replies are kept on disk."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from pathlib import Path

from mono_internvl.chat_client import ChatClient
from mono_internvl.errors import ConfigError, EndpointError
from mono_internvl.runs.json_lines import read_lines, to_line

KEY_VARIABLE = "JUDGE_API_KEY"
"""Environment variable of the key; `OPENAI_API_KEY` where it is not set."""

PROMPTS = "prompts 1"
"""Version of the texts below, part of a judge's name: figures of two versions do not compare."""

_GRADE = """You grade answers to questions about images. You see a question, the true answer and
an answer to grade, not the image. In the true answer, <AND> stands between parts that all have to
be given, <OR> between alternatives of which one is enough. Grade 0.0 for a wrong answer, 1.0 for
a right one, a tenth between where only some of it is right. Reply with the number alone.

Question: {question}
True answer: {truth}
Answer to grade: {answer}
Grade:"""
_EXTRACT = """Below are a question with a hint about the form of its answer, and a reply. Copy the
final answer out of the reply in that form: an option letter, an integer, a number with as many
decimals as asked for, a Python list, or a few words. Reply with the answer alone, or with nothing
if the reply gives none.

{question}
Reply: {answer}
Final answer:"""
_NUMBER = re.compile(r"\d+(?:\.\d+)?")
_MAX_TOKENS = 128
_KEY_BYTES = 16


@dataclass
class EndpointJudge:
    """A judge model at an address; may be asked from several threads.

    Attributes:
        url: Up to `/v1`.
        model: As the endpoint calls it.
        cache: JSON lines of replies; a question that has one is not asked again.
        wait_s: Before the second attempt; twice as long before each other.
    """

    url: str
    model: str
    cache: Path
    wait_s: float = 1.0
    _replies: dict[str, str] = field(default_factory=dict, init=False, repr=False)
    _writing: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False)

    def __post_init__(self) -> None:
        self._client = ChatClient(
            self.url,
            self.model,
            name_of_url="judge_url",
            key_variables=(KEY_VARIABLE, "OPENAI_API_KEY"),
            wait_s=self.wait_s,
        )
        for line in read_lines(self.cache) if self.cache.is_file() else []:
            try:
                self._replies.update(json.loads(line))
            except ValueError:  # cut in two by a kill
                continue

    @property
    def name(self) -> str:
        """Model and version of our prompts."""
        return f"{self.model} ({PROMPTS})"

    def grade(self, question: str, truth: str, answer: str) -> float:
        """How right an answer is, 0 to 1; 0 where the judge names no number.

        Raises:
            ConfigError: The endpoint does not answer.
        """
        reply = self._ask(_GRADE.format(question=question, truth=truth, answer=answer))
        found = _NUMBER.search(reply)
        return min(1.0, float(found[0])) if found else 0.0

    def extract(self, question: str, answer: str) -> str:
        """The bare answer in a reply.

        Raises:
            ConfigError: The endpoint does not answer.
        """
        return self._ask(_EXTRACT.format(question=question, answer=answer)).strip()

    def _ask(self, prompt: str) -> str:
        asked = json.dumps([self.url, self.model, prompt]).encode()
        key = hashlib.blake2b(asked, digest_size=_KEY_BYTES).hexdigest()
        if key not in self._replies:
            reply = self._call(prompt)
            with self._writing:
                self._replies[key] = reply
                self.cache.parent.mkdir(parents=True, exist_ok=True)
                with self.cache.open("a", encoding="utf-8") as file:
                    file.write(to_line({key: reply}))
        return self._replies[key]

    def _call(self, prompt: str) -> str:
        try:
            return self._client.ask(prompt, _MAX_TOKENS).text
        except EndpointError as error:
            raise ConfigError(
                f"judge_url={self.url!r}, judge_model={self.model!r}: no answer ({error}); check "
                f"address, model and {KEY_VARIABLE}; what it has said already is kept in "
                f"{self.cache}"
            ) from error
