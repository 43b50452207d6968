"""How well a model expects a text."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mono_internvl.configuration.labels import IGNORED_LABEL
from mono_internvl.model.modeling import MonoInternVLForConditionalGeneration
from mono_internvl.processing.processor import MonoInternVLProcessor
from mono_internvl.processing.prompts import Conversation


@torch.inference_mode()
def perplexity(
    model: MonoInternVLForConditionalGeneration,
    processor: MonoInternVLProcessor,
    conversations: Sequence[Conversation],
) -> float:
    """exp of the mean cross entropy, in fp32, over the answer tokens of text conversations."""
    model.eval()
    total, count = 0.0, 0
    for messages in conversations:
        sample = processor.encode_conversation(messages)
        labels = sample.labels[None].to(model.device)
        num = int((labels[:, 1:] != IGNORED_LABEL).sum())
        out = model(sample.input_ids[None].to(model.device), labels=labels, logits_to_keep=None)
        total, count = total + float(out.loss) * num, count + num
    return float(torch.tensor(total / max(1, count)).exp())
