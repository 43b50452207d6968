"""What docs/serving.md shows is run: the client's code, the line of curl, the tables."""

from __future__ import annotations

import contextlib
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from served import Served, picture

from mono_internvl import ChatSession
from mono_internvl.serving.http.limits import Limits
from mono_internvl.serving.http.schema import IGNORED, ChatRequest

PAGE = (Path(__file__).parents[3] / "docs" / "serving.md").read_text("utf-8")
SHOWN = "127.0.0.1:8000"


@pytest.fixture(scope="module")
def served(session: ChatSession) -> Iterator[Served]:
    with Served(session, name="quickstart") as found:
        yield found


def _block(language: str, start: str, served: Served) -> str:
    found = re.findall(rf"^```{language}\n(.*?)^```", PAGE, flags=re.S | re.M)
    (text,) = (one for one in found if one.startswith(start))
    assert SHOWN in text
    return str(text).replace(SHOWN, f"{served.host}:{served.port}")


def test_code_of_the_page_runs(
    served: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture(0).save(tmp_path / "a.png")
    with contextlib.chdir(tmp_path):
        exec(compile(_block("python", "import base64", served), "page", "exec"), {})
    assert "CompletionUsage" in capsys.readouterr().out


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
def test_curl_of_the_page_runs(served: Served) -> None:
    words = shlex.split(_block("bash", "curl", served))
    done = subprocess.run([*words, "-sS"], capture_output=True, text=True, check=True, timeout=60)
    assert '"object":"chat.completion"' in done.stdout


def test_tables_of_the_page_are_the_code() -> None:
    fields = {name for name in ChatRequest.model_fields if name not in ("model", "messages")}
    table = PAGE.split("| field | meaning here |")[1].split("\n\n")[0]
    listed = set(re.findall(r"`(\w+)[`.]", "".join(re.findall(r"^\| (.*?) \|", table, re.M))))
    assert fields | IGNORED == listed
    limits = Limits()
    for text in (
        f"| {limits.rows}, {limits.queue} |",
        f"| {limits.memory_bytes // 2**20:,} MiB |",
        f"| {limits.body_bytes // 2**20} MiB |",
        f"| {limits.images}, {limits.image_pixels // 10**6} megapixels |",
        f"| {limits.answers}, {limits.answer_tokens:,} |",
        f"| {limits.upload_s} s each |",
        f"| {limits.send_s} s |",
        f"| {limits.answer_s} s |",
        f"| {limits.connections} |",
        f"| {limits.drain_s} s |",
    ):
        assert text in PAGE, text


def test_metrics_of_the_page_are_those_of_a_server(served: Served) -> None:
    _, _, text = served.ask(None, path="/metrics", method="GET")
    real = set(re.findall(r"^# TYPE mono_internvl_(\w+) (?!gauge)", text, flags=re.M))
    real |= set(re.findall(r"^mono_internvl_(answers_\w+|\w+_bytes) ", text, flags=re.M))
    real = {name for name in real if not name.endswith("_created")}
    table = PAGE.split("## Metrics")[1].split("## Measured")[0]
    first = "".join(re.findall(r"^\| (`.*?) \|", table, flags=re.M))
    assert real == set(re.findall(r"`([a-z_]+)", first)), real
