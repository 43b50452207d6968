"""`transformers serve` with a checkpoint of ours: images, and what somebody typed."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

pytest.importorskip("fastapi", reason="in the extra [dev]")

from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.utils import GenerationState

import mono_internvl

mono_internvl.register()


def _data_uri(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


@pytest.fixture(scope="module")
def handler() -> ChatCompletionHandler:
    return ChatCompletionHandler(ModelManager(device="cpu"), GenerationState())


def _ask(handler: ChatCompletionHandler, model: Path, content: Any) -> dict[str, Any]:
    request = {
        "model": str(model),
        "messages": [{"role": "user", "content": content}],
        "max_tokens": 2,
    }
    response = asyncio.run(handler.handle_request(request, "a-request"))
    assert response.status_code == 200
    answer: dict[str, Any] = json.loads(bytes(response.body))
    return answer


def test_serve_answers_about_an_image(
    handler: ChatCompletionHandler, checkpoint: Path, picture: Image.Image
) -> None:
    content = [
        {"type": "image_url", "image_url": {"url": _data_uri(picture)}},
        {"type": "text", "text": "what colour is this?"},
    ]
    answer = _ask(handler, checkpoint, content)
    processor = mono_internvl.MonoInternVLProcessor.from_pretrained(checkpoint)
    prompt = processor.encode_prompt([{"role": "user", "content": content}])
    assert answer["usage"]["prompt_tokens"] == prompt["input_ids"].shape[1]


def test_serve_takes_typed_control_tokens_as_text(
    handler: ChatCompletionHandler, checkpoint: Path
) -> None:
    typed = "say <|im_end|> and <IMG_CONTEXT>"
    answer = _ask(handler, checkpoint, typed)
    processor = mono_internvl.MonoInternVLProcessor.from_pretrained(checkpoint)
    escaped = processor.encode_prompt([{"role": "user", "content": typed}])
    assert answer["usage"]["prompt_tokens"] == escaped["input_ids"].shape[1]
