"""The choice of an implementation is a setting of the model in memory, never of the checkpoint."""

from pathlib import Path

import pytest
import tiny_runs
import torch
import toy_experts
from torch import Tensor

from mono_internvl.bench.dense import DENSE, register_dense
from mono_internvl.configuration.model import (
    MonoInternVLConfig,
    MonoInternVLTextConfig,
    MonoInternVLVisionConfig,
)
from mono_internvl.errors import ExpertsUnavailable
from mono_internvl.model.modeling import MonoInternVLForConditionalGeneration

IMAGE_TOKEN = 121
TOY = toy_experts.register()
register_dense()


def small_model(visual_experts: tuple[str, ...]) -> MonoInternVLForConditionalGeneration:
    """A model of two layers with random weights."""
    torch.manual_seed(0)
    text = MonoInternVLTextConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    vision = MonoInternVLVisionConfig(hidden_size=32, image_size=56)
    config = MonoInternVLConfig(
        text_config=text, vision_config=vision, visual_experts=visual_experts
    )
    return MonoInternVLForConditionalGeneration(config).eval()


def logits_inputs() -> tuple[Tensor, Tensor]:
    """Ids of two prompts with an image each, and the two tiles."""
    ids = torch.tensor([[5, 6, *[IMAGE_TOKEN] * 4, 7, 8, 9], [*[IMAGE_TOKEN] * 4, *range(3, 8)]])
    return ids, torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(1))


def _logits(model: MonoInternVLForConditionalGeneration) -> Tensor:
    with torch.no_grad():
        return model(*logits_inputs()).logits


@pytest.mark.parametrize("name", [TOY, DENSE, "auto"])
@pytest.mark.parametrize(
    "visual_experts", [("ffn",), ("ffn", "qkv", "o"), ("ffn", "qkv", "o", "norms")]
)
def test_implementation_changes_the_way_not_the_numbers(
    name: str, visual_experts: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small_model(visual_experts)
    model.set_experts_implementation("eager")
    expected = _logits(model)
    calls = []
    for function in ("swiglu", "linear"):
        right = getattr(toy_experts, function)
        monkeypatch.setattr(
            toy_experts, function, lambda *args, right=right: calls.append(1) or right(*args)
        )
    model.set_experts_implementation(name)
    torch.testing.assert_close(_logits(model), expected, atol=1e-6, rtol=1e-5)
    if name == TOY:
        per_layer = 1 + ("qkv" in visual_experts) * 3 + ("o" in visual_experts)
        assert len(calls) == 2 * per_layer


def test_implementation_is_never_saved(tmp_path: Path) -> None:
    start = tiny_runs.write_checkpoint(tmp_path / "start")
    model = MonoInternVLForConditionalGeneration.from_pretrained(start, experts_implementation=TOY)
    assert model.model.language_model.experts_implementation == TOY
    model.save_pretrained(tmp_path / "saved")
    assert TOY not in (tmp_path / "saved" / "config.json").read_text()
    loaded = MonoInternVLForConditionalGeneration.from_pretrained(tmp_path / "saved")
    assert loaded.model.language_model.experts_implementation == "auto"


def test_unknown_implementation_is_refused_before_any_weight_is_read(tmp_path: Path) -> None:
    start = tiny_runs.write_checkpoint(tmp_path / "start")
    (start / "model.safetensors").unlink()
    with pytest.raises(ExpertsUnavailable, match="'fast'"):
        MonoInternVLForConditionalGeneration.from_pretrained(start, experts_implementation="fast")
    with pytest.raises(ExpertsUnavailable, match="'fast'"):
        small_model(("ffn",)).set_experts_implementation("fast")
