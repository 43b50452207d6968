"""Helpers of the processor's tests: one small processor, messages, and prompts read back."""

from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from PIL import Image

from mono_internvl.processing.images import MonoInternVLImageProcessor
from mono_internvl.processing.processor import MonoInternVLProcessor
from mono_internvl.processing.prompts import GROUNDING_TOKENS, SPECIAL_TOKENS
from mono_internvl.processing.tokenizer import load_tokenizer

GOLDEN = Path(__file__).parent / "parity" / "golden"
RESERVED = [token for token in SPECIAL_TOKENS if token not in GROUNDING_TOKENS]
SYSTEM = "Be brief."


def make(name: str = "tokenizer", **options: Any) -> MonoInternVLProcessor:
    images = MonoInternVLImageProcessor(image_size=28, max_tiles=4)
    return MonoInternVLProcessor(images, load_tokenizer(GOLDEN / name), **options)


P = make(default_system_prompt=SYSTEM)
WIDE, SQUARE = Image.new("RGB", (56, 28), "red"), Image.new("RGB", (28, 28), "blue")
SNIPPETS = st.sampled_from([*SPECIAL_TOKENS, "the ", "\n", "你是", "😀", "<", "|", "im_end", "IMG"])
TEXTS = st.lists(st.one_of(SNIPPETS, st.text(max_size=4)), max_size=8).map("".join)
CLEAN = TEXTS.filter(lambda text: not any(token in text for token in (*RESERVED, "<image>")))


def user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": [part_of(part) for part in parts]}


def part_of(part: Any) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    return {"type": "image", "image": part}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def prompt_of(batch: Any, row: int = 0) -> str:
    """The prompt that ids spell, a run of n `<IMG_CONTEXT>` as `#n`."""
    text = P.tokenizer.decode(batch["input_ids"][row].tolist())
    for count in range(40, 0, -1):
        text = text.replace("<img>" + "<IMG_CONTEXT>" * count + "</img>", f"#{count}")
    return text


def question_of(batch: Any) -> str:
    return prompt_of(batch).rpartition("<|im_start|>user\n")[2].partition("<|im_end|>")[0]


def control_count(ids: Any, tokens: list[str] = RESERVED) -> int:
    numbers = {P.tokenizer.control_tokens[token] for token in tokens}
    return sum(int(index) in numbers for index in torch.as_tensor(ids).flatten())
