"""Quantised weights: which ways in work, and that no way out leaves a folder nobody can load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import write_checkpoint
from torch import Tensor
from transformers import BitsAndBytesConfig

from mono_internvl import MonoInternVLForConditionalGeneration
from mono_internvl.errors import CheckpointError

Model = MonoInternVLForConditionalGeneration
IDS = torch.arange(5, 25)[None]
MOST_ERROR = 0.1  # of the largest logit; measured 0.02 in 8 bits. Random k and v: 0.9


def _logits(model: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(IDS).logits.float()
    return logits


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of widths that bitsandbytes multiplies on a CPU."""
    folder = tmp_path_factory.mktemp("quantised") / "checkpoint"
    return write_checkpoint(folder, hidden_size=64, intermediate_size=128)


@pytest.fixture(scope="module")
def exact(checkpoint: Path) -> Tensor:
    return _logits(Model.from_pretrained(checkpoint, dtype=torch.float32))


def _is_close(found: Tensor, exact: Tensor) -> bool:
    return float((found - exact).abs().max()) < MOST_ERROR * float(exact.abs().max())


def _assert_not_saved(model: Any, folder: Path) -> None:
    for options in ({}, {"save_original_format": False}):
        with pytest.raises(CheckpointError, match=r"is quantised.*quantise it again after"):
            model.save_pretrained(folder, **options)
        assert not folder.exists()


def test_torchao_after_loading_answers_and_is_not_saved(
    checkpoint: Path, exact: Tensor, tmp_path: Path
) -> None:
    quantization = pytest.importorskip("torchao.quantization", reason="in the extra [dev]")
    model = Model.from_pretrained(checkpoint, dtype=torch.float32)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    assert not torch.equal(_logits(model), exact)
    assert _is_close(_logits(model), exact)
    _assert_not_saved(model, tmp_path / "saved")


def test_torchao_while_loading_raises_with_the_way_that_works(checkpoint: Path) -> None:
    quantization = pytest.importorskip("torchao.quantization", reason="in the extra [dev]")
    from transformers import TorchAoConfig

    asked = TorchAoConfig(quantization.Int8WeightOnlyConfig())
    with pytest.raises(CheckpointError, match=r"k_proj.*quantise the loaded model"):
        Model.from_pretrained(checkpoint, quantization_config=asked)


def _assert_weights_are_close(model: Any, exact: Any) -> None:
    import bitsandbytes as bnb

    layers = {n: m for n, m in model.named_modules() if isinstance(m, bnb.nn.Linear4bit)}
    assert any(name.endswith("k_proj") for name in layers)
    for name, layer in layers.items():
        packed = layer.weight
        weight = bnb.functional.dequantize_4bit(packed.data, packed.quant_state).float()
        wanted = exact.get_submodule(name).weight.detach()
        assert torch.cosine_similarity(weight.flatten(), wanted.flatten(), dim=0) > 0.98, name


@pytest.mark.parametrize("bits", [8, 4])
def test_bitsandbytes_answers_and_is_not_saved(
    checkpoint: Path, exact: Tensor, bits: int, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes", reason="in the extra [dev]")
    asked = (
        BitsAndBytesConfig(load_in_8bit=True)
        if bits == 8
        else BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    )
    model = Model.from_pretrained(checkpoint, quantization_config=asked, dtype=torch.float32)
    if bits == 4:  # before a pass: that packs the weights anew
        _assert_weights_are_close(model, Model.from_pretrained(checkpoint, dtype=torch.float32))
    found = _logits(model)
    assert not torch.equal(found, exact)
    assert bits == 4 or _is_close(found, exact), "in 4 bits a tiny model's logits are not close"
    _assert_not_saved(model, tmp_path / "saved")
