"""Training as a user starts it, and as it is ended: by torchrun on a node, by kills."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_runs

ROOT = Path(__file__).parents[2]


def test_three_kills_change_nothing() -> None:
    """`make soak` in small: two processes that share a model, killed at random moments."""
    paths = [str(ROOT / "src"), str(ROOT / "tests")]
    done = subprocess.run(
        [sys.executable, ROOT / "tests/training/soak.py", "--kills", "3", "--processes", "2"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    last = done.stdout.splitlines()[-1]
    assert re.match(r"soak: PASSED: 3 kills \(\d while a state was written\)", last)


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("RUN_SLOW"), reason="three processes import PyTorch")
def test_example_of_many_nodes_runs_on_one(start: Path, data: Path, tmp_path: Path) -> None:
    torchrun = Path(sys.executable).parent
    if shutil.which("torchrun", path=str(torchrun)) is None:
        pytest.skip("torchrun is not beside this Python")
    fields = {"steps": 3, "batch_size": 2, "max_tokens": 128, "max_tiles": 1, "precision": "fp32"}
    words = [str(ROOT / "examples/cluster/nodes.sh"), "sft", "--model", str(start)]
    words += ["--data", str(data / "mixed.json"), "--out", str(tmp_path / "run")]
    for name, value in fields.items():
        words += ["--set", f"{name}={value}"]
    shared = {"NODES": "1", "FIRST": "localhost", "GPUS": "2", "DEVICE": "cpu", "PORT": "0"}
    path = os.pathsep.join([str(torchrun), os.environ["PATH"]])
    done = subprocess.run(
        words,
        env={**os.environ, **shared, "PATH": path, "PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "fsdp over 2" in done.stdout
    assert len(tiny_runs.metric_rows(tmp_path / "run/sft/metrics.jsonl")) == 3
    assert (tmp_path / "run/sft/checkpoint/model.safetensors").is_file()
