"""How valid inputs are damaged: values of JSON, and bytes of files. All by the given generator."""

from __future__ import annotations

import json
import random
from typing import Any

STRANGE: tuple[Any, ...] = (
    None, True, -1, 0, 1.5, float("nan"), float("inf"), 10**9, 10**30, "", " ", "\ud800", "\u2028",
    "\x00", "<image>", "<IMG_CONTEXT>", "<|im_end|>", "a" * 300, "../" * 50,
    "data:image/png;base64,AA==", [], [[]], {}, {"a": [1]}, ["images/0.png"] * 3, b"\xff", ("x",),
)  # fmt: skip


def mutated(value: Any, rng: random.Random) -> Any:
    """The value with one strange thing somewhere in it, or something left out."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(list(value))
        if rng.random() < 0.1:
            return {k: v for k, v in value.items() if k != key}
        return {**value, key: mutated(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.85:
        place = rng.randrange(len(value))
        if rng.random() < 0.1:
            return value[:place] + value[place + 1 :]
        return [*value[:place], mutated(value[place], rng), *value[place + 1 :]]
    if isinstance(value, str) and rng.random() < 0.3:
        place = rng.randrange(len(value) + 1)
        return value[:place] + str(rng.choice(STRANGE)) + value[place:]
    return rng.choice(STRANGE)


def mutated_json(value: Any, rng: random.Random) -> bytes:
    """A value as JSON, one to three times mutated, at times with its bytes damaged too."""
    for _ in range(rng.randint(1, 3)):
        value = mutated(value, rng)
    data = json.dumps(value, default=str).encode()
    return mutated_bytes(data, rng) if rng.random() < 0.2 else data


def mutated_bytes(data: bytes, rng: random.Random) -> bytes:
    """Data with bytes changed, a stretch cut out, doubled or moved, or the end missing."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 5)):
        if not out:
            break
        place = rng.randrange(len(out))
        length = rng.choice((1, 2, 4, 16, 64))
        match rng.randrange(6):
            case 0 | 1:
                out[place] = rng.randrange(256)
            case 2:
                out[place : place + length] = rng.choice((b"\0", b"\xff", b"\x7f")) * length
            case 3:
                del out[place : place + length]
            case 4:
                out[place:place] = out[place : place + length]
            case 5:
                del out[max(place, len(out) // 2) :]
    return bytes(out)


def mutated_text(text: str, pieces: list[str], rng: random.Random) -> str:
    """Text with pieces of a language put in, or stretches left out."""
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(len(text) + 1)
        if rng.random() < 0.3:
            text = text[:place] + text[place + rng.choice((1, 5, 20)) :]
        else:
            text = text[:place] + rng.choice(pieces) + text[place:]
    return text
