"""A user's mistake is one line and exit code 1 or 2, whatever the line runs into."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mono_internvl.cli import app as cli
from mono_internvl.door import one_line
from mono_internvl.errors import ConfigError

PROGRAM = """
import json, sys
from mono_internvl.door import pass_through
from mono_internvl.serving.terminal import print_json
sys.exit(pass_through(lambda: {}))
"""


def through_the_door(command: str, **options: object) -> subprocess.CompletedProcess[bytes]:
    words = [sys.executable, "-c", PROGRAM.format(command)]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    return subprocess.run(words, timeout=120, check=False, **streams)  # type: ignore[call-overload, no-any-return]


def run(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["mono-internvl", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert isinstance(end.value.code, int)
    return end.value.code


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ConfigError("two\nlines"), "two lines"),
        (FileNotFoundError(2, "No such file or directory", "a\udcff"), "a\\udcff: No such file"),
        (OSError(28, "No space left on device"), "reading or writing: No space left"),
        (MemoryError(), "not enough memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "not enough memory"),
        (UnicodeDecodeError("ascii", b"\xff", 0, 1, "not in range"), "encoding of this terminal"),
    ],
)
def test_door_says_a_users_error_in_one_line(error: Exception, said: str) -> None:
    line = one_line(error)
    assert line is not None and said in line
    assert line.isprintable()


@pytest.mark.parametrize("error", [KeyError("x"), ValueError("x"), RuntimeError("x")])
def test_door_leaves_faults_of_the_program_their_traceback(error: Exception) -> None:
    assert one_line(error) is None


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("command", ["print('x')", "print_json(1)"])
def test_door_full_output_is_one_line(command: str) -> None:
    with open("/dev/full", "wb") as full:
        ended = through_the_door(command, stdout=full)
    assert ended.returncode == 1
    assert ended.stderr.startswith(b"error: ") and ended.stderr.count(b"\n") == 1
    assert b"No space left on device" in ended.stderr


def test_door_reader_that_has_gone_is_no_error() -> None:
    words = [sys.executable, "-c", PROGRAM.format("print('x' * 10**6)")]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""


def test_door_closed_streams_are_empty() -> None:
    words = f"exec {sys.executable} -c '{PROGRAM.format('print(len(sys.stdin.read()))')}'"
    for closed in ("<&-", "<&- >&-", "<&- >&- 2>&-"):
        ended = subprocess.run(["sh", "-c", f"{words} {closed}"], capture_output=True, timeout=120)
        assert (ended.returncode, ended.stderr) == (0, b""), closed
        assert ended.stdout == (b"" if ">&-" in closed else b"0\n")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_door_json_is_json_in_any_encoding(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", encoding)
    said = "\\u4e2d\\U0001f600\\udcff"
    ended = through_the_door(f"print_json('{said}')")
    assert (ended.returncode, ended.stderr) == (0, b"")
    assert json.loads(ended.stdout) == "\u4e2d\U0001f600\udcff"
    shown = through_the_door(f"print('{said}')")
    assert (shown.returncode, shown.stderr) == (0, b"")
    assert (b"\\u4e2d" in shown.stdout) == (encoding != "utf-8")


@pytest.mark.parametrize(
    "words",
    [
        ("chat", "--model", "x", "--image", "~nosuchuser/a.png", "What?"),
        ("chat", "--model", "x", "--image", "a" * 300, "What?"),
        ("chat", "--model", "x", "--seed", 2**64, "What?"),
        ("chat", "--model", "x", "--temperature", 1e-300, "What?"),
        ("chat", "--model", "x", "--repetition-penalty", 1e-300, "What?"),
    ],
)
def test_chat_mistakes_are_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: tuple[object, ...]
) -> None:
    assert run(monkeypatch, *words) == 1
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1
    assert printed.err.startswith("error: ")


@pytest.mark.parametrize("seed", ["1.5", "x", "-1", str(2**63)])
@pytest.mark.parametrize("verb", [("quickstart",), ("lab", "modular")])
def test_world_seed_out_of_range_is_wrong_usage(
    monkeypatch: pytest.MonkeyPatch, verb: tuple[str, ...], seed: str
) -> None:
    assert run(monkeypatch, *verb, "--seed", seed) == 2
