"""From PNG files and the reference's prompt ids to its answers, end to end.

`test_processor_parity.py` holds that our processor makes these ids from the conversations; here its
tiles and those ids go through the model, and the answer through its decoder.
"""

import json
from functools import cache
from typing import Any

import pytest
import torch
from golden_data import GoldenDataError, golden_dir
from parity_checks import Model, load_model

from mono_internvl.processing.processor import MonoInternVLProcessor
from mono_internvl.processing.prompts import TURN_END
from mono_internvl.processing.tokenizer import load_tokenizer

CHAT_MODEL = "mono_a"
KNOWN_CHATS = {"chat_turn1", "chat_turn2", "multi_image_chat", "batch_chat"}


def _chats() -> dict[str, dict[str, Any]]:
    chats = json.loads((golden_dir() / "python" / "chat.json").read_text(encoding="utf-8"))
    if set(chats) != KNOWN_CHATS:
        raise GoldenDataError(f"python/chat.json: {sorted(chats)}, known {sorted(KNOWN_CHATS)}")
    return chats


CHATS = _chats()


@cache
def _model(attention: str) -> Model:
    return load_model(golden_dir() / CHAT_MODEL, attention)


@cache
def _processor() -> MonoInternVLProcessor:
    tokenizer = load_tokenizer(golden_dir() / "tokenizer")
    return MonoInternVLProcessor.from_config(_model("eager").config, tokenizer)


def _pixel_values(chat: dict[str, Any]) -> torch.Tensor:
    """Tiles of the chat's images; an image of n > 1 tiles was cut in n - 1 and a thumbnail."""
    processor, ids = _processor(), torch.tensor(chat["input_ids"])
    num_tiles = int((ids == processor.image_token_id).sum()) // processor.tokens_per_tile
    counts = chat.get("image_counts", [num_tiles])
    names = [f"chat_{letter}.png" for letter in "abcdefgh"[: len(counts)]]
    images = [{"type": "image", "image": golden_dir() / "python" / name} for name in names]
    message = {"role": "user", "content": [*images, {"type": "text", "text": "?"}]}
    limits = [max(1, count - 1) for count in counts]
    pixels = processor.encode_prompt([message], max_tiles=limits)["pixel_values"]
    assert pixels.shape[0] == num_tiles
    return pixels


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", sorted(CHATS))
def test_chat_answers_as_reference(name: str, attention: str) -> None:
    chat, processor = CHATS[name], _processor()
    ids, wanted = torch.tensor(chat["input_ids"]), chat["output_ids_without_leading_bos"]
    out = _model(attention).generate(
        ids,
        attention_mask=torch.tensor(chat["attention_mask"]),
        pixel_values=_pixel_values(chat),
        max_new_tokens=len(wanted[0]),
        do_sample=False,
        eos_token_id=processor.tokenizer.control_id(TURN_END),
        pad_token_id=processor.tokenizer.pad_token_id,
    )[:, ids.shape[1] :]
    assert out.tolist() == wanted
    answers = [processor.decode_answer(row) for row in out]
    assert answers == (chat["responses"] if "responses" in chat else [chat["response"]])
