"""The same numbers on a CUDA device as on the CPU, up to rounding; needs such a device."""

import pytest
import torch
from tiny_models import image_ids, text_ids, tile_pixels, tiny_model
from torch import Tensor

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

# fp32 with TF32 off: only the order of sums differs.
LOGITS_ATOL = 1e-3


@pytest.fixture(autouse=True)
def full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """TF32 would round products to 10 bits."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def _prompt(device: str) -> dict[str, Tensor]:
    ids = torch.cat((text_ids(3, 1), image_ids(2), text_ids(4, 2)), dim=1)
    return {"input_ids": ids.to(device), "pixel_values": tile_pixels(2).to(device)}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@torch.no_grad()
def test_forward_on_cuda_equals_cpu(attention: str) -> None:
    model = tiny_model(attention=attention)
    expected = model(**_prompt("cpu")).logits
    logits = model.to("cuda")(**_prompt("cuda")).logits
    torch.testing.assert_close(logits.cpu(), expected, rtol=0, atol=LOGITS_ATOL)


@pytest.mark.parametrize("attention", ["flash_attention_2", "flex_attention"])
@torch.no_grad()
def test_packed_segments_with_other_attention_equal_sdpa(attention: str) -> None:
    if attention == "flash_attention_2":
        pytest.importorskip("flash_attn", reason="flash_attn is not installed")
    model = tiny_model(attention="sdpa").to("cuda", torch.bfloat16)
    model.config.visual_position_step = 0.25
    ids = _prompt("cuda")["input_ids"]
    packed = {"input_ids": torch.cat((ids, ids), dim=1), "pixel_values": tile_pixels(4).cuda()}
    packed["position_ids"] = torch.arange(ids.shape[1]).repeat(2)[None].cuda()
    expected = model(**packed).logits
    model.set_attn_implementation(attention)
    found = model(**packed).logits
    assert (found - expected).abs().mean() < 0.05 * expected.std()
    unpacked = model(**{**packed, "position_ids": None}).logits
    assert (unpacked - expected).abs().mean() > 0.2 * expected.std()


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@torch.no_grad()
def test_generate_on_cuda_equals_cpu(cache: str) -> None:
    model = tiny_model(attention="sdpa")
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": -1}
    expected = model.generate(**_prompt("cpu"), **options)
    found = model.to("cuda").generate(**_prompt("cuda"), **options, cache_implementation=cache)
    assert found.tolist() == expected.tolist()
