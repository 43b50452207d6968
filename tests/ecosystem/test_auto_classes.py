"""Transformers' Auto classes and pipelines: our checkpoints, and other InternVL repositories."""

from __future__ import annotations

import base64
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    pipeline,
)

import mono_internvl
from mono_internvl import (
    MonoInternVLConfig,
    MonoInternVLForConditionalGeneration,
    MonoInternVLProcessor,
)
from mono_internvl.errors import ConfigError

Model = MonoInternVLForConditionalGeneration
QUESTION = "what colour is this?"


def _question(image: Any) -> list[dict[str, Any]]:
    parts = [{"type": "image", **image}, {"type": "text", "text": QUESTION}]
    return [{"role": "user", "content": parts}]


# ------------------------------------------------------------------------------------------ dtype


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_auto_classes_accept_every_torch_dtype(checkpoint: Path, name: str) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        config = AutoConfig.from_pretrained(checkpoint, **{name: dtype})
        assert config.dtype == dtype
        assert json.loads(config.to_json_string())["torch_dtype"] == str(dtype).split(".")[1]
    stored = AutoConfig.from_pretrained(checkpoint)
    assert AutoConfig.from_pretrained(checkpoint, **{name: "auto"}).dtype == stored.dtype
    model = AutoModelForImageTextToText.from_pretrained(checkpoint, **{name: torch.bfloat16})
    assert isinstance(model, Model)
    assert model.dtype == torch.bfloat16


def test_pipeline_stops_at_the_end_of_an_answer(
    checkpoint: Path, picture: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = pipeline("image-text-to-text", model=str(checkpoint), dtype=torch.float32)
    turn_end = ask.tokenizer.control_id("<|im_end|>")
    word = ask.tokenizer.encode_plain("red").ids[0]
    script = iter([word, turn_end, 6, word, turn_end, 6])

    def head(x: torch.Tensor) -> torch.Tensor:
        return torch.eye(len(ask.tokenizer))[next(script)].expand(len(x), -1)

    monkeypatch.setattr(ask.model.lm_head, "forward", head)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    encoded = base64.b64encode(buffer.getvalue()).decode()
    for image in ({"image": picture}, {"base64": encoded}):
        out = ask(text=_question(image), max_new_tokens=3, return_full_text=False)
        assert out[0]["generated_text"].strip() == ask.tokenizer.decode([word]).strip()
        if "image" in image:
            assert next(script) == 6, "two tokens were asked for, no third"


# ----------------------------------------------------------------------------------- registration

_IMPORTS = {
    "package, then transformers": (
        # Asking where transformers is does not import it yet.
        "import mono_internvl, importlib.util; importlib.util.find_spec('transformers'); "
        "import transformers.models.auto.modeling_auto"
    ),
    "transformers, then package": "import transformers, mono_internvl",
    "one public name": "from mono_internvl import MonoInternVLConfig",
    "the network in the middle of another room": "import mono_internvl.generation.engine",
    "another room, then the network": (
        "import mono_internvl.configuration.model, mono_internvl.model.modeling"
    ),
}


def test_every_public_import_registers() -> None:
    check = """
from transformers.models.auto import configuration_auto, processing_auto
assert "internvl_chat" in configuration_auto.CONFIG_MAPPING
names = [c.__name__ for c in processing_auto.PROCESSOR_MAPPING._extra_content.values()]
assert "MonoInternVLProcessor" in names, names
"""
    running = {
        name: subprocess.Popen([sys.executable, "-c", f"{lines}\n{check}"], stderr=subprocess.PIPE)
        for name, lines in _IMPORTS.items()
    }
    for name, process in running.items():
        _, said = process.communicate()
        assert process.returncode == 0, f"{name}: {said.decode()}"


def test_register_may_be_called_again(checkpoint: Path) -> None:
    mono_internvl.register()
    mono_internvl.register()
    assert isinstance(AutoModelForImageTextToText.from_pretrained(checkpoint), Model)


def test_auto_classes_find_every_class(checkpoint: Path) -> None:
    config = AutoConfig.from_pretrained(checkpoint)
    assert type(config) is MonoInternVLConfig
    assert hasattr(transformers, "InternVLChatModel") is False, "the name of other repositories"
    assert isinstance(AutoProcessor.from_pretrained(checkpoint), MonoInternVLProcessor)
    assert isinstance(AutoModelForCausalLM.from_pretrained(checkpoint), Model)
    written = json.loads((checkpoint / "config.json").read_text())
    assert written["model_type"] == "internvl_chat", "the released layout"
    assert written["architectures"] == ["InternVLChatModel"]


# ------------------------------------------------------------------------- other InternVL folders

_CODE = """
import torch
from transformers import PreTrainedConfig, PreTrainedModel

class InternVLChatConfig(PreTrainedConfig):
    model_type = "internvl_chat"
    def __init__(self, llm_config=None, vision_config=None, **kwargs):
        super().__init__(**kwargs)
        self.llm_config, self.vision_config = llm_config, vision_config

class InternVLChatModel(PreTrainedModel):
    config_class = InternVLChatConfig
    def __init__(self, config):
        super().__init__(config)
        self.mlp1 = torch.nn.Sequential(torch.nn.LayerNorm(4), torch.nn.Linear(4, 4))
        self.post_init()
    def forward(self, x):
        return self.mlp1(x)
"""


@pytest.fixture
def ordinary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository of the InternVL family with its own code, weights under released names."""
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "m"))
    monkeypatch.syspath_prepend(str(tmp_path / "m"))
    folder = tmp_path / "InternVL2"
    folder.mkdir()
    config = {
        "model_type": "internvl_chat",
        "architectures": ["InternVLChatModel"],
        "auto_map": {
            "AutoConfig": "code_internvl_chat.InternVLChatConfig",
            "AutoModel": "code_internvl_chat.InternVLChatModel",
        },
        "llm_config": {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"},
        "vision_config": {"model_type": "intern_vit_6b"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code_internvl_chat.py").write_text(_CODE)
    weights = {
        "mlp1.0.weight": torch.arange(4.0),
        "mlp1.0.bias": torch.arange(4.0),
        "mlp1.1.weight": torch.arange(16.0).view(4, 4),
        "mlp1.1.bias": torch.arange(4.0),
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_other_internvl_repository_runs_its_own_code(ordinary: Path) -> None:
    model, info = AutoModel.from_pretrained(
        ordinary, trust_remote_code=True, output_loading_info=True
    )
    assert type(model).__name__ == "InternVLChatModel"
    assert not isinstance(model.config, MonoInternVLConfig)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(model.mlp1[1].weight.detach(), torch.arange(16.0).view(4, 4))


def test_other_internvl_repository_without_trust_is_refused_with_the_way_out(
    ordinary: Path,
) -> None:
    with pytest.raises(ConfigError, match="trust_remote_code=True"):
        AutoConfig.from_pretrained(ordinary)
