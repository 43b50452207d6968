"""The examples run as they are printed, on a small checkpoint."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

from mono_internvl import load

EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPTS = {
    "trainer": ".",
    "peft_lora": "merged",
    "trl_sft": ".",
    "trl_dpo": ".",
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_example_trains_and_leaves_a_checkpoint(
    name: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    arguments = ["--model", str(checkpoint), "--out", str(tmp_path / "out"), "--steps", "2"]
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    session = load(tmp_path / "out" / SCRIPTS[name])
    assert session.ask("what colour is this?", max_new_tokens=2).tokens.prompt > 0


def test_every_example_is_tested() -> None:
    helpers = {"rows", "collate"}
    assert {file.stem for file in EXAMPLES.glob("*.py")} - helpers == set(SCRIPTS)
