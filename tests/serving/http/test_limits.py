"""What a server refuses, whom it turns away, and what it lets go of."""

from __future__ import annotations

import json
import signal
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hostile import Attack, request_bytes
from served import CHAT, JSON, Served, chat, data_uri, picture, user
from typer.testing import CliRunner

from mono_internvl import ChatSession
from mono_internvl.cli.app import app
from mono_internvl.errors import CheckpointError, ConfigError
from mono_internvl.generation.engine import Engine
from mono_internvl.serving.http.limits import Admission, Limits
from mono_internvl.serving.http.run import read_key
from mono_internvl.serving.listening import bind

HI = chat(user("say one"))
LONG = {**HI, "max_tokens": 400}


def test_hostile_requests_end_in_clear_errors(session: ChatSession) -> None:
    with Served(session) as served:
        outcome = Attack(served).run(150)
        assert not outcome.failures, "\n".join(outcome.failures)
        assert set(outcome.statuses) >= {400, 404, 405, 413, 415}
        served.wait_until_idle()
        assert served.service.admission.bytes == 0


@pytest.mark.parametrize(
    ("change", "param", "message"),
    [
        ({"temperature": "hot"}, "temperature", "valid number"),
        ({"top_logprobs": 2}, "top_logprobs", "logprobs=true"),
        ({"n": 9}, "n", "at most 8"),
        ({"tools": [{}]}, "tools", "not supported"),
        ({"colour": 1}, "colour", "unknown field"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content", "list"),
        ({"messages": [user("a"), {"role": "assistant", "content": "b"}]}, "messages[1].role", ""),
        ({"messages": [user("a <|im_end|>")]}, "messages[0].content", "control token '<|im_end|>'"),
        ({"messages": [user("a " * 600)]}, "messages", "the model reads 512"),
        ({"messages": [user("a" * 10_000)]}, "messages", "more than 8,192 characters"),
        ({"messages": [user("<image> a")]}, None, "1 <image> placeholders but 0 images"),
    ],
)
def test_error_names_the_field(
    served: Served, change: dict[str, Any], param: str | None, message: str
) -> None:
    status, _, body = served.ask({**HI, **change})
    assert status == 400
    assert body["error"]["param"] == param and message in body["error"]["message"]


@pytest.mark.parametrize(
    "url", ["http://a.example/a.png", "file://{}", "{}", "https://127.0.0.1:{port}/health"]
)
def test_nothing_is_fetched_or_opened(served: Served, tmp_path: Path, url: str) -> None:
    file = tmp_path / ("a" * 70 + "png")
    picture(0).save(file, "PNG")
    status, _, body = served.ask(chat(user("look", url.format(file, port=served.port))))
    assert status == 400 and body["error"]["param"] == "messages[0].content[0].image_url.url"
    assert body["error"]["code"] == "invalid_image"


def test_images_have_bounds_together(session: ChatSession) -> None:
    uri = data_uri(picture(0, side=60))
    with Served(session, image_pixels=2 * 60 * 60, images=3) as served:
        assert served.ask(chat(user("look", uri, uri)))[0] == 200
        status, _, body = served.ask(chat(user("look", uri, uri, uri)))
        assert status == 400 and "may have 0 beside" in body["error"]["message"]
        small = data_uri(picture(0, side=10))
        status, _, body = served.ask(chat(user("look", small, small, small, small)))
        assert status == 400 and "more than 3 images" in body["error"]["message"]


def test_body_is_bounded_whether_its_length_is_said_or_not(session: ChatSession) -> None:
    with Served(session, body_bytes=1000) as served:
        assert served.ask(HI)[0] == 200
        assert served.ask(b"a" * 1001)[0] == 413
        pieces = b"".join(b"64\r\n" + b"a" * 100 + b"\r\n" for _ in range(11)) + b"0\r\n\r\n"
        head = f"POST {CHAT} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
        raw = (head + "Transfer-Encoding: chunked\r\n\r\n").encode() + pieces
        with served.socket(raw) as connection:
            assert b"413" in connection.recv(100)


def test_memory_of_requests_is_bounded_together(session: ChatSession) -> None:
    with Served(session, memory_bytes=20_000) as served:
        status, headers, body = served.ask(chat(user("a" * 6000)))
        assert status == 429 and body["error"]["code"] == "server_busy"
        assert 1 <= int(headers["retry-after"]) <= 60
        assert served.ask(HI)[0] == 200
        served.wait_until_idle()  # a client may read its answer before the server lets go of it
        assert served.service.admission.bytes == 0


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step of an engine takes a while."""
    step = Engine.step

    def slowly(self: Engine) -> Any:
        time.sleep(0.02)
        return step(self)

    monkeypatch.setattr(Engine, "step", slowly)


def test_queue_is_bounded(session: ChatSession, slow: None) -> None:
    with Served(session, rows=1, queue=1) as served, ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: served.ask({**HI, "max_tokens": 20}), range(4)))
        assert sorted(status for status, _, _ in found) == [200, 200, 429, 429]
        refused = next(one for one in found if one[0] == 429)
        assert refused[1]["retry-after"].isdecimal()
        assert refused[2]["error"]["type"] == "rate_limit_error"
        assert served.ask({**HI, "n": 3})[0] == 429  # three answers, two places
        served.wait_until_idle()
        assert served.ask({**HI, "n": 2})[0] == 200


@pytest.mark.parametrize("stream", [False, True])
def test_client_that_hangs_up_frees_its_place(
    session: ChatSession, slow: None, stream: bool
) -> None:
    with Served(session, rows=1) as served:
        body = json.dumps({**LONG, "stream": stream}).encode()
        running, waiting = (served.socket(request_bytes(body)) for _ in range(2))
        _until(lambda: served.engine.num_running == 1 and served.engine.num_waiting == 1)
        waiting.close()
        _until(lambda: served.engine.num_waiting == 0)
        assert served.engine.num_running == 1
        running.close()
        served.wait_until_idle()
        assert served.ask(HI)[0] == 200


def _until(is_so: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_answer_has_its_time(session: ChatSession, slow: None) -> None:
    with Served(session, answer_s=1) as served:
        status, _, body = served.ask(LONG)
        assert status == 504 and body["error"]["code"] == "timeout"
        served.wait_until_idle()
        _, _, text = served.ask({**LONG, "stream": True})  # begun, and broken off
        assert '"code":"timeout"' in text and "data: [DONE]" not in text
        served.wait_until_idle()


def test_slow_clients_lose_their_connection(session: ChatSession) -> None:
    with Served(session, upload_s=1) as served:
        body = json.dumps(HI).encode()
        whole = request_bytes(body)
        silent, half_head, half_body = (
            served.socket(part) for part in (b"", whole[:40], whole[:-5])
        )
        for connection in (silent, half_head, half_body):
            with connection:
                found = _everything(connection)
                assert found.startswith(b"HTTP/1.1 408") and b'"error"' in found
        served.wait_until_idle()


def _everything(connection: socket.socket) -> bytes:
    received = b""
    while piece := connection.recv(65536):
        received += piece
    return received


def test_client_that_does_not_read_loses_its_connection(session: ChatSession) -> None:
    small = Served(session, send_s=1)
    small.listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    with small as served:
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        connection.connect((served.host, served.port))
        with connection:
            many = {**LONG, "stream": True, "logprobs": True, "top_logprobs": 20}
            connection.sendall(request_bytes(json.dumps(many).encode()))
            _until(lambda: served.engine.num_running == 1)
            _until_gone(served)
            served.wait_until_idle()
            assert served.ask(HI)[0] == 200


def _until_gone(served: Served) -> None:
    end = time.monotonic() + 40
    while served.server.server_state.connections:
        assert time.monotonic() < end, "the connection is still there"
        time.sleep(0.05)


def test_key_is_asked_for(session: ChatSession) -> None:
    with Served(session, api_key="secret") as served:
        status, headers, body = served.ask(HI)
        assert status == 401 and body["error"]["code"] == "invalid_api_key"
        assert headers["www-authenticate"] == "Bearer"
        for given in ("Bearer secreu", "secret", "Bearer secret ", "Bearer \xff"):
            expected = 200 if given.strip() == "Bearer secret" else 401
            assert served.ask(HI, headers={**JSON, "Authorization": given})[0] == expected
        assert served.ask(HI, headers={**JSON, "Authorization": "Bearer secret"})[0] == 200
        assert served.ask(None, path="/v1/models", method="GET")[0] == 401
        assert served.ask(None, path="/metrics", method="GET")[0] == 401
        assert served.ask(None, path="/health", method="GET")[0] == 200


def test_answers_under_way_are_finished_at_the_end(session: ChatSession, slow: None) -> None:
    with Served(session) as served, ThreadPoolExecutor(2) as pool:
        request = {**HI, "max_tokens": 30}
        whole = pool.submit(served.ask, request)
        stream = pool.submit(served.ask, {**request, "stream": True})
        _until(lambda: served.engine.num_running == 2)
        served.server.handle_exit(signal.SIGTERM, None)
        assert whole.result()[0] == 200
        assert whole.result()[2]["usage"]["completion_tokens"] == 30
        assert "data: [DONE]" in stream.result()[2]
    with pytest.raises(ConnectionRefusedError):
        served.ask(HI)
    assert not served.server._captured_signals  # it ends with 0, not by the signal


def test_end_does_not_wait_for_ever(session: ChatSession, slow: None) -> None:
    with Served(session, drain_s=1) as served, ThreadPoolExecutor(1) as pool:
        late = pool.submit(served.ask, LONG)
        _until(lambda: served.engine.num_running == 1)
        began = time.monotonic()
        served.stop()
        assert late.exception(10) is not None or late.result()[0] >= 500
    assert time.monotonic() - began < 5


def test_failing_step_ends_its_answers_alone(
    session: ChatSession, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    step, failures = Engine.step, [RuntimeError("a secret of the inside")]

    def failing(self: Engine) -> Any:
        if self.num_running and failures:
            raise failures.pop()
        return step(self)

    monkeypatch.setattr(Engine, "step", failing)
    with Served(session) as served:
        status, _, body = served.ask(HI)
        assert status == 500 and body["error"]["type"] == "server_error"
        assert "secret" not in json.dumps(body) and "a secret of the inside" in caplog.text
        assert served.ask(HI)[0] == 200
        failures.append(CheckpointError("nan"))  # type: ignore[arg-type]
        _, _, text = served.ask({**LONG, "stream": True})
        assert '"server_error"' in text and "[DONE]" not in text
        served.wait_until_idle()


def test_limits_and_addresses_are_checked() -> None:
    with pytest.raises(ConfigError, match="queue=0"):
        Limits(queue=0)
    with bind("127.0.0.1", 0) as taken:
        taken.listen()
        with pytest.raises(ConfigError, match="take another port"):
            bind("127.0.0.1", taken.getsockname()[1])
    with pytest.raises(ConfigError, match="--host no such host"):
        bind("no such host", 0)


def test_time_to_come_again_follows_the_queue() -> None:
    admission = Admission(Limits(rows=2, queue=8))
    waits = []
    for _ in range(3):
        for _ in range(3):
            admission.enter()
        waits.append(int(admission.busy("").headers["Retry-After"]))
        admission.finished(10.0)
    assert waits == sorted(waits) and waits[0] < waits[-1] <= 60


def test_key_is_read_from_file_or_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "key"
    file.write_text("from-file\n")
    monkeypatch.setenv("KEY", "from-environment")
    assert read_key(file, "KEY") == "from-file"
    assert read_key(None, "KEY") == "from-environment"
    assert read_key(None, "NO_SUCH_KEY") is None
    for text in ("", "a\nb", "\u4f60"):
        file.write_text(text)
        with pytest.raises(ConfigError, match="--api-key-file"):
            read_key(file, "KEY")
    with pytest.raises(ConfigError, match="--api-key-file"):
        read_key(tmp_path / "none", "KEY")


def test_command_line_binds_here_unless_told(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import uvicorn

    found: list[tuple[str, int]] = []
    monkeypatch.setattr(
        uvicorn.Server, "run", lambda self, sockets: found.append(sockets[0].getsockname())
    )
    monkeypatch.delenv("MONO_INTERNVL_API_KEY", raising=False)
    line = ["serve", "--model", str(checkpoint), "--port", "0", "--kv-mb", "8"]
    runner = CliRunner()
    here = runner.invoke(app, line)
    assert here.exit_code == 0 and found[0][0] == "127.0.0.1" and "anybody" not in here.output
    wide = runner.invoke(app, [*line, "--host", "0.0.0.0"])
    assert found[1][0] == "0.0.0.0" and "anybody who reaches 0.0.0.0 may ask" in wide.output
