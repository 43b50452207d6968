"""A conversation in a terminal or a pipe: lines in, answers out as they are made."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import sys
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from mono_internvl.door import one_line
from mono_internvl.errors import ImageError, MonoInternVLError, PromptError

if TYPE_CHECKING:
    from mono_internvl.processing.video import FrameSampling
    from mono_internvl.serving.session import ChatSession

HELP = """\
/image PATH   show an image with the next question; several times for several images
/video PATH   show a video with the next question, as some of its frames
/history      what was said
/reset        start anew
/help         this text
/quit         leave, as Ctrl-D does; Ctrl-C stops an answer"""
_COMMAND = re.compile(r"/[a-z]+$")


@dataclass(frozen=True)
class Picture:
    """An image and the name it was given by.

    Attributes:
        name: A path, a data URI, or a video and the number of its frame.
        image: Of Pillow; of a video a `VideoFrame`.
    """

    name: str
    image: Any

    @classmethod
    def load(cls, name: str) -> Picture:
        """The image of a path or data URI.

        Raises:
            ImageError: It cannot be decoded.
        """
        from mono_internvl.processing.image_files import load_image

        if name.startswith("data:"):
            return cls(name, load_image(name))
        return cls(name, load_image(_path_of(name)))

    @classmethod
    def of_video(cls, name: str, sampling: FrameSampling | None = None) -> list[Picture]:
        """The frames of a video that are shown.

        Raises:
            ImageError: It cannot be read.
        """
        from mono_internvl.processing.video import EVENLY, frames_of

        return [cls(str(frame), frame) for frame in frames_of(_path_of(name), sampling or EVENLY)]


def _path_of(name: str) -> Path:
    try:
        return Path(name).expanduser()
    except RuntimeError as error:
        raise ImageError(f"{name}: {error}; give the path without ~") from error


def answer(
    session: ChatSession, question: str, pictures: Sequence[Picture], as_json: bool = False
) -> None:
    """Ask, and print the answer as it comes, or one JSON object when it is there.

    Raises:
        MonoInternVLError: As `ChatSession.ask`.
    """
    images = [picture.image for picture in pictures]
    if not as_json:
        session.ask(question, images, stream=lambda piece: typer.echo(piece, nl=False))
        typer.echo()
        return
    result = session.ask(question, images)
    print_json(
        {
            "question": question,
            "answer": result.text,
            "boxes": result.boxes,
            "images": [picture.name for picture in pictures],
            "tokens": dataclasses.asdict(result.tokens),
            "seconds": round(result.seconds, 3),
            "finish_reason": result.finish_reason,
        },
        indent=None,
    )


def converse(session: ChatSession, pictures: Sequence[Picture], as_json: bool = False) -> int:
    """Read questions and commands from standard input, one per line, until it ends.

    Args:
        session: Conversation to go on with.
        pictures: Shown with the first question.
        as_json: One JSON object per answer; all else goes to standard error.

    Returns:
        How many lines failed; each was reported on standard error.
    """
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - gives `input` its line editing
        typer.echo(HELP, err=as_json)
    shown, failures = list(pictures), 0
    for line in _lines(is_terminal):
        command, _, rest = line.partition(" ")
        try:
            if command in ("/quit", "/exit"):
                break
            if not _COMMAND.match(command):
                answer(session, line, shown, as_json)
                shown = []
            elif command == "/image":
                shown.append(Picture.load(rest.strip().strip("'\"")))
            elif command == "/video":
                shown += Picture.of_video(rest.strip().strip("'\""))
            elif command == "/reset":
                session.reset()
                shown = []
            elif command in ("/history", "/help"):
                typer.echo(HELP if command == "/help" else transcript(session), err=as_json)
            else:
                raise PromptError(f"{command} is no command; /help names them all")
        except MonoInternVLError as error:
            show_error(error)
            failures += 1
        except KeyboardInterrupt:
            if not is_terminal:
                raise
            typer.echo("\n(stopped)", err=True)
            shown = []
    return failures


def transcript(session: ChatSession) -> str:
    """What was said, a line per message."""
    lines = []
    for message in session.history:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        words = ["[image]" if part["type"] == "image" else part["text"] for part in parts]
        lines.append(f"{message['role']}: {' '.join(words)}")
    return "\n".join(lines) or "(nothing was said yet)"


def show_error(error: MonoInternVLError) -> None:
    """One line on standard error, red in a terminal."""
    typer.secho(f"error: {one_line(error)}", fg=typer.colors.RED, err=True)


def print_json(value: Any, indent: int | None = 2) -> None:
    """A JSON document on standard output; what that cannot encode is escaped as JSON does it."""
    text = json.dumps(value, ensure_ascii=False, indent=indent, default=str)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(value, indent=indent, default=str)
    typer.echo(text)


def _lines(is_terminal: bool) -> Generator[str, None, None]:
    while True:
        try:
            line = input("> " if is_terminal else "").strip()
        except EOFError:
            if is_terminal:
                typer.echo(err=True)
            return
        except KeyboardInterrupt:
            if not is_terminal:
                raise
            typer.echo()
            continue
        if line:
            yield line


def quieten() -> None:
    """No progress bars and notes of transformers between the lines of an answer."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
