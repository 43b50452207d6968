"""The checks of a golden case: each takes our model and the case, and raises AssertionError.

They are plain functions so that `test_faults.py` can show that they fail on a wrong model.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import tolerances
import torch
from golden_data import GoldenCase, GoldenDataError
from tolerances import Tolerance
from torch import Tensor

from mono_internvl.errors import PromptError
from mono_internvl.model.modeling import MonoInternVLForConditionalGeneration
from mono_internvl.model.visual_tokens import pixel_shuffle
from mono_internvl.released.keys import to_released

Model = MonoInternVLForConditionalGeneration

largest_differences: dict[str, float] = {}
"""Kind of value -> largest difference that any check met so far in this process."""


def load_model(folder: Path, attention: str = "eager") -> Model:
    """The model of a golden folder through the project's own converter, fp32, eval."""
    model = Model.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention)
    for part in (model.model.language_model, model.model.vision_tower):
        used = attention if part is None else part.config._attn_implementation
        assert used == attention, f"{used} attention, asked for {attention}"
    return model.eval()


def assert_close(kind: str, ours: Tensor, theirs: Tensor, tolerance: Tolerance) -> None:
    """Raise AssertionError, with the largest difference, where ours is too far from theirs."""
    assert ours.shape == theirs.shape, f"{kind}: shape {ours.shape}, golden {theirs.shape}"
    difference = (ours - theirs).abs()
    largest = float(difference.max()) if difference.numel() else 0.0
    assert torch.isfinite(ours).all(), f"{kind}: not finite"
    largest_differences[kind] = max(largest, largest_differences.get(kind, 0.0))
    allowed = tolerance.atol + tolerance.rtol * theirs.abs()
    assert (difference <= allowed).all(), f"{kind}: off by {largest:.3g}, allowed {tolerance}"


def check_forward(model: Model, case: GoldenCase) -> None:
    """Logits, hidden states and loss of one forward pass, at the rows that are no padding."""
    wanted, labels = case.outputs, case.input("labels")
    with torch.no_grad():
        out = model(
            input_ids=case.input("input_ids"),
            pixel_values=case.pixel_values,
            attention_mask=_attention_mask(case),
            position_ids=case.input("position_ids"),
            labels=labels,
            loss_weight=case.input("loss_weight"),
            output_hidden_states=True,
        )
    real = _real_rows(case)
    if "logits" in wanted:
        assert_close("logits", out.logits[real], wanted["logits"][real], tolerances.LOGITS)
    if "logits_tail" in wanted:
        rows = wanted["logits_tail"].shape[1]
        tail, kept = out.logits[:, -rows:], real[:, -rows:]
        assert_close("logits", tail[kept], wanted["logits_tail"][kept], tolerances.LOGITS)
    if "hidden_states" in wanted:
        ours, theirs = torch.stack(out.hidden_states), wanted["hidden_states"]
        assert ours.shape == theirs.shape
        assert_close("hidden", ours[:, real], theirs[:, real], tolerances.HIDDEN_STATES)
    if "loss" in wanted:
        assert_close("loss", out.loss.reshape(1), wanted["loss"], tolerances.LOSS)
        assert_close("loss", out.loss, torch.tensor(case.meta["loss"]), tolerances.LOSS)


def check_gradients(model: Model, case: GoldenCase) -> None:
    """Gradient norm of every parameter, and full gradients where the case has them.

    Gradients are mapped back to the released names through the project's key table. A parameter
    that nothing reaches counts as zero on both sides.
    """
    model.zero_grad(set_to_none=True)
    model(
        input_ids=case.input("input_ids"),
        pixel_values=case.pixel_values,
        attention_mask=_attention_mask(case),
        position_ids=case.input("position_ids"),
        labels=case.input("labels"),
        loss_weight=case.input("loss_weight"),
    ).loss.backward()
    ours = to_released(
        {
            name: torch.zeros_like(p) if p.grad is None else p.grad
            for name, p in model.named_parameters()
        },
        model.config,
    )
    model.zero_grad(set_to_none=True)
    norms = case.meta["grad_norms"]
    assert ours.keys() == norms.keys(), f"parameters differ: {sorted(ours.keys() ^ norms.keys())}"
    for name, norm in norms.items():
        golden = torch.tensor(norm or 0.0)
        assert_close("gradient norm", ours[name].norm(), golden, tolerances.GRAD_NORM)
    for key, theirs in case.outputs.items():
        if key.startswith("grad."):
            scale = theirs.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
            mine = ours[key.removeprefix("grad.")] / scale
            assert_close("gradient", mine, theirs / scale, tolerances.GRADIENT)


def check_generation(model: Model, case: GoldenCase) -> None:
    """Greedy ids and the logits of every step, with a cache and without an end token."""
    ids, mask = generation_prompt(case)
    wanted = case.outputs["generated_ids"]
    eos, model.generation_config.eos_token_id = model.generation_config.eos_token_id, None
    out = model.generate(
        input_ids=ids,
        attention_mask=mask,
        pixel_values=case.pixel_values,
        max_new_tokens=wanted.shape[1],
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    model.generation_config.eos_token_id = eos
    scores = torch.stack(out.logits, dim=1)  # (B, new, V)
    assert_close("scores", scores, case.outputs["generated_scores"], tolerances.SCORES)
    new = out.sequences[:, ids.shape[1] :]
    assert torch.equal(new, wanted), f"generated {new.tolist()}, golden {wanted.tolist()}"


def check_generation_eos(model: Model, case: GoldenCase) -> None:
    """Greedy ids with an end token; rows that ended are padded."""
    ids, mask = generation_prompt(case)
    wanted = case.outputs["generated_ids_eos"]
    new = model.generate(
        input_ids=ids,
        attention_mask=mask,
        pixel_values=case.pixel_values,
        max_new_tokens=wanted.shape[1],
        do_sample=False,
        eos_token_id=case.meta["eos_used"],
        pad_token_id=case.meta["pad_used"],
    )[:, ids.shape[1] :]
    assert torch.equal(new, wanted[:, : new.shape[1]]), f"generated {new.tolist()}"
    assert (wanted[:, new.shape[1] :] == case.meta["pad_used"]).all(), "stopped too early"


def check_features(model: Model, case: GoldenCase) -> None:
    """The way from pixels to visual tokens, and its parts."""
    pixels = case.pixel_values
    assert pixels is not None
    version, selected = model.config.ps_version, model.config.select_layer
    probe = case.outputs["pixel_shuffle_probe_in"]
    with torch.no_grad():
        for key, theirs in case.outputs.items():
            if key == "pixel_shuffle_probe_in":
                continue
            if match := re.fullmatch(r"pixel_shuffle_probe_(v\d)", key):
                ours = pixel_shuffle(probe, match[1]).reshape(theirs.shape)
                assert_close("pixel shuffle", ours, theirs, tolerances.EXACT)
                continue
            if key == "vision_last_hidden_state":
                ours = _vision_hidden_state(model, pixels, -1)
            elif key == "vision_hidden_states":
                ours = torch.stack(
                    [_vision_hidden_state(model, pixels, k) for k in range(len(theirs))]
                )
            elif match := re.fullmatch(r"extract_feature_select_(-?\d+)", key):
                model.config.select_layer = int(match[1])
                ours = model.get_image_features(pixels)
                model.config.select_layer = selected
            elif key == "extract_feature":
                ours = model.get_image_features(pixels)
            elif match := re.fullmatch(r"extract_feature_ps_(v\d)", key):
                model.config.ps_version = match[1]
                ours = model.get_image_features(pixels)
                model.config.ps_version = version
            elif match := re.fullmatch(r"extract_feature_(\d+)", key):
                ours = model.get_image_features(case.tensors[f"in.pixel_values_{match[1]}"])
            else:
                match = re.fullmatch(r"resized_position_embedding_(\d+)", key)
                assert match is not None
                embedder = model.model.vision_embedder
                side = int(match[1]) // model.config.vision_config.patch_size
                resized = embedder.position_embeddings_for(side, side)
                ours = torch.cat((embedder.position_embedding[:, :1], resized), dim=1)
            assert_close("features", ours, theirs, tolerances.FEATURES)


def _vision_hidden_state(model: Model, pixels: Tensor, index: int) -> Tensor:
    """Embeddings, or what follows a layer of the tower; the patch model has the former only."""
    x = model.model.vision_embedder(pixels)
    return x if model.model.vision_tower is None else model.model.vision_tower(x, index)


def check_mismatch(model: Model, case: GoldenCase) -> None:
    """The reference truncates and zeroes the loss; ours raises, with both numbers."""
    ids, pixels = case.input("input_ids"), case.pixel_values
    assert ids is not None and pixels is not None
    places = int((ids == model.config.image_token_id).sum())
    features = pixels.shape[0] * model.config.num_image_tokens_per_tile
    assert places != features
    with pytest.raises(PromptError) as error:
        model(input_ids=ids, pixel_values=pixels, labels=case.input("labels"))
    numbers = [int(x) for x in re.findall(r"\d+", str(error.value))]
    assert {places, features} <= set(numbers), f"{error.value}: names neither of the two numbers"


Check = Callable[[Model, GoldenCase], None]

# Which output is held by which check; an output that matches no row is an error.
CHECK_OF_OUTPUT: tuple[tuple[str, Check], ...] = (
    (r"logits|logits_tail|hidden_states|loss", check_forward),
    (r"grad\..+", check_gradients),
    (r"generated_ids|generated_scores", check_generation),
    (r"generated_ids_eos", check_generation_eos),
    (r"extract_feature(_ps_v\d|_select_-?\d+|_\d+)?", check_features),
    (r"vision_last_hidden_state|vision_hidden_states", check_features),
    (r"pixel_shuffle_probe_(in|v\d)|resized_position_embedding_\d+", check_features),
)


def checks_of(case: GoldenCase) -> list[Check]:
    """The checks that together hold every output of a case.

    Raises:
        GoldenDataError: An output of the case is held by none.
    """
    if case.name == "mismatch":
        return [check_mismatch]
    checks: list[Check] = []
    for key in case.outputs:
        found = [check for pattern, check in CHECK_OF_OUTPUT if re.fullmatch(pattern, key)]
        if not found:
            raise GoldenDataError(f"{case.id}: no check for out.{key}")
        checks += found
    if case.meta.get("grad_norms"):
        checks.append(check_gradients)
    return sorted(set(checks), key=lambda check: check.__name__)


def case_checks(cases: Iterable[GoldenCase]) -> list[tuple[GoldenCase, Check]]:
    """Every case with each of its checks."""
    return [(case, check) for case in cases for check in checks_of(case)]


def generation_prompt(case: GoldenCase) -> tuple[Tensor, Tensor]:
    """Ids and mask (B, T) that generation starts from."""
    ids, mask = case.input("gen_input_ids"), case.input("gen_attention_mask")
    if ids is None:
        ids, mask = case.input("input_ids"), case.input("attention_mask")
    assert ids is not None and mask is not None
    return ids, mask.long()


def _attention_mask(case: GoldenCase) -> Tensor | None:
    mask = case.input("attention_mask")
    return None if mask is None else mask.long()


def _real_rows(case: GoldenCase) -> Tensor:
    ids, mask = case.input("input_ids"), case.input("attention_mask")
    assert ids is not None
    return torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
