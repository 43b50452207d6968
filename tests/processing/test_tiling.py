"""Another way to cut images takes the place of InternVL's, from the processor to the answer."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_runs
import torch
from PIL import Image

from mono_internvl.data.batches import BatchPlan, collate, collate_packed
from mono_internvl.errors import ConfigError, PromptError
from mono_internvl.generation.engine import Engine
from mono_internvl.generation.request import Request
from mono_internvl.generation.sampling import Sampling
from mono_internvl.model.modeling import MonoInternVLForConditionalGeneration
from mono_internvl.processing.images import MonoInternVLImageProcessor
from mono_internvl.processing.processor import MonoInternVLProcessor
from mono_internvl.processing.prompts import IMAGE_CONTEXT, IMAGE_END, IMAGE_START
from mono_internvl.processing.tiling import TILINGS, InternVLTiling, TokenLayout, feature_order
from mono_internvl.serving.loading import load
from mono_internvl.training.objectives.next_token import NextToken

NEWLINE, SEPARATOR = "<ref>", "<box>"  # control tokens of the vocabulary, of whatever meaning


@dataclass(frozen=True)
class Grid:
    """The whole image in one crop, then a grid of crops whose rows of tokens run across them.

    A newline behind each row, and a separator behind the whole image, as XComposer2-4KHD has them.
    """

    image_size: int
    max_tiles: int
    min_tiles: int = 1
    use_thumbnail: bool = False
    pad2square: bool = False
    fill: tuple[int, ...] = ()

    def grid(self, width: int, height: int) -> tuple[int, int]:
        """Columns and rows."""
        return (2, 1) if width > height else (1, 2) if height > width else (2, 2)

    def layout(self, width: int, height: int, tokens_per_side: int) -> TokenLayout:
        columns, rows = self.grid(width, height)
        return grid_layout(columns, rows, tokens_per_side)

    def cut(self, image: Image.Image) -> np.ndarray:
        side, (columns, rows) = self.image_size, self.grid(*image.size)
        whole = np.asarray(image.resize((side, side)))
        pixels = np.asarray(image.resize((columns * side, rows * side)))
        crops = pixels.reshape(rows, side, columns, side, 3).swapaxes(1, 2)
        return np.concatenate((whole[None], crops.reshape(-1, side, side, 3)))


def grid_layout(columns: int, rows: int, side: int) -> TokenLayout:
    """One crop and its separator, then `columns` x `rows` crops of `side` x `side` tokens."""
    tokens = np.arange(columns * rows * side * side).reshape(rows, columns, side, side)
    across = tokens.swapaxes(1, 2).reshape(-1) + side * side
    return TokenLayout(
        1 + columns * rows,
        (*(side,) * side, 0, *(columns * side,) * (rows * side)),
        (*(NEWLINE,) * side, SEPARATOR, *(NEWLINE,) * (rows * side)),
        (*range(side * side), *across.tolist()),
    )


@pytest.fixture
def grids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint whose processor cuts grids."""
    monkeypatch.setitem(TILINGS, "grid", Grid)
    folder = tiny_runs.write_checkpoint(tmp_path / "checkpoint")
    processor = MonoInternVLProcessor.from_pretrained(folder)
    cutter = processor.image_processor
    processor = MonoInternVLProcessor(
        MonoInternVLImageProcessor(
            image_size=cutter.image_size,
            tiling="grid",
            visual_token_size=cutter.visual_token_size,
        ),
        processor.tokenizer,
        default_system_prompt="",
    )
    processor.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "layout", [TokenLayout(2, (4, 4)), TokenLayout(0, ()), grid_layout(2, 3, 2)], ids=str
)
def test_layout_counts_what_it_writes(layout: TokenLayout) -> None:
    names = {IMAGE_CONTEXT: 7, NEWLINE: 8, SEPARATOR: 9}
    ids = layout.ids(names.__getitem__)
    assert len(ids) == layout.num_tokens
    assert ids.count(7) == layout.num_visual_tokens
    assert all(layout.text.count(name) == ids.count(index) for name, index in names.items())


@pytest.mark.parametrize(("columns", "rows"), [(1, 1), (2, 3), (5, 11)])
def test_layout_counts_the_tokens_of_a_grid(columns: int, rows: int) -> None:
    layout = grid_layout(columns, rows, side=12)
    assert layout.num_tokens == (rows * columns + 1) * 144 + 1 + (rows + 1) * 12


def test_layout_refuses_what_is_no_order() -> None:
    with pytest.raises(PromptError, match="each of 0 to 3 once"):
        TokenLayout(1, (4,), order=(0, 1, 2, 2))


def test_order_counts_on_from_image_to_image() -> None:
    plain, turned = TokenLayout(1, (2,)), TokenLayout(1, (3,), order=(2, 0, 1))
    assert feature_order([plain, plain]) is None
    order = feature_order([turned, plain, turned])
    assert order is not None and order.tolist() == [2, 0, 1, 3, 4, 7, 5, 6]


def test_layout_of_internvl_is_tile_after_tile() -> None:
    layout = InternVLTiling(image_size=56, max_tiles=6).layout(300, 100, tokens_per_side=2)
    assert layout == TokenLayout(4, (4, 4, 4, 4))
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
    assert processor.image_processor.tiling == "grid"
    image, side = _noise(90, 30), processor.image_processor.image_size // 28
    tokens = 3 * side * side + 1 + 2 * side
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
    assert sample.num_tiles == (3,)
    assert sample.input_ids.tolist()[start : end + 1] == ids[start : end + 1]


def _placed_by_hand(model: Any, processor: Any, image: Image.Image, prompt: Any) -> torch.Tensor:
    """(1, T, D) embeddings of a prompt with one image, row of tokens after row."""
    tiling = processor.image_processor.tiling_with()
    columns, rows = tiling.grid(*image.size)
    found = model.get_image_features(prompt["pixel_values"])  # (tiles, side * side, D)
    side = int(found.shape[1] ** 0.5)
    found = found.unflatten(1, (side, side))
    placed = [found[0, y] for y in range(side)]
    for y in range(rows * side):
        placed += [found[1 + y // side * columns + x, y % side] for x in range(columns)]
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
