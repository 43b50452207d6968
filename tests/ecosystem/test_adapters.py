"""`load` of a PEFT adapter: the model it was trained on, with it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mono_internvl import MonoInternVLForConditionalGeneration, load
from mono_internvl.errors import CheckpointError, ConfigError

peft = pytest.importorskip("peft", reason="in the extra [dev]")


@pytest.fixture
def adapter(checkpoint: Path, tmp_path: Path) -> Path:
    model = MonoInternVLForConditionalGeneration.from_pretrained(checkpoint)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_load_merges_an_adapter_into_its_base(adapter: Path, checkpoint: Path) -> None:
    found = load(adapter).model
    base = MonoInternVLForConditionalGeneration.from_pretrained(checkpoint)
    wanted = peft.PeftModel.from_pretrained(base, str(adapter)).merge_and_unload().state_dict()
    plain = MonoInternVLForConditionalGeneration.from_pretrained(checkpoint).state_dict()
    assert type(found) is MonoInternVLForConditionalGeneration
    changed = {name for name, x in plain.items() if not torch.equal(x, wanted[name])}
    assert any("q_proj" in name for name in changed)
    for name, x in found.state_dict().items():
        assert torch.equal(x, wanted[name]), name


@pytest.mark.parametrize("base", [None, "", 3])
def test_load_refuses_an_adapter_without_base(adapter: Path, base: object) -> None:
    file = adapter / "adapter_config.json"
    fields = json.loads(file.read_text())
    file.write_text(json.dumps({**fields, "base_model_name_or_path": base}))
    with pytest.raises(CheckpointError, match="base_model_name_or_path"):
        load(adapter)


def test_load_refuses_a_damaged_adapter(adapter: Path) -> None:
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="adapter not applied"):
        load(adapter)


def test_load_refuses_an_adapter_in_int8(adapter: Path) -> None:
    pytest.importorskip("torchao", reason="in the extra [dev]")
    with pytest.raises(ConfigError, match="int8"):
        load(adapter, precision="int8")
