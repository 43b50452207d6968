"""JSON lines: one value per line, and nothing but a line feed ends a line.

`str.splitlines` also ends one at U+2028 and six more characters that JSON may hold as they are.
"""

import json
from pathlib import Path
from typing import Any


def to_line(value: Any) -> str:
    """A value as one line of JSON that every reader takes, its line feed included.

    Raises:
        ValueError: It holds nan or an infinite number, which JSON has not.
    """
    line = json.dumps(value, ensure_ascii=False, allow_nan=False)
    try:
        line.encode()
    except UnicodeEncodeError:  # lone surrogates, which UTF-8 has not
        line = json.dumps(value, allow_nan=False)
    return line + "\n"


def read_lines(file: Path) -> list[str]:
    """The lines of a UTF-8 file without their line feeds; a last one that ends none is a line too.

    Raises:
        OSError: It cannot be read.
        UnicodeDecodeError: It is not UTF-8.
    """
    text = file.read_text(encoding="utf-8")
    return text.removesuffix("\n").split("\n") if text else []
