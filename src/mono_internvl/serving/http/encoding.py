"""A request of chat completions -> what the engine is asked. Images are foreign data, and files of
the server are out of reach: a string that is neither data URI nor base64 is refused, never opened.
"""

from __future__ import annotations

import base64
import binascii
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image

from mono_internvl.errors import ImageError
from mono_internvl.generation.request import Request
from mono_internvl.generation.sampling import Sampling
from mono_internvl.processing.image_files import image_size, load_image
from mono_internvl.processing.processor import MonoInternVLProcessor
from mono_internvl.processing.prompts import GROUNDING_TOKENS
from mono_internvl.serving.http.errors import ApiError
from mono_internvl.serving.http.limits import Limits
from mono_internvl.serving.http.schema import ChatRequest, ImagePart

DEFAULT_ANSWER_TOKENS = 512
_CHARACTERS_PER_TOKEN = 16  # more than any text has; a longer prompt is not even tokenized


@dataclass(frozen=True)
class Asked:
    """What the engine is asked for one request.

    Attributes:
        requests: One for each answer.
        num_prompt: Tokens of the prompt.
        num_bytes: That the prompt holds while it waits.
    """

    requests: list[Request]
    num_prompt: int
    num_bytes: int


class RequestEncoder:
    """Encodes requests; several threads may call it.

    Args:
        processor: Of the model.
        most_tokens: That the model reads, prompt and answer together.
        limits: Of the server.
        max_tiles: Most tiles of an image; None takes the processor's own.
    """

    def __init__(
        self,
        processor: MonoInternVLProcessor,
        most_tokens: int,
        limits: Limits,
        max_tiles: int | None,
    ) -> None:
        self._processor, self._limits = processor, limits
        self._most_tokens = most_tokens
        self._max_tiles = max_tiles or processor.image_processor.max_tiles
        self.most_text = min(_CHARACTERS_PER_TOKEN * most_tokens, sys.maxsize)
        """Characters of a prompt; a longer one has more tokens than the model reads."""
        self._reserved = [
            token for token in processor.tokenizer.control_tokens if token not in GROUNDING_TOKENS
        ]

    def __call__(self, asked: ChatRequest) -> Asked:
        """What to ask the engine.

        Raises:
            ApiError: 400, with the field.
            MonoInternVLError: Messages and images do not make a prompt.
        """
        if asked.messages[-1].role != "user":
            last = f"messages[{len(asked.messages) - 1}]"
            raise ApiError(400, f"{last}: the last message must be the user's", f"{last}.role")
        self._check_texts(asked)
        messages, tiles = self._with_images(asked)
        batch = self._processor.encode_prompt(messages, max_tiles=tiles or None)
        ids, pixels = batch["input_ids"][0], batch.get("pixel_values")
        room = self._most_tokens - len(ids) - 1
        if room < 1:
            raise self._too_long(f"{len(ids)} tokens")
        wanted = asked.max_completion_tokens or asked.max_tokens or DEFAULT_ANSWER_TOKENS
        request = Request(
            ids,
            pixels,
            Sampling(
                temperature=asked.temperature,
                top_p=asked.top_p,
                max_new_tokens=min(wanted, self._limits.answer_tokens, room),
                seed=asked.seed,
            ),
            stop_ids=frozenset(self._processor.stop_token_ids),
            stop_strings=tuple(asked.stop),
            decode=self._processor.decode_answer,
            has_logprobs=asked.logprobs,
            num_alternatives=asked.top_logprobs,
            feature_order=batch.get("feature_order"),
        )
        num_bytes = ids.nbytes + (0 if pixels is None else pixels.nbytes)
        return Asked(request.samples(asked.n), len(ids), num_bytes)

    def _check_texts(self, asked: ChatRequest) -> None:
        """Texts that fit, in which nothing is written that only the template may write."""
        total = 0
        for number, message in enumerate(asked.messages):
            text = "".join(part.text for part in message.content if part.type == "text")
            total += len(text)
            if total > self.most_text:
                raise self._too_long(f"more than {self.most_text:,} characters")
            for token in self._reserved:
                if token in text:
                    param = f"messages[{number}].content"
                    raise ApiError(
                        400,
                        f"{param}: contains the control token {token!r}; remove it",
                        param,
                        "control_token",
                    )

    def _with_images(self, asked: ChatRequest) -> tuple[list[Mapping[str, Any]], list[int]]:
        """Messages as the processor takes them, images decoded, and most tiles of each image."""
        pixels, tokens = self._limits.image_pixels, 0
        tiles: list[int] = []
        messages: list[Mapping[str, Any]] = []
        for number, message in enumerate(asked.messages):
            parts: list[dict[str, Any]] = []
            for place, part in enumerate(message.content):
                if not isinstance(part, ImagePart):
                    parts.append({"type": "text", "text": part.text})
                    continue
                param = f"messages[{number}].content[{place}].image_url.url"
                if len(tiles) == self._limits.images:
                    most = self._limits.images
                    raise ApiError(400, f"{param}: more than {most} images", param)
                image = _decoded(part.image_url.url, param, pixels)
                pixels -= image.width * image.height
                tiles.append(1 if part.image_url.detail == "low" else self._max_tiles)
                layout = self._processor.image_processor.layout_of(*image.size, max_tiles=tiles[-1])
                tokens += layout.num_tokens
                if tokens > self._most_tokens:  # before any tile is made of them
                    raise self._too_long(f"at least {tokens} tokens of images")
                parts.append({"type": "image", "image": image})
            role = "system" if message.role == "developer" else message.role
            messages.append({"role": role, "content": parts})
        return messages, tiles

    def _too_long(self, what: str) -> ApiError:
        return ApiError(
            400,
            f"messages: {what}, but the model reads {self._most_tokens} with the answer; send less "
            'text, or fewer or smaller images (detail="low" reads an image in one tile)',
            "messages",
            "context_length_exceeded",
        )


def _decoded(url: str, param: str, most_pixels: int) -> Image.Image:
    """The image of a data URI or of base64."""
    try:
        source: str | bytes = url
        if url[:5].lower() != "data:":
            if ":" in url[:16]:
                raise ImageError("nothing is fetched; send the image as a data URI")
            source = base64.b64decode(url, validate=True)
        width, height = image_size(source)
        if width * height > most_pixels:
            raise ImageError(
                f"{width}x{height} = {width * height} pixels, but the images of a request may have "
                f"{most_pixels} beside those before it; scale it down first"
            )
        return load_image(source)
    except (ImageError, binascii.Error, ValueError) as error:
        raise ApiError(400, f"{param}: {error}", param, "invalid_image") from error
