"""What generic hosts ask of a processor: places of images, counts without pixels, templates."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from transformers import ProcessorMixin
from transformers.processing_utils import MultiModalData

from mono_internvl.errors import PromptError
from mono_internvl.processing.encoding import check_placeholders
from mono_internvl.processing.images import MonoInternVLImageProcessor
from mono_internvl.processing.prompts import (
    IMAGE_CONTEXT,
    IMAGE_END,
    IMAGE_START,
    Turn,
    check_no_control,
    texts_of,
)
from mono_internvl.processing.templates import JinjaForm, ReleasedForm
from mono_internvl.processing.tiling import TokenLayout
from mono_internvl.processing.tokenizer import MonoInternVLTokenizer

# Absent from the oldest transformers that is supported.
_CAN_SANITIZE = (
    "sanitize_control_tokens" in inspect.signature(ProcessorMixin.apply_chat_template).parameters
)


class HostProcessor(ProcessorMixin):
    """The hooks of `ProcessorMixin`, for images laid out by a `Tiling`.

    Attributes:
        image_processor: Cuts images into tiles.
        tokenizer: Has the control tokens of chat and vision.
        image_token_id: Id of `<IMG_CONTEXT>`.
    """

    image_processor: MonoInternVLImageProcessor
    tokenizer: MonoInternVLTokenizer
    image_token_id: int
    _form: ReleasedForm | JinjaForm

    @property
    def tokens_per_tile(self) -> int:
        """Visual tokens of one tile (448 px: 256)."""
        return int(self.image_processor.image_size // self.visual_token_size) ** 2

    @property
    def visual_token_size(self) -> int:
        """Side of the square that one visual token sees, px."""
        return self.image_processor.visual_token_size

    @property
    def unused_input_names(self) -> list[str]:
        """What the image processor returns and the model does not take."""
        return ["num_tiles", "num_patches", "layouts"]

    def replace_image_token(
        self, image_inputs: Mapping[str, Any], image_idx: int, **kwargs: Any
    ) -> str:
        """What stands in the prompt for one image: `<img>`, its visual tokens, `</img>`."""
        layout: TokenLayout = image_inputs["layouts"][image_idx]
        return IMAGE_START + layout.text + IMAGE_END

    def _get_num_multimodal_tokens(
        self, image_sizes: Sequence[Sequence[int]] | None = None, **kwargs: Any
    ) -> MultiModalData:
        """Tokens and tiles of images given by (height, width), for hosts that plan without pixels.

        `<img>` and `</img>` are counted.
        """
        if image_sizes is None:
            return MultiModalData()
        options = {
            k: v for k, v in kwargs.items() if k in ("min_tiles", "max_tiles", "use_thumbnail")
        }
        if not kwargs.get("crop_to_patches", True):
            options |= {"min_tiles": 1, "max_tiles": 1}
        layouts = [
            self.image_processor.layout_of(width, height, **options)
            for height, width in image_sizes
        ]
        return MultiModalData(
            num_image_tokens=[2 + layout.num_tokens for layout in layouts],
            num_image_patches=[layout.num_tiles for layout in layouts],
        )

    def check_image_tokens(self, input_ids: torch.Tensor, layouts: Sequence[TokenLayout]) -> None:
        """Refuses ids whose `<IMG_CONTEXT>` do not match the visual tokens of their images.

        Raises:
            PromptError: With both numbers.
        """
        placeholders = int((input_ids == self.image_token_id).sum())
        features = sum(layout.num_tokens for layout in layouts)
        if placeholders != features:
            raise PromptError(
                f"input_ids: {placeholders} {IMAGE_CONTEXT} but {features} visual tokens of "
                f"{sum(layout.num_tiles for layout in layouts)} tiles; encode text and images "
                "together"
            )

    def validate_inputs(
        self,
        images: Any = None,
        text: Any = None,
        videos: Any = None,
        audio: Any = None,
        **kwargs: Any,
    ) -> None:
        """Checks a call of the processor with a rendered prompt.

        Raises:
            PromptError: If placeholders and images differ in number, or there are videos or audio.
        """
        if videos is not None or audio is not None:
            raise PromptError("videos, audio: not understood; give the frames of a video as images")
        if text is not None:
            check_placeholders([text] if isinstance(text, str) else list(text), images)
        super().validate_inputs(images=images, text=text, videos=videos, audio=audio, **kwargs)

    def apply_chat_template(self, conversation: Any, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, but what somebody typed never becomes a control token.

        Ids (`tokenize=True`) of messages that name control tokens spell those names as text, as
        with `sanitize_control_tokens=True`. A string prompt cannot tell a typed control token from
        one of the template; there they are refused, and `encode_prompt` escapes them.

        Raises:
            PromptError: If a message holds a control token other than those of grounding, and the
                prompt is asked for as a string or with a mask of the answers; or if one comes about
                where two parts of a message meet.
        """
        can_escape = (
            _CAN_SANITIZE
            and kwargs.get("tokenize")
            and not kwargs.get("return_assistant_tokens_mask")
        )
        control = self.tokenizer.control_tokens
        is_batch = bool(conversation) and isinstance(conversation[0], (list, tuple))
        turns = [
            turn
            for messages in (conversation if is_batch else [conversation])
            for turn in texts_of(messages)
        ]
        try:
            check_no_control(turns, control)
        except PromptError:
            if not can_escape:
                raise
            check_no_control(_without_tokens(turns, control), control)
            kwargs["sanitize_control_tokens"] = True
        if isinstance(self._form, JinjaForm) and kwargs.get("chat_template") is None:
            for messages in conversation if is_batch else [conversation]:
                self._form.check_conversation(messages, **kwargs)
        return super().apply_chat_template(conversation, *args, **kwargs)


def _without_tokens(turns: Iterable[Turn], tokens: Iterable[str]) -> list[Turn]:
    """The turns less the tokens that stand in one part; those across parts are what hosts miss."""
    pattern = re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))))
    return [
        Turn(turn.role, tuple(pattern.sub("\ue000", str(part)) for part in turn.parts))
        for turn in turns
    ]
