"""Checkpoints in the released layout: all of it or nothing, and bit for bit back again."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import ALL_EXPERTS, image_ids, text_ids, tile_pixels, tiny_config, tiny_model
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText

from mono_internvl.auto_classes import register
from mono_internvl.configuration.model import MonoInternVLConfig
from mono_internvl.errors import CheckpointError, ConfigError
from mono_internvl.model.modeling import MonoInternVLForConditionalGeneration, MonoInternVLModel
from mono_internvl.released.keys import (
    digest,
    expected_shapes,
    fuse_wqkv,
    released_name,
    split_wqkv,
    to_released,
)
from mono_internvl.released.weight_files import (
    iterate_tensors,
    read_headers,
    resolve_checkpoint,
    safetensors_files,
)

Model = MonoInternVLForConditionalGeneration
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
LAYER = "language_model.model.layers.1"


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A checkpoint folder of a tiny model."""
    folder = tmp_path / "checkpoint"
    tiny_model().save_pretrained(folder)
    return folder


def _edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def _assert_same_weights(a: Model, b: Model) -> None:
    ours, theirs = dict(a.named_parameters()), dict(b.named_parameters())
    assert ours.keys() == theirs.keys()
    for name, p in ours.items():
        assert p.dtype == theirs[name].dtype and torch.equal(p, theirs[name]), name


# -------------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize("experts", [(), ("ffn",), ALL_EXPERTS], ids=["none", "ffn", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_round_trip_is_bit_for_bit(
    tmp_path: Path, experts: tuple[str, ...], dtype: torch.dtype
) -> None:
    model = tiny_model(experts, qkv_bias=True, o_bias=True, qk_norm=True).to(dtype)
    model.save_pretrained(tmp_path / "a")
    again = Model.from_pretrained(tmp_path / "a")
    assert again.dtype == dtype
    _assert_same_weights(again, model)
    again.save_pretrained(tmp_path / "b")
    assert digest(dict(iterate_tensors(tmp_path / "a"))) == digest(
        dict(iterate_tensors(tmp_path / "b"))
    )
    assert (tmp_path / "a/config.json").read_bytes() == (tmp_path / "b/config.json").read_bytes()


def test_round_trip_of_tied_embeddings(tmp_path: Path) -> None:
    model = tiny_model(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    assert "language_model.output.weight" not in read_headers(tmp_path)
    again = Model.from_pretrained(tmp_path)
    assert again.lm_head.weight is again.get_input_embeddings().weight
    _assert_same_weights(again, model)


def test_round_trip_in_shards(tmp_path: Path, saved: Path) -> None:
    model = Model.from_pretrained(saved)
    model.save_pretrained(tmp_path / "shards", max_shard_size="60KB")
    assert len(safetensors_files(tmp_path / "shards")) > 3
    _assert_same_weights(Model.from_pretrained(tmp_path / "shards"), model)
    whole, shards = (dict(iterate_tensors(f)) for f in (saved, tmp_path / "shards"))
    assert digest(whole) == digest(shards)


def test_stored_names_and_shapes_are_the_released_ones(saved: Path) -> None:
    shapes = {key: info.shape for key, info in read_headers(saved).items()}
    assert shapes == expected_shapes(tiny_model(), tiny_config())
    assert shapes[f"{LAYER}.attention.wqkv.weight"] == (128, 64)
    assert shapes[f"{LAYER}.feed_forward_ve.w2.weight"] == (64, 96)
    assert shapes["mlp1.0.weight"] == (128,) and shapes["mlp1.3.bias"] == (64,)
    assert not any(key.startswith(("model.", "lm_head")) for key in shapes)


def test_loading_keeps_bf16_unless_asked(tmp_path: Path) -> None:
    tiny_model().to(torch.bfloat16).save_pretrained(tmp_path)
    assert Model.from_pretrained(tmp_path).dtype == torch.bfloat16
    assert Model.from_pretrained(tmp_path, dtype=torch.float32).dtype == torch.float32


def test_loaded_model_computes_the_same(saved: Path) -> None:
    ids = torch.cat((text_ids(3), image_ids(1), text_ids(3)), dim=1)
    with torch.no_grad():
        ours, theirs = (
            m(ids, pixel_values=tile_pixels(1)).logits
            for m in (Model.from_pretrained(saved, attn_implementation="eager"), tiny_model())
        )
    assert torch.allclose(ours, theirs, atol=1e-6, rtol=0)


def test_rotary_tables_of_other_exporters_are_ignored(saved: Path) -> None:
    before = Model.from_pretrained(saved)
    key = f"{LAYER}.attention.rotary_emb.inv_freq"
    _edit(saved, lambda tensors: tensors.update({key: torch.ones(8)}))
    _assert_same_weights(Model.from_pretrained(saved), before)


def test_unknown_config_fields_are_kept(saved: Path, tmp_path: Path) -> None:
    file = saved / "config.json"
    config = json.loads(file.read_text())
    config["my_note"] = {"a": [1, 2]}
    config["llm_config"]["my_other_note"] = 3
    file.write_text(json.dumps(config))
    Model.from_pretrained(saved).save_pretrained(tmp_path / "again")
    written = json.loads((tmp_path / "again/config.json").read_text())
    assert written["my_note"] == {"a": [1, 2]}
    assert written["llm_config"]["my_other_note"] == 3


# -------------------------------------------------------------------------------- what is refused


def _drop(key: str) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda tensors: tensors.pop(key)


def _rename(tensors: dict[str, torch.Tensor]) -> None:
    tensors["mlp1.4.weight"] = tensors.pop("mlp1.3.weight")


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (_drop("mlp1.1.bias"), r"1 missing, first mlp1\.1\.bias \(64,\)"),
        (_drop(f"{LAYER}.feed_forward_ve.w1.weight"), r"layers\.1\.feed_forward_ve\.w1\.weight"),
        (_drop(f"{LAYER}.attention.wqkv.weight"), r"1 missing, .*wqkv"),
        (
            lambda tensors: tensors.update({"language_model.extra": torch.zeros(1)}),
            r"1 unexpected, first language_model\.extra",
        ),
        (
            lambda tensors: tensors.update({"mlp1.3.weight": torch.zeros(64, 65)}),
            r"another shape, first mlp1\.3\.weight: stored \(64, 65\), expected \(64, 64\)",
        ),
        (
            _rename,
            r"1 missing, first mlp1\.3\.weight .*nearest stored name: mlp1\.4\.weight.*unexpected",
        ),
        (
            lambda tensors: tensors.update(
                {"model.lm_head.weight": tensors.pop("language_model.output.weight")}
            ),
            r"missing, first language_model\.output\.weight",
        ),
    ],
)
def test_loading_refuses_other_tensors(
    saved: Path, change: Callable[[dict[str, torch.Tensor]], object], complaint: str
) -> None:
    _edit(saved, change)
    with pytest.raises(CheckpointError, match=complaint):
        Model.from_pretrained(saved)


@pytest.mark.parametrize("loader", [Model, MonoInternVLModel, AutoModelForImageTextToText])
def test_loading_takes_fields_of_the_configuration(saved: Path, loader: Any) -> None:
    options = {"image_attention": "bidirectional", "visual_position_steps": [0.25, 1]}
    config = loader.from_pretrained(saved, **options).config
    assert config.image_attention == "bidirectional"
    assert config.visual_position_steps == (0.25, 1)
    given = tiny_config()
    model = Model.from_pretrained(saved, config=given, image_attention="bidirectional")
    assert (model.config.image_attention, given.image_attention) == ("bidirectional", "causal")
    with pytest.raises(ConfigError, match="image_attention='both'"):
        loader.from_pretrained(saved, image_attention="both")


def test_loading_refuses_modular_checkpoint_as_monolithic(saved: Path) -> None:
    file = saved / "config.json"
    config = json.loads(file.read_text())
    config["llm_config"]["architectures"] = ["InternLM2ForCausalLM"]
    del config["visual_experts"]
    file.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"6 unexpected.*visual experts: none"):
        Model.from_pretrained(saved)


def _truncate(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2])


def _to_shards(folder: Path) -> None:
    model = Model.from_pretrained(folder)
    (folder / WEIGHTS).unlink()
    model.save_pretrained(folder, max_shard_size="60KB")


def _drop_shard(folder: Path) -> None:
    _to_shards(folder)
    safetensors_files(folder)[1].unlink()


def _spoil_index(folder: Path) -> None:
    _to_shards(folder)
    (folder / INDEX).write_text('{"weight_map": [')


def _name_shard(name: Any) -> Callable[[Path], object]:
    """An index that names something else than a file of the folder."""

    def damage(folder: Path) -> None:
        _to_shards(folder)
        index = json.loads((folder / INDEX).read_text())
        index["weight_map"][min(index["weight_map"])] = name
        (folder / INDEX).write_text(json.dumps(index))

    return damage


def _binary_index(folder: Path) -> None:
    _to_shards(folder)
    (folder / INDEX).write_bytes(b'{"weight_map": {"a": "\xff\xfe"}}')


def _only_pickle(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (_truncate, "not a readable safetensors file"),
        (lambda folder: (folder / WEIGHTS).write_bytes(b""), "not a readable safetensors file"),
        (
            lambda folder: (folder / WEIGHTS).write_bytes(b"\xff" * 64),
            "not a readable safetensors file",
        ),
        (lambda folder: (folder / WEIGHTS).unlink(), "no model.safetensors"),
        (_drop_shard, "shard model-0000.* is missing"),
        (_spoil_index, "index.json: not"),
        (_binary_index, "index.json: not"),
        (_name_shard(7), "shard 7; expected the name of a file"),
        (_name_shard(None), "shard None; expected the name of a file"),
        (_name_shard([1]), r"shard \[1\]; expected the name"),
        (_name_shard("../model.safetensors"), "shard '../model.safetensors'; expected the name"),
        (_name_shard("/etc/passwd"), "shard '/etc/passwd'; expected the name"),
        (_name_shard(".."), "shard '..'; expected the name"),
        (_only_pickle, "pytorch_model.bin is a pickle"),
        (lambda folder: (folder / "config.json").unlink(), "config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json"),
        (lambda folder: (folder / "config.json").write_text("[1]"), "config.json"),
    ],
)
def test_loading_refuses_damaged_folder(
    saved: Path, damage: Callable[[Path], object], complaint: str
) -> None:
    damage(saved)
    with pytest.raises(CheckpointError, match=complaint):
        Model.from_pretrained(saved)


@pytest.mark.parametrize(
    ("part", "field", "value"),
    [
        ("llm_config", "architectures", ["Qwen2ForCausalLM"]),
        ("vision_config", "model_type", "siglip_vision_model"),
        (None, "model_type", "internvl"),
    ],
)
def test_loading_refuses_unknown_architecture(
    saved: Path, part: str | None, field: str, value: object
) -> None:
    file = saved / "config.json"
    config = json.loads(file.read_text())
    (config[part] if part else config)[field] = value
    file.write_text(json.dumps(config))
    expected = value[0] if isinstance(value, list) else str(value)
    with pytest.raises(ConfigError, match=f"'{expected}'.* expected"):
        Model.from_pretrained(saved)


def test_loading_refuses_file_for_folder(saved: Path) -> None:
    with pytest.raises(CheckpointError, match="not a folder"):
        Model.from_pretrained(saved / WEIGHTS)


# --------------------------------------------------------------------------------------- the hub


def _cached_repository(cache: Path, folder: Path, revision: str, ref: str | None = None) -> None:
    """Lay out a hub cache as a download leaves it behind."""
    repository = cache / "models--made-up--mono-tiny"
    shutil.copytree(folder, repository / "snapshots" / revision)
    if ref:
        (repository / "refs").mkdir(parents=True, exist_ok=True)
        (repository / "refs" / ref).write_text(revision)


def test_loading_hub_id_from_cache_with_revision(tmp_path: Path, saved: Path) -> None:
    first, second = "1" * 40, "2" * 40
    cache = tmp_path / "hub"
    _cached_repository(cache, saved, first, "main")
    _edit(saved, lambda tensors: tensors["mlp1.1.bias"].fill_(0.5))
    _cached_repository(cache, saved, second)
    options = {"cache_dir": cache, "local_files_only": True}
    main = Model.from_pretrained("made-up/mono-tiny", **options)
    assert not (main.model.projector.fc1.bias == 0.5).any()
    pinned = Model.from_pretrained("made-up/mono-tiny", revision=second, **options)
    assert (pinned.model.projector.fc1.bias == 0.5).all()
    assert resolve_checkpoint("made-up/mono-tiny", **options).name == first


@pytest.mark.parametrize(
    ("name", "revision"),
    [("made-up/other", None), ("made-up/mono-tiny", "3" * 40), ("not a/valid/id", None)],
)
def test_loading_hub_id_that_is_not_there_raises(
    tmp_path: Path, saved: Path, name: str, revision: str | None
) -> None:
    _cached_repository(tmp_path / "hub", saved, "1" * 40, "main")
    with pytest.raises(CheckpointError, match=name):
        Model.from_pretrained(
            name, revision=revision, cache_dir=tmp_path / "hub", local_files_only=True
        )


# ------------------------------------------------------------------------------------- Auto classes


def test_auto_classes_load_checkpoint(saved: Path) -> None:
    register()
    register()
    assert isinstance(AutoConfig.from_pretrained(saved), MonoInternVLConfig)
    model = AutoModelForImageTextToText.from_pretrained(saved)
    assert isinstance(model, Model)
    _assert_same_weights(model, tiny_model())
    eager = AutoModelForImageTextToText.from_pretrained(saved, attn_implementation="eager")
    assert eager.config._attn_implementation == "eager"
    assert eager.model.language_model.config._attn_implementation == "eager"
    eager.config.save_pretrained(saved / "again")
    written = json.loads((saved / "again/config.json").read_text())
    assert written == json.loads((saved / "config.json").read_text())


def test_auto_classes_prefer_this_package_to_code_of_a_checkpoint(saved: Path) -> None:
    file = saved / "config.json"
    code = {
        "AutoConfig": "configuration_internvl_chat.InternVLChatConfig",
        "AutoModel": "modeling_internvl_chat.InternVLChatModel",
    }
    file.write_text(json.dumps({**json.loads(file.read_text()), "auto_map": code}))
    assert isinstance(AutoConfig.from_pretrained(saved), MonoInternVLConfig)
    assert isinstance(AutoModelForImageTextToText.from_pretrained(saved), Model)


def test_auto_model_is_the_base_model() -> None:
    assert isinstance(AutoModel.from_config(tiny_config()), MonoInternVLModel)


# ---------------------------------------------------------------------------------- the key table


@pytest.mark.parametrize(("kv_heads", "group", "head_dim"), [(1, 1, 2), (2, 3, 4), (4, 2, 8)])
def test_split_wqkv_and_fuse_wqkv_are_inverse(kv_heads: int, group: int, head_dim: int) -> None:
    wqkv = torch.randn(kv_heads * (group + 2) * head_dim, 5)
    q, k, v = split_wqkv(wqkv, kv_heads, group, head_dim)
    assert torch.equal(fuse_wqkv(q, k, v, kv_heads, head_dim), wqkv)
    block = wqkv[-(group + 2) * head_dim :]  # the last group: its queries, then key, then value
    assert torch.equal(q[-group * head_dim :], block[: group * head_dim])
    assert torch.equal(k[-head_dim:], block[group * head_dim : (group + 1) * head_dim])
    assert torch.equal(v[-head_dim:], block[(group + 1) * head_dim :])


def test_key_table_names_every_parameter_once() -> None:
    model = tiny_model(ALL_EXPERTS, qkv_bias=True, o_bias=True, qk_norm=True)
    tensors = dict(model.named_parameters())
    released = to_released(tensors, model.config)
    fused = sum(".wqkv" in key for key in released)
    assert len(released) + 2 * fused == len(tensors)
    assert sum(t.numel() for t in released.values()) == sum(t.numel() for t in tensors.values())


def test_released_name_refuses_unknown_parameter() -> None:
    with pytest.raises(CheckpointError, match="add a row"):
        released_name("model.language_model.layers.0.self_attn.r_proj.weight")


def test_digest_sees_every_bit() -> None:
    tensors = {"a": torch.zeros(3), "b": torch.ones(2, dtype=torch.bfloat16)}
    base = digest(tensors)
    assert digest(dict(reversed(tensors.items()))) == base
    assert digest({**tensors, "a": torch.tensor([0.0, -0.0, 0.0])}) != base
    assert digest({**tensors, "a": torch.zeros(3, 1)}) != base
    assert digest({**tensors, "b": torch.ones(2, dtype=torch.float16)}) != base
    assert digest({"c": tensors["a"], "b": tensors["b"]}) != base
