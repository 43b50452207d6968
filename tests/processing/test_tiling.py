"""Another way to cut images takes the place of InternVL's, from the processor to the answer."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_runs
import torch
from PIL import Image
from transformers.cache_utils import DynamicCache

from mono_internvl.checkpoints.initialize import init
from mono_internvl.checkpoints.presets import preset
from mono_internvl.configuration.model import MonoInternVLConfig
from mono_internvl.costs.info import describe
from mono_internvl.data.batches import BatchPlan, collate, collate_packed
from mono_internvl.errors import CheckpointError, ConfigError, PromptError
from mono_internvl.generation.engine import Engine
from mono_internvl.generation.request import Request
from mono_internvl.generation.sampling import Sampling
from mono_internvl.model.modeling import MonoInternVLForConditionalGeneration
from mono_internvl.processing.images import MonoInternVLImageProcessor
from mono_internvl.processing.processor import MonoInternVLProcessor
from mono_internvl.processing.prompts import IMAGE_CONTEXT, IMAGE_END, IMAGE_START
from mono_internvl.processing.tiling import (
    NEWLINE,
    SEPARATOR,
    InternVLTiling,
    TokenLayout,
    XComposer4KHDTiling,
    feature_order,
)
from mono_internvl.released.weight_files import read_headers
from mono_internvl.serving.loading import load
from mono_internvl.serving.session import ChatSession
from mono_internvl.training.objectives.next_token import NextToken

SIDE_PX, LIMIT = 56, 6  # of the tiny checkpoint: 2 x 2 visual tokens a tile


def published_grid(width: int, height: int, limit: int) -> tuple[int, int]:
    """(columns, rows) by the published rule, written from its description."""
    if width < height:
        columns, rows = published_grid(height, width, limit)
        return rows, columns
    ratio = width / height
    scale = 1
    while scale * np.ceil(scale / ratio) <= limit:
        scale += 1
    scale -= 1
    new_width = scale * 336
    new_height = int(new_width / ratio)
    return scale, max(1, int(np.ceil(new_height / 336)))


def test_grids_are_the_published_ones_for_10000_sizes() -> None:
    rng = np.random.default_rng(0)
    sizes = np.exp(rng.uniform(np.log(8), np.log(8000), (9_000, 2))).astype(int).tolist()
    sizes += rng.integers(1, 40, (900, 2)).tolist()
    sizes += [[336 * n, 336 * m] for n in range(1, 11) for m in range(1, 11)]
    limits = (1, 9, 16, 25, 45, 55, 65)
    for number, (width, height) in enumerate(sizes):
        limit = limits[number % len(limits)]
        tiling = XComposer4KHDTiling(max_tiles=limit)
        columns, rows = tiling.grid(width, height)
        assert (columns, rows) == published_grid(width, height, limit), (width, height, limit)
        assert columns * rows <= limit


@pytest.mark.parametrize(("side", "px"), [(12, 336), (16, 448), (2, 56)])
@pytest.mark.parametrize("size", [(336, 336), (3840, 1600), (700, 4000)])
def test_layout_counts_the_published_tokens(size: tuple[int, int], side: int, px: int) -> None:
    tiling = XComposer4KHDTiling(px, max_tiles=55)
    columns, rows = tiling.grid(*size)
    layout = tiling.layout(*size, side)
    assert layout.num_tiles == rows * columns + 1
    assert layout.num_tokens == (rows * columns + 1) * side**2 + 1 + (rows + 1) * side
    assert layout.text == IMAGE_CONTEXT * layout.num_tokens
    assert layout.order.count(NEWLINE) == (rows + 1) * side
    assert layout.order[side * (side + 1)] == SEPARATOR
    assert layout.order[: side + 2] == (*range(side), NEWLINE, side)
    second_row = layout.order[-(columns * side + 1) * (rows * side - 1) :]
    of_first_tile, next_tile = side**2 + side, 2 * side**2 + side  # behind the global view
    assert second_row[:side] == tuple(range(of_first_tile, of_first_tile + side))
    if columns > 1:
        assert second_row[side] == next_tile
    assert layout.order[-1] == NEWLINE and layout.order[-2] == layout.num_features - 1


@pytest.mark.parametrize("size", [(300, 97), (97, 300), (100, 100), (3000, 1), (1, 3000)])
def test_tiles_are_the_padded_picture_and_its_whole(size: tuple[int, int]) -> None:
    tiling = XComposer4KHDTiling(SIDE_PX, max_tiles=LIMIT)
    image = _noise(*size)
    tiles = tiling.cut(image)
    columns, rows = tiling.grid(*size)
    assert len(tiles) == tiling.layout(*size, 2).num_tiles == columns * rows + 1
    canvas = tiles[1:].reshape(rows, columns, SIDE_PX, SIDE_PX, 3).swapaxes(1, 2)
    canvas = canvas.reshape(rows * SIDE_PX, columns * SIDE_PX, 3)
    if size[0] < size[1]:  # a tall picture is the reflection of a wide one
        canvas, image = canvas.swapaxes(0, 1), image.transpose(Image.Transpose.TRANSPOSE)
    width = canvas.shape[1]
    height = max(1, int(width / (image.width / image.height)))
    top = int((canvas.shape[0] - height) / 2)
    scaled = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))
    assert np.array_equal(canvas[top : top + height], scaled)
    assert (canvas[:top] == 255).all() and (canvas[top + height :] == 255).all()
    if size[0] < size[1]:
        canvas = canvas.swapaxes(0, 1)
    whole = Image.fromarray(canvas).resize((SIDE_PX, SIDE_PX), Image.Resampling.BICUBIC)
    assert np.array_equal(tiles[0], np.asarray(whole))


@pytest.mark.parametrize(
    "field", [{"min_tiles": 2}, {"use_thumbnail": False}, {"pad2square": True}, {"max_tiles": 0}]
)
def test_4khd_refuses_settings_it_has_no_use_for(field: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(field))):
        MonoInternVLImageProcessor(image_size=336, tiling="xcomposer_4khd", **field)


@pytest.mark.parametrize(
    "field",
    [{"dynamic_image_size": False}, {"use_thumbnail": False}, {"ps_version": "v1"}],
)
def test_4khd_refuses_configurations_it_contradicts(field: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"xcomposer_4khd.*{next(iter(field))}"):
        MonoInternVLConfig(tiling="xcomposer_4khd", **field)


def test_configuration_states_its_tiling_only_where_it_is_not_internvls() -> None:
    assert "tiling" not in MonoInternVLConfig().to_dict()
    stored = MonoInternVLConfig(tiling="xcomposer_4khd").to_dict()
    assert MonoInternVLConfig.from_dict(stored).tiling == "xcomposer_4khd"
    with pytest.raises(ConfigError, match="tiling='4k' is not known"):
        MonoInternVLConfig(tiling="4k")


@pytest.fixture(scope="module")
def grids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, made of a language model, that cuts as XComposer2-4KHD does."""
    folder = tmp_path_factory.mktemp("4khd")
    tiny_runs.write_checkpoint(folder / "plain", max_position_embeddings=1024)
    return init(
        str(folder / "plain-llama"),
        folder / "made",
        tiling="xcomposer_4khd",
        tile_px=SIDE_PX,
        patch_width=16,
        max_tiles=LIMIT,
    )


def test_layout_refuses_what_is_no_order() -> None:
    for order in ((0, 1, 2, 2), (0, 1, 2), (0, 1, 2, 3, -3)):
        with pytest.raises(PromptError, match="each of 0 to 3 once"):
            TokenLayout(1, 4, order=order)


def test_order_counts_on_from_image_to_image() -> None:
    plain, turned = TokenLayout(1, 2), TokenLayout(1, 3, order=(2, 0, NEWLINE, 1, SEPARATOR))
    assert feature_order([plain, plain]) is None
    order = feature_order([turned, plain, turned])
    assert order is not None
    assert order.tolist() == [2, 0, -1, 1, -2, 3, 4, 7, 5, -1, 6, -2]


def test_layout_of_internvl_is_tile_after_tile() -> None:
    layout = InternVLTiling(image_size=56, max_tiles=6).layout(300, 100, tokens_per_side=2)
    assert layout == TokenLayout(4, 16)
    assert layout.text == IMAGE_CONTEXT * 16


def test_unknown_tiling_is_refused() -> None:
    with pytest.raises(ConfigError, match="tiling='squares' is not known; expected one of"):
        MonoInternVLImageProcessor(tiling="squares")


def _ask(image: Image.Image) -> list[dict[str, Any]]:
    content = [{"type": "image", "image": image}, {"type": "text", "text": "what"}]
    return [{"role": "user", "content": content}]


def _noise(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(width * height).integers(0, 256, (height, width, 3))
    return Image.fromarray(pixels.astype(np.uint8))


def test_second_tiling_is_saved_and_laid_out_alike_everywhere(grids: Path) -> None:
    processor = MonoInternVLProcessor.from_pretrained(grids)
    assert processor.image_processor.tiling == "xcomposer_4khd"
    image, side = _noise(90, 30), processor.image_processor.image_size // 28
    columns, rows = processor.image_processor.tiling_with().grid(90, 30)
    tokens = (columns * rows + 1) * side * side + 1 + (rows + 1) * side
    prompt = processor.encode_prompt(_ask(image))
    text = processor.apply_chat_template(_ask(image), add_generation_prompt=True)
    hosted = processor(text=text, images=[image])
    for name in ("input_ids", "feature_order"):
        assert torch.equal(torch.as_tensor(hosted[name]), prompt[name])
    (counted,) = processor._get_num_multimodal_tokens([(30, 90)]).num_image_tokens
    assert counted == tokens + 2
    ids = prompt["input_ids"][0].tolist()
    start, end = (ids.index(processor.tokenizer.control_id(t)) for t in (IMAGE_START, IMAGE_END))
    assert end - start == tokens + 1
    sample = processor.encode_conversation([*_ask(image), {"role": "assistant", "content": "red"}])
    assert sample.num_tiles == (columns * rows + 1,)
    assert sample.input_ids.tolist()[start : end + 1] == ids[start : end + 1]


def _placed_by_hand(model: Any, processor: Any, image: Image.Image, prompt: Any) -> torch.Tensor:
    """(1, T, D) embeddings of a prompt with one image, row of tokens after row."""
    tiling = processor.image_processor.tiling_with()
    columns, rows = tiling.grid(*image.size)
    found = model.get_image_features(prompt["pixel_values"])  # (tiles, side * side, D)
    side = int(found.shape[1] ** 0.5)
    found = found.unflatten(1, (side, side))
    marks = model.model.projector.marks
    newline = model.model.projector(marks.newline[None])
    placed = [part for y in range(side) for part in (found[0, y], newline)]
    placed.append(model.model.projector(marks.separator[None]))
    for y in range(rows * side):
        placed += [found[1 + y // side * columns + x, y % side] for x in range(columns)]
        placed.append(newline)
    embeds = model.get_input_embeddings()(prompt["input_ids"])
    embeds[prompt["input_ids"] == processor.image_token_id] = torch.cat(placed)
    return embeds


@torch.no_grad()
def test_second_tiling_is_read_and_answered_alike_everywhere(grids: Path) -> None:
    processor = MonoInternVLProcessor.from_pretrained(grids)
    model = MonoInternVLForConditionalGeneration.from_pretrained(grids).eval()
    images = (_noise(90, 30), _noise(30, 90), _noise(60, 60))
    options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": -1}
    engine, answers, requests = Engine(model), [], []
    for image in images:
        prompt = processor.encode_prompt(_ask(image))
        embeds = _placed_by_hand(model, processor, image, prompt)
        mask = prompt["input_ids"] == processor.image_token_id
        expected = model(inputs_embeds=embeds, visual_token_mask=mask).logits
        torch.testing.assert_close(model(**prompt).logits, expected, atol=1e-5, rtol=0)
        answer = model.generate(**prompt, **options)[0, mask.shape[1] :].tolist()
        by_hand = model.generate(
            prompt["input_ids"], inputs_embeds=embeds, visual_token_mask=mask, **options
        )
        assert answer == by_hand[0, -3:].tolist()
        answers.append(answer)
        requests.append(
            Request(
                prompt["input_ids"][0],
                prompt["pixel_values"],
                Sampling(max_new_tokens=3),
                feature_order=prompt["feature_order"],
            )
        )
    assert [list(one.ids) for one in engine.generate(requests)] == answers
    again = engine.generate(requests[:1])[0]  # its image is not read again
    assert again.num_cached and list(again.ids) == answers[0]
    several = processor.encode_prompts([_ask(image) for image in images])
    found = model.generate(**several, **options, num_beams=2, num_return_sequences=2)
    alone = model.generate(
        **processor.encode_prompt(_ask(images[2])), **options, num_beams=2, num_return_sequences=2
    )
    assert torch.equal(found[-2:, -3:], alone[:, -3:])


@torch.no_grad()
def test_second_tiling_is_talked_about(grids: Path) -> None:
    session = load(grids, precision="fp32")
    options = {"max_new_tokens": 2}
    first = session.ask("what", _noise(90, 30), **options)
    second = session.ask("and this", _noise(30, 90), **options)
    assert second.tokens.cached > first.tokens.prompt - 10, "the first image is not read again"
    fresh = load(grids, precision="fp32")
    fresh.engine.prefixes.max_bytes = 0
    assert fresh.ask("what", _noise(90, 30), **options).ids == first.ids
    assert fresh.ask("and this", _noise(30, 90), **options).ids == second.ids


@torch.no_grad()
def test_second_tiling_is_learnt_from(grids: Path) -> None:
    processor = MonoInternVLProcessor.from_pretrained(grids)
    model = MonoInternVLForConditionalGeneration.from_pretrained(grids).train()
    images = (_noise(90, 30), _noise(30, 90))
    answer = {"role": "assistant", "content": "red"}
    samples = [processor.encode_conversation([*_ask(image), answer]) for image in images]
    plan = BatchPlan(2, 1000, pad_token_id=0, image_token_id=processor.image_token_id)
    logits, labels = [], []
    for image, sample in zip(images, samples, strict=True):
        prompt = {"input_ids": sample.input_ids[None], "pixel_values": sample.pixel_values}
        embeds = _placed_by_hand(model, processor, image, prompt)
        mask = prompt["input_ids"] == processor.image_token_id
        logits.append(model(inputs_embeds=embeds, visual_token_mask=mask).logits[0, :-1])
        labels.append(sample.labels[1:])
    expected = torch.nn.functional.cross_entropy(torch.cat(logits), torch.cat(labels))
    for batch in (collate(samples, plan, (), ()), collate_packed(samples, plan, (), ())):
        weight = batch.loss_weight.sum()
        loss, _ = NextToken().loss(model, batch, weight, {}, None)
        torch.testing.assert_close(loss, expected, atol=1e-5, rtol=0)
    with torch.enable_grad():
        NextToken().loss(model, batch, batch.loss_weight.sum(), {}, None)[0].backward()
    for mark in model.model.projector.marks.parameters():
        assert mark.grad is not None and mark.grad.abs().max() > 0


@torch.no_grad()
def test_second_tiling_attends_over_the_whole_image_both_ways(grids: Path) -> None:
    processor = MonoInternVLProcessor.from_pretrained(grids)
    prompt = processor.encode_prompt(_ask(_noise(90, 30)))
    changed = prompt["pixel_values"].clone()
    changed[-1] += 1  # the last tile, behind newlines and the separator
    first = int((prompt["input_ids"][0] == processor.image_token_id).nonzero()[0])
    for attention, is_seen in (("causal", False), ("bidirectional", True)):
        model = MonoInternVLForConditionalGeneration.from_pretrained(
            grids, image_attention=attention
        ).eval()
        logits = [
            model(**{**prompt, "pixel_values": pixels}).logits[0]
            for pixels in (prompt["pixel_values"], changed)
        ]
        differs = (logits[0] != logits[1]).any(-1)
        assert bool(differs[first]) is is_seen and not differs[: first - 1].any()
        cache = DynamicCache(config=model.config)
        out = model.prefill(
            prompt["input_ids"],
            cache,
            prompt["pixel_values"],
            feature_order=prompt["feature_order"],
        )
        torch.testing.assert_close(out.logits[0, -1], logits[0][-1], atol=1e-5, rtol=0)


def test_learned_tokens_are_stored_and_needed(grids: Path, tmp_path: Path) -> None:
    assert {"image_marks.newline", "image_marks.separator"} <= set(read_headers(grids))
    copy = tmp_path / "copy"
    shutil.copytree(grids, copy)
    config = json.loads((copy / "config.json").read_text())
    del config["tiling"]
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="2 unexpected, first image_marks"):
        MonoInternVLForConditionalGeneration.from_pretrained(copy)


def test_model_refuses_the_order_of_another_tiling(grids: Path, tmp_path: Path) -> None:
    plain = MonoInternVLForConditionalGeneration.from_pretrained(
        tiny_runs.write_checkpoint(tmp_path / "plain")
    ).eval()
    prompt = MonoInternVLProcessor.from_pretrained(grids).encode_prompt(_ask(_noise(90, 30)))
    request = Request(
        prompt["input_ids"][0], prompt["pixel_values"], feature_order=prompt["feature_order"]
    )
    with pytest.raises(PromptError, match="feature_order of shape"):
        Engine(plain).generate([request])
    model = MonoInternVLForConditionalGeneration.from_pretrained(grids).eval()
    with pytest.raises(PromptError, match="pass on its feature_order"):
        Engine(model).generate([dataclasses.replace(request, feature_order=None)])
    with pytest.raises(ConfigError, match="tiling: internvl in the model but xcomposer_4khd in"):
        ChatSession(plain, MonoInternVLProcessor.from_pretrained(grids))


def test_costs_of_an_image_follow_its_shape() -> None:
    config = preset("mono-internvl-2b")
    by_size = describe(config, "image=1344x448,text=256").costs
    assert by_size == describe(config, f"visual={4 * 256},text=256").costs
    config.change({"tiling": "xcomposer_4khd", "force_image_size": 336, "max_dynamic_patch": 55})
    costs = describe(config, "image=3840x1600,text=256").costs
    assert costs is not None
    columns, rows = published_grid(3840, 1600, 55)
    assert costs.tiles == columns * rows + 1
    assert costs.visual_tokens == costs.tiles * 144 + 1 + (rows + 1) * 12
    for wrong, message in (
        ("visual=768,text=1", "say it, for example image="),
        ("image=0x9", "expected e.g."),
        ("image=9", "expected e.g."),
    ):
        with pytest.raises(ConfigError, match=message):
            describe(config, wrong)
