"""What a report says about its run: kinds of tasks, measures of language, and the page's own words.

The report knows none of them; whoever asks for it gives them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Kind:
    """A kind of task as a reader meets it.

    Attributes:
        name: the word in the records.
        title: heading.
        measure: what its score, in [0, 1], means.
        full_marks: least score that counts as right; below it an answer is partly right or wrong.
        is_graded: whether a score between 0 and `full_marks` is partly right, rather than wrong.
    """

    name: str
    title: str
    measure: str
    full_marks: float = 0.999
    is_graded: bool = False


@dataclass(frozen=True)
class TextChart:
    """A measure of language that gets a chart.

    Attributes:
        name: the measure.
        title: heading.
        note: what it means.
        top: upper end of the axis; None fits it to the values.
        decimals: of the last value.
    """

    name: str
    title: str
    note: str
    top: float | None
    decimals: int


@dataclass(frozen=True)
class Words:
    """What a report says about its run.

    Attributes:
        title: of the page; behind it stands the name of the run.
        headline: what happened, in a few words.
        lead: the same in a paragraph; HTML.
        quick_note: said of a quick run; HTML.
        right_note: which answers count as right.
        limits: what the run does and does not show; HTML.
        kinds: of tasks, in the order in which they are shown.
        text_measures: measures of language, in order, and what they are called.
        text_charts: those of them that get a chart.
    """

    title: str = "A run"
    headline: str = "A run"
    lead: str = ""
    quick_note: str = "<strong>Quick run.</strong>"
    right_note: str = ""
    limits: str = ""
    kinds: Sequence[Kind] = ()
    text_measures: Mapping[str, str] = field(default_factory=dict)
    text_charts: Sequence[TextChart] = ()

    def kind_named(self, name: str) -> Kind:
        """The kind of that name; one that nobody described gets its own name as its title."""
        for kind in self.kinds:
            if kind.name == name:
                return kind
        return Kind(name, name.replace("_", " ").capitalize(), "score")

    def in_order(self, names: Iterable[str]) -> list[Kind]:
        """The kinds of these names: the described ones first, the others by name."""
        rank = {kind.name: index for index, kind in enumerate(self.kinds)}
        ordered = sorted(set(names), key=lambda name: (rank.get(name, len(rank)), name))
        return [self.kind_named(name) for name in ordered]
