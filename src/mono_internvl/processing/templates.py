"""How a conversation becomes pieces: the released prompt form, or a language model's own template.

A Jinja template renders one string, in which what somebody typed could pass for a control token.
So each message is rendered as a mark that no template knows, and only what the template itself
wrote around the marks is searched for control tokens; the message takes the mark's place as text.
A system message is shown to the template, which may look for switches in it and remove them: with
stand-ins for the characters that control tokens begin and end with, so that no edit makes one.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import date
from typing import Any, Protocol

from mono_internvl.errors import ConfigError, PromptError
from mono_internvl.processing.bounded_templates import BoundedTemplate, texts_in, unused_characters
from mono_internvl.processing.prompts import (
    GROUNDING_TOKENS,
    TURN_END,
    TURN_START,
    ImagePart,
    Piece,
    Turn,
    image_macros,
    render,
    render_turn,
)
from mono_internvl.processing.tokenizer import MonoInternVLTokenizer

RELEASED_FORM = "internlm2-chat"
"""The form of the released checkpoints, written in `prompts`."""

JINJA_FORM = "chat_template.jinja"
"""The form that the file of this name says; the value of `template` in config.json."""

TEMPLATE_DATE = date(2024, 7, 26)
"""The date that a template gets in place of today's; Llama's own templates fall back to it."""

_TODAY = re.compile(r"""strftime_now\s*\(\s*(?P<quote>['"])(?P<format>[^'"]*)(?P=quote)\s*\)""")
_HAS_SPANS = re.compile(r"{%-?\s*generation\s*-?%}")


class PromptForm(Protocol):
    """A way to write conversations.

    Attributes:
        adds_bos: Whether BOS is put in front of what is rendered.
        turn_end: Control token that closes an answer.
        stop_tokens: Control tokens that end generation, besides the tokenizer's EOS.
    """

    adds_bos: bool
    turn_end: str
    stop_tokens: tuple[str, ...]

    def render(
        self, turns: Sequence[Turn], *, default_system_prompt: str, add_generation_prompt: bool
    ) -> list[Piece]:
        """A conversation as pieces; answers and what closes them are marked as learned."""

    def render_next(self, turn: Turn, *, close_previous: bool) -> list[Piece]:
        """What a user's turn adds to a conversation that ends with an answer, up to the next one.

        Args:
            turn: The user's.
            close_previous: Whether the answer before it still lacks its end.
        """


class ReleasedForm:
    """The prompt form of the released checkpoints."""

    adds_bos = True
    turn_end = TURN_END
    stop_tokens: tuple[str, ...] = (TURN_END, TURN_START)

    def __init__(self, tokenizer: MonoInternVLTokenizer) -> None:
        for token in self.stop_tokens:
            tokenizer.control_id(token)

    def render(
        self, turns: Sequence[Turn], *, default_system_prompt: str, add_generation_prompt: bool
    ) -> list[Piece]:
        return render(
            turns,
            default_system_prompt=default_system_prompt,
            add_generation_prompt=add_generation_prompt,
        )

    def render_next(self, turn: Turn, *, close_previous: bool) -> list[Piece]:
        pieces = [Piece("control", TURN_END)] if close_previous else []
        pieces += render_turn(turn)
        return [*pieces, Piece("control", TURN_START), Piece("text", "assistant\n")]


class JinjaForm:
    """The prompt form of a language model's own chat template.

    What is learned: what the template marks with `{% generation %}`; where it has no such marks, an
    answer and the first control token after it.

    Args:
        source: The template.
        tokenizer: Of the model; says what control tokens are.

    Raises:
        ConfigError: The template cannot be read, leaves messages out, or closes answers with no
            control token.
    """

    adds_bos = False

    def __init__(self, source: str, tokenizer: MonoInternVLTokenizer) -> None:
        self._source = source
        try:
            self._template = BoundedTemplate(source)
        except Exception as error:  # Jinja's own, and Python's while it compiles
            raise ConfigError(f"chat template: {_first_line(error)}; give another one") from error
        names = sorted(tokenizer.control_tokens, key=len, reverse=True)
        self._control = re.compile("(" + "|".join(map(re.escape, names)) + ")")
        self._names = {
            name: getattr(tokenizer, name) or ""
            for name in ("bos_token", "eos_token", "unk_token", "pad_token")
        }
        self._edges = sorted({edge for name in names for edge in (name[0], name[-1])})
        self._has_spans = bool(_HAS_SPANS.search(source))
        exchange = (Turn("user", ("Q",)), Turn("assistant", ("A",)))
        try:
            pieces = self.render(exchange, default_system_prompt="", add_generation_prompt=False)
        except PromptError as error:
            raise ConfigError(f"chat template: {error}; give another one") from error
        learned = [piece for piece in pieces if piece.is_learned]
        ends = [piece.text for piece in learned if piece.kind == "control"]
        if not ends:
            raise ConfigError(
                "chat template: no control token closes an answer, so a model could not learn to "
                "stop; expected one of the tokenizer's special tokens after it, give another "
                "template"
            )
        self.turn_end = ends[-1]
        self.stop_tokens = (self.turn_end,)

    def render(
        self, turns: Sequence[Turn], *, default_system_prompt: str, add_generation_prompt: bool
    ) -> list[Piece]:
        turns = list(turns)
        if default_system_prompt and turns and turns[0].role != "system":
            turns.insert(0, Turn("system", (default_system_prompt,)))
        if turns and turns[-1].role == "assistant" and not turns[-1].parts:
            turns.pop()  # an answer still to be given
            add_generation_prompt = True
        return list(self._pieces(turns, add_generation_prompt))

    def render_next(self, turn: Turn, *, close_previous: bool) -> list[Piece]:
        before = [Turn("user", ("Q",)), Turn("assistant", ("A",))]
        pieces = list(self._pieces([*before, turn], add_generation_prompt=True))
        answer = next(i for i, piece in enumerate(pieces) if piece.is_learned and piece.text == "A")
        end = next(
            i
            for i, piece in enumerate(pieces[answer:], start=answer)
            if piece.kind == "control" and piece.text == self.turn_end
        )
        return pieces[answer + 1 :] if close_previous else pieces[end + 1 :]

    def check_conversation(self, messages: Sequence[Any], **options: Any) -> None:
        """Refuses messages of which the template would make control tokens, before a host renders.

        A host puts what was typed into the template as it is. So it is rendered here as well, once
        more with stand-ins for the characters that control tokens begin and end with: the control
        tokens must be the same. The bounds of time and size hold for the host in this way, too.

        Args:
            messages: As hosts have them, contents as text or in parts.
            **options: What else the template gets.

        Raises:
            PromptError: The template makes a control token of text, or cannot render.
        """
        *others, gap = unused_characters(len(self._edges) + 1, self._source, *texts_in(messages))
        hidden = str.maketrans(dict(zip(self._edges, others, strict=True)))
        known = {k: v for k, v in options.items() if isinstance(v, str | int | float)}

        def control_tokens(change: Callable[[str], str]) -> list[str]:
            rendered, _ = self._rendered(_with_texts(messages, change), **known)
            return self._control.findall(rendered)

        def untyped(text: str) -> str:
            return self._control.sub(gap, text)

        if control_tokens(untyped) != control_tokens(lambda text: untyped(text).translate(hidden)):
            raise PromptError(
                "messages: the chat template would make a control token of what is left of a text; "
                "remove what looks like one"
            )

    def _pieces(self, turns: Sequence[Turn], add_generation_prompt: bool) -> Iterator[Piece]:
        """The template's own text cut at control tokens, with the messages in their places."""
        systems = [turn.text for turn in turns if turn.role == "system"]
        opening, closing, *others = unused_characters(2 + len(self._edges), self._source, *systems)
        stand_ins = dict(zip(self._edges, others, strict=True))
        shown_as = str.maketrans(stand_ins)
        typed = str.maketrans({other: edge for edge, other in stand_ins.items()})
        rendered, spans = self._render(turns, add_generation_prompt, opening, closing, shown_as)
        position, shown, open_answer = 0, [], False
        for mark in [*re.finditer(f"{opening}([0-9]{{1,9}}){closing}", rendered), None]:
            stop = mark.start() if mark else len(rendered)
            for start, end, is_spanned in _cut(position, stop, spans):
                for text in filter(None, self._control.split(rendered[start:end])):
                    is_control = bool(self._control.fullmatch(text))
                    is_learned = is_spanned if self._has_spans else open_answer
                    written = text.translate(typed)
                    yield Piece("control" if is_control else "text", written, is_learned)
                    open_answer = open_answer and not is_control
            if mark is None:
                break
            shown.append(int(mark[1]))
            if shown[-1] >= len(turns):
                break  # a template that makes marks of its own
            turn, position = turns[shown[-1]], mark.end()
            open_answer = turn.role == "assistant"
            is_learned = open_answer
            if self._has_spans:
                is_learned = any(first <= stop < last for first, last in spans)
            yield from _message(turn, is_learned)
        expected = [i for i, turn in enumerate(turns) if turn.role != "system"]
        if [i for i in shown if i >= len(turns) or turns[i].role != "system"] != expected:
            raise PromptError(
                f"the chat template shows messages {shown} of {len(turns)}; expected each of them "
                "once and in order"
            )

    def _render(
        self,
        turns: Sequence[Turn],
        add_generation_prompt: bool,
        opening: str,
        closing: str,
        shown_as: dict[int, str],
    ) -> tuple[str, list[tuple[int, int]]]:
        messages = []
        for number, turn in enumerate(turns):
            content = f"{opening}{number}{closing}"
            if turn.role == "system" and not self._control.search(turn.text):
                content = turn.text.translate(shown_as)  # templates look for switches in it
            messages.append({"role": turn.role, "content": content})
        return self._rendered(messages, add_generation_prompt=add_generation_prompt)

    def _rendered(
        self, messages: Sequence[Any], **options: Any
    ) -> tuple[str, list[tuple[int, int]]]:
        try:
            variables = {"tools": None, "documents": None, **self._names, **options}
            return self._template.render(messages=messages, **variables)
        except Exception as error:  # of the template, or of Python while it runs
            roles = ", ".join(str(dict(message).get("role")) for message in messages[:8])
            raise PromptError(
                f"messages: the chat template refuses {roles}: {_first_line(error)}"
            ) from error


def _with_texts(value: Any, change: Callable[[str], str], key: str = "") -> Any:
    """Plain messages with every text changed; roles and the kinds of parts are no texts."""
    if isinstance(value, str):
        return value if key in ("role", "type") else change(value)
    if isinstance(value, Mapping):
        return {name: _with_texts(item, change, name) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_with_texts(item, change) for item in value]
    return value if value is None or isinstance(value, int | float) else ""


def _first_line(error: Exception) -> str:
    said = str(error).strip().splitlines()
    return said[0][:300] if said else type(error).__name__


def _cut(
    start: int, stop: int, spans: Sequence[tuple[int, int]]
) -> Iterator[tuple[int, int, bool]]:
    """The stretches of (start, stop) inside and outside of the spans, in order."""
    edges = sorted({start, stop, *(x for span in spans for x in span if start < x < stop)})
    for first, last in itertools.pairwise(edges):
        yield first, last, any(a <= first and last <= b for a, b in spans)


def _message(turn: Turn, is_learned: bool) -> Iterator[Piece]:
    grounding = re.compile("(" + "|".join(map(re.escape, GROUNDING_TOKENS)) + ")")
    for part in turn.parts:
        if isinstance(part, ImagePart):
            yield Piece("image")
            continue
        for text in filter(None, grounding.split(part)):
            yield Piece("control" if text in GROUNDING_TOKENS else "text", text, is_learned)


def adapt_template(template: str, today: date | None = TEMPLATE_DATE) -> str:
    """A language model's template for messages with images, as hosts hand them over in parts.

    Images become `<IMG_CONTEXT>`, placed as `prompts.to_turns` places them; what the template gets
    to see is plain text. Reasoning models are told to answer at once unless asked otherwise.

    A template that prints today's date gets a fixed one: else the same samples would have other
    ids tomorrow, and a killed run would not go on to the same numbers.

    Args:
        template: Jinja.
        today: The date that it gets; None leaves it the clock.

    Raises:
        ConfigError: It asks for the date in a form that is not written out.
    """
    if today is not None:
        template = _TODAY.sub(lambda call: json.dumps(today.strftime(call["format"])), template)
        if re.search(r"strftime_now\s*\(", template):
            raise ConfigError(
                "chat template: prints today's date in a form that it computes; expected "
                'strftime_now("...") with the form written out, give another template or '
                "--template-date today"
            )
    return image_macros() + _PLAIN_MESSAGES + template


# Jinja ignores the line breaks and indentation here: every tag strips the whitespace around it.
_PLAIN_MESSAGES = """
{%- if enable_thinking is not defined -%}{%- set enable_thinking = false -%}{%- endif -%}
{%- set plain = namespace(messages=[]) -%}
{%- for message in messages -%}
  {%- set text = question(message.content) if message.role == 'user' else none -%}
  {%- if message.role != 'user' -%}{%- set text = text_of(message.content) -%}{%- endif -%}
  {%- set plain.messages = plain.messages + [dict(message, content=text)] -%}
{%- endfor -%}
{%- set messages = plain.messages -%}
"""


def prompt_form(
    name: str, template: str | None, tokenizer: MonoInternVLTokenizer
) -> ReleasedForm | JinjaForm:
    """The form by its name in processor_config.json and, as `template`, in config.json.

    Raises:
        ConfigError: There is none of that name, or its template is missing or of no use.
    """
    if name == RELEASED_FORM:
        return ReleasedForm(tokenizer)
    if name != JINJA_FORM or template is None:
        raise ConfigError(
            f"prompt_form={name!r} with {'a' if template else 'no'} chat template; expected "
            f"{RELEASED_FORM!r}, or {JINJA_FORM!r} with the template"
        )
    return JinjaForm(template, tokenizer)
