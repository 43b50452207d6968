"""A tiny model, and a server with it that most tests share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_runs import write_checkpoint

pytest.importorskip("prometheus_client", reason="in the extra [dev]")

from served import Served

from mono_internvl import ChatSession, load


@pytest.fixture(scope="package")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("served") / "checkpoint")


@pytest.fixture(scope="package")
def session(checkpoint: Path) -> ChatSession:
    return load(checkpoint, device="cpu", precision="fp32")


@pytest.fixture(scope="package")
def served(session: ChatSession) -> Iterator[Served]:
    with Served(session) as found:
        yield found
