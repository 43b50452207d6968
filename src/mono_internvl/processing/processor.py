"""Messages and images -> ids and pixels; the only place where `<IMG_CONTEXT>` is counted.

Shapes: B batch, T tokens, N tiles of all images of all samples, S side of a tile in px.
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import BatchFeature

from mono_internvl.configuration.model import MonoInternVLConfig
from mono_internvl.errors import CheckpointError, ConfigError, PromptError
from mono_internvl.processing.encoding import (
    Sample,
    TileLimits,
    decode_answer,
    encode_pieces,
    pad_left,
)
from mono_internvl.processing.host_processor import HostProcessor
from mono_internvl.processing.images import (
    MonoInternVLImageProcessor,
    share_tiles,
)
from mono_internvl.processing.prompts import (
    DEFAULT_SYSTEM_PROMPT,
    IMAGE_CONTEXT,
    IMAGE_END,
    IMAGE_START,
    SUPPORTED_TEMPLATES,
    Conversation,
    OnControl,
    Piece,
    Turn,
    check_no_control,
    open_answer,
    to_turns,
)
from mono_internvl.processing.prompts import chat_template as make_chat_template
from mono_internvl.processing.templates import JINJA_FORM, RELEASED_FORM
from mono_internvl.processing.templates import prompt_form as make_prompt_form
from mono_internvl.processing.tiling import TokenLayout, feature_order
from mono_internvl.processing.tokenizer import (
    HUB_OPTIONS,
    MonoInternVLTokenizer,
    find_file,
    load_tokenizer,
)
from mono_internvl.processing.video import VideoFrame
from mono_internvl.runs.files import MAX_TEMPLATE_BYTES, read_bytes, read_json, reading

PROCESSOR_CONFIG = "processor_config.json"
PREPROCESSOR_CONFIG = "preprocessor_config.json"
CONFIG = "config.json"
_IMAGE_OVERRIDES = ("min_tiles", "max_tiles", "use_thumbnail")
_IMAGE_SETTINGS = (
    *_IMAGE_OVERRIDES,
    "image_size",
    "image_mean",
    "image_std",
    "pad2square",
    "tiling",
    "visual_token_size",
)


class MonoInternVLProcessor(HostProcessor):
    """Image processor, tokenizer and chat template as one.

    Args:
        image_processor: Cuts images into tiles.
        tokenizer: Has the control tokens of chat and vision.
        chat_template: Jinja template of `apply_chat_template`; made from `default_system_prompt`
            unless given.
        default_system_prompt: System message of conversations without one; empty: no block.
        prompt_form: How the `encode_*` functions render: "internlm2-chat", or "chat_template.jinja"
            for a language model's own template.

    Raises:
        ConfigError: If tiles cannot be cut into visual tokens, or the template is of no use.
        CheckpointError: If the tokenizer lacks a control token.
    """

    def __init__(
        self,
        image_processor: MonoInternVLImageProcessor | None = None,
        tokenizer: MonoInternVLTokenizer | None = None,
        chat_template: str | None = None,
        default_system_prompt: str = DEFAULT_SYSTEM_PROMPT,
        prompt_form: str = RELEASED_FORM,
    ) -> None:
        if image_processor is None or tokenizer is None:
            raise ConfigError("a processor needs an image_processor and a tokenizer; give both")
        if image_processor.image_size % image_processor.visual_token_size:
            raise ConfigError(
                f"image_size={image_processor.image_size} is not a multiple of the visual token's "
                f"side of {image_processor.visual_token_size} px"
            )
        if not isinstance(default_system_prompt, str):
            raise ConfigError(f"default_system_prompt={default_system_prompt!r:.60}; expected text")
        self.default_system_prompt = default_system_prompt
        self.image_token = IMAGE_CONTEXT
        self.image_token_id = tokenizer.control_id(IMAGE_CONTEXT)
        for token in (IMAGE_START, IMAGE_END):
            tokenizer.control_id(token)
        self.prompt_form = prompt_form
        self._form = make_prompt_form(prompt_form, chat_template, tokenizer)
        super().__init__(
            image_processor,
            tokenizer,
            chat_template=chat_template or make_chat_template(default_system_prompt),
        )

    @classmethod
    def from_config(
        cls,
        config: MonoInternVLConfig,
        tokenizer: MonoInternVLTokenizer,
        *,
        default_system_prompt: str = DEFAULT_SYSTEM_PROMPT,
        chat_template: str | None = None,
    ) -> "MonoInternVLProcessor":
        """A processor whose image settings are those of a model.

        Args:
            config: Of the model.
            tokenizer: Of the model.
            default_system_prompt: System message of conversations without one.
            chat_template: Of a language model whose prompts are not in the released form.

        Raises:
            ConfigError: If the config names a chat template of another form.
        """
        if config.template not in (*SUPPORTED_TEMPLATES, JINJA_FORM):
            raise ConfigError(
                f"template={config.template!r} is not supported; expected one of "
                f"{', '.join(str(name) for name in SUPPORTED_TEMPLATES)}"
            )
        return cls(
            MonoInternVLImageProcessor.from_config(config),
            tokenizer,
            chat_template=chat_template,
            default_system_prompt=default_system_prompt,
            prompt_form=JINJA_FORM if config.template == JINJA_FORM else RELEASED_FORM,
        )

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, **kwargs: Any
    ) -> "MonoInternVLProcessor":
        """Loads the processor of a folder or hub id.

        A folder written by `save_pretrained` is read as it is. A released one has no processor
        files of ours: its image settings are in config.json and its tokenizer is converted.

        Args:
            pretrained_model_name_or_path: Folder or hub id.
            **kwargs: `revision`, `cache_dir`, `token`, `local_files_only`, `force_download`,
                `subfolder`; `max_tiles`, `min_tiles`, `use_thumbnail`, `default_system_prompt`
                replace what is stored. Other options of generic hosts are ignored.

        Raises:
            CheckpointError: If files are missing or contradict one another.
            ConfigError: If an override is out of range.
        """
        hub = {key: value for key, value in kwargs.items() if key in HUB_OPTIONS}
        overrides = {key: value for key, value in kwargs.items() if key in _IMAGE_OVERRIDES}
        path = pretrained_model_name_or_path
        with reading(f"{path}: processor files"):
            return cls._read(path, hub, overrides, kwargs.get("default_system_prompt"))

    @classmethod
    def _read(
        cls,
        path: str | Path,
        hub: dict[str, Any],
        overrides: dict[str, Any],
        system: str | None,
    ) -> "MonoInternVLProcessor":
        tokenizer = load_tokenizer(path, **hub)
        template_file = None
        stored = read_json(find_file(path, PROCESSOR_CONFIG, hub))
        settings = stored.get("image_processor") or read_json(
            find_file(path, PREPROCESSOR_CONFIG, hub)
        )
        if settings.get("image_processor_type") == MonoInternVLImageProcessor.__name__:
            fields = {key: settings[key] for key in _IMAGE_SETTINGS if key in settings}
            if "visual_token_size" in stored:  # where older versions wrote it
                fields["visual_token_size"] = stored["visual_token_size"]
        else:
            released = read_json(find_file(path, CONFIG, hub))
            if not released:
                raise CheckpointError(
                    f"{path}: neither {PROCESSOR_CONFIG} of ours nor {CONFIG}; "
                    "expected a checkpoint"
                )
            like = cls.from_config(MonoInternVLConfig.from_dict(released), tokenizer)
            fields = {key: getattr(like.image_processor, key) for key in _IMAGE_SETTINGS}
        form = stored.get("prompt_form", RELEASED_FORM)
        if stored and (system is None or form == JINJA_FORM):
            template_file = find_file(path, JINJA_FORM, hub)
        if system is None:
            system = stored.get("default_system_prompt", DEFAULT_SYSTEM_PROMPT)
        template = read_bytes(template_file, MAX_TEMPLATE_BYTES) if template_file else None
        return cls(
            MonoInternVLImageProcessor(**{**fields, **overrides}),
            tokenizer,
            chat_template=None if template is None else template.decode(),
            default_system_prompt=system,
            prompt_form=form,
        )

    @property
    def stop_token_ids(self) -> list[int]:
        """Ids that end an answer: `</s>`, `<|im_end|>`, `<|im_start|>`; EOS and the turn's end.

        Source: stop ids of the released template. Differs: the released chat stops on
            `<|im_end|>` only.
        """
        named = [self.tokenizer.control_id(token) for token in self._form.stop_tokens]
        return sorted({*named, self.tokenizer.eos_token_id} - {None})

    @property
    def turn_end_id(self) -> int:
        """Id of the control token that closes an answer."""
        return self.tokenizer.control_id(self._form.turn_end)

    def encode_prompt(
        self,
        messages: Conversation,
        *,
        max_tiles: int | Sequence[int] | None = None,
        share_budget: bool = False,
        on_control: OnControl = "escape",
        answer_start: str = "",
    ) -> BatchFeature:
        """A prompt that is open for an answer.

        Args:
            messages: The conversation; see `prompts.to_turns`.
            max_tiles: Most tiles of an image, or one number for each; None: the processor's own.
            share_budget: Whether the images share `max_tiles` instead of having it each.
            on_control: Whether control tokens in the text become plain text or an error.
            answer_start: What the answer begins with; the model goes on from there.

        Returns:
            `input_ids` and `attention_mask`, int64 (1, T); with images `pixel_values` (N, 3, S, S),
            and `feature_order` where their tokens do not stand tile after tile.

        Raises:
            PromptError: If messages are malformed, or images and placeholders differ in number.
            ImageError: If an image cannot be decoded.
        """
        return self.encode_prompts(
            [messages],
            max_tiles=max_tiles,
            share_budget=share_budget,
            on_control=on_control,
            answer_start=answer_start,
        )

    def encode_prompts(
        self,
        conversations: Sequence[Conversation],
        *,
        max_tiles: int | Sequence[int] | None = None,
        share_budget: bool = False,
        on_control: OnControl = "escape",
        answer_start: str = "",
    ) -> BatchFeature:
        """A batch of prompts, padded on the left; see `encode_prompt`.

        Args:
            max_tiles: One number, or one for each image of all conversations in order.
        """
        if not conversations:
            raise PromptError("conversations: empty; expected at least one")
        limits = TileLimits(max_tiles, self.image_processor.max_tiles)
        rendered, images, image_limits = [], [], []
        for messages in conversations:
            turns = self._checked(to_turns(messages), on_control)
            shown = [source for turn in turns for source in turn.images]
            own = limits.take(len(shown))
            images += shown
            image_limits += [share_tiles(most, len(shown)) for most in own] if share_budget else own
            pieces = self._form.render(
                turns, default_system_prompt=self.default_system_prompt, add_generation_prompt=True
            )
            rendered.append(([*pieces, *open_answer(answer_start)], len(shown)))
        limits.check_used_up()
        pixel_values, layouts = self._cut(images, image_limits)
        rows, position = [], 0
        for pieces, count in rendered:
            rows.append(self._ids(pieces, layouts[position : position + count])[0])
            position += count
        return self._batch(rows, pixel_values, layouts)

    def encode_turn(
        self,
        message: Mapping[str, Any],
        *,
        close_previous: bool = True,
        max_tiles: int | Sequence[int] | None = None,
        on_control: OnControl = "escape",
    ) -> BatchFeature:
        """Only what a new user message adds to a conversation whose keys and values are cached.

        The ids of prompt, answer and this suffix together are those of the whole conversation.

        Args:
            message: The user's message.
            close_previous: Whether the cached answer still lacks its end.
            max_tiles: As in `encode_prompt`.
            on_control: As in `encode_prompt`.

        Returns:
            As `encode_prompt`, without BOS; `attention_mask` covers the new tokens only.
        """
        if message.get("role") != "user":
            raise PromptError(f"message.role={message.get('role')!r}; a new turn is the user's")
        turns = to_turns([message])
        checked = self._checked(turns, on_control)
        pieces = self._form.render_next(checked[0], close_previous=close_previous)
        images = list(turns[0].images)
        limits = TileLimits(max_tiles, self.image_processor.max_tiles)
        own = limits.take(len(images))
        limits.check_used_up()
        pixel_values, layouts = self._cut(images, own)
        return self._batch([self._ids(pieces, layouts, continues=True)[0]], pixel_values, layouts)

    def encode_conversation(
        self,
        messages: Conversation,
        *,
        max_tiles: int | None = None,
        share_budget: bool = True,
        max_tokens: int | None = None,
        on_control: OnControl = "escape",
    ) -> Sample:
        """A training sample: every answer and its `<|im_end|>` are learned, nothing else.

        Outer whitespace of each message is dropped.

        Args:
            messages: The conversation; see `prompts.to_turns`.
            max_tiles: Most tiles of the sample, or of each image if the budget is not shared.
            share_budget: Whether the images of the sample share `max_tiles`.
            max_tokens: Longer samples are cut there; None keeps all.
            on_control: As in `encode_prompt`.

        Raises:
            PromptError: As in `encode_prompt`; also if the cut goes through an image.

        Source: `preprocess_internlm` of the released code. Differs: labels follow character
            offsets, where the released code masks a sample whose pieces tokenize differently alone.
        """
        turns = to_turns(messages, strip=True)
        pieces = self._form.render(
            self._checked(turns, on_control),
            default_system_prompt=self.default_system_prompt,
            add_generation_prompt=False,
        )
        sources = [source for turn in turns for source in turn.images]
        most = self.image_processor.max_tiles if max_tiles is None else max_tiles
        limit = share_tiles(most, len(sources)) if share_budget else most
        pixel_values, layouts = self._cut(sources, [limit] * len(sources))
        ids, labels = self._ids(pieces, layouts)
        if max_tokens is not None and len(ids) > max_tokens:
            ids, labels = ids[:max_tokens], labels[:max_tokens]
            if ids.count(self.tokenizer.control_id(IMAGE_END)) < len(layouts):
                raise PromptError(
                    f"max_tokens={max_tokens} cuts an image; the images have "
                    f"{[layout.num_tokens for layout in layouts]} tokens; raise max_tokens or "
                    "lower max_tiles"
                )
        return Sample(torch.tensor(ids), torch.tensor(labels), pixel_values, tuple(layouts))

    def encode_with_images_of(self, sample: Sample, messages: Conversation) -> Sample:
        """A training sample of another text to the same images, which are not read again.

        Args:
            sample: Whose images these are.
            messages: As `encode_conversation` takes them.

        Returns:
            Ids and labels; the pixels are those of `sample`, and not repeated.

        Raises:
            PromptError: As in `encode_conversation`.
        """
        pieces = self._form.render(
            to_turns(messages, strip=True),
            default_system_prompt=self.default_system_prompt,
            add_generation_prompt=False,
        )
        ids, labels = self._ids(pieces, sample.layouts)
        return Sample(torch.tensor(ids), torch.tensor(labels), None, sample.layouts)

    def encode_document(self, text: str) -> Sample:
        """A text that is learned as a whole, with the end of a text behind it; no template."""
        ids, labels = self._ids([Piece("text", text, is_learned=True)], [])
        if (end := self.tokenizer.eos_token_id) is not None:
            ids, labels = [*ids, end], [*labels, end]
        return Sample(torch.tensor(ids), torch.tensor(labels), None, ())

    def count_text_tokens(self, messages: Conversation) -> int:
        """Tokens of a training sample but for what stands between `<img>` and `</img>`.

        Args:
            messages: As `encode_conversation` takes them; images are not read.
        """
        turns = to_turns(messages, strip=True)
        pieces = self._form.render(
            turns, default_system_prompt=self.default_system_prompt, add_generation_prompt=False
        )
        num_images = sum(len(turn.images) for turn in turns)
        return len(self._ids(pieces, [TokenLayout(0, 0)] * num_images)[0])

    def text_digest(self) -> str:
        """What differs where the same conversation would have other text tokens."""
        sha = hashlib.sha256(self.tokenizer.backend_tokenizer.to_str().encode())
        template = str(self.chat_template)  # of a dated template the date is in it
        for text in (self.prompt_form, self.default_system_prompt, template):
            sha.update(text.encode())
        return sha.hexdigest()[:16]

    def _checked(self, turns: list[Turn], on_control: OnControl) -> list[Turn]:
        if on_control not in ("escape", "raise"):
            raise PromptError(f"on_control={on_control!r}; expected 'escape' or 'raise'")
        if on_control == "raise":
            check_no_control(turns, self.tokenizer.control_tokens)
        return turns

    def _ids(
        self, pieces: Sequence[Piece], layouts: Sequence[TokenLayout], *, continues: bool = False
    ) -> tuple[list[int], list[int]]:
        bos = self._form.adds_bos and not continues
        return encode_pieces(self.tokenizer, pieces, layouts, add_bos=bos, continues=continues)

    def _cut(
        self, images: Sequence[Any], limits: Sequence[int]
    ) -> tuple[torch.Tensor | None, list[TokenLayout]]:
        if not images:
            return None, []
        most = [
            1 if isinstance(source, VideoFrame) else limit
            for source, limit in zip(images, limits, strict=True)
        ]
        features = self.image_processor(list(images), max_tiles=most)
        return features["pixel_values"], features["layouts"]

    def _batch(
        self,
        rows: list[list[int]],
        pixel_values: torch.Tensor | None,
        layouts: Sequence[TokenLayout],
    ) -> BatchFeature:
        batch = pad_left(rows, self.tokenizer.pad_token_id)
        if pixel_values is not None:
            batch["pixel_values"] = pixel_values
        if (order := feature_order(layouts)) is not None:
            batch["feature_order"] = order
        self.check_image_tokens(batch["input_ids"], layouts)
        return BatchFeature(batch)

    def decode_answer(self, ids: Any, *, keep_grounding: bool = False) -> str:
        """The text of a generated answer.

        Args:
            ids: New ids of one row, int64 (T,) or a list.
            keep_grounding: Whether `<ref>`, `<box>` and their like stay in the text.

        Returns:
            The text up to the first turn's end, without control tokens and outer whitespace.
        """
        return decode_answer(self.tokenizer, ids, self.turn_end_id, keep_grounding)
