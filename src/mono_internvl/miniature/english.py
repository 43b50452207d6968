"""English prose for the miniature's language model: the docstrings of the Python standard library.

The prose is committed beside this file (`assets/english_train.txt`, `assets/english_heldout.txt`,
one paragraph per block, blocks separated by an empty line) so that every machine trains on the
same text, whatever Python it has. It was made once with Python 3.11 by

    python -m mono_internvl.miniature.english

Whole source files go either to training or to the held-out part, and a paragraph that occurs in
both is dropped from training. The text is under the licence of Python (`assets/LICENSE-PSF.txt`).
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import inspect
import logging
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

logger = logging.getLogger(__name__)

ASSETS = Path(__file__).parent / "assets"
"""Folder of the committed text and its licence."""

HELDOUT_MAX_BYTES = 60_000
TRAIN_MAX_BYTES = 1_900_000

_SKIPPED_FOLDERS = frozenset({"test", "tests", "idle_test", "site-packages", "__pycache__"})
_TOPICS = "pydoc_data/topics.py"  # the language reference, kept by `help()` as string constants
_HELDOUT_PERCENT = 13
_MIN_WORDS, _MAX_CHARS = 6, 900
_CODE_MARKS = re.compile(r">>>|\.\.\. |::|[{}|<>=\\#~^@$%]|--|\+\+|[-=.]{3}")
_IDENTIFIER = re.compile(r"\w[._(\[]\w|_\b|\b_")
_MAX_IDENTIFIERS = 0.12
_EMPHASIS = re.compile(r"\*+([^*\s][^*]*)\*+")
_QUOTED_CODE = re.compile(r"`+([^`]*)`+")
_EMPTY_CALL = re.compile(r"(\w)\(\)")


def load_english(split: str = "train") -> tuple[str, ...]:
    """Read the committed English.

    Args:
        split: `"train"` or `"heldout"`.

    Returns:
        The paragraphs, each one line of ASCII prose.

    Raises:
        ValueError: if `split` names neither part.
    """
    if split not in ("train", "heldout"):
        raise ValueError(f"split: got {split!r}, expected 'train' or 'heldout'")
    text = (ASSETS / f"english_{split}.txt").read_text(encoding="ascii")
    return tuple(block for block in text.strip().split("\n\n") if block)


def extract_paragraphs(source: str, constants: bool = False) -> list[str]:
    """Collect the prose paragraphs of all docstrings in one Python source text.

    Args:
        source: the text of a module.
        constants: take every string constant, not only docstrings.

    Returns:
        Paragraphs in order of appearance, unwrapped to one line each; listings, tables, signatures
        and anything that is not ASCII prose are left out.
    """
    holders = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    strings: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, holders):
            strings.append(ast.get_docstring(node, clean=False) or "")
        elif constants and isinstance(node, ast.Constant) and isinstance(node.value, str):
            strings.append(node.value)
    blocks = [block for text in strings for block in _blocks(inspect.cleandoc(text))]
    return [text for text in map(_as_prose, blocks) if text]


def _blocks(text: str) -> list[list[str]]:
    """Split a docstring into runs of lines of one indentation, ended by empty lines."""
    blocks: list[list[str]] = []
    last_indent = -1
    for line in text.split("\n"):
        indent = len(line) - len(line.lstrip()) if line.strip() else -1
        if indent >= 0 and indent == last_indent:
            blocks[-1].append(line)
        elif indent >= 0:
            blocks.append([line])
        last_indent = indent
    return blocks


def _as_prose(lines: list[str]) -> str | None:
    """Return a docstring block as one line of prose, or None if it is something else."""
    text = " ".join(line.strip() for line in lines)
    if not text.isascii() or any(re.search(r"\S {3,}\S", line) for line in lines):
        return None
    text = _EMPHASIS.sub(r"\1", _EMPTY_CALL.sub(r"\1", _QUOTED_CODE.sub(r"\1", text))).strip()
    text = re.sub(r"  +", " ", text)
    words = text.split()
    if len(words) < _MIN_WORDS or len(text) > _MAX_CHARS or _CODE_MARKS.search(text):
        return None
    letters = sum(char.isalpha() or char == " " for char in text) / len(text)
    identifiers = sum(bool(_IDENTIFIER.search(word)) for word in words) / len(words)
    text += "." if text[-1].isalnum() else ""
    plain = text[0].isupper() and text[-1] in ".!?:" and "*" not in text and letters > 0.9
    return text if plain and identifiers <= _MAX_IDENTIFIERS else None


def _modules(root: Path) -> Iterator[Path]:
    for path in sorted(root.rglob("*.py")):
        if not _SKIPPED_FOLDERS.intersection(path.relative_to(root).parts):
            yield path


def extract_standard_library(root: Path) -> tuple[list[str], list[str]]:
    """Extract the English of a standard library, split by source file.

    Args:
        root: the folder that holds the library's modules.

    Returns:
        Training paragraphs and held-out paragraphs, no paragraph twice.
    """
    train: dict[str, None] = {}
    heldout: dict[str, None] = {}
    for path in _modules(root):
        name = path.relative_to(root).as_posix()
        try:
            source = path.read_text(encoding="utf-8")
            paragraphs = extract_paragraphs(source, constants=name == _TOPICS)
        except (SyntaxError, UnicodeDecodeError):
            logger.info("left out %s: not parseable text", path)
            continue
        bucket = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest()) % 100
        target = heldout if bucket < _HELDOUT_PERCENT else train
        target.update(dict.fromkeys(paragraphs))
    heldout_kept = _up_to(list(heldout), HELDOUT_MAX_BYTES)
    train_kept = _up_to([text for text in train if text not in heldout], TRAIN_MAX_BYTES)
    return train_kept, heldout_kept


def _up_to(paragraphs: list[str], max_bytes: int) -> list[str]:
    kept: list[str] = []
    size = 0
    for text in paragraphs:
        size += len(text) + 2
        if size > max_bytes:
            break
        kept.append(text)
    return kept


def main() -> None:
    """Write the committed English anew from the standard library of the running Python."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--out", type=Path, default=ASSETS)
    out: Path = parser.parse_args().out
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    train, heldout = extract_standard_library(Path(sysconfig.get_paths()["stdlib"]))
    out.mkdir(parents=True, exist_ok=True)
    for name, paragraphs in (("train", train), ("heldout", heldout)):
        path = out / f"english_{name}.txt"
        path.write_text("\n\n".join(paragraphs) + "\n", encoding="ascii")
        logger.info("%s: %d paragraphs, %d bytes", path, len(paragraphs), path.stat().st_size)


if __name__ == "__main__":
    main()
