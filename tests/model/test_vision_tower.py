"""The modular baseline's vision tower beyond its numbers, which `tests/parity` holds."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import IMAGE_SIZE, VOCAB, image_ids, randomize, text_ids, tile_pixels, tiny_config

from mono_internvl.checkpoints.convert import check_round_trip
from mono_internvl.configuration.model import MonoInternVLConfig, MonoInternVLVisionConfig
from mono_internvl.errors import CheckpointError, ConfigError
from mono_internvl.model.modeling import MonoInternVLForConditionalGeneration as Model
from mono_internvl.model.vision_tower import drop_path
from mono_internvl.recipes.groups import VISION_PARAMETERS
from mono_internvl.released.keys import to_released
from mono_internvl.training.recipe import Rule, Stage
from mono_internvl.training.recompute import enable_recompute
from mono_internvl.training.rules import apply_rules

GOLDEN = Path(__file__).parents[1] / "parity" / "golden"
TOWER = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}


def _config(select_layer: int = -1, **vision: Any) -> MonoInternVLConfig:
    fields = {"kind": "vit", "image_size": IMAGE_SIZE, "intermediate_size": 48, **TOWER, **vision}
    return MonoInternVLConfig(
        text_config=tiny_config(()).text_config,
        vision_config=MonoInternVLVisionConfig(**fields),
        select_layer=select_layer,
    )


def _model(select_layer: int = -1, **vision: Any) -> Model:
    model = Model(_config(select_layer, **vision)).eval()
    randomize(model)
    return model


def _loss(model: Model) -> torch.Tensor:
    ids = torch.cat((image_ids(2), text_ids(7)), dim=1)
    labels = ids.masked_fill((ids >= VOCAB - 9) & (ids <= VOCAB - 6), -100)
    return model(input_ids=ids, pixel_values=tile_pixels(2), labels=labels).loss


# --------------------------------------------------------------------------------- depth drop


def test_drop_path_keeps_the_expectation_per_tile() -> None:
    torch.manual_seed(0)
    y = drop_path(torch.ones(4000, 3, 2), 0.25)
    assert torch.equal(y.amin((1, 2)), y.amax((1, 2))), "a tile is kept or dropped whole"
    kept = y[:, 0, 0] != 0
    torch.testing.assert_close(y[kept], torch.full_like(y[kept], 1 / 0.75))
    assert abs(kept.float().mean() - 0.75) < 0.03
    assert drop_path(y, 0.0) is y
    assert drop_path(y.bfloat16(), 0.5).dtype == torch.bfloat16


def test_drop_path_grows_with_depth_and_is_off_in_evaluation() -> None:
    model, plain = _model(drop_path_rate=0.3), _model()
    rates = [layer.drop_path_rate for layer in model.model.vision_tower.layers]
    assert rates == pytest.approx([0.0, 0.15, 0.3])
    pixels = tile_pixels(3)
    torch.testing.assert_close(
        model.get_image_features(pixels), plain.get_image_features(pixels), rtol=0, atol=0
    )
    model.train()
    torch.manual_seed(1)
    first = model.get_image_features(pixels)
    assert not torch.equal(first, plain.get_image_features(pixels))
    torch.manual_seed(1)
    assert torch.equal(first, model.get_image_features(pixels)), "a function of the seed"


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_gradient_checkpointing_changes_no_gradient_of_the_tower(attention: str) -> None:
    model = _model(drop_path_rate=0.5).train()
    model.set_attn_implementation(attention)
    assert model.model.vision_tower.config._attn_implementation == attention
    torch.manual_seed(0)
    _loss(model).backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    enable_recompute(model, "full")
    assert model.model.vision_tower.layers[0].gradient_checkpointing
    torch.manual_seed(0)
    _loss(model).backward()
    for name, p in model.named_parameters():
        assert torch.equal(p.grad, expected[name]), name


@pytest.mark.parametrize("is_training", [False, True])
def test_tower_compiles_without_graph_breaks(is_training: bool) -> None:
    model = _model(drop_path_rate=0.3).train(is_training)
    pixels = tile_pixels(2)
    torch._dynamo.reset()
    found = torch._dynamo.explain(model.get_image_features)(pixels)
    assert found.graph_break_count == 0, found.break_reasons
    assert found.graph_count == 1
    compiled = torch.compile(model.get_image_features, backend="eager", fullgraph=True)
    torch.manual_seed(0)
    expected = model.get_image_features(pixels)
    torch.manual_seed(0)
    assert torch.equal(compiled(pixels), expected), "stochastic depth draws as it does uncompiled"


def test_modular_model_compiles_on_text_without_graph_breaks() -> None:
    torch._dynamo.reset()
    found = torch._dynamo.explain(_model())(input_ids=text_ids(9))
    assert found.graph_break_count == 0, found.break_reasons


# ------------------------------------------------------------------------------- what learns


@pytest.mark.parametrize("select_layer", [-1, 3, -2, 1, 0])
def test_rules_freeze_what_no_loss_reads_and_nothing_else(select_layer: int) -> None:
    model = _model(select_layer)
    rules = (Rule(VISION_PARAMETERS, 1e-3), Rule(".*", 1e-4))
    stage = Stage(name="all", title="", data="x", batch_size=1, steps=1, rules=rules)
    apply_rules(model, model.config, stage)
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    for p in model.parameters():
        p.requires_grad_(True)
    _loss(model).backward()
    reached = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert learning == reached
    assert ("model.vision_embedder.class_embedding" in reached) == (select_layer != 0)


def test_initial_layer_scale_is_the_configured_factor() -> None:
    tower = Model(_config(initializer_factor=0.1)).model.vision_tower
    for layer in tower.layers:
        assert (layer.ls1 == 0.1).all() and (layer.ls2 == 0.1).all()
        assert layer.attn.qkv.weight.std() < 0.03 and not layer.attn.qkv.bias.any()


# ------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("name", ["vit_300m", "vit_6b"])
def test_modular_checkpoint_round_trip_is_identical(name: str, tmp_path: Path) -> None:
    folder = tmp_path / name
    folder.mkdir()
    for file in ("config.json", "model.safetensors"):
        shutil.copy(GOLDEN / name / file, folder)
    result = check_round_trip(folder, tmp_path / "copy")
    assert result.differences == ()
    config = json.loads((tmp_path / "copy" / "config.json").read_text())
    assert config["vision_config"]["architectures"] == ["InternVisionModel"]
    assert config["vision_config"]["model_type"] == "intern_vit_6b"
    assert config["llm_config"]["architectures"] == ["InternLM2ForCausalLM"]


def test_modular_checkpoint_is_loaded_whole_or_not_at_all(tmp_path: Path) -> None:
    _model().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["vision_config"]["num_hidden_layers"] = 4
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"missing, first vision_model\.encoder\.layers\.3\."):
        Model.from_pretrained(tmp_path)


def test_released_names_of_the_tower() -> None:
    model = _model(norm_type="rms_norm", qk_normalization=True, qkv_bias=False)
    keys = to_released(dict(model.named_parameters()), model.config)
    layer = {
        k.split("layers.0.")[1] for k in keys if k.startswith("vision_model.encoder.layers.0.")
    }
    modules = ("norm1", "norm2", "attn.qkv", "attn.q_norm", "attn.k_norm")
    biased = ("attn.proj", "mlp.fc1", "mlp.fc2")
    assert layer == (
        {"ls1", "ls2"}
        | {f"{module}.weight" for module in (*modules, *biased)}
        | {f"{module}.bias" for module in biased}
    )


# ----------------------------------------------------------------------------- configuration


def _released(**vision: Any) -> dict[str, Any]:
    config = json.loads((GOLDEN / "vit_6b" / "config.json").read_text())
    config["vision_config"] = {"model_type": "intern_vit_6b", **vision}
    return config


def test_missing_keys_of_a_released_tower_are_the_released_defaults() -> None:
    vision = MonoInternVLConfig(**_released()).vision_config
    assert vision.kind == "vit"
    assert (vision.hidden_size, vision.num_hidden_layers, vision.num_attention_heads) == (
        3200,
        48,
        25,
    )
    assert (vision.norm_type, vision.qkv_bias, vision.qk_normalization) == ("rms_norm", False, True)
    assert (vision.image_size, vision.initializer_factor) == (224, 0.1)


@pytest.mark.parametrize(
    ("vision", "complaint"),
    [
        ({"dropout": 0.1}, r"vision_config\.dropout=0\.1"),
        ({"attention_dropout": 0.1}, r"vision_config\.attention_dropout=0\.1"),
        ({"hidden_size": 3201}, "hidden_size=3201 is not a multiple"),
        ({"norm_type": "batch_norm"}, "norm_type='batch_norm'"),
        ({"drop_path_rate": 1.0}, "drop_path_rate=1.0"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0"),
        ({"qk_normalization": "yes"}, "qk_normalization='yes'"),
        ({"hidden_act": "tanhgelu"}, "hidden_act='tanhgelu'"),
    ],
)
def test_tower_configuration_is_refused_by_name(vision: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        MonoInternVLConfig(**_released(**vision))


@pytest.mark.parametrize("select_layer", [4, -5, "last"])
def test_select_layer_outside_of_the_tower_is_refused(select_layer: Any) -> None:
    with pytest.raises(ConfigError, match=f"select_layer={select_layer!r}; expected -4 to 3"):
        _config(select_layer)


def test_select_layer_of_a_patch_model_means_nothing() -> None:
    config = tiny_config()
    again = MonoInternVLConfig(**{**copy.deepcopy(config.to_dict()), "select_layer": -40})
    assert again.select_layer == -40
