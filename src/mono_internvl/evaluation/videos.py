"""The videos of a benchmark's rows, and what is said in them while a frame is seen.

Source: Video-MME, which wants only the subtitles of sampled frames; VLMEvalKit at 058f673 takes the
lines that are shown at a frame's time. Differs: a line that several frames share is given once, in
order (lmms-eval gives each once, in no order).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mono_internvl.data.records import shortened
from mono_internvl.errors import MissingDependency, SampleError
from mono_internvl.evaluation.toolkits import is_given

_VIDEOS = (".mp4", ".mkv", ".webm", ".avi", ".mov")
_SUBTITLES = (".srt", ".vtt", ".ass")
_VIDEO_FOLDERS = ("", "video", "videos", "data")
_SUBTITLE_FOLDERS = ("", "subtitle", "subtitles")
_NAMES = ("video", "videoID", "video_id")


def video_of(fields: Mapping[str, Any], folders: Sequence[Path], where: str) -> Path:
    """The video of a row: by its path, or a file of its id in a folder of videos.

    Args:
        fields: Of the row: `video`, `videoID` or `video_id`.
        folders: That it is looked for in.
        where: Place of the row, for messages.

    Raises:
        SampleError: It names none, or none that is there.
    """
    names = [str(fields[name]) for name in _NAMES if is_given(fields.get(name))]
    if not names:
        raise SampleError(f"{where}: neither frames nor {', '.join(_NAMES)}; expected a video")
    found = _file(names, folders, _VIDEO_FOLDERS, ("", *_VIDEOS))
    if found is None:
        raise SampleError(
            f"{where}: no video {shortened(names[0])!r} ({', '.join(_VIDEOS)}) below "
            f"{' or '.join(map(str, folders))}; put it there, or into a folder video"
        )
    return found


def subtitles_of(video: Path, folders: Sequence[Path]) -> Path | None:
    """The subtitles of a video, or None where there are none."""
    return _file([video.stem], (video.parent, *folders), _SUBTITLE_FOLDERS, _SUBTITLES)


def said_at(subtitles: Path, times: Sequence[float]) -> str:
    """The lines that are shown at these times, each once, a line each.

    Args:
        subtitles: An SRT, WebVTT or ASS file.
        times: s from the beginning of the video.

    Raises:
        SampleError: The file cannot be read.
        MissingDependency: pysubs2 is not installed.
    """
    try:
        import pysubs2
    except ImportError as error:
        raise MissingDependency(
            "pysubs2 is not installed; pip install 'mono-internvl[video]' reads subtitles"
        ) from error
    try:
        events = pysubs2.load(str(subtitles), encoding="utf-8").events
    except (OSError, ValueError, pysubs2.exceptions.Pysubs2Error) as error:
        raise SampleError(f"{subtitles}: not readable subtitles ({error})") from error
    shown = [
        event for event in events if any(event.start <= 1000 * time < event.end for time in times)
    ]
    return "\n".join(" ".join(event.plaintext.split()) for event in shown)


def _file(
    names: Sequence[str], folders: Sequence[Path], inner: Sequence[str], suffixes: Sequence[str]
) -> Path | None:
    for name in names:
        for folder in folders:
            for below in inner:
                for suffix in suffixes:
                    path = folder / below / f"{name}{suffix}"
                    try:
                        if path.is_file():
                            return path
                    except (OSError, ValueError):
                        continue
    return None
