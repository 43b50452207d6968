"""A conversation with a model: images in any turn, every token read once, an answer as it is made.

The session keeps what was said as the chat template writes it, with the ids that were generated,
and asks an engine that keeps the keys and values: a new question costs its own tokens only.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from mono_internvl.compute import ComputePlan
from mono_internvl.errors import ConfigError, PromptError
from mono_internvl.generation.attention_maps import AttentionMaps, attention_maps
from mono_internvl.generation.context import most_tokens
from mono_internvl.generation.engine import Engine, free_bytes
from mono_internvl.generation.request import Request
from mono_internvl.generation.sampling import GREEDY, Sampling
from mono_internvl.model.modeling import MonoInternVLForConditionalGeneration
from mono_internvl.processing.image_files import ImageSource, is_one_image, load_image
from mono_internvl.processing.processor import MonoInternVLProcessor
from mono_internvl.processing.prompts import parse_boxes
from mono_internvl.processing.video import VideoFrame

Box = tuple[int, int, int, int]
FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class TokenCounts:
    """What an answer cost.

    Attributes:
        prompt: Tokens of the conversation up to the answer.
        cached: How many of them were not read again.
        generated: Tokens of the answer, without the one that ended it.
    """

    prompt: int
    cached: int
    generated: int


@dataclass(frozen=True)
class Answer:
    """An answer.

    Attributes:
        text: Without control tokens and outer whitespace.
        boxes: Boxes (x1, y1, x2, y2) in the text, in 1/1000 of the image's width and height.
        tokens: Token counts.
        seconds: From the question to the end of the answer.
        finish_reason: "stop" if the model ended it, "length" if it had to be cut.
        ids: The generated ids, without the one that ended the answer.
    """

    text: str
    boxes: tuple[Box, ...]
    tokens: TokenCounts
    seconds: float
    finish_reason: FinishReason
    ids: tuple[int, ...]

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class _Said:
    """A conversation, or a prompt of one.

    Attributes:
        ids: Its tokens.
        is_visual: Which of them stand for an image; a generated `<IMG_CONTEXT>` does not.
        tiles: (tiles, 3, S, S) of every question with images.
        feature_order: Which feature of the tiles stands at each visual token; -1, -2: learned ones.
        answer_start: Where its last answer begins.
    """

    ids: tuple[int, ...] = ()
    is_visual: tuple[bool, ...] = ()
    tiles: tuple[Tensor, ...] = ()
    feature_order: tuple[int, ...] = ()
    answer_start: int = 0


class ChatSession:
    """A conversation that grows; one thread, one answer at a time.

    An answer stopped by Ctrl-C, or by closing its stream, stays in the conversation as far as it
    came. Any other failure leaves the session as it was before the question.

    Args:
        model: On any device, in any dtype.
        processor: Of the same checkpoint.
        system: System message; None takes the processor's own, an empty one leaves it out.
        max_tiles: Most tiles of an image, thumbnail not counted; None takes the processor's own.
        sampling: Used where `ask` says nothing else.
        plan: What the model was loaded to compute with, for those who ask; None is unknown.
        engine: Of the model, shared with other sessions of the same thread; None makes one.

    Raises:
        ConfigError: If model and processor do not belong together.

    Source: `chat` of the released code. Differs: later turns reuse keys and values, with the ids
        that were generated, where it reads the whole conversation again from re-tokenized text (we
        do so where dynamic rotary scaling has set in); `</s>` and `<|im_start|>` end an answer too;
        an empty answer is closed like any other.
    """

    def __init__(
        self,
        model: MonoInternVLForConditionalGeneration,
        processor: MonoInternVLProcessor,
        *,
        system: str | None = None,
        max_tiles: int | None = None,
        sampling: Sampling = GREEDY,
        plan: ComputePlan | None = None,
        engine: Engine | None = None,
    ) -> None:
        _check_belong_together(model, processor)
        _check_max_tiles(max_tiles)
        if engine is None:
            # A row as long as memory allows, and as much again for the earlier turns.
            num_bytes = max(1, free_bytes(model.device) // 3)
            engine = Engine(model, max_rows=1, kv_bytes=num_bytes, prefix_bytes=num_bytes)
        self.engine = engine
        self.model = model
        self.processor = processor
        self.system = system
        self.max_tiles = max_tiles
        self.sampling = sampling
        self.plan = plan
        self._busy = threading.Lock()
        self._turn_end = processor.turn_end_id
        self._image_token: int = processor.image_token_id
        self._stops = frozenset(processor.stop_token_ids)
        self._messages: list[dict[str, Any]] = []
        self._said = _Said()

    def __repr__(self) -> str:
        model = self.model
        return (
            f"<ChatSession: {len(self._messages)} messages, {len(self.ids)} tokens; "
            f"{model.num_parameters():,} parameters, {model.dtype} on {model.device}>"
        )

    @property
    def history(self) -> list[dict[str, Any]]:
        """What was said, as messages with their images; answers keep their grounding tokens."""
        return list(self._messages)

    @property
    def ids(self) -> tuple[int, ...]:
        """The tokens of the conversation."""
        return self._said.ids

    def reset(self) -> None:
        """Forget the conversation.

        Its keys and values are kept as long as there is room: what a later one begins with like it,
        system message and images, is not read again.

        Raises:
            PromptError: An answer is being streamed.
        """
        with self._exclusive():
            self._messages, self._said = [], _Said()

    def attention(self) -> AttentionMaps:
        """Where the tokens of the conversation look, layer by layer; all of it is read anew.

        Raises:
            PromptError: It holds no image, or is too long for a map.
        """
        with self._exclusive():
            said = self._said
            if not said.tiles:
                raise PromptError("the conversation holds no image; ask about one first")
            return attention_maps(
                self.model,
                said.ids,
                torch.cat(said.tiles),
                is_visual=said.is_visual,
                feature_order=torch.tensor(said.feature_order, dtype=torch.int64),
                num_prompt=said.answer_start,
            )

    def ask(
        self,
        question: str,
        images: ImageSource | Sequence[ImageSource] = (),
        *,
        stream: Callable[[str], object] | None = None,
        max_tiles: int | None = None,
        **sampling: Any,
    ) -> Answer:
        """Ask, and wait for the answer.

        Args:
            question: Text; `<image>` in it says where an image stands, else images come first.
            images: One image or several: paths, bytes, data URIs, open files, PIL images, arrays.
            stream: Gets the answer's text piece by piece.
            max_tiles: Most tiles of each of these images.
            **sampling: Fields of `Sampling` that differ from the session's.

        Raises:
            PromptError: The question is empty or too long, or images and placeholders differ in
                number.
            ImageError: An image cannot be decoded.
            ConfigError: A sampling option or `max_tiles` is out of range or unknown.
            CheckpointError: The model's logits are not numbers.
        """
        with contextlib.closing(
            self.ask_stream(question, images, max_tiles=max_tiles, **sampling)
        ) as pieces:
            while True:
                try:
                    piece = next(pieces)
                except StopIteration as end:
                    answer: Answer = end.value
                    return answer
                if stream is not None:
                    stream(piece)

    def ask_stream(
        self,
        question: str,
        images: ImageSource | Sequence[ImageSource] = (),
        *,
        max_tiles: int | None = None,
        **sampling: Any,
    ) -> Generator[str, None, Answer]:
        """As `ask`, but yields the answer's text as it is made; returns the `Answer`."""
        unknown = sorted(set(sampling) - {field.name for field in dataclasses.fields(Sampling)})
        if unknown:
            raise ConfigError(
                f"sampling option {unknown[0]!r} is unknown; expected one of "
                f"{', '.join(field.name for field in dataclasses.fields(Sampling))}"
            )
        options = dataclasses.replace(self.sampling, **sampling)
        _check_max_tiles(max_tiles)
        with self._exclusive():
            return (yield from self._take_turn(question, images, max_tiles, options))

    # ------------------------------------------------------------------ one turn

    def _take_turn(
        self,
        question: str,
        images: ImageSource | Sequence[ImageSource],
        max_tiles: int | None,
        options: Sampling,
    ) -> Generator[str, None, Answer]:
        start = time.perf_counter()
        message = _user_message(question, images)
        prompt = self._prompt_with(message, self.max_tiles if max_tiles is None else max_tiles)
        most = min(options.max_new_tokens, self._room_after(len(prompt.ids)))
        pieces: list[str] = []
        generation = self.engine.submit(
            Request(
                prompt.ids,
                torch.cat(prompt.tiles) if prompt.tiles else None,
                dataclasses.replace(options, max_new_tokens=most),
                stop_ids=self._stops,
                decode=self.processor.decode_answer,
                on_text=pieces.append,
                visual_token_mask=torch.tensor(prompt.is_visual),
                feature_order=torch.tensor(prompt.feature_order, dtype=torch.int64),
                is_continued=True,
            )
        )
        try:
            while generation.finish_reason is None:
                self.engine.step()
                yield from pieces
                pieces.clear()
        except (KeyboardInterrupt, GeneratorExit):
            if generation.ids:
                self._close_turn(message, prompt, generation.ids)
            raise
        finally:
            generation.cancel()
        self._close_turn(message, prompt, generation.ids)
        result = generation.result
        assert result.text is not None and result.finish_reason != "cancelled"
        return Answer(
            text=result.text,
            boxes=tuple(parse_boxes(result.text)),
            tokens=TokenCounts(result.num_prompt, result.num_cached, len(result.ids)),
            seconds=time.perf_counter() - start,
            finish_reason=result.finish_reason,
            ids=result.ids,
        )

    def _prompt_with(self, message: Mapping[str, Any], max_tiles: int | None) -> _Said:
        """The conversation up to the answer to a message."""
        said = self._said
        if said.ids:
            batch = self.processor.encode_turn(message, close_previous=False, max_tiles=max_tiles)
        else:
            system = [] if self.system is None else [{"role": "system", "content": self.system}]
            batch = self.processor.encode_prompt([*system, message], max_tiles=max_tiles)
        ids = batch["input_ids"][0].tolist()
        tiles = [batch["pixel_values"]] if "pixel_values" in batch else []
        is_visual = [token == self._image_token for token in ids]
        seen, order = sum(at >= 0 for at in said.feature_order), list(range(sum(is_visual)))
        if "feature_order" in batch:
            order = batch["feature_order"].tolist()
        return _Said(
            (*said.ids, *ids),
            (*said.is_visual, *is_visual),
            (*said.tiles, *tiles),
            (*said.feature_order, *(at if at < 0 else seen + at for at in order)),
        )

    def _close_turn(self, message: dict[str, Any], prompt: _Said, generated: list[int]) -> None:
        """Ends the answer as the template does, and remembers both messages."""
        answer = self.processor.decode_answer(generated, keep_grounding=True)
        new = (*generated, self._turn_end)
        text = (False,) * len(new)
        self._said = dataclasses.replace(
            prompt,
            ids=(*prompt.ids, *new),
            is_visual=(*prompt.is_visual, *text),
            answer_start=len(prompt.ids),
        )
        self._messages += [message, {"role": "assistant", "content": answer}]

    def _room_after(self, num_prompt: int) -> int:
        """How many tokens an answer may have, its end not counted."""
        limit = min(most_tokens(self.model.config), self.engine.cache.max_tokens)
        if num_prompt + 2 > limit:
            raise PromptError(
                f"the conversation has {num_prompt} tokens with this question, but the model reads "
                f"{limit} with the answer; reset the session, or ask with a lower max_tiles"
            )
        return limit - num_prompt - 1

    @contextlib.contextmanager
    def _exclusive(self) -> Generator[None, None, None]:
        if not self._busy.acquire(blocking=False):
            raise PromptError(
                "an answer of this session is still being streamed; read it to its end or close it"
            )
        try:
            yield
        finally:
            self._busy.release()


def _user_message(question: str, images: ImageSource | Sequence[ImageSource]) -> dict[str, Any]:
    if not isinstance(question, str) or not question.strip():
        raise PromptError(f"question={question!r:.60}; expected some text: 'What is shown?'")
    several: Any = [images] if is_one_image(images) else images
    if not isinstance(several, Iterable):
        raise PromptError(f"images is a {type(images).__name__}; expected an image or several")
    parts: list[dict[str, Any]] = []
    for image in several:
        if isinstance(image, VideoFrame):
            text = {"type": "text", "text": image.label}
            parts += [text, {"type": "image", "image": image}, {"type": "text", "text": "\n"}]
        else:
            parts.append({"type": "image", "image": load_image(image)})
    return {"role": "user", "content": [*parts, {"type": "text", "text": question}]}


def _check_max_tiles(max_tiles: Any) -> None:
    is_count = isinstance(max_tiles, int) and not isinstance(max_tiles, bool) and max_tiles >= 1
    if max_tiles is not None and not is_count:
        raise ConfigError(
            f"max_tiles={max_tiles!r}; expected an integer >= 1, or None for the processor's own"
        )


def _check_belong_together(
    model: MonoInternVLForConditionalGeneration, processor: MonoInternVLProcessor
) -> None:
    config = model.config
    for name, of_model, of_processor in (
        ("visual tokens per tile", config.num_image_tokens_per_tile, processor.tokens_per_tile),
        ("id of <IMG_CONTEXT>", config.image_token_id, processor.image_token_id),
        ("tiling", config.tiling, processor.image_processor.tiling),
    ):
        if of_model != of_processor:
            raise ConfigError(
                f"{name}: {of_model} in the model but {of_processor} in the processor; load "
                "both from the same checkpoint"
            )
