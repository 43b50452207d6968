"""Samples of a data set on one page: images, tokens and what of them is learnt."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from jinja2 import Environment
from PIL import Image

from mono_internvl.reports.page import STYLE
from mono_internvl.runs.folder import write_whole

_THUMBNAIL_PX = 200
_MOST_TOKENS = 400
_STYLE = """
.tokens { font-family: var(--mono); font-size: .78rem; line-height: 1.9; overflow-wrap: anywhere; }
.tokens span { border: 1px solid var(--line); border-radius: 3px; padding: 0 .15rem;
  white-space: pre-wrap; }
.tokens .learnt { background: var(--good); color: var(--paper); border-color: var(--good); }
.sheet { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: .8rem 1rem; margin: 1rem 0; }
.sheet img { max-width: 200px; margin-right: .5rem; background: #fff; }
"""
_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; {# -#}
style-src 'unsafe-inline'; img-src data:">
<title>{{ title }}</title><style>{{ style }}</style></head><body><main>
<p class="eyebrow">data</p><h1>{{ title }}</h1>
{% for source, counts in sources.items() %}<h2>{{ source }}</h2>
<dl class="made">{% for name, value in counts.items() %}<dt>{{ name }}</dt><dd>{{ value }}</dd>
{% endfor %}</dl>{% endfor %}
{% if bad %}<h2>Broken records</h2><ul>{% for line in bad %}<li><code>{{ line }}</code></li>
{% endfor %}</ul>{% endif %}
<h2>Samples</h2><p>Filled tokens are learnt; equal neighbours are written once.</p>
{% for sample in samples %}<div class="sheet"><p class="note">{{ sample.where }}
· {{ sample.num_tokens }} tokens, {{ sample.num_learnt }} of them learnt</p>
<p>{% for image in sample.images %}<img src="data:image/jpeg;base64,{{ image }}" alt="">{% endfor %}
</p><p class="tokens">{% for token in sample.tokens %}<span{% if token.is_learnt %} {# -#}
class="learnt"{% endif %}>{{ token.text }}{% if token.count > 1 %} × {{ token.count }}{% endif %}
</span> {% endfor %}</p></div>{% endfor %}
</main></body></html>"""


@dataclass(frozen=True)
class ShownToken:
    """Equal tokens side by side.

    Attributes:
        text: Of one of them.
        is_learnt: Whether they have a label.
        count: How many.
    """

    text: str
    is_learnt: bool
    count: int


@dataclass(frozen=True)
class ShownSample:
    """A sample on the page.

    Attributes:
        where: The place of its record.
        images: Thumbnails, JPEG in base64.
        tokens: The first few hundred of its tokens.
        num_tokens: All of them.
        num_learnt: Those with a label.
    """

    where: str
    images: tuple[str, ...]
    tokens: tuple[ShownToken, ...]
    num_tokens: int
    num_learnt: int


def shown_sample(
    where: str, images: Iterable[Image.Image], tokens: Sequence[tuple[str, bool]]
) -> ShownSample:
    """A sample as it is shown.

    Args:
        where: The place of its record.
        images: RGB.
        tokens: Text of every token, and whether it has a label.
    """
    merged = (ShownToken(text, learnt, len(list(run))) for (text, learnt), run in groupby(tokens))
    return ShownSample(
        where,
        tuple(_thumbnail(image) for image in images),
        tuple(list(merged)[:_MOST_TOKENS]),
        len(tokens),
        sum(learnt for _, learnt in tokens),
    )


def write_contact_sheet(
    file: Path,
    title: str,
    sources: Mapping[str, Mapping[str, Any]],
    samples: Sequence[ShownSample],
    bad: Sequence[str],
) -> None:
    """Write the page.

    Args:
        file: HTML; everything is in it.
        title: Of the page.
        sources: Counts by source and name.
        samples: What is shown.
        bad: What is wrong with broken records, a line each.
    """
    said = {
        source: {
            name: value if isinstance(value, int | str) else json.dumps(value)
            for name, value in counts.items()
        }
        for source, counts in sources.items()
    }
    page = Environment(autoescape=True).from_string(_PAGE)
    # The style sheets are ours and hold nothing that a page would read as markup.
    text = page.render(title=title, style=STYLE + _STYLE, sources=said, samples=samples, bad=bad)
    write_whole(file, text)


def _thumbnail(image: Image.Image) -> str:
    small = image.copy()
    small.thumbnail((_THUMBNAIL_PX, _THUMBNAIL_PX))
    out = io.BytesIO()
    small.save(out, "JPEG", quality=85)
    return base64.b64encode(out.getvalue()).decode()
