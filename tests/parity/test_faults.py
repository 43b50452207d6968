"""The parity checks can fail: each fault planted here turns a named golden case red.

The committed golden data is used whatever `GOLDEN_DIR` says, as it is the checks that are on trial.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_data import GoldenCase, GoldenDataError, find_case
from parity_checks import (
    Check,
    check_features,
    check_forward,
    check_generation,
    check_gradients,
    load_model,
)
from torch import Tensor, nn

from mono_internvl.configuration.model import MonoInternVLTextConfig, MonoInternVLVisionConfig
from mono_internvl.experts import Routing
from mono_internvl.model import decoder, layers, modeling, vision_tower
from mono_internvl.model.decoder import MonoInternVLTextModel
from mono_internvl.model.vision_tower import VisionAttention, VisionTower
from mono_internvl.released import keys as checkpoint

COMMITTED = Path(__file__).parent / "golden"

Plant = Callable[[pytest.MonkeyPatch], None]


@dataclass(frozen=True)
class Fault:
    """A way to get it wrong, and the case that tells."""

    name: str
    plant: Plant
    model: str
    case: str
    check: Check

    def golden(self) -> GoldenCase:
        return find_case(self.model, self.case, COMMITTED)


def _swap_experts(patch: pytest.MonkeyPatch) -> None:
    right = layers.route

    def wrong(x: Tensor, routing: Routing, text: nn.Module, visual: nn.Module | None) -> Tensor:
        return (
            right(x, routing, text, visual) if visual is None else right(x, routing, visual, text)
        )

    patch.setattr(layers, "route", wrong)


def _patch_routing(patch: pytest.MonkeyPatch, change: Callable[[Routing], Routing]) -> None:
    """What the decoder gets, after features were placed."""
    right = MonoInternVLTextModel.forward

    def wrong(
        self: MonoInternVLTextModel,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        routing: Routing | None,
        **kwargs: Any,
    ) -> Any:
        routing = None if routing is None else change(routing)
        return right(self, input_ids, inputs_embeds, routing, **kwargs)

    patch.setattr(MonoInternVLTextModel, "forward", wrong)


def _patch_mask(patch: pytest.MonkeyPatch, change: Callable[[Tensor], Tensor]) -> None:
    cpu = torch.device("cpu")
    _patch_routing(patch, lambda routing: Routing.from_mask(change(routing.is_visual(cpu))))


def _route_visual_as_text(patch: pytest.MonkeyPatch) -> None:
    _patch_mask(patch, torch.zeros_like)


def _route_one_row_late(patch: pytest.MonkeyPatch) -> None:
    _patch_mask(patch, lambda mask: mask.roll(1, dims=-1))


def _route_first_visual_row_as_text(patch: pytest.MonkeyPatch) -> None:
    def change(mask: Tensor) -> Tensor:
        mask = mask.clone()
        mask[mask.nonzero()[0]] = False
        return mask

    _patch_mask(patch, change)


def _scatter_experts_in_gathered_order(patch: pytest.MonkeyPatch) -> None:
    def wrong(routing: Routing) -> Routing:
        order = torch.arange(routing.num_text + routing.num_visual)
        return Routing(
            routing.num_text, routing.num_visual, routing.text_rows, routing.visual_rows, order
        )

    _patch_routing(patch, wrong)


def _patch_rope(patch: pytest.MonkeyPatch, **wrong_values: object) -> None:
    right = decoder.rotary_embeddings

    def wrong(
        config: MonoInternVLTextConfig, position_ids: Tensor, kv_length: int, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        stored = config.rope_parameters
        config.rope_parameters = {**(stored or {}), **wrong_values}
        angles = right(config, position_ids, kv_length, dtype)
        config.rope_parameters = stored
        return angles

    patch.setattr(decoder, "rotary_embeddings", wrong)


def _wrong_rope_theta(patch: pytest.MonkeyPatch) -> None:
    _patch_rope(patch, rope_theta=10_000.0)


def _no_dynamic_rope(patch: pytest.MonkeyPatch) -> None:
    _patch_rope(patch, rope_type="default")


def _interleaved_rope(patch: pytest.MonkeyPatch) -> None:
    def wrong(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        cos, sin = cos[:, None, :, :half], sin[:, None, :, :half]
        even, odd = x[..., 0::2], x[..., 1::2]
        return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)

    patch.setattr(layers, "rotate", wrong)


def _backwards_rope(patch: pytest.MonkeyPatch) -> None:
    right = layers.rotate
    patch.setattr(layers, "rotate", lambda x, cos, sin: right(x, cos, -sin))


def _transposed_pixel_shuffle(patch: pytest.MonkeyPatch) -> None:
    right = modeling.pixel_shuffle
    patch.setattr(modeling, "pixel_shuffle", lambda x, version: right(x, "v1"))


def _channels_first_pixel_shuffle(patch: pytest.MonkeyPatch) -> None:
    right = modeling.pixel_shuffle

    def wrong(x: Tensor, version: str) -> Tensor:
        y = right(x, version)
        return y.unflatten(-1, (4, -1)).transpose(-1, -2).flatten(-2)

    patch.setattr(modeling, "pixel_shuffle", wrong)


def _contiguous_wqkv(patch: pytest.MonkeyPatch) -> None:
    def wrong(wqkv: Tensor, kv_heads: int, group: int, head_dim: int) -> tuple[Tensor, ...]:
        q, kv = kv_heads * group * head_dim, kv_heads * head_dim
        return tuple(part.contiguous() for part in wqkv.split((q, kv, kv)))

    patch.setattr(checkpoint, "split_wqkv", wrong)


def _key_and_value_exchanged(patch: pytest.MonkeyPatch) -> None:
    right = checkpoint.split_wqkv

    def wrong(*args: object) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = right(*args)  # type: ignore[arg-type]
        return q, v, k

    patch.setattr(checkpoint, "split_wqkv", wrong)


def _contiguous_wqkv_on_the_way_back(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(checkpoint, "fuse_wqkv", lambda q, k, v, *heads: torch.cat((q, k, v)))


def _no_class_token(patch: pytest.MonkeyPatch) -> None:
    right = VisionTower.forward

    def wrong(self: VisionTower, x: Tensor, select_layer: int = -1) -> Tensor:
        return torch.cat((x[:, :1], right(self, x[:, 1:], select_layer)), dim=1)

    patch.setattr(VisionTower, "forward", wrong)


def _one_vision_layer_short(patch: pytest.MonkeyPatch) -> None:
    right = MonoInternVLVisionConfig.layers_until
    patch.setattr(MonoInternVLVisionConfig, "layers_until", lambda *args: max(right(*args) - 1, 0))


def _vision_qkv_by_head(patch: pytest.MonkeyPatch) -> None:
    right = VisionAttention.forward

    def by_head(module: nn.Module, args: object, qkv: Tensor) -> Tensor:
        return qkv.unflatten(-1, (heads, 3, -1)).transpose(-3, -2).flatten(-3)

    def wrong(self: VisionAttention, x: Tensor) -> Tensor:
        with_hook = self.qkv.register_forward_hook(by_head)
        try:
            return right(self, x)
        finally:
            with_hook.remove()

    heads = 3  # of vit_300m
    patch.setattr(VisionAttention, "forward", wrong)


def _no_vision_query_norm(patch: pytest.MonkeyPatch) -> None:
    right = VisionAttention.forward

    def wrong(self: VisionAttention, x: Tensor) -> Tensor:
        self.q_norm = nn.Identity()
        return right(self, x)

    patch.setattr(VisionAttention, "forward", wrong)


def _vision_query_norm_per_head(patch: pytest.MonkeyPatch) -> None:
    right = layers.RMSNorm.forward

    def wrong(self: layers.RMSNorm, x: Tensor) -> Tensor:
        if x.shape[1] != 17:  # 4 x 4 patches and a class token
            return right(self, x)
        heads = x.unflatten(-1, (2, -1))
        heads = heads * torch.rsqrt(heads.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * heads.flatten(-2)

    patch.setattr(layers.RMSNorm, "forward", wrong)


def _always_drop_path(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(vision_tower, "drop_path", lambda x, rate: x * 0.9)


FAULTS = [
    Fault("experts swapped", _swap_experts, "mono_a", "img1_tile1", check_forward),
    Fault("experts swapped", _swap_experts, "mono_a", "text_only", check_generation),
    Fault("visual as text", _route_visual_as_text, "mono_a", "img1_tile1", check_forward),
    Fault("visual as text", _route_visual_as_text, "mono_a", "img1_tile3_thumb", check_generation),
    Fault("visual as text", _route_visual_as_text, "mono_a", "img2", check_gradients),
    Fault("one row late", _route_one_row_late, "mono_a", "img1_tile1", check_forward),
    Fault("one row late", _route_one_row_late, "mono_a", "mixed", check_forward),
    Fault(
        "one visual row as text",
        _route_first_visual_row_as_text,
        "mono_b",
        "img1_tile3_thumb",
        check_forward,
    ),
    Fault(
        "rows not put back",
        _scatter_experts_in_gathered_order,
        "mono_a",
        "batch2_rightpad",
        check_forward,
    ),
    Fault("theta 10000", _wrong_rope_theta, "mono_a", "img1_tile1", check_forward),
    Fault("interleaved rope", _interleaved_rope, "mono_a", "text_only", check_forward),
    Fault("backwards rope", _backwards_rope, "mono_a", "text_only", check_forward),
    Fault("no dynamic rope", _no_dynamic_rope, "mono_dynrope", "img1_tile1", check_forward),
    Fault("no dynamic rope", _no_dynamic_rope, "mono_dynrope", "batch2_leftpad", check_generation),
    Fault(
        "pixel shuffle v1", _transposed_pixel_shuffle, "mono_a", "extract_feature", check_features
    ),
    Fault("pixel shuffle v1", _transposed_pixel_shuffle, "mono_a", "img1_tile1", check_forward),
    Fault(
        "channels before patches",
        _channels_first_pixel_shuffle,
        "mono_b",
        "extract_feature",
        check_features,
    ),
    Fault("contiguous wqkv", _contiguous_wqkv, "mono_a", "text_only", check_forward),
    Fault("contiguous wqkv", _contiguous_wqkv, "mono_b", "img1_tile1", check_forward),
    Fault("k and v exchanged", _key_and_value_exchanged, "mono_a", "text_only", check_forward),
    Fault(
        "contiguous wqkv on the way back",
        _contiguous_wqkv_on_the_way_back,
        "mono_a",
        "img1_tile3_thumb",
        check_gradients,
    ),
    Fault("no class token", _no_class_token, "vit_300m", "img1_tile1", check_forward),
    Fault("no class token", _no_class_token, "vit_6b", "extract_feature", check_features),
    Fault(
        "one layer short", _one_vision_layer_short, "vit_300m", "batch2_leftpad", check_generation
    ),
    Fault("one layer short", _one_vision_layer_short, "vit_6b", "extract_feature", check_features),
    Fault("vision qkv by head", _vision_qkv_by_head, "vit_300m", "img1_tile1", check_gradients),
    Fault("no query norm", _no_vision_query_norm, "vit_6b", "img1_tile1", check_forward),
    Fault(
        "query norm per head",
        _vision_query_norm_per_head,
        "vit_6b",
        "extract_feature",
        check_features,
    ),
    Fault("drop path at inference", _always_drop_path, "vit_6b", "extract_feature", check_features),
]


@pytest.mark.parametrize(
    "fault", FAULTS, ids=lambda f: f"{f.name}-{f.model}/{f.case}".replace(" ", "_")
)
def test_fault_turns_case_red(fault: Fault, monkeypatch: pytest.MonkeyPatch) -> None:
    case = fault.golden()
    fault.check(load_model(case.folder), case)

    fault.plant(monkeypatch)
    with pytest.raises(AssertionError, match="off by") as red:
        fault.check(load_model(case.folder), case)
    assert not isinstance(red.value, GoldenDataError)
