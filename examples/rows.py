"""Eight made-up rows that the examples train on: a plain picture, a question, two answers."""

from PIL import Image

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (40, 60, 230), "black": (0, 0, 0)}
QUESTION = "What colour is this?"


def eight_rows() -> list[dict]:
    """`image`, `question`, the right `answer` and a `wrong` one."""
    names = list(COLOURS)
    return [
        {
            "image": Image.new("RGB", (448, 448), COLOURS[names[number % 4]]),
            "question": QUESTION,
            "answer": names[number % 4],
            "wrong": names[(number + 1) % 4],
        }
        for number in range(8)
    ]
