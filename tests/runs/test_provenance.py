"""What stands beside a number."""

import sys

import pytest

from mono_internvl.runs.provenance import command


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["/usr/bin/mono-internvl", "bench", "decode"], "mono-internvl bench decode"),
        (["/site/mono_internvl/__main__.py", "bench"], "mono-internvl bench"),
        (["x", "--out", "/home/somebody/runs", "--run=/home/other"], "x --out runs --run=other"),
    ],
)
def test_command_is_what_was_typed_without_folders(
    argv: list[str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", argv)
    assert command() == said
