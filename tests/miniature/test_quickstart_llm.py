"""The miniature on a language model of another family: stages, recipes and report as they are."""

import json
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_quickstart import SMALLEST, read_rows
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from mono_internvl.cli import app as cli
from mono_internvl.miniature import quickstart as module
from mono_internvl.miniature.quickstart import SHIPPED_LANGUAGE_MODEL
from mono_internvl.model.modeling import MonoInternVLForConditionalGeneration
from mono_internvl.released.keys import read_config

STAGES = ("s11", "s12", "s13", "s2")


def _write_qwen3(folder: Path) -> Path:
    """A random Qwen3 with the miniature's tokenizer: q/k norm, tied head, its own head width."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(SHIPPED_LANGUAGE_MODEL)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`mono-internvl quickstart --quick --llm DIR`, three steps a stage."""
    root = tmp_path_factory.mktemp("qwen3")
    llm = _write_qwen3(root / "llm")
    words = ["quickstart", "--quick", "--llm", str(llm), "--out", str(root / "run")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "QUICK", SMALLEST)
        patch.setattr(sys, "argv", ["mono-internvl", *words, "--processes", "1"])
        with pytest.raises(SystemExit) as end, (root / "printed").open("w") as printed:
            patch.setattr(sys, "stdout", printed)
            cli.main()
    assert not end.value.code
    return root / "run"


def test_all_stages_evaluations_and_the_report_are_there(run: Path) -> None:
    metrics = json.loads((run / "metrics.json").read_text())
    assert [stage["name"] for stage in metrics["stages"]] == ["start", *STAGES]
    assert (run / "report.html").stat().st_size > 10_000
    assert read_config(run / "model").text_config.family == "qwen3"
    for stage in STAGES:
        rows = read_rows(run / stage / "metrics.jsonl")
        assert [row["step"] for row in rows] == [1, 2, 3]
        assert all(row["images"] for row in rows)
    last = metrics["stages"][-1]["scores"]
    assert {"caption", "colour", "grounding", "ocr", "chart"} <= set(last)


def test_text_stays_bit_identical_until_attention_learns(run: Path) -> None:
    stages = json.loads((run / "metrics.json").read_text())["stages"]
    same = {stage["name"]: stage["text_logits_identical"] for stage in stages}
    assert same == {"start": True, "s11": True, "s12": True, "s13": False, "s2": False}
    perplexity = {stage["name"]: stage["text"]["perplexity"] for stage in stages}
    assert perplexity["start"] == perplexity["s11"] == perplexity["s12"]


def test_what_qwen3_has_of_its_own_learns_where_the_recipe_says(run: Path) -> None:
    load = MonoInternVLForConditionalGeneration.from_pretrained
    models = [load(run / name / "checkpoint") for name in ("start", *STAGES)]
    assert all(m.lm_head.weight is m.model.language_model.embed_tokens.weight for m in models)
    assert "language_model.output.weight" not in load_file(run / "model" / "model.safetensors")

    def moves(name: str) -> list[bool]:
        weights = [model.get_parameter(name) for model in models]
        return [not torch.equal(a, b) for a, b in pairwise(weights)]

    layer = "model.language_model.layers.0"
    assert moves(f"{layer}.mlp_visual.down_proj.weight") == [True] * 4
    assert moves(f"{layer}.self_attn.q_proj.weight") == [False, False, True, True]
    assert moves(f"{layer}.self_attn.q_norm.weight") == [False, False, False, True]
    assert moves(f"{layer}.mlp.down_proj.weight") == [False, False, False, True]
    assert moves("lm_head.weight") == [False, False, False, True]


def test_screen_says_what_could_not_be_measured(run: Path) -> None:
    printed = (run.parent / "printed").read_text()
    (line,) = (x for x in printed.splitlines() if "facts replayed in S2" in x)
    assert line.endswith("  -  (must be >= 0.8) not measured")
    assert "bounds were chosen for the shipped language model" in printed
    assert "report: " in printed


def test_run_folder_is_held_to_its_language_model(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["mono-internvl", "quickstart", "--quick", "--out", str(run)]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 1
    said = capsys.readouterr()
    assert "begun with llm=" in said.out + said.err
