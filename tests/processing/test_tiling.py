"""Another way to cut images takes the place of InternVL's, from the processor to the answer."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import tiny_runs
import torch
from PIL import Image

from mono_internvl.errors import ConfigError
from mono_internvl.model.modeling import MonoInternVLForConditionalGeneration
from mono_internvl.processing.images import MonoInternVLImageProcessor
from mono_internvl.processing.processor import MonoInternVLProcessor
from mono_internvl.processing.prompts import IMAGE_CONTEXT, IMAGE_END, IMAGE_START
from mono_internvl.processing.tiling import TILINGS, InternVLTiling, TokenLayout

SEPARATOR = "<ref>"  # a control token of the vocabulary, whatever it means elsewhere


@dataclass(frozen=True)
class Strips:
    """Two tiles, the image's upper and lower half; a separator behind each row of tokens."""

    image_size: int
    max_tiles: int
    min_tiles: int = 1
    use_thumbnail: bool = False
    pad2square: bool = False
    fill: tuple[int, ...] = ()

    def layout(self, width: int, height: int, tokens_per_side: int) -> TokenLayout:
        return TokenLayout(2, (tokens_per_side,) * (2 * tokens_per_side), SEPARATOR)

    def cut(self, image: Image.Image) -> np.ndarray:
        side = self.image_size
        return np.asarray(image.resize((side, 2 * side))).reshape(2, side, side, 3)


@pytest.fixture
def strips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint whose processor cuts strips."""
    monkeypatch.setitem(TILINGS, "strips", Strips)
    folder = tiny_runs.write_checkpoint(tmp_path / "checkpoint")
    processor = MonoInternVLProcessor.from_pretrained(folder)
    cutter = processor.image_processor
    processor = MonoInternVLProcessor(
        MonoInternVLImageProcessor(
            image_size=cutter.image_size,
            tiling="strips",
            visual_token_size=cutter.visual_token_size,
        ),
        processor.tokenizer,
        default_system_prompt="",
    )
    processor.save_pretrained(folder)
    return folder


def test_layout_counts_what_it_writes() -> None:
    for layout in (TokenLayout(2, (4, 4)), TokenLayout(1, (2, 2), SEPARATOR), TokenLayout(0, ())):
        ids = layout.ids(7, 8 if layout.separator else None)
        assert len(ids) == layout.num_tokens or not layout.runs
        assert ids.count(7) == layout.num_visual_tokens == layout.text.count(IMAGE_CONTEXT)
        assert ids.count(8) == layout.text.count(SEPARATOR)


def test_layout_of_internvl_is_tile_after_tile() -> None:
    layout = InternVLTiling(image_size=56, max_tiles=6).layout(300, 100, tokens_per_side=2)
    assert layout == TokenLayout(4, (4, 4, 4, 4))
    assert layout.text == IMAGE_CONTEXT * 16


def test_unknown_tiling_is_refused() -> None:
    with pytest.raises(ConfigError, match="tiling='squares' is not known; expected one of"):
        MonoInternVLImageProcessor(tiling="squares")


def test_second_tiling_is_saved_and_laid_out_alike_everywhere(strips: Path) -> None:
    processor = MonoInternVLProcessor.from_pretrained(strips)
    assert processor.image_processor.tiling == "strips"
    image, side = Image.new("RGB", (90, 30), "red"), processor.image_processor.image_size // 28
    tokens = 2 * side * side + 2 * side - 1
    message = {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text"}]}
    message["content"][1]["text"] = "what"
    prompt = processor.encode_prompt([message])
    hosted = processor(
        text=processor.apply_chat_template([message], add_generation_prompt=True), images=[image]
    )
    assert torch.equal(torch.as_tensor(hosted["input_ids"]), prompt["input_ids"])
    (counted,) = processor._get_num_multimodal_tokens([(30, 90)]).num_image_tokens
    assert counted == tokens + 2
    ids = prompt["input_ids"][0].tolist()
    start, end = (ids.index(processor.tokenizer.control_id(t)) for t in (IMAGE_START, IMAGE_END))
    assert end - start == tokens + 1
    answered = [message, {"role": "assistant", "content": "red"}]
    sample = processor.encode_conversation(answered)
    assert sample.num_tiles == (2,)
    assert sample.input_ids.tolist()[start : end + 1] == ids[start : end + 1]


def test_second_tiling_is_read_by_the_model(strips: Path) -> None:
    processor = MonoInternVLProcessor.from_pretrained(strips)
    model = MonoInternVLForConditionalGeneration.from_pretrained(strips)
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what"}]}
    rows = []
    for colour in ("red", "blue"):
        message["content"][0]["image"] = Image.new("RGB", (60, 60), colour)
        with torch.no_grad():
            rows.append(model(**processor.encode_prompt([message])).logits[0, -1])
    assert not torch.equal(*rows)
