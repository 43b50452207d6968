"""What `mono-internvl info` says beyond the counts of `tests/costs/test_accounting.py`."""

import json
import sys
from typing import Any

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError

from mono_internvl.checkpoints.presets import config_of, preset
from mono_internvl.cli import app as cli
from mono_internvl.cli.recipes import RECIPES
from mono_internvl.costs.inference import parameter_table
from mono_internvl.costs.info import describe, parse_tokens, trainable_parameters
from mono_internvl.errors import CheckpointError, ConfigError, RecipeError


def _info(monkeypatch: pytest.MonkeyPatch, capsys: Any, *arguments: str) -> str:
    monkeypatch.setattr(sys, "argv", ["mono-internvl", "info", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code
    return str(capsys.readouterr().out)


def test_trainable_parameters_of_evip_2b() -> None:
    groups = parameter_table(preset("mono-internvl-2b")).groups
    last_expert, class_embedding = groups.visual_experts // 24, 1024  # neither can ever learn
    sees = groups.patch_embedding + groups.projector + groups.visual_experts
    never = last_expert + class_embedding
    assert trainable_parameters(preset("mono-internvl-2b"), RECIPES["evip-2b"]) == {
        "s11": sees - never,
        "s12": sees - never,
        "s13": sees + groups.attention - never,
        "s2": groups.total - never,
    }


def test_trainable_parameters_of_a_recipe_that_does_not_fit() -> None:
    with pytest.raises(RecipeError, match="decides no parameter"):
        trainable_parameters(preset("mini-internvl-chat-2b-v1-5"), RECIPES["miniature"])
    modular = preset("mini-internvl-chat-2b-v1-5")
    assert trainable_parameters(modular, RECIPES["sft"]) == {"sft": parameter_table(modular).total}


def test_options_that_differ_from_the_released_models_are_shown() -> None:
    config = preset("mono-internvl-2b")
    usual = describe(config).config
    config.image_attention, config.visual_position_step = "bidirectional", 0.25
    text = config.text_config
    text.sliding_window, text.sliding_layers = 4096, [1] * 6 + [0] * 18
    text.no_rope_layers = [1] * 20 + [0] * 4
    shown = describe(config).config
    assert {name: shown[name] for name in shown if name not in usual} == {
        "image_attention": "bidirectional",
        "visual_position_step": 0.25,
        "sliding_window": 4096,
        "sliding_layers": 6,
        "layers_without_rope": 4,
    }


@pytest.mark.parametrize(
    ("given", "parsed"),
    [
        ("visual=768,text=256", (768, 256, [])),
        ("text=5", (0, 5, [])),
        (" text = 5 , visual = 256 ", (256, 5, [])),
        ("image=640x480,text=5,image=2x3", (0, 5, [(640, 480), (2, 3)])),
    ],
)
def test_tokens_are_parsed(given: str, parsed: tuple[int, int, list[tuple[int, int]]]) -> None:
    assert parse_tokens(given) == parsed


@pytest.mark.parametrize(
    "given", ["", "768", "visual=a", "visual=-1", "image=3", "text=1,text=2", "text=1,"]
)
def test_tokens_that_cannot_be_read_are_refused(given: str) -> None:
    with pytest.raises(ConfigError, match="visual=768,text=256"):
        parse_tokens(given)


def test_costs_are_in_the_dtype_of_the_checkpoint() -> None:
    config = preset("mono-internvl-2b")
    config.dtype = torch.float32
    costs = describe(config, "text=8").costs
    assert costs is not None and costs.dtype == "float32"
    assert costs.weight_bytes == 4 * 3_111_355_392


def test_info_prints_costs_and_stages(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ("--tokens", "visual=768,text=256", "--recipe", "evip-2b")
    out = _info(monkeypatch, capsys, *asked)
    for number in ("3,218,962,157,568", "1,473,865,728", "6,222,710,784", "100,663,296"):
        assert number in out
    assert max(map(len, out.splitlines())) <= 80
    found = json.loads(_info(monkeypatch, capsys, *asked, "--json"))
    assert found["costs"]["prefill"]["total"] == 3_218_962_157_568
    assert list(found["trainable"]) == ["s11", "s12", "s13", "s2"]
    plain = json.loads(_info(monkeypatch, capsys, "--json"))
    assert set(plain) == {"name", "parameters", "config"}


def test_info_asks_for_a_hub_id_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def offline(name: str, **options: Any) -> str:
        asked.append(options["allow_patterns"])
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(CheckpointError, match="made-up/x: no such folder, and not available"):
        config_of("made-up/x", "2b")
    assert asked == [["config.json"]]
