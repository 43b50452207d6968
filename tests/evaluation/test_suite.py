"""Published benchmarks asked of a tiny model: resumed after kills, judged, scored again, shown."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import benchmark_samples as samples
import pytest
import tiny_runs
from typer.testing import CliRunner

from mono_internvl.cli.app import app
from mono_internvl.data.records import Record
from mono_internvl.errors import ConfigError, SampleError
from mono_internvl.evaluation import families
from mono_internvl.evaluation import fetch as fetching
from mono_internvl.evaluation import runner as run_module
from mono_internvl.evaluation.benchmarks.table import ROWS, TABLE
from mono_internvl.evaluation.judge import EndpointJudge
from mono_internvl.evaluation.questions import Question, shares
from mono_internvl.evaluation.suite import Suite, ask_suite, score_suite
from mono_internvl.processing.prompts import Turn
from mono_internvl.reports.benchmarks import markdown, radar
from mono_internvl.runs.benchmark_results import BenchmarkResult, PublishedScore, read_results
from mono_internvl.runs.predictions import read_predictions

EVERY = tuple(row.name for row in ROWS)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_runs.write_checkpoint(
        tmp_path_factory.mktemp("model") / "start", max_position_embeddings=4096
    )


@pytest.fixture(scope="module")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("benchmarks")
    for name in EVERY:
        samples.write_sample(name, root)
    return root


def _suite(checkpoint: Path, data_root: Path, out: Path, *names: str, **fields: Any) -> Suite:
    common: dict[str, Any] = {"device": "cpu", "precision": "fp32", "max_tiles": 1}
    return Suite(model=str(checkpoint), names=names, data_root=data_root, out=out,
                 **common | fields)  # fmt: skip


@pytest.fixture(scope="module")
def finished(checkpoint: Path, data_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Suite:
    names = "mme", "gqa", "chartqa", "docvqa-test", "mmvet", "mmbench-test", "vqav2-testdev"
    suite = _suite(checkpoint, data_root, tmp_path_factory.mktemp("out"), *names)
    ask_suite(suite)
    return suite


def test_suite_asks_scores_and_writes(finished: Suite) -> None:
    results = {one.name: one for one in score_suite(finished)}
    assert [len(read_predictions(finished.predictions(row))) for row in finished.rows] == [
        6, 5, 5, 5, 5, 5, 5
    ]  # fmt: skip
    assert results["mme"].scores.keys() == {"paper", "corrected"}
    assert results["mmvet"].scores == {"paper": None} and results["mmvet"].judge is None
    assert results["docvqa-test"].scores == {"paper": None}
    mme = results["mme"]
    md5 = hashlib.md5((finished.data_root / "mme.tsv").read_bytes()).hexdigest()
    assert (mme.answered, mme.questions, mme.data_md5) == (6, 2374, md5)
    assert mme.protocol is not None and mme.protocol["max_new_tokens"] == 20
    assert {"6 questions, the published split has 2,374", "1 tiles instead of 12",
            f"data of MD5 {md5[:8]}, published is b36b43c3"} <= set(mme.notes)  # fmt: skip
    assert read_results(finished.out) == (finished.model, list(results.values()))


def test_submission_files_have_the_servers_forms(finished: Suite) -> None:
    score_suite(finished)
    folder = finished.out / "submissions"
    rrc = json.loads((folder / "docvqa-test.json").read_text())
    assert [row["questionId"] for row in rrc] == [0, 1, 2, 3, 4] and "answer" in rrc[0]
    assert json.loads((folder / "vqav2-testdev.json").read_text())[4]["question_id"] == 4
    assert set(json.loads((folder / "mmvet.json").read_text())) == set("01234")
    lines = (folder / "mmbench-test.tsv").read_text().splitlines()
    assert lines[0] == "index\tquestion\tA\tB\tC\tD\tprediction"


def test_five_kills_lose_and_repeat_no_question(
    checkpoint: Path, data_root: Path, finished: Suite, tmp_path: Path
) -> None:
    asked = tmp_path / "asked.txt"
    script = Path(__file__).with_name("killed_suite.py")
    command = [sys.executable, str(script), str(checkpoint), str(data_root), str(tmp_path / "out")]
    done = subprocess.run([*command, str(asked)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "5"
    keys = asked.read_text().split()
    assert len(keys) == len(set(keys)) == 16, "every question is answered once"
    for name in ("mme", "gqa", "chartqa"):
        file = Path("predictions") / f"{name}.jsonl"
        assert (tmp_path / "out" / file).read_text() == (finished.out / file).read_text()


def test_processes_get_whole_images() -> None:
    class Shown(Record):
        @property
        def images(self) -> tuple[Any, ...]:
            return tuple(self.fields["images"])

    turns = (Turn("user", ("?",)), Turn("assistant", ("",)))
    questions = [
        Question(Shown(turns, str(n), "", {"kind": "x", "images": images}))
        for n, images in enumerate((["a"], ["b"], ["a"], [], ["b"], [], ["c"]))
    ]
    dealt = [[q.sample.record_id for q in share] for share in shares(questions, 2)]
    assert dealt == [["0", "2", "3", "6"], ["1", "4", "5"]]


def test_missing_data_stop_before_the_model_is_loaded(
    checkpoint: Path, data_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module.Subject, "load", lambda *_: pytest.fail("loaded"))
    with pytest.raises(SampleError, match="none of mme"):
        ask_suite(_suite(checkpoint, tmp_path, tmp_path / "out", "mme"))


# The verb


def _verb(*words: Any) -> Any:
    return CliRunner().invoke(app, ["evaluate", *map(str, words)])


def test_verb_asks_scores_draws_and_scores_again(
    checkpoint: Path, data_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--model", checkpoint, "--benchmarks", "mme,gqa,chartqa", "--data-root", data_root]
    words += ["--out", tmp_path, "--device", "cpu", "--max-tiles", 1, "--per-kind", 4]
    said = _verb(*words)
    assert said.exit_code == 0, said.output
    assert "mme: 4 of 4" in said.output and "points of 2800, 4 answers" in said.output
    assert (tmp_path / "radar.svg").is_file()
    page = (tmp_path / "table.md").read_text()
    assert page.index("Measured.") < page.index("## Published by others, not measured here")
    monkeypatch.setattr(run_module.Subject, "load", lambda *_: pytest.fail("asked again"))
    again = _verb(*words, "--score-only", "--json")
    assert again.exit_code == 0, again.output
    assert [one["name"] for one in json.loads(again.stdout)] == ["mme", "gqa", "chartqa"]


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--benchmarks", "mmme"], "benchmarks='mmme'; expected some of all"),
        (["--benchmarks", "mme", "--data", "x.jsonl"], "published benchmarks take --data-root"),
        (["--benchmarks", "mme", "--blind"], "published benchmarks take --data-root"),
        ([], "needs --data FILE.jsonl"),
        (["--benchmarks", "mme", "--judge-url", "http://x/v1"], "expected both or neither"),
        (["--benchmarks", "mme", "--score-only"], "no answers to MME; ask first"),
        (["--benchmarks", "mme", "--data-root", "nowhere"], "nowhere: none of mme"),
    ],
)
def test_verb_refuses_in_a_line(
    checkpoint: Path, tmp_path: Path, words: list[str], complaint: str
) -> None:
    said = _verb("--model", checkpoint, "--out", tmp_path, "--device", "cpu", *words)
    assert said.exit_code != 0
    message = str(said.exception) if said.exception else said.output
    assert complaint in message.replace("\n", " ")


def test_verb_wants_a_model() -> None:
    with pytest.raises(ConfigError, match="model is missing"):
        raise _verb("--benchmarks", "mme").exception


# The judge


class FakeEndpoint(BaseHTTPRequestHandler):
    """Grades 0.5 and extracts 14; fails as often as it is told to first."""

    asked: list[dict[str, Any]]
    failures: list[int]
    keys: list[str | None]

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        type(self).keys.append(self.headers.get("Authorization"))
        if self.failures:
            self.send_error(self.failures.pop())
            return
        type(self).asked.append(body)
        is_grade = body["messages"][0]["content"].endswith("Grade:")
        reply = {"choices": [{"message": {"content": "0.5" if is_grade else " 14\n"}}]}
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(reply).encode())

    def log_message(self, *args: Any) -> None: ...


@pytest.fixture
def endpoint() -> Iterator[str]:
    FakeEndpoint.asked, FakeEndpoint.failures, FakeEndpoint.keys = [], [], []
    server = HTTPServer(("127.0.0.1", 0), FakeEndpoint)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    thread.join()


def _judge(endpoint: str, cache: Path) -> EndpointJudge:
    return EndpointJudge(endpoint, "some-model", cache, wait_s=0.0)


def test_judge_grades_and_is_named_and_asked_once(
    finished: Suite, endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUDGE_API_KEY", "secret")
    FakeEndpoint.failures = [500, 429]
    suite = replace(finished, names=("mmvet",))

    def judge_for(row: Any) -> EndpointJudge:
        return _judge(endpoint, tmp_path / "mmvet.jsonl")

    result = score_suite(suite, judge_for)[0]
    assert result.scores == {"paper": 50.0} and result.details == {"rec": 50.0, "ocr": 50.0}
    assert result.judge == "some-model (prompts 1)"
    assert len(FakeEndpoint.asked) == 5 and set(FakeEndpoint.keys) == {"Bearer secret"}
    assert "secret" not in (tmp_path / "mmvet.jsonl").read_text()
    with (tmp_path / "mmvet.jsonl").open("a") as file:
        file.write('{"cut')
    assert score_suite(suite, judge_for)[0].scores == {"paper": 50.0}
    assert len(FakeEndpoint.asked) == 5, "what was said before is kept"


def test_judge_reads_several_answers_at_a_time(finished: Suite) -> None:
    together = threading.Barrier(2, timeout=30)

    class Slow:
        """Grades an answer when another one is there to be graded."""

        name = "slow"
        num_asked = 0

        def grade(self, question: str, truth: str, answer: str) -> float:
            self.num_asked += 1
            if self.num_asked <= 4:
                together.wait()
            return 0.5

        def extract(self, question: str, answer: str) -> str:
            raise NotImplementedError

    assert score_suite(replace(finished, names=("mmvet",)), lambda row: Slow())[0].scores == {
        "paper": 50.0
    }


def test_judge_that_fails_is_not_asked_about_the_rest(
    finished: Suite, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(families, "JUDGE_REQUESTS", 1)
    asked: list[str] = []

    class Failing:
        name = "failing"

        def grade(self, question: str, truth: str, answer: str) -> float:
            asked.append(question)
            time.sleep(0.05)  # so that those behind it are still waiting
            raise ConfigError("no answer")

        def extract(self, question: str, answer: str) -> str:
            raise NotImplementedError

    with pytest.raises(ConfigError, match="no answer"):
        score_suite(replace(finished, names=("mmvet",)), lambda row: Failing())
    assert len(asked) < 5


def test_judge_extracts_what_is_not_read_without_it(
    endpoint: str, data_root: Path, tmp_path: Path
) -> None:
    row = TABLE["mathvista"]
    questions = row.load(row.data_files(data_root), data_root)
    found = [row.predict(q, "It is 14, I think.", row.protocol) for q in questions]
    scores = row.score(found, _judge(endpoint, tmp_path / "m.jsonl"))
    assert scores.paper == pytest.approx(100 * 2 / 5)  # hits where the truth is the integer 14
    assert row.score(found, None).paper is None


@pytest.mark.parametrize("code", [401, 503])
def test_judge_that_does_not_answer_is_an_error_of_one_line(
    endpoint: str, tmp_path: Path, code: int
) -> None:
    FakeEndpoint.failures = [code] * 9
    with pytest.raises(ConfigError, match=f"no answer .*{code}.*JUDGE_API_KEY"):
        _judge(endpoint, tmp_path / "m.jsonl").grade("?", "a", "b")
    assert len(FakeEndpoint.keys) == (1 if code == 401 else 5)
    with pytest.raises(ConfigError, match="judge_url='localhost'; expected http"):
        _judge("localhost", tmp_path / "m.jsonl")


# Fetching


def test_fetch_downloads_checks_and_keeps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = b"index\tquestion\n"
    source = tmp_path / "served.tsv"
    source.write_bytes(content)
    calls: list[str] = []

    def urlopen(address: str, timeout: float) -> Any:
        calls.append(address)
        return source.open("rb")

    monkeypatch.setattr(fetching.urllib.request, "urlopen", urlopen)
    md5 = hashlib.md5(content).hexdigest()
    row = replace(TABLE["mme"], md5=md5[:8])
    file = fetching.fetch(row, tmp_path / "data")
    assert file.read_bytes() == content and file.name == "MME.tsv" and len(calls) == 1
    assert fetching.fetch(row, tmp_path / "data") == file and len(calls) == 1
    with pytest.raises(SampleError, match=f"MD5 {md5}; expected one that begins with b36b43c3"):
        fetching.fetch(TABLE["mme"], tmp_path / "other")
    assert list((tmp_path / "other").iterdir()) == []


def test_fetch_without_a_network_says_what_to_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*args: Any, **options: Any) -> Any:
        raise OSError("no network")

    monkeypatch.setattr(fetching.urllib.request, "urlopen", offline)
    with pytest.raises(ConfigError, match=r"no network.*curl -L .*MME\.tsv; md5sum .*b36b43c3"):
        fetching.fetch(TABLE["mme"], tmp_path)
    said = _verb("--fetch", "coco", "--data-root", tmp_path)
    assert "by hand" in str(said.exception) and "coco_karpathy_test.json" in str(said.exception)
    commands = fetching.commands(TABLE["okvqa"], tmp_path)
    assert commands[0].startswith("hf download --repo-type dataset lmms-lab-encoder/OK-VQA")


# Pages


def _result(name: str, score: float | None, published: float | None, **fields: Any) -> Any:
    others = (PublishedScore("Theirs", published, "table 9"),) if published is not None else ()
    common: dict[str, Any] = {"split": "test", "unit": "%", "top": 100.0, "answered": 5,
                              "questions": 5, "published": others}  # fmt: skip
    return BenchmarkResult(
        name=name, title=name.upper(), scores={"paper": score}, **common | fields
    )


def test_table_keeps_published_figures_out_of_ours() -> None:
    page = markdown("ours", [_result("a", 12.5, 77.7), _result("b", None, 88.8, judge="J")])
    measured, published = page.split("## Published by others, not measured here")
    assert "12.5" in measured and "77.7" not in measured and "88.8" not in measured
    assert "77.7" in published and "12.5" not in published and "J" in measured


def test_radar_draws_ours_solid_and_others_dashed() -> None:
    results = [_result(name, 50.0, 70.0) for name in "abc"]
    assert radar("ours", results[:2]) is None
    assert radar("ours", [*results[:2], _result("c", None, 70.0)]) is None
    chart = radar("ours", results)
    assert chart is not None and "ours, measured" in chart and "Theirs, published" in chart
    assert "stroke-dasharray" in chart and radar("ours", results) == chart
