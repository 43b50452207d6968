"""What generic hosts do with the model: LoRA, compilation, gradient checkpointing."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from tiny_llms import TINY_LLMS
from tiny_models import IMAGE_SIZE, TOKENS_PER_TILE, tile_pixels

from mono_internvl.checkpoints.from_llm import monolithic_from_llm
from mono_internvl.configuration.model import MonoInternVLVisionConfig
from mono_internvl.model.modeling import MonoInternVLForConditionalGeneration
from mono_internvl.training.recompute import enable_recompute

VISION = MonoInternVLVisionConfig(hidden_size=32, image_size=IMAGE_SIZE)


def _model(folder: Path, version: str = "qwen3") -> MonoInternVLForConditionalGeneration:
    TINY_LLMS[version].write(folder)
    return monolithic_from_llm(folder, vision=VISION, visual_experts=("ffn", "qkv", "o")).model


def _batch(model: MonoInternVLForConditionalGeneration) -> dict[str, torch.Tensor]:
    ids = torch.randint(4, 250, (1, 24), generator=torch.Generator().manual_seed(1))
    ids[0, 2 : 2 + TOKENS_PER_TILE] = model.config.image_token_id
    labels = ids.masked_fill(torch.arange(24) < 8, -100)
    return {"input_ids": ids, "labels": labels, "pixel_values": tile_pixels(1)}


def test_lora_trains_merges_and_reloads(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="in the extra [dev]")
    model = _model(tmp_path / "llm")
    base, batch = copy.deepcopy(model), _batch(model)
    targets = r".*\.(q_proj|v_proj|o_proj_visual|down_proj)"
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets)
    torch.manual_seed(0)
    tuned = peft.get_peft_model(model, config)
    learned = {name: p for name, p in tuned.named_parameters() if p.requires_grad}
    assert learned and all("lora_" in name for name in learned)
    assert any("mlp_visual.down_proj" in name for name in learned)
    optimizer = torch.optim.AdamW(learned.values(), lr=1e-2)
    losses = []
    for _ in range(5):
        loss = tuned(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.05
    tuned.eval()
    with torch.no_grad():
        wanted = tuned(**batch, logits_to_keep=0).logits
        tuned.save_pretrained(tmp_path / "adapter")
        again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter").eval()
        assert torch.equal(again(**batch, logits_to_keep=0).logits, wanted)
        merged = again.merge_and_unload()
        merged.save_pretrained(tmp_path / "merged")
        loaded = MonoInternVLForConditionalGeneration.from_pretrained(tmp_path / "merged").eval()
        found = loaded(**batch, logits_to_keep=0).logits
        assert torch.allclose(found, wanted, atol=1e-4, rtol=0)
        assert not torch.allclose(found, base(**batch, logits_to_keep=0).logits, atol=1e-2)


@pytest.mark.parametrize("version", ["qwen3", "llama3.1", "mistral-v0.1", "smollm3"])
def test_forward_compiles_without_graph_breaks(version: str, tmp_path: Path) -> None:
    model = _model(tmp_path, version)
    ids = torch.randint(4, 250, (2, 24), generator=torch.Generator().manual_seed(1))
    torch._dynamo.reset()
    found = torch._dynamo.explain(model)(ids)
    assert found.graph_break_count == 0, found.break_reasons
    assert found.graph_count == 1


def test_images_break_the_graph_where_they_are_placed_and_in_no_layer(tmp_path: Path) -> None:
    """How many rows are visual is read once, at the door; layers compile whole."""
    model = _model(tmp_path)
    batch = _batch(model)
    torch._dynamo.reset()
    found = torch._dynamo.explain(model)(batch["input_ids"], pixel_values=batch["pixel_values"])
    places = {reason.user_stack[-1].name for reason in found.break_reasons}
    assert places == {"from_mask"}
    assert model.config.text_config.num_hidden_layers == 4
    assert found.graph_break_count < 8, "would be twice a layer"


@pytest.mark.parametrize("version", ["qwen3", "smollm3-sliding"])
def test_gradient_checkpointing_changes_no_gradient(version: str, tmp_path: Path) -> None:
    model = _model(tmp_path, version)
    batch = _batch(model)
    gradients = []
    for is_on in (False, True):
        model.zero_grad()
        model.train()
        if is_on:
            enable_recompute(model, "full")
            assert model.model.language_model.layers[0].gradient_checkpointing
        model(**batch).loss.backward()
        gradients.append(
            {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        )
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name
