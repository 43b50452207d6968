"""Messages -> turns -> pieces: which text, which control token and which image stands where.

A conversation is rendered to pieces, not to one string, so that a control token is always a
decision of the template and never an accident of what somebody typed. The Jinja template for
generic hosts renders the same prompts as strings.
"""

import base64
import binascii
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mono_internvl.errors import PromptError

BOS, EOS, UNK = "<s>", "</s>", "<unk>"
TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"
IMAGE_START, IMAGE_END, IMAGE_CONTEXT = "<img>", "</img>", "<IMG_CONTEXT>"
IMAGE_PLACEHOLDER = "<image>"
"""Stands for an image in the text of a question; ordinary text everywhere else."""

CHAT_TOKENS = (
    "<|plugin|>",
    "<|interpreter|>",
    "<|action_end|>",
    "<|action_start|>",
    TURN_END,
    TURN_START,
)
"""Control tokens of the chat language model, in the order of their ids."""

GROUNDING_TOKENS = ("<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>")
"""Control tokens that questions, answers and data may contain."""

VISUAL_TOKENS = (IMAGE_START, IMAGE_END, IMAGE_CONTEXT, *GROUNDING_TOKENS)
"""The nine control tokens appended for vision, in the order of their ids."""

SPECIAL_TOKENS = (UNK, BOS, EOS, *CHAT_TOKENS, *VISUAL_TOKENS)

DEFAULT_SYSTEM_PROMPT = (
    "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, "
    "是一个有用无害的人工智能助手。"
)
"""System message of the released checkpoints, used when a conversation brings none."""

SUPPORTED_TEMPLATES = (None, "internlm2-chat", "Hermes-2")
"""Values of a released `template` field that mean the prompt form written here."""

_WHITESPACE = " \n\t"
_GROUNDING = re.compile("(" + "|".join(re.escape(token) for token in GROUNDING_TOKENS) + ")")
_BOX = re.compile(r"\[\s*" + r"\s*,\s*".join([r"(\d{1,6}(?:\.\d{1,6})?)"] * 4) + r"\s*\]")

OnControl = Literal["escape", "raise"]


@dataclass(frozen=True)
class ImagePart:
    """An image in a turn, still undecoded."""

    source: Any


@dataclass(frozen=True)
class Turn:
    """One message: who speaks, and texts and images in order."""

    role: str
    parts: tuple[str | ImagePart, ...]

    @property
    def images(self) -> tuple[Any, ...]:
        """Sources of the turn's images in order."""
        return tuple(part.source for part in self.parts if isinstance(part, ImagePart))

    @property
    def text(self) -> str:
        """The turn's text without its images."""
        return "".join(part for part in self.parts if isinstance(part, str))


Conversation = Sequence[Mapping[str, Any] | Turn]
"""Messages in transformers' form, or turns that a record was parsed to."""


@dataclass(frozen=True)
class Piece:
    """A stretch of a rendered conversation.

    Attributes:
        kind: `"text"` never becomes a control token, `"control"` is one, `"image"` is a slot for
            an image.
        text: The text, or the name of the control token.
        is_learned: Whether training learns it: answers and the `<|im_end|>` that closes them.
    """

    kind: Literal["text", "control", "image"]
    text: str = ""
    is_learned: bool = False


def to_turns(messages: Conversation, *, strip: bool = False) -> list[Turn]:
    """Validates messages and puts every image in its place; turns are taken as they are.

    Images of a message stand where `<image>` stands in its text. Without placeholders they stand
    where their parts stand; several in front of the text are numbered, as in the released
    multi-image chat.

    Args:
        messages: `{"role": "system" | "user" | "assistant", "content": str | parts}`, or turns.
        strip: Whether outer whitespace of every text is dropped, as in training.

    Returns:
        The turns; a system turn is first if there is one.

    Raises:
        PromptError: If roles or parts are malformed, or placeholders and images differ in number.
    """
    if not messages:
        raise PromptError("messages: empty; expected at least one message")
    turns = []
    for index, message in enumerate(messages):
        turn = message if isinstance(message, Turn) else _to_turn(message, index)
        if turn.role == "system" and index:
            raise PromptError(f"messages[{index}]: a system message must be the first one")
        turns.append(Turn(turn.role, _strip_outer(turn.parts)) if strip else turn)
    return turns


def render(
    turns: Sequence[Turn], *, default_system_prompt: str, add_generation_prompt: bool
) -> list[Piece]:
    """A conversation as pieces, BOS not included.

    An empty answer leaves its turn open (role only), as in the released code.

    Args:
        turns: Turns in order.
        default_system_prompt: Used where no system turn is given; empty leaves the block out.
        add_generation_prompt: Whether the prompt ends with an open assistant turn.
    """
    turns = list(turns)
    system = turns.pop(0).text if turns and turns[0].role == "system" else default_system_prompt
    pieces: list[Piece] = []
    if system:
        pieces += render_turn(Turn("system", (system,)))
    for turn in turns:
        pieces += render_turn(turn)
    if add_generation_prompt:
        pieces += [Piece("control", TURN_START), Piece("text", "assistant\n")]
    return pieces


def render_turn(turn: Turn) -> list[Piece]:
    """One turn as pieces; the answer of an assistant and its end are marked as learned."""
    is_answer = turn.role == "assistant"
    pieces = [Piece("control", TURN_START), Piece("text", f"{turn.role}\n")]
    if is_answer and not turn.text:
        return pieces
    for part in turn.parts:
        if isinstance(part, ImagePart):
            pieces.append(Piece("image"))
            continue
        for text in _GROUNDING.split(part) if turn.role != "system" else [part]:
            if text:
                kind: Literal["text", "control"] = "control" if text in GROUNDING_TOKENS else "text"
                pieces.append(Piece(kind, text, is_answer))
    pieces.append(Piece("control", TURN_END, is_answer))
    return pieces


def open_answer(text: str) -> list[Piece]:
    """The beginning of an answer that a model is to go on with, behind an open assistant turn."""
    return [
        Piece("control" if part in GROUNDING_TOKENS else "text", part)
        for part in _GROUNDING.split(text)
        if part
    ]


def check_no_control(turns: Iterable[Turn], control_tokens: Iterable[str]) -> None:
    """Refuses control tokens in the text of turns; grounding tokens are allowed.

    Raises:
        PromptError: Naming the token and the role.
    """
    reserved = [token for token in control_tokens if token not in GROUNDING_TOKENS]
    for turn in turns:
        for token in reserved:
            if token in turn.text:
                raise PromptError(
                    f"{turn.role} message: contains the control token {token!r}; remove it, or use "
                    'on_control="escape" to have it treated as text'
                )


def texts_of(messages: Iterable[Mapping[str, Any]]) -> list[Turn]:
    """The text of messages, read leniently: images and malformed parts are left out."""
    turns = []
    for message in messages:
        content = message.get("content")
        parts = [content] if isinstance(content, str) else content or ()
        texts = [part.get("text") if isinstance(part, Mapping) else part for part in parts]
        kept = tuple(text for text in texts if isinstance(text, str))
        turns.append(Turn(str(message.get("role")), kept))
    return turns


def chat_template(default_system_prompt: str = DEFAULT_SYSTEM_PROMPT) -> str:
    """The Jinja template that renders what `render` does, an image as `<IMG_CONTEXT>`.

    BOS comes first where the tokenizer has one: hosts that render with a template encode the result
    without adding any. Answers and their ends are marked with `{% generation %}`, for trainers that
    learn those only.

    Args:
        default_system_prompt: Used where a conversation has no system message; empty leaves it out.
    """
    return _TEMPLATE.replace(
        "DEFAULT_SYSTEM", json.dumps(default_system_prompt, ensure_ascii=False)
    )


def image_macros() -> str:
    """The Jinja macros that put images in their places: `question(content)`, `text_of(content)`."""
    return _TEMPLATE.partition("{%- set system =")[0]


def parse_boxes(text: str) -> list[tuple[int, int, int, int]]:
    """Boxes (x1, y1, x2, y2) in a text, in units of 1/1000 of the image's width and height.

    Found by their brackets, whether `<box>` and `</box>` were kept or not, and returned as they are
    written: edges may lie beyond the image or in the wrong order.
    """
    return [
        (round(float(x1)), round(float(y1)), round(float(x2)), round(float(y2)))
        for x1, y1, x2, y2 in _BOX.findall(text)
    ]


def _to_turn(message: Mapping[str, Any], index: int) -> Turn:
    role, content = message.get("role"), message.get("content")
    if role not in ("system", "user", "assistant"):
        raise PromptError(
            f"messages[{index}].role={role!r}; expected 'system', 'user' or 'assistant'"
        )
    if not isinstance(content, Sequence):
        raise PromptError(
            f"messages[{index}].content is a {type(content).__name__}; "
            "expected text or a list of parts"
        )
    parts: list[str | ImagePart] = [content] if isinstance(content, str) else []
    if not parts:
        parts = [part for part in (_read_part(part, index) for part in content) if part != ""]
    if role == "user":
        parts = _place_images(parts, index)
    elif any(isinstance(part, ImagePart) for part in parts):
        raise PromptError(
            f"messages[{index}]: an image in a {role} message; only users show images"
        )
    return Turn(role, tuple(parts))


def _read_part(part: Any, index: int) -> str | ImagePart:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    if kind == "image_url":
        link = part.get("image_url")
        source = link.get("url") if isinstance(link, Mapping) else link
        if source is not None:
            return ImagePart(source)
    if kind == "image":
        for key in ("image", "path", "url"):
            if part.get(key) is not None:
                return ImagePart(part[key])
        if isinstance(part.get("base64"), str):
            try:
                return ImagePart(base64.b64decode(part["base64"], validate=True))
            except binascii.Error as error:
                raise PromptError(
                    f"messages[{index}]: image part is not base64 ({error})"
                ) from error
    raise PromptError(
        f"messages[{index}].content: part of type {kind!r} is not understood; expected "
        '{"type": "text", "text": ...} or {"type": "image", "image": ...}'
    )


def _place_images(parts: list[str | ImagePart], index: int) -> list[str | ImagePart]:
    """Parts of a user message with images in their final places, and the text around them."""
    images = [part for part in parts if isinstance(part, ImagePart)]
    texts = [part for part in parts if isinstance(part, str)]
    placeholders = sum(text.count(IMAGE_PLACEHOLDER) for text in texts)
    if placeholders:
        if placeholders != len(images):
            raise PromptError(
                f"messages[{index}]: {placeholders} {IMAGE_PLACEHOLDER} placeholders but "
                f"{len(images)} images; write one placeholder for each image, or none at all"
            )
        return _fill_placeholders("".join(texts), images)
    if not images:
        return parts
    if all(isinstance(part, ImagePart) for part in parts[: len(images)]):
        return [*_image_header(images), "\n" + "".join(texts)]
    out: list[str | ImagePart] = []
    for part in parts:
        previous = out[-1] if out else None
        if isinstance(part, ImagePart):
            touches_text = isinstance(previous, str) and previous[-1] not in _WHITESPACE
            needs_break = touches_text or isinstance(previous, ImagePart)
        else:
            needs_break = isinstance(previous, ImagePart) and part[0] not in _WHITESPACE
        out += ["\n", part] if needs_break else [part]
    return out


def _fill_placeholders(text: str, images: list[ImagePart]) -> list[str | ImagePart]:
    first, *rest = text.split(IMAGE_PLACEHOLDER)
    out: list[str | ImagePart] = [first]
    for image, following in zip(images, rest, strict=True):
        out += [image, following]
    return [part for part in out if part != ""]


def _image_header(images: list[ImagePart]) -> list[str | ImagePart]:
    if len(images) == 1:
        return [images[0]]
    header: list[str | ImagePart] = []
    for number, image in enumerate(images, start=1):
        header += [f"<image {number}> (图{number}):", image]
    return header


def _strip_outer(turn_parts: Sequence[str | ImagePart]) -> tuple[str | ImagePart, ...]:
    parts = list(turn_parts)
    if parts and isinstance(parts[0], str):
        parts[0] = parts[0].lstrip()
    if parts and isinstance(parts[-1], str):
        parts[-1] = parts[-1].rstrip()
    return tuple(part for part in parts if part != "")


# Jinja ignores the line breaks and indentation here: every tag strips the whitespace around it.
_TEMPLATE = """
{%- macro is_image(part) -%}
  {{- 'yes' if part.type in ['image', 'image_url'] else '' -}}
{%- endmacro -%}
{%- macro text_of(content) -%}
  {%- if content is string -%}
    {{- content -}}
  {%- else -%}
    {%- for part in content if part.type == 'text' -%}{{- part.text -}}{%- endfor -%}
  {%- endif -%}
{%- endmacro -%}
{%- macro question(content) -%}
  {%- set text = text_of(content) -%}
  {%- set ns = namespace(images=0, leading=true, number=0, last='') -%}
  {%- if content is not string -%}
    {%- for part in content -%}
      {%- if is_image(part) -%}
        {%- set ns.images = ns.images + 1 -%}
        {%- if ns.last -%}{%- set ns.leading = false -%}{%- endif -%}
      {%- elif part.text -%}
        {%- set ns.last = part.text -%}
      {%- endif -%}
    {%- endfor -%}
  {%- endif -%}
  {%- if '<image>' in text -%}
    {{- text | replace('<image>', '<IMG_CONTEXT>') -}}
  {%- elif not ns.images -%}
    {{- text -}}
  {%- elif ns.leading -%}
    {%- for number in range(1, ns.images + 1) -%}
      {{- '<image ' ~ number ~ '> (图' ~ number ~ '):' if ns.images > 1 else '' -}}
      {{- '<IMG_CONTEXT>' -}}
    {%- endfor -%}
    {{- '\\n' ~ text -}}
  {%- else -%}
    {%- set ns.last = '' -%}
    {%- for part in content -%}
      {%- if is_image(part) -%}
        {{- '\\n' if ns.last and ns.last[-1] not in ' \\n\\t' else '' -}}
        {{- '<IMG_CONTEXT>' -}}
        {%- set ns.last = '<IMG_CONTEXT>' -%}
      {%- elif part.text -%}
        {{- '\\n' if ns.last == '<IMG_CONTEXT>' and part.text[0] not in ' \\n\\t' else '' -}}
        {{- part.text -}}
        {%- set ns.last = part.text -%}
      {%- endif -%}
    {%- endfor -%}
  {%- endif -%}
{%- endmacro -%}
{%- set system = DEFAULT_SYSTEM -%}
{{- bos_token or '' -}}
{%- if messages[0].role == 'system' -%}
  {%- set system = text_of(messages[0].content) -%}
{%- endif -%}
{%- if system -%}{{- '<|im_start|>system\\n' ~ system ~ '<|im_end|>' -}}{%- endif -%}
{%- for message in messages -%}
  {%- if message.role == 'user' -%}
    {{- '<|im_start|>user\\n' ~ question(message.content) ~ '<|im_end|>' -}}
  {%- elif message.role == 'assistant' -%}
    {%- set answer = text_of(message.content) -%}
    {{- '<|im_start|>assistant\\n' -}}
    {%- if answer -%}
      {%- generation -%}{{- answer ~ '<|im_end|>' -}}{%- endgeneration -%}
    {%- endif -%}
  {%- elif message.role != 'system' or not loop.first -%}
    {{- raise_exception('unexpected role ' ~ message.role) -}}
  {%- endif -%}
{%- endfor -%}
{{- '<|im_start|>assistant\\n' if add_generation_prompt else '' -}}
"""
