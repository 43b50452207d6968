"""TRL learns from the ids that our own training learns from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from mono_internvl import MonoInternVLForConditionalGeneration, MonoInternVLProcessor

pytest.importorskip("trl", reason="in the extra [dev]")

from trl.data_utils import apply_chat_template
from trl.trainer.dpo_trainer import DataCollatorForVisionPreference
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling
from trl.trainer.utils import create_model_from_path

QUESTION, ANSWER = "what colour is this?", "red"


@pytest.fixture(scope="module")
def processor(checkpoint: Path) -> MonoInternVLProcessor:
    return MonoInternVLProcessor.from_pretrained(checkpoint)


def _messages(content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content}]


def _ours(processor: MonoInternVLProcessor, picture: Image.Image) -> Any:
    question = [{"type": "image", "image": picture}, {"type": "text", "text": QUESTION}]
    answer = {"role": "assistant", "content": ANSWER}
    return processor.encode_conversation([*_messages(question), answer])


def test_trl_finds_the_model_by_its_path(checkpoint: Path) -> None:
    model = create_model_from_path(str(checkpoint), dtype="float32")
    assert isinstance(model, MonoInternVLForConditionalGeneration)


def test_trl_sft_collator_gives_our_ids(
    processor: MonoInternVLProcessor, picture: Image.Image
) -> None:
    row = {
        "images": [picture],
        "prompt": _messages(QUESTION),
        "completion": [{"role": "assistant", "content": ANSWER}],
    }
    batch = DataCollatorForVisionLanguageModeling(processor, completion_only_loss=True)([row])
    ours = _ours(processor, picture)
    assert batch["input_ids"][0].tolist() == ours.input_ids.tolist()
    assert batch["labels"][0].tolist() == ours.labels.tolist()
    assert torch.equal(batch["pixel_values"], ours.pixel_values)


def test_trl_preference_collator_gives_our_ids(
    processor: MonoInternVLProcessor, picture: Image.Image
) -> None:
    row = {
        "images": [picture],
        "prompt": _messages(QUESTION),
        "chosen": [{"role": "assistant", "content": ANSWER}],
        "rejected": [{"role": "assistant", "content": "blue"}],
    }
    batch = DataCollatorForVisionPreference(processor)([row])
    ids = batch["input_ids"][0][batch["attention_mask"][0].bool()]
    assert ids.tolist() == _ours(processor, picture).input_ids.tolist()


def test_rendered_prompts_have_one_bos(processor: MonoInternVLProcessor) -> None:
    """Rendered here, encoded there, with and without special tokens: the same ids."""
    messages = _messages(QUESTION)
    ours = processor.encode_prompt(messages)["input_ids"].tolist()
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    bos = processor.tokenizer.bos_token
    assert text.startswith(bos) and text.count(bos) == 1
    assert apply_chat_template({"prompt": messages}, processor)["prompt"] == text
    for special in (True, False):
        found = processor(text=[text], add_special_tokens=special)["input_ids"]
        assert [list(row) for row in found] == ours
        assert processor.tokenizer(text, add_special_tokens=special).input_ids == ours[0]
    several = processor.tokenizer([text, text.removeprefix(bos)]).input_ids
    assert several == [ours[0], ours[0]]
    assert processor.tokenizer("red").input_ids[0] == processor.tokenizer.bos_token_id


def test_answers_are_marked_for_assistant_only_loss(
    processor: MonoInternVLProcessor, picture: Image.Image
) -> None:
    ours = _ours(processor, picture)
    question = [{"type": "image", "image": picture}, {"type": "text", "text": QUESTION}]
    answer = [{"type": "text", "text": ANSWER}]
    marked = processor.apply_chat_template(
        [*_messages(question), {"role": "assistant", "content": answer}],
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    assert [int(x) for x in marked["input_ids"][0]] == ours.input_ids.tolist()
    mask = torch.as_tensor(marked["assistant_masks"][0]).bool()
    assert mask.tolist() == (ours.labels != -100).tolist()
