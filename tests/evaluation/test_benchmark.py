"""A benchmark that nobody knew plugs in and is evaluated like those that are here."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
from typer.testing import CliRunner

from mono_internvl.cli import benchmarks
from mono_internvl.cli.app import app
from mono_internvl.compute import make_plan
from mono_internvl.data.records import Record
from mono_internvl.errors import ConfigError
from mono_internvl.evaluation.benchmark import Benchmark, named
from mono_internvl.evaluation.benchmarks import BENCHMARKS
from mono_internvl.evaluation.evaluate import evaluate
from mono_internvl.evaluation.metrics.metric import Metric
from mono_internvl.evaluation.protocol import Protocol
from mono_internvl.evaluation.questions import Question
from mono_internvl.processing.processor import MonoInternVLProcessor
from mono_internvl.processing.prompts import Turn
from mono_internvl.runs.benchmark_results import PublishedScore


def _load(folder: Path) -> Iterator[Question]:
    """One text file a question, in a form of the toy's own."""
    for file in sorted(folder.glob("*.txt")):
        asked, wanted = file.read_text().split("|")
        turns = (Turn("user", (asked,)), Turn("assistant", (wanted,)))
        fields = {"id": file.stem, "kind": "length", "wanted": int(wanted)}
        yield Question(Record(turns, file.stem, str(file), fields))


TOY = Benchmark(
    name="toy",
    metrics={
        "length": Metric(
            "length",
            "wanted",
            "a number",
            lambda truth: isinstance(truth, int),
            lambda text, wanted: float(len(text) >= wanted),
            mean=lambda found: min(one.score for one in found),
        )
    },
    protocols={
        "long": Protocol(max_new_tokens=8),
        "short": Protocol(max_new_tokens=1, prompt_suffix="\nOne word."),
    },
    load=_load,
    published=(PublishedScore("someone's model", 71.5, "their table 3"),),
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_runs.write_checkpoint(tmp_path_factory.mktemp("model") / "start")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    for number, wanted in enumerate((0, 0, 4000)):
        (folder / f"{number}.txt").write_text(f"say one|{wanted}")
    return folder


def test_toy_is_loaded_prompted_scored_and_averaged_in_its_own_way(
    checkpoint: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts: list[Any] = []
    encode = MonoInternVLProcessor.encode_prompt

    def spy(self: MonoInternVLProcessor, messages: Any, **options: Any) -> Any:
        prompts.append(messages[-1].text)
        return encode(self, messages, **options)

    monkeypatch.setattr(MonoInternVLProcessor, "encode_prompt", spy)
    options: dict[str, Any] = {"benchmark": TOY, "device": "cpu", "out": tmp_path / "p.jsonl"}
    found = evaluate(checkpoint, data, **options)
    assert (found.benchmark, found.scores, found.items) == ("toy", {"length": 0.0}, {"length": 3})
    rows = [json.loads(line) for line in found.predictions.read_text().splitlines()]
    assert [(row["id"], row["score"]) for row in rows] == [("0", 1), ("1", 1), ("2", 0)]
    assert {row["protocol"]["max_new_tokens"] for row in rows} == {8}
    assert set(prompts) == {"say one"}
    prompts.clear()
    short = evaluate(checkpoint, data, protocol=TOY.protocols["short"], **options)
    assert short.protocol["prompt_suffix"] == "\nOne word." and set(prompts) == {
        "say one\nOne word."
    }


def test_toy_is_known_to_the_program_by_its_name(
    checkpoint: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(benchmarks.BENCHMARKS, "toy", TOY)
    words = ["evaluate", "--model", str(checkpoint), "--data", str(data), "--device", "cpu"]
    words += ["--out", str(tmp_path / "p.jsonl"), "--benchmark", "toy"]
    said = CliRunner().invoke(app, words)
    assert said.exit_code == 0, said.output
    assert "length                 0.0 %  of 3" in said.output
    assert "published: someone's model 71.5 (their table 3)" in said.output


def test_unknown_benchmark_is_refused() -> None:
    assert set(benchmarks.BENCHMARKS) == {"records", "miniature"}
    with pytest.raises(ConfigError, match="benchmark='mmmu'; expected one of records"):
        named(BENCHMARKS, "mmmu")


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"max_new_tokens": True}, "max_new_tokens=True"),
        ({"max_tiles": 0}, "max_tiles=0"),
        ({"decoding": "beam"}, "decoding='beam'"),
    ],
)
def test_protocol_refuses_senseless_fields(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        Protocol(**fields)


def test_protocol_takes_precision_and_attention_of_the_plan_or_refuses_it() -> None:
    plan = make_plan("cpu", "fp32", processes=1)
    assert Protocol().planned(plan) == Protocol(precision="fp32", attention="sdpa")
    for other in (Protocol(precision="bf16"), Protocol(attention="eager")):
        with pytest.raises(ConfigError, match="the protocol asks for"):
            other.planned(plan)


def test_answers_of_another_or_unknown_protocol_are_refused() -> None:
    protocol = Protocol(max_new_tokens=64, precision="fp32", attention="sdpa")
    protocol.check_same(protocol.to_dict(), "file", "ask anew")
    with pytest.raises(ConfigError, match=r"file: its answers do not say .*ask anew"):
        protocol.check_same(None, "file", "ask anew")
    with pytest.raises(ConfigError, match="max_new_tokens=96, expected 64; ask anew"):
        protocol.check_same({**protocol.to_dict(), "max_new_tokens": 96}, "file", "ask anew")
