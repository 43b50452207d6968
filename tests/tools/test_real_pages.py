"""The block of the real example says what its rows say, and refuses other files."""

import json
from pathlib import Path

import pytest
from real_pages import ROWS, real_block

from mono_internvl.errors import ConfigError
from mono_internvl.reports.markdown import NOTHING

KIND = {"score": 0.625, "blind": 0.05, "chance": 0.025, "items": 40}


def stage(name: str, score: float) -> dict:
    return {
        "name": name,
        "samples": 32.0,
        "cpu_minutes": 1.0,
        "scores": {"noto": {**KIND, "score": score}},
        "text": {"perplexity": 19.5, "language": 0.75},
        "text_logits_identical": True,
    }


ROW = {
    "variant": "delta tuning",
    "stages": [stage("start", 0.0), stage("s2", 0.625)],
    "losses": {name: {"noto": {"seen": 1.25, "blind": 6.5}} for name in ("start", "s2")},
    "of_20": {"noto": 0.775},
    "pixels": {"noto": {"nearest": 0.7, "regression": 0.825}},
    "device": "cpu",
    "plan": None,
    "versions": {"torch": "2"},
    "date": "2026-01-31",
}


def test_block_shows_model_beside_pixels_blind_and_chance(tmp_path: Path) -> None:
    assert real_block(tmp_path) == NOTHING
    (tmp_path / ROWS).write_text(json.dumps(ROW) + "\n")
    block = real_block(tmp_path)
    assert "| 40 | 0.625 | 0.7 | 0.825 | 0.05 | 0.025 | 0.775 |" in block
    assert "| 0 | 0.625 |" in block


def test_block_refuses_other_rows(tmp_path: Path) -> None:
    (tmp_path / ROWS).write_text('{"stages": []}\n')
    with pytest.raises(ConfigError, match=r"examples/real/run\.py"):
        real_block(tmp_path)
