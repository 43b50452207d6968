"""What is verified is what is loaded, for every class; and saving replaces what was there."""

import json
import os
import pickle
import shutil
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import randomize, tiny_model
from transformers import AutoModel, AutoModelForImageTextToText

from mono_internvl.errors import CheckpointError, ConfigError
from mono_internvl.model.modeling import MonoInternVLForConditionalGeneration, MonoInternVLModel

Model = MonoInternVLForConditionalGeneration
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_SIZE = "60KB"


def _is_same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def _other_model() -> Model:
    model = tiny_model()
    randomize(model, seed=1)
    return model


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint"
    tiny_model().save_pretrained(folder, max_shard_size=SHARD_SIZE)
    assert (folder / INDEX).is_file()
    return folder


# ------------------------------------------------------------------------ what lies beside


def test_loading_ignores_stale_single_file_beside_shards(sharded: Path) -> None:
    _other_model().save_pretrained(sharded.parent / "other")
    stale = load_file(sharded.parent / "other" / WEIGHTS)
    save_file({k: v for k, v in stale.items() if ".layers.0." not in k}, sharded / WEIGHTS)
    assert _is_same(Model.from_pretrained(sharded), tiny_model())


def test_loading_ignores_adapter_beside_weights(
    sharded: Path, caplog: pytest.LogCaptureFixture
) -> None:
    adapted = peft.get_peft_model(
        tiny_model(), peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    )
    adapted.save_pretrained(sharded.parent / "adapter")
    for file in (sharded.parent / "adapter").glob("adapter_*"):
        shutil.copy(file, sharded)
    assert (sharded / "adapter_config.json").is_file()
    for load in (Model.from_pretrained, AutoModelForImageTextToText.from_pretrained):
        caplog.clear()
        assert _is_same(load(sharded), tiny_model())
        assert "adapter_config.json beside the weights is not applied" in caplog.text


class _Opens:
    """A pickle that leaves a trace when it is read."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (str(self.trace), "w"))


def _in_memory_layout(folder: Path, **fields: Any) -> None:
    config = tiny_model().config
    (folder / "config.json").write_text(
        json.dumps(
            {
                "model_type": config.model_type,
                "text_config": config.text_config.to_dict(),
                "vision_config": config.vision_config.to_dict(),
                "visual_experts": list(config.visual_experts),
                **fields,
            },
            default=str,
        )
    )


@pytest.mark.parametrize("name", ["other.safetensors", "adapter_model.bin"])
def test_loading_ignores_other_weights_that_config_names(sharded: Path, name: str) -> None:
    if name.endswith(".bin"):
        (sharded / name).write_bytes(pickle.dumps(_Opens(sharded / "trace")))
    else:
        save_file({"a": torch.zeros(1)}, sharded / name, metadata={"format": "pt"})
    _in_memory_layout(sharded, transformers_weights=name)
    assert _is_same(Model.from_pretrained(sharded), tiny_model())
    assert not (sharded / "trace").exists()


@pytest.mark.parametrize(
    "fields",
    [
        {"_attn_implementation": "kernels-community/made-up"},
        {"attn_implementation": "kernels-community/made-up"},
        {"_attn_implementation_internal": "kernels-community/made-up"},
        {"_experts_implementation": "made-up"},
        {"fusion_config": {"made-up": True}},
        {"distributed_config": {"tp_plan": "auto"}},
    ],
    ids=lambda fields: next(iter(fields)),
)
@pytest.mark.parametrize("place", ["released", "top", "text"])
def test_config_file_does_not_say_how_to_compute(
    sharded: Path, fields: dict[str, Any], place: str
) -> None:
    plain = shutil.copytree(sharded, sharded.parent / "plain")
    if place != "released":
        _in_memory_layout(sharded)
    config = json.loads((sharded / "config.json").read_text())
    (config["text_config"] if place == "text" else config).update(fields)
    (sharded / "config.json").write_text(json.dumps(config))
    model, usual = Model.from_pretrained(sharded), Model.from_pretrained(plain)
    for found, expected in (
        (model.config, usual.config),
        (model.config.text_config, usual.config.text_config),
    ):
        for name in (*fields, "_attn_implementation", "_experts_implementation"):
            assert getattr(found, name, None) == getattr(expected, name, None), name
    assert _is_same(model, usual)


@pytest.mark.parametrize(
    "options",
    [{"variant": "fp16"}, {"subfolder": "a"}, {"gguf_file": "a.gguf"}, {"key_mapping": {"a": "b"}}],
    ids=lambda options: next(iter(options)),
)
def test_loading_refuses_to_load_what_was_not_verified(
    sharded: Path, options: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(options))} is not supported"):
        Model.from_pretrained(sharded, **options)


def test_index_with_one_tensor_in_two_shards_is_refused(sharded: Path) -> None:
    first, second = sorted(sharded.glob("model-*.safetensors"))[:2]
    save_file({**load_file(second), **load_file(first)}, second, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="expected every tensor once"):
        Model.from_pretrained(sharded)


# ----------------------------------------------------------------------- all classes alike


@pytest.mark.parametrize(
    "load", [Model.from_pretrained, MonoInternVLModel.from_pretrained, AutoModel.from_pretrained]
)
@pytest.mark.parametrize("is_sharded", [True, False])
def test_every_class_refuses_missing_tensor(
    tmp_path: Path, load: Callable[[Path], Any], is_sharded: bool
) -> None:
    tiny_model().save_pretrained(tmp_path, max_shard_size=SHARD_SIZE if is_sharded else "1GB")
    for file in tmp_path.glob("*.safetensors"):
        tensors = load_file(file)
        kept = {k: v for k, v in tensors.items() if not k.endswith("layers.0.attention.wo.weight")}
        save_file(kept, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"1 missing, first .*layers\.0\.attention\.wo"):
        load(tmp_path)


def test_base_model_loads_whole_checkpoint(sharded: Path) -> None:
    for load in (MonoInternVLModel.from_pretrained, AutoModel.from_pretrained):
        assert _is_same(load(sharded), tiny_model().model)


def test_loading_takes_generation_config_of_folder(sharded: Path) -> None:
    file = sharded / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token_id": [2, 5]}))
    assert Model.from_pretrained(sharded).generation_config.eos_token_id == [2, 5]
    file.unlink()
    assert Model.from_pretrained(sharded).generation_config.eos_token_id == 2
    file.write_text('{"cache_implementation": 3, "num_beams": "x"}')
    with pytest.raises(CheckpointError, match=r"generation_config\.json"):
        Model.from_pretrained(sharded)


def test_loaded_model_names_its_folder(sharded: Path) -> None:
    assert Model.from_pretrained(sharded).config.name_or_path == str(sharded)


# ------------------------------------------------------------------------ saving over something


@pytest.mark.parametrize("before", [SHARD_SIZE, "90KB", "1GB"])
@pytest.mark.parametrize("after", [SHARD_SIZE, "90KB", "1GB"])
def test_saving_replaces_earlier_checkpoint(tmp_path: Path, before: str, after: str) -> None:
    tiny_model().save_pretrained(tmp_path, max_shard_size=before)
    (tmp_path / "notes.safetensors").write_bytes(b"mine")
    other = _other_model()
    other.save_pretrained(tmp_path, max_shard_size=after)
    assert _is_same(Model.from_pretrained(tmp_path), other)
    assert _is_same(AutoModel.from_pretrained(tmp_path), other.model)
    found = {file.name for file in tmp_path.iterdir()}
    index = json.loads((tmp_path / INDEX).read_text()) if INDEX in found else None
    weights = {WEIGHTS} if index is None else set(index["weight_map"].values())
    assert {name for name in found if name.endswith(".safetensors")} == weights | {
        "notes.safetensors"
    }
    assert not [name for name in found if name.startswith(".")]


@pytest.mark.parametrize("before", [SHARD_SIZE, "1GB"])
@pytest.mark.parametrize("after", [SHARD_SIZE, "1GB"])
def test_interrupted_saving_leaves_old_or_new(
    tmp_path: Path, before: str, after: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stops after every single move and removal; what stands there then is loaded."""
    old, new, folder = tiny_model(), _other_model(), tmp_path / "checkpoint"
    seen, calls = [], {"left": 0}

    class Killed(BaseException):
        pass

    def stopping(change: Callable[..., Any]) -> Callable[..., Any]:
        def stop_or_go_on(self: Path, *args: Any, **kwargs: Any) -> Any:
            if folder in self.parents:
                if calls["left"] == 0:
                    raise Killed
                calls["left"] -= 1
            return change(self, *args, **kwargs)

        return stop_or_go_on

    for steps in range(100):
        shutil.rmtree(folder, ignore_errors=True)
        old.save_pretrained(folder, max_shard_size=before)
        calls["left"] = steps
        with monkeypatch.context() as patched:
            for name in ("replace", "unlink", "rename"):
                patched.setattr(Path, name, stopping(getattr(Path, name)))
            with suppress(Killed):
                new.save_pretrained(folder, max_shard_size=after)
        loaded = Model.from_pretrained(folder)
        seen.append("old" if _is_same(loaded, old) else "new" if _is_same(loaded, new) else "?")
        if calls["left"]:
            break
    assert set(seen) == {"old", "new"} and seen == sorted(seen, reverse=True)


def test_saved_files_have_one_mode(tmp_path: Path) -> None:
    umask = os.umask(0o022)
    try:
        tiny_model().save_pretrained(tmp_path, max_shard_size=SHARD_SIZE)
    finally:
        os.umask(umask)
    assert {stat.S_IMODE(file.stat().st_mode) for file in tmp_path.iterdir()} == {0o644}


def test_saving_into_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        tiny_model().save_pretrained(tmp_path / "a")
