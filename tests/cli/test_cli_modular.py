"""The modular baseline through the same verbs as the monolithic model."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from mono_internvl import MonoInternVLForConditionalGeneration, MonoInternVLProcessor
from mono_internvl.cli import app as cli

GOLDEN = Path(__file__).parents[1] / "parity" / "golden"
PICTURE, QUESTION = GOLDEN / "python" / "chat_a.png", "What is it?"


@pytest.fixture(scope="module", params=["vit_300m", "vit_6b"])
def checkpoint(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    for name in ("config.json", "model.safetensors"):
        shutil.copy(GOLDEN / request.param / name, folder)
    for file in (GOLDEN / "tokenizer").iterdir():
        shutil.copy(file, folder)
    return folder


@pytest.fixture
def verb(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., dict[str, Any]]:
    def run(*arguments: object) -> dict[str, Any]:
        monkeypatch.setattr(sys, "argv", ["mono-internvl", *map(str, arguments), "--json"])
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert not end.value.code
        result: dict[str, Any] = json.loads(capsys.readouterr().out)
        return result

    return run


def test_chat_gives_the_tokens_of_generate(checkpoint: Path, verb: Callable[..., Any]) -> None:
    options = ("--device", "cpu", "--max-tiles", 2, "--max-new-tokens", 12)
    said = verb("chat", "--model", checkpoint, "--image", PICTURE, *options, QUESTION)

    model = MonoInternVLForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32)
    processor = MonoInternVLProcessor.from_pretrained(checkpoint)
    image = {"type": "image", "image": Image.open(PICTURE)}
    text = {"type": "text", "text": QUESTION}
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": [image, text]}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        max_tiles=2,
    )
    prompt = inputs["input_ids"].shape[1]
    ids = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, prompt:]
    assert said["tokens"]["prompt"] == prompt
    assert said["answer"] == processor.tokenizer.decode(ids, skip_special_tokens=True).strip()


def test_convert_proves_the_round_trip(checkpoint: Path, verb: Callable[..., Any]) -> None:
    result = verb("convert", "--check", checkpoint)
    assert result["differences"] == [] and result["tokens"] == 515


def test_info_counts_the_tower(checkpoint: Path, verb: Callable[..., Any]) -> None:
    info = verb("info", "--model", checkpoint)
    shapes = json.loads((GOLDEN / "vit_300m" / "param_shapes.json").read_text())
    if info["config"]["width"] == 48:
        shapes = json.loads((GOLDEN / "vit_6b" / "param_shapes.json").read_text())
    sizes = {name: torch.Size(shape).numel() for name, shape in shapes.items()}
    tower = sum(n for name, n in sizes.items() if ".encoder." in name)
    assert info["parameters"]["total"] == sum(sizes.values())
    assert info["parameters"]["groups"]["vision_tower"] == tower > 0
    assert info["config"]["visual_experts"] == []


def test_evaluate_scores_records(
    checkpoint: Path, verb: Callable[..., Any], tmp_path: Path
) -> None:
    shutil.copy(PICTURE, tmp_path / "a.png")
    record = {
        "id": "1",
        "image": "a.png",
        "kind": "colour",
        "metric": "exact",
        "answer": "red",
        "conversations": [
            {"from": "human", "value": "<image>\nWhich colour?"},
            {"from": "gpt", "value": "red"},
        ],
    }
    (tmp_path / "data.jsonl").write_text(json.dumps(record) + "\n")
    out = tmp_path / "out.jsonl"
    arguments = ("--data", tmp_path / "data.jsonl", "--out", out, "--device", "cpu")
    found = verb("evaluate", "--model", checkpoint, *arguments, "--max-tiles", 1)
    assert found["items"] == {"colour": 1} and out.is_file()
