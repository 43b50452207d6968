"""Jinja for templates that come with a checkpoint: sandboxed, and bounded in time and memory.

Jinja's sandbox keeps a template from the machine, not from working for ever: loops nest, a string
times a number fills the memory. Here every turn of a loop and every call is a step of a budget, and
whatever makes text longer looks at the length before it makes it. What cannot be bounded that way
(padding to a width, filler text) is not there; no known chat template uses it.

The rest is as transformers renders chat templates: trimmed blocks, `raise_exception`,
`strftime_now`, JSON without HTML escapes, `{% generation %}` around what is learned.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from typing import Any

from jinja2 import Template, nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

MAX_STEPS = 1_000_000
"""Turns of loops and calls of one rendering."""

MAX_SECONDS = 5.0
"""CPU time of one rendering; the longest of the known templates take milliseconds."""

MAX_CHARACTERS = 4 << 20
"""Longest text or list that a template makes, besides eight times what it was given."""

_MAX_INTEGER_BITS = 64
_MAX_INDENT = 16
_FILTERS = (
    *("abs", "capitalize", "count", "d", "default", "dictsort", "e", "escape", "first", "float"),
    *("int", "items", "last", "length", "list", "lower", "map", "max", "min", "reject"),
    *("rejectattr", "reverse", "round", "safe", "select", "selectattr", "sort", "title", "trim"),
    *("unique", "upper", "wordcount"),
)
_TEXT_METHODS = frozenset(
    (
        *("capitalize", "count", "endswith", "find", "format", "index", "isalnum", "isalpha"),
        *("isdecimal", "isdigit", "islower", "isnumeric", "isspace", "istitle", "isupper", "join"),
        *("lower", "lstrip", "partition", "removeprefix", "removesuffix", "replace", "rfind"),
        *("rindex", "rpartition", "rsplit", "rstrip", "split", "splitlines", "startswith"),
        *("strip", "swapcase", "title", "upper"),
    )
)
# A width of five digits, or one that is an argument.
_WIDE_FORMAT = re.compile(r"\d{5}|%[^%]*\*|\{[^{}]*\{")


class TemplateLimit(TemplateError):
    """A template works longer, or makes more, than any chat template has to."""


@dataclass
class _Budget:
    """What one rendering may still do, and where its learned text lies."""

    size: int
    steps: int = MAX_STEPS
    deadline: float = field(default_factory=lambda: time.thread_time() + MAX_SECONDS)
    spans: list[str] = field(default_factory=list)

    def step(self) -> None:
        self.steps -= 1
        if self.steps < 0:
            raise TemplateLimit(f"more than {MAX_STEPS} turns of loops and calls")
        if time.thread_time() > self.deadline:
            raise TemplateLimit(f"more than {MAX_SECONDS:g} s")

    def check(self, size: int) -> None:
        if size > self.size:
            raise TemplateLimit(f"text or list of {size}, more than {self.size}")


_budget: ContextVar[_Budget] = ContextVar("budget")


def _size_of(value: Any, enough: int) -> int:
    """Characters and elements of nested values; counting ends above `enough`."""
    size, pending = 0, [value]
    while pending and size <= enough:
        one = pending.pop()
        size += 1
        if isinstance(one, str):
            size += len(one)
        elif isinstance(one, Mapping):
            size += len(one)
            if size <= enough:
                pending += [*one.keys(), *one.values()]
        elif isinstance(one, list | tuple):
            size += len(one)
            if size <= enough:
                pending += one
    return size


def _check_size(value: Any, times: int = 1) -> None:
    budget = _budget.get(None)
    if budget is not None:
        budget.check(_size_of(value, budget.size) * times)


def _each(iterable: Iterable[Any]) -> Iterator[Any]:
    """What a loop runs over, a step for every turn."""
    for item in iterable:
        _budget.get().step()
        yield item


def _concat(parts: Iterable[str]) -> str:
    kept: list[str] = []
    size, budget = 0, _budget.get(None)
    for part in parts:
        kept.append(part)
        size += len(part)
        if budget is not None:
            budget.check(size)
    return "".join(kept)


def _join(values: Iterable[Any], d: str = "", attribute: Any = None) -> str:
    items = list(values)
    if attribute is not None:
        items = [item[attribute] for item in items]
    _check_size([*items, str(d) * min(len(items), 1)], times=1)
    _check_size(str(d), times=max(len(items), 1))
    return str(d).join(str(item) for item in items)


def _string(value: Any) -> str:
    _check_size(value)
    return str(value)


def _replace(text: str, old: str, new: str, count: int = -1) -> str:
    text, old, new = str(text), str(old), str(new)
    found = text.count(old) if count is None or count < 0 else min(text.count(old), count)
    budget = _budget.get(None)
    if budget is not None:
        budget.check(len(text) + found * len(new))
    return text.replace(old, new, -1 if count is None else count)


def _format(text: str, *args: Any, **kwargs: Any) -> str:
    _check_format(text, [*args, *kwargs.values()])
    return str(text) % (kwargs or args)


def _check_format(text: str, values: Any) -> None:
    if _WIDE_FORMAT.search(text):
        raise TemplateLimit(f"format {text!r:.60} with a wide or computed width")
    _check_size([text, values], times=1 + text.count("%") + text.count("{"))


def _narrow(width: int) -> int:
    if width > _MAX_INDENT:
        raise TemplateLimit(f"indentation of {width}")
    return int(width)


def _indent(text: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    margin = width if isinstance(width, str) else " " * _narrow(width)
    _check_size(text)
    _check_size(margin, times=1 + text.count("\n"))
    lines = [margin + line if line or blank else line for line in text.split("\n")]
    return "\n".join(lines if first else [text.split("\n")[0], *lines[1:]])


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    _check_size(value, times=1 if indent is None else 64)  # indentation grows with the nesting
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=None if indent is None else _narrow(indent),
        separators=separators,
        sort_keys=sort_keys,
    )


def _refuse(message: Any = "") -> None:
    raise TemplateError(str(message))


class _PlainNamespace(Namespace):
    """A namespace without names that begin with an underscore."""

    def __setitem__(self, name: str, value: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise SecurityError(f"{name!r} cannot be set on a namespace")
        super().__setitem__(name, value)


class _Generator(CodeGenerator):
    """Compiles loops and concatenations so that they count."""

    def visit_For(self, node: nodes.For, frame: Frame) -> None:
        node.iter = _call("each", node.iter)
        super().visit_For(node, frame)

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.visit(_call("join", nodes.List(node.nodes)), frame)


def _call(name: str, value: Any) -> nodes.Call:
    """The call of a function of the environment."""
    return nodes.Call(nodes.EnvironmentAttribute(name), [value], [], None, None)


class _LearnedSpans(Extension):
    """`{% generation %}`: what stands in it is learned.

    Its text is put between marks of the rendering, which are taken out at the end: only then is
    known where it lies.
    """

    tags = {"generation"}  # noqa: RUF012 - as the base class

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        block = nodes.CallBlock(self.call_method("_mark"), [], [], body)
        return block.set_lineno(line)

    def _mark(self, caller: Callable[[], str]) -> str:
        start, end = _budget.get().spans
        return f"{start}{caller()}{end}"


class _BoundedEnvironment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, with every loop, call and growing text on a budget."""

    code_generator_class = _Generator
    intercepted_binops = frozenset(("+", "*", "**", "%"))
    concat = staticmethod(_concat)
    each = staticmethod(_each)
    join = staticmethod(_join)

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_LearnedSpans, loopcontrols]
        )
        self.finalize = self._finalize
        self.filters = {name: self.filters[name] for name in _FILTERS}
        self.filters.update(
            join=_join,
            string=_string,
            replace=_replace,
            format=_format,
            indent=_indent,
            tojson=_to_json,
        )
        self.globals = {
            "range": self.globals["range"],
            "dict": lambda *args, **kwargs: dict(*args, **kwargs),
            "namespace": _PlainNamespace,
            "raise_exception": _refuse,
            "strftime_now": lambda form: datetime.now().strftime(form),
        }

    @staticmethod
    def _finalize(value: Any) -> Any:
        if not isinstance(value, str):
            _check_size(value)
        return value

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, str) and attr not in _TEXT_METHODS:
            return False
        return super().is_safe_attribute(obj, attr, value)

    def call(self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        _budget.get().step()
        owner, name = getattr(__obj, "__self__", None), getattr(__obj, "__name__", "")
        if isinstance(owner, str):
            if name == "replace":
                __obj = partial(_replace, owner)
            elif name == "join":
                __obj = partial(_join, d=owner)
        return super().call(__context, __obj, *args, **kwargs)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None

        def checked(*args: Any, **kwargs: Any) -> str:
            _check_format(value.__self__, [*args, *kwargs.values()])
            return wrapped(*args, **kwargs)

        return checked

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        _budget.get().step()
        numbers = [x for x in (left, right) if isinstance(x, int)]
        sized = [x for x in (left, right) if isinstance(x, Sized)]
        if operator == "%" and isinstance(left, str):
            _check_format(left, right)
        elif operator == "+" and len(sized) == 2:
            _budget.get().check(len(left) + len(right))
        elif operator == "*" and sized and numbers:
            _budget.get().check(len(sized[0]) * max(numbers[0], 0))
        elif operator == "**" and len(numbers) == 2:
            _check_bits(abs(left).bit_length() * abs(right))
        elif len(numbers) == 2:
            _check_bits(max(abs(left).bit_length(), abs(right).bit_length()))
        return super().call_binop(context, operator, left, right)


def _check_bits(bits: int) -> None:
    if bits > _MAX_INTEGER_BITS:
        raise TemplateLimit("numbers too large to count anything")


_ENVIRONMENT = _BoundedEnvironment()


class BoundedTemplate:
    """A chat template.

    Args:
        source: Jinja.

    Raises:
        jinja2.TemplateError: It cannot be read, or uses what is not there.
    """

    def __init__(self, source: str) -> None:
        self._source = source
        self._template: Template = _ENVIRONMENT.from_string(source)

    def __reduce__(self) -> tuple[Any, ...]:
        return BoundedTemplate, (self._source,)

    def render(self, **variables: Any) -> tuple[str, list[tuple[int, int]]]:
        """Render, within the bounds.

        Args:
            **variables: Plain values: text, numbers, lists and dicts of them.

        Returns:
            The text, and the stretches (start, end) of it that stand in `{% generation %}`.

        Raises:
            jinja2.TemplateError: `TemplateLimit`, or the template refuses the messages.
            Exception: What Python raises of a mistake in the template.
        """
        given = _size_of(variables, 1 << 30)
        start, end = unused_characters(2, self._source, *texts_in(variables))
        budget = _Budget(size=MAX_CHARACTERS + 8 * given, spans=[start, end])
        token = _budget.set(budget)
        try:
            text = self._template.render(**variables)
        finally:
            _budget.reset(token)
        return _take_out_spans(text, start, end)


def unused_characters(count: int, *texts: str) -> list[str]:
    """Characters that stand in none of the texts, of the private use planes: nobody's text."""
    used = set().union(*map(set, texts))
    free = (chr(code) for code in range(0xF0000, 0x10FFFE) if chr(code) not in used)
    return [next(free) for _ in range(count)]


def texts_in(value: Any) -> Iterator[str]:
    """Every text in nested lists and dicts."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from texts_in(key)
            yield from texts_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from texts_in(item)


def _take_out_spans(text: str, start: str, end: str) -> tuple[str, list[tuple[int, int]]]:
    if start not in text:
        return text.replace(end, ""), []
    kept: list[str] = []
    length, opened, spans = 0, 0, []
    for part in re.split(f"([{start}{end}])", text):
        if part == start:
            opened = length
        elif part == end:
            spans.append((opened, length))
        else:
            kept.append(part)
            length += len(part)
    return "".join(kept), spans
