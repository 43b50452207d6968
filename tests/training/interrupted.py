"""A run that ends before its time."""

from __future__ import annotations

from typing import Any

import pytest

from mono_internvl.training.loop import train_stage
from mono_internvl.training.progress import StageProgress


class _Stopped(Exception):
    """Stands for what ends a run before its time."""


def interrupt(monkeypatch: pytest.MonkeyPatch, step: int, *arguments: Any, **named: Any) -> None:
    """Train, but stop right after a step."""

    def update(self: StageProgress, row: dict[str, Any]) -> None:
        if row["step"] == step:
            raise _Stopped

    with monkeypatch.context() as patched, pytest.raises(_Stopped):
        patched.setattr(StageProgress, "update", update)
        train_stage(*arguments, **named)
