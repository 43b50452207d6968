"""An article as a page: HTML or Markdown, its pictures where they lie."""

from __future__ import annotations

import html
import os
import urllib.parse
from pathlib import Path

from mono_internvl.composition.compose import Article
from mono_internvl.errors import ConfigError

FORMS = (".html", ".md")
_STYLE = (
    "body{max-width:42em;margin:2em auto;padding:0 1em;font:1.05em/1.6 serif}"
    "figure{margin:1.5em 0}img{max-width:100%}figcaption{font-style:italic;color:#555}"
)
_MARKDOWN = str.maketrans({mark: f"\\{mark}" for mark in "\\`*_[]<>#"})


def check_page(file: Path) -> None:
    """Refuse a file that no page is written to.

    Raises:
        ConfigError: Its suffix is none of `FORMS`, or its folder is missing.
    """
    if file.suffix.lower() not in FORMS:
        raise ConfigError(f"{file}: expected a file that ends in {' or '.join(FORMS)}")
    if not file.parent.is_dir():
        raise ConfigError(f"{file}: no folder {file.parent}; make it first")


def page(article: Article, file: Path) -> str:
    """The text of a page; links are relative to its file.

    Args:
        article: What it shows.
        file: That it is written to; the suffix says in which form.
    """
    is_html = file.suffix.lower() == ".html"
    parts = [_html_head(article) if is_html else f"# {article.title.translate(_MARKDOWN)}"]
    at = {one.line: one for one in article.illustrations}
    for number, text in enumerate(article.lines):
        parts.append(f"<p>{html.escape(text)}</p>" if is_html else text.translate(_MARKDOWN))
        if (one := at.get(number)) is None:
            continue
        link = urllib.parse.quote(os.path.relpath(one.picture, file.parent).replace(os.sep, "/"))
        if is_html:
            caption = html.escape(one.caption)
            parts.append(
                f'<figure><img src="{link}" alt="{caption}">'
                f"<figcaption>{caption}</figcaption></figure>"
            )
        else:
            caption = one.caption.translate(_MARKDOWN)
            parts.append(f"![{caption}]({link})\n\n*{caption}*")
    return ("\n" if is_html else "\n\n").join(parts) + ("\n</body></html>" if is_html else "")


def _html_head(article: Article) -> str:
    title = html.escape(article.title)
    return (
        f'<!doctype html><html><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{_STYLE}</style></head><body><h1>{title}</h1>"
    )
