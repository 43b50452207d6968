"""lmms-eval finds the model by its entry point, and gets the answers that a session gives.

`make test-lmms-eval` has an environment with it; the task is a file, and nothing is downloaded.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tiny_models import randomize

pytest.importorskip("lmms_eval", reason="`make test-lmms-eval` has an environment with lmms-eval")

import datasets
from tiny_runs import image_record, write_checkpoint

from mono_internvl import load
from mono_internvl.serving.plugins.lmms_eval_model import sampling_of

NEW_TOKENS = 6
TASK = """
dataset_path: parquet
dataset_kwargs:
  data_files:
    test: {data}
task: colours
test_split: test
output_type: generate_until
doc_to_visual: !function functions.doc_to_visual
doc_to_text: !function functions.doc_to_text
doc_to_messages: !function functions.doc_to_messages
doc_to_target: answer
generation_kwargs:
  max_new_tokens: {tokens}
process_results: !function functions.process_results
metric_list:
  - metric: exact
    aggregation: mean
    higher_is_better: true
"""
FUNCTIONS = """
def doc_to_visual(doc):
    return [doc["image"].convert("RGB")]


def doc_to_text(doc, options=None):
    return doc["question"]


def doc_to_messages(doc, options=None):
    image = {"type": "image", "url": doc_to_visual(doc)[0]}
    return [{"role": "user", "content": [image, {"type": "text", "text": doc["question"]}]}]


def process_results(doc, results):
    return {"exact": float(results[0] == doc["answer"])}
"""


def test_answers_of_a_local_task_are_those_of_a_session(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint")
    session = load(folder, device="cpu", precision="fp32")
    randomize(session.model)
    session.model.save_pretrained(folder)
    rows = []
    for number in range(5):
        image = image_record(tmp_path, number)["image"]
        picture = Image.open(tmp_path / image)
        question = f"what colour is this? {'one ' * number}"
        answer = session.ask(question, [picture], max_new_tokens=NEW_TOKENS).text
        session.reset()
        rows.append({"image": picture, "question": question, "answer": answer})
    assert len({row["answer"] for row in rows}) > 1
    rows[-1]["answer"] = "another"  # so that a score of one is not what anything gets
    data = tmp_path / "rows.parquet"
    features = datasets.Features(
        image=datasets.Image(), question=datasets.Value("string"), answer=datasets.Value("string")
    )
    datasets.Dataset.from_list(rows, features=features).to_parquet(str(data))
    task = tmp_path / "task"
    task.mkdir()
    (task / "colours.yaml").write_text(TASK.format(data=data, tokens=NEW_TOKENS))
    (task / "functions.py").write_text(FUNCTIONS)
    result = _evaluated(task, folder, tmp_path / "out")
    assert result["results"]["colours"]["exact,none"] == pytest.approx(0.8)


def _evaluated(task: Path, model: Path, out: Path) -> dict[str, Any]:
    words = ["--model", "mono_internvl", "--model_args", f"pretrained={model},precision=fp32"]
    words += ["--include_path", str(task), "--tasks", "colours", "--batch_size", "2"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(out / "hub")}
    done = subprocess.run(
        [sys.executable, "-m", "lmms_eval", *words, "--output_path", str(out)],
        env={**os.environ, **offline},
        capture_output=True,
        text=True,
    )
    print(done.stdout[-3000:])
    assert done.returncode == 0, done.stderr[-3000:]
    files = list(out.rglob("*_results.json"))
    assert files, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(files[0].read_text())
    return found


def test_options_that_are_not_understood_are_refused() -> None:
    assert sampling_of({"temperature": 0.7, "do_sample": False}, 9).temperature == 0
    assert sampling_of({"temperature": 0.7}, 9).temperature == 0.7
    assert sampling_of({"max_new_tokens": 20}, 9).max_new_tokens == 9
    with pytest.raises(ValueError, match="num_beams"):
        sampling_of({"num_beams": 3}, 9)
    with pytest.raises(ValueError, match="frequency_penalty"):
        sampling_of({"frequency_penalty": 1}, 9)
