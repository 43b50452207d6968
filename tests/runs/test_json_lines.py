"""JSON lines: what is written is read back, line for line."""

import json
from pathlib import Path

import pytest

from mono_internvl.runs.json_lines import read_lines, to_line

SEPARATORS = "\n\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"


def test_lines_are_read_as_they_were_written(tmp_path: Path) -> None:
    values = [f"a{SEPARATORS}b", "\ud800", {"中": [1.5, None]}, ""]
    file = tmp_path / "a.jsonl"
    file.write_text("".join(map(to_line, values)), encoding="utf-8")
    assert [json.loads(line) for line in read_lines(file)] == values
    assert "中" in file.read_text(encoding="utf-8")


def test_last_line_may_be_open_and_a_file_empty(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    for text, lines in (("", []), ("1", ["1"]), ("1\n", ["1"]), ("1\n\n2", ["1", "", "2"])):
        file.write_text(text)
        assert read_lines(file) == lines


def test_line_is_json_or_refused() -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        to_line(float("nan"))
