"""A tiny model that says what a test has it say."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest
from tiny_runs import write_checkpoint

from mono_internvl import ChatSession, load
from mono_internvl.generation import engine as engine_module
from mono_internvl.serving.web.desk import Desk

Say = Callable[..., None]


@pytest.fixture(scope="package")
def session(tmp_path_factory: pytest.TempPathFactory) -> ChatSession:
    folder = write_checkpoint(tmp_path_factory.mktemp("web") / "checkpoint")
    return load(folder, device="cpu", precision="fp32")


@pytest.fixture
def desk(session: ChatSession) -> Iterator[Desk]:
    found = Desk(session)
    yield found
    found.close()


@pytest.fixture
def say(session: ChatSession, monkeypatch: pytest.MonkeyPatch) -> Say:
    """Have the model say a text, a token in `pause_s`; once it has ended, the same text anew."""
    tokenizer = session.processor.tokenizer

    def script(text: str, pause_s: float = 0) -> None:
        ids = [*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        queue = list(ids)

        def choose(*_: object) -> list[int]:
            time.sleep(pause_s)
            if not queue:
                queue.extend(ids)
            return [queue.pop(0)]

        monkeypatch.setattr(engine_module, "choose_tokens", choose)

    return script
