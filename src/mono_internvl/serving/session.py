"""A conversation with a model: images in any turn, every token read once, an answer as it is made.

The session keeps the keys and values of what was said, so a new question costs its own tokens only.
The cache always holds the conversation as the chat template writes it, with the ids that were
generated.

Legend: V vocabulary.
"""

import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import BatchFeature, LogitsProcessorList
from transformers.cache_utils import DynamicCache

from mono_internvl.compute import ComputePlan
from mono_internvl.configuration.text_fields import is_scaled_dynamically
from mono_internvl.errors import ConfigError, PromptError
from mono_internvl.generation.context import most_tokens
from mono_internvl.generation.finite_logits import check_finite
from mono_internvl.generation.prefix import digest
from mono_internvl.generation.request import TextStream
from mono_internvl.generation.sampling import GREEDY, Sampling
from mono_internvl.model.modeling import MonoInternVLForConditionalGeneration
from mono_internvl.processing.image_files import ImageSource, is_one_image, load_image
from mono_internvl.processing.processor import MonoInternVLProcessor
from mono_internvl.processing.prompts import parse_boxes

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
class FirstQuestion:
    """What a conversation began with.

    Attributes:
        ids: Tokens of the prompt.
        pictures: Fingerprint of its tiles, or None without images.
        image_token: Id of `<IMG_CONTEXT>`.
        cache: Keys and values of the conversation.
    """

    ids: tuple[int, ...]
    pictures: bytes | None
    image_token: int
    cache: DynamicCache

    def num_shared_with(self, past: "FirstQuestion") -> int:
        """Leading tokens whose keys and values are those of `past`; at least one is left to read.

        All images or none: those that are in part shared are read anew.
        """
        pairs = zip(self.ids[:-1], past.ids, strict=False)
        shared = next((n for n, (a, b) in enumerate(pairs) if a != b), None)
        if shared is None:
            shared = min(len(self.ids) - 1, len(past.ids))
        if self.pictures != past.pictures or self.image_token in self.ids[shared:]:
            images = [n for n, token in enumerate(self.ids[:shared]) if token == self.image_token]
            shared = min([shared, *images[:1]])
        return shared


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

    Raises:
        ConfigError: If model and processor do not belong together.

    Source: `chat` of the released code. Differs: later turns reuse the cache with the ids that were
        generated, where it reads the whole conversation again from re-tokenized text; `</s>` and
        `<|im_start|>` end an answer too; an empty answer is closed like any other. As there, keys
        cached before dynamic rotary scaling sets in keep the angles they were given.
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
    ) -> None:
        _check_belong_together(model, processor)
        _check_max_tiles(max_tiles)
        self.model = model.eval()
        self.processor = processor
        self.system = system
        self.max_tiles = max_tiles
        self.sampling = sampling
        self.plan = plan
        self._busy = threading.Lock()
        self._turn_end = processor.turn_end_id
        self._image_token: int = processor.image_token_id
        self._stops = frozenset(processor.stop_token_ids)
        self._clear()

    def _clear(self) -> None:
        self._messages: list[dict[str, Any]] = []
        self._ids: list[int] = []
        self._first: FirstQuestion | None = None  # of this conversation
        self._past: FirstQuestion | None = None  # of the one before, with its cache
        self._cache = DynamicCache()  # whole in sliding layers too: it is cropped

    def __repr__(self) -> str:
        model = self.model
        return (
            f"<ChatSession: {len(self._messages)} messages, {len(self._ids)} tokens; "
            f"{model.num_parameters():,} parameters, {model.dtype} on {model.device}>"
        )

    @property
    def history(self) -> list[dict[str, Any]]:
        """What was said, as messages with their images; answers keep their grounding tokens."""
        return list(self._messages)

    @property
    def ids(self) -> tuple[int, ...]:
        """The tokens of the conversation, all of them in the cache."""
        return tuple(self._ids)

    @property
    def cache(self) -> DynamicCache:
        """Keys and values of `ids`; for looking, not for changing."""
        return self._cache

    def reset(self) -> None:
        """Forget the conversation.

        Its keys and values are kept until the next question: what that has in common with the first
        one, system message and image, is not read again.

        Raises:
            PromptError: An answer is being streamed.
        """
        with self._exclusive():
            first, cache = (self._first if self._ids else None), self._cache
            self._clear()
            if first is not None:
                self._past = dataclasses.replace(first, cache=cache)

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
        batch = self._encode(message, self.max_tiles if max_tiles is None else max_tiles)
        prompt: list[int] = batch["input_ids"][0].tolist()
        pixels = batch.get("pixel_values")
        before, num_messages = len(self._ids), len(self._messages)
        num_prompt = before + len(prompt)
        most = min(options.max_new_tokens, self._room_after(num_prompt))
        if not before and (num_shared := self._begin(prompt, pixels)):
            prompt = prompt[num_shared:]
            pixels = pixels if self._image_token in prompt else None
        cached = len(self._ids)
        generated: list[int] = []
        text = TextStream(self.processor.decode_answer)
        is_settled = False
        try:
            try:
                yield from self._generate(prompt, pixels, generated, most, options, text)
            except (KeyboardInterrupt, GeneratorExit):
                if generated:
                    self._close_turn(message, generated, num_prompt)
                    is_settled = True
                raise
            self._close_turn(message, generated, num_prompt)
            is_settled = True
        finally:
            if not is_settled:
                self._crop(before)
                del self._messages[num_messages:]
        if rest := text.finish(generated):
            yield rest
        return Answer(
            text=text.text,
            boxes=tuple(parse_boxes(text.text)),
            tokens=TokenCounts(num_prompt, cached, len(generated)),
            seconds=time.perf_counter() - start,
            finish_reason="length" if len(generated) == most else "stop",
            ids=tuple(generated),
        )

    def _generate(
        self,
        prompt: list[int],
        pixel_values: Tensor | None,
        generated: list[int],
        most: int,
        options: Sampling,
        text: TextStream,
    ) -> Generator[str, None, None]:
        """Reads the prompt and appends at most `most` ids to `generated`; yields certain text."""
        processors = options.logits_processors()
        generator = None
        if options.seed is not None:
            generator = torch.Generator(self.model.device).manual_seed(options.seed)
        logits = self._read_prompt(prompt, pixel_values)
        while True:
            token = self._choose(logits, processors, options.temperature > 0, generator)
            if token in self._stops:
                return
            generated.append(token)
            if piece := text.push(generated):
                yield piece
            if len(generated) == most:
                return
            logits = self._read([token])

    def _encode(self, message: Mapping[str, Any], max_tiles: int | None) -> BatchFeature:
        if self._ids:
            return self.processor.encode_turn(message, close_previous=False, max_tiles=max_tiles)
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return self.processor.encode_prompt([*system, message], max_tiles=max_tiles)

    @torch.inference_mode()
    def _choose(
        self,
        logits: Tensor,
        processors: LogitsProcessorList,
        is_random: bool,
        generator: torch.Generator | None,
    ) -> int:
        """The next token from (1, V) logits."""
        check_finite(logits)
        if processors:
            logits = processors(torch.tensor([self._ids], device=logits.device), logits.float())
        if not is_random:
            return int(logits.argmax(-1))
        return int(torch.multinomial(logits.float().softmax(-1)[0], 1, generator=generator))

    # ------------------------------------------------------------------ the cache

    @torch.inference_mode()
    def _read_prompt(self, ids: list[int], pixel_values: Tensor | None) -> Tensor:
        """Reads a user's turn, with its images where their context tokens stand; as `_read`."""
        device = self.model.device
        tokens = torch.tensor([ids], device=device)
        pixels = None if pixel_values is None else pixel_values.to(device)
        out = self.model.prefill(tokens, self._cache, pixels)
        self._ids += ids
        return _last_logits(out.logits)

    @torch.inference_mode()
    def _read(self, ids: list[int]) -> Tensor:
        """Reads generated tokens, each of them text. Returns (1, V) logits of what follows."""
        tokens = torch.tensor([ids], device=self.model.device)
        out = self.model(tokens, past_key_values=self._cache, logits_to_keep=1)
        self._ids += ids
        return _last_logits(out.logits)

    def _begin(self, prompt: list[int], pixels: Tensor | None) -> int:
        """Takes over what the conversation before began with; returns how many tokens that were."""
        past, self._past = self._past, None
        pictures = None if pixels is None else digest(pixels)
        self._first = FirstQuestion(tuple(prompt), pictures, self._image_token, self._cache)
        shared = 0 if past is None else self._first.num_shared_with(past)
        longest = max(len(prompt), 0 if past is None else len(past.ids))
        if is_scaled_dynamically(self.model.config.get_text_config(), longest):
            shared = 0  # keys of another prompt length are turned by other angles
        if past is not None and shared:
            self._cache, self._ids = past.cache, prompt[:shared]
            self._crop(shared)
        return shared

    def _close_turn(self, message: dict[str, Any], generated: list[int], num_prompt: int) -> None:
        """Ends the answer as the template does, and remembers both messages."""
        self._crop(len(self._ids))
        self._read([*generated[len(self._ids) - num_prompt :], self._turn_end])
        answer = self.processor.decode_answer(generated, keep_grounding=True)
        self._messages += [message, {"role": "assistant", "content": answer}]

    def _crop(self, length: int) -> None:
        """Back to the first `length` tokens, also after a pass that broke off between layers."""
        self._ids = self._ids[:length]
        if not length:
            self._cache = DynamicCache()
            return
        for layer in self._cache.layers:
            layer.keys = layer.keys[..., :length, :]
            layer.values = layer.values[..., :length, :]

    def _room_after(self, num_prompt: int) -> int:
        """How many tokens an answer may have, its end not counted."""
        limit = most_tokens(self.model.config)
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
    pictures = [{"type": "image", "image": load_image(image)} for image in several]
    return {"role": "user", "content": [*pictures, {"type": "text", "text": question}]}


def _last_logits(logits: Tensor | None) -> Tensor:
    assert logits is not None
    return logits[:, -1]  # (1, V)


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
    ):
        if of_model != of_processor:
            raise ConfigError(
                f"{name}: {of_model} in the model but {of_processor} in the processor; load "
                "both from the same checkpoint"
            )
