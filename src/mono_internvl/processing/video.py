"""A video -> some of its frames, which are images that are read when they are needed.

Video files are foreign data, as image files are: containers are on an allow-list, nothing but the
file itself is opened, and size is bounded before decoding.

Source: frames as VLMEvalKit takes them for Video-MME (058f673): n of them at len / (n + 1), or so
many a second; labels and one tile a frame as InternVL asks about videos.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image

from mono_internvl.errors import ConfigError, ImageError, MissingDependency
from mono_internvl.processing.image_files import MAX_PIXELS
from mono_internvl.processing.prompts import IMAGE_PLACEHOLDER

DEFAULT_FRAMES = 8
MOST_FRAMES = 512
"""Of one video; each is a tile, and a tile of 448 px has 256 tokens."""

VIDEO_PLACEHOLDER = "<video>"
"""Stands for the frames of a video in the text of a record's question."""

_CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,ogg,flv,gif,asf"
_NO_PROTOCOL = "none"  # a container may name further files: none of them is opened
_KEPT_CLIPS = 2
_KEPT_TIMELINES = 64


def _is_number(value: object, kind: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


@dataclass(frozen=True)
class FrameSampling:
    """Which frames of a video are shown.

    Attributes:
        count: So many, at equal distances; None where `fps` says it.
        fps: So many a second instead.

    Raises:
        ConfigError: Both are given or neither is, or one is out of range.
    """

    count: int | None = DEFAULT_FRAMES
    fps: float | None = None

    def __post_init__(self) -> None:
        if (self.count is None) == (self.fps is None):
            raise ConfigError(
                f"frames={self.count!r}, fps={self.fps!r}; expected one of them: a number of "
                "frames, or frames a second"
            )
        if self.count is not None and not (_is_number(self.count, int) and self.count >= 1):
            raise ConfigError(f"frames={self.count!r}; expected an integer from 1 to {MOST_FRAMES}")
        if self.count is not None and self.count > MOST_FRAMES:
            raise ConfigError(f"frames={self.count}; at most {MOST_FRAMES} frames are shown")
        if self.fps is not None and not (_is_number(self.fps, int | float) and 0 < self.fps <= 1e3):
            raise ConfigError(f"fps={self.fps!r}; expected a number above 0, for example 0.5")

    def indices(self, length: int, rate: float) -> list[int]:
        """Numbers of the frames, from 0.

        Args:
            length: Frames of the video.
            rate: Its frames a second.

        Raises:
            ImageError: They are more than `MOST_FRAMES`.
        """
        if self.count is not None:
            step = length / (self.count + 1)
            return [int(step * number) for number in range(1, self.count + 1)]
        assert self.fps is not None
        step, wanted = rate / self.fps, max(1, int(length / rate * self.fps))
        if wanted > MOST_FRAMES:
            raise ImageError(
                f"fps={self.fps:g} makes {wanted} frames of {length / rate:.1f} s; at most "
                f"{MOST_FRAMES} are shown, lower fps or give a number of frames"
            )
        return [min(int(step * number), length - 1) for number in range(wanted)]


def frame_sampling(frames: int | None, fps: float | None) -> FrameSampling:
    """The sampling of two options of which neither need be given.

    Raises:
        ConfigError: Both are, or one is out of range.
    """
    return EVENLY if frames is None and fps is None else FrameSampling(frames, fps)


EVENLY = FrameSampling()
"""`DEFAULT_FRAMES` at equal distances."""


@dataclass(frozen=True)
class VideoFrame:
    """A frame of a video as an encoded image, read when it is needed; see `ImageRef`.

    Attributes:
        path: Of the video.
        number: Among the frames that are shown, from 1.
        sampling: Which are.
    """

    path: Path
    number: int
    sampling: FrameSampling = EVENLY

    def __str__(self) -> str:
        return f"{self.path} frame {self.number}"

    @property
    def label(self) -> str:
        """What stands in front of it in a prompt."""
        return f"Frame-{self.number}: "

    def read(self, size: int = -1, /) -> bytes:
        """The frame as PNG.

        Raises:
            ImageError: The video cannot be decoded.
        """
        data = _shown(self.path, _version(self.path), self.sampling)[self.number - 1]
        return data if size < 0 else data[:size]

    def version(self) -> tuple[int, ...]:
        """Size and time of change of the video."""
        return _version(self.path)


def frames_of(path: str | Path, sampling: FrameSampling = EVENLY) -> tuple[VideoFrame, ...]:
    """The frames of a video that are shown.

    With a number of frames the video is not opened; how many frames `fps` makes is looked up.

    Raises:
        ImageError: There is no such file, or it cannot be read as a video.
        MissingDependency: PyAV is not installed.
    """
    path = Path(path)
    if not path.is_file():
        raise ImageError(f"video {path}: no such file", reason="image missing")
    count = sampling.count
    if count is None:
        count = len(frame_times(path, sampling))
    return tuple(VideoFrame(path, number, sampling) for number in range(1, count + 1))


def frame_times(path: Path, sampling: FrameSampling) -> list[float]:
    """When the frames that are shown are seen, s from the beginning.

    Raises:
        ImageError: The file cannot be read as a video.
    """
    line = _timeline(path, _version(path))
    return [line.times[index] for index in sampling.indices(len(line.times), line.rate)]


def with_frames(text: str, counts: Iterable[int]) -> str:
    """A question with a line `Frame-i: <image>` for every frame in the place of each `<video>`.

    Args:
        text: With as many `<video>` as there are videos.
        counts: Frames of each video.
    """
    first, *rest = text.split(VIDEO_PLACEHOLDER)
    for count, following in zip(counts, rest, strict=True):
        lines = (f"Frame-{number}: {IMAGE_PLACEHOLDER}" for number in range(1, count + 1))
        first += "\n".join(lines) + following
    return first


# ------------------------------------------------------------------------------- what a file holds


@dataclass(frozen=True)
class _Timeline:
    """Frames of a video in the order they are seen.

    Attributes:
        stamps: Of each frame, in the stream's own unit.
        keys: Those that decoding can begin at.
        times: Of each frame, s from the first.
        rate: Frames a second.
    """

    stamps: tuple[int, ...]
    keys: tuple[int, ...]
    times: tuple[float, ...]
    rate: float


def _version(path: Path) -> tuple[int, ...]:
    try:
        status = path.stat()
    except OSError as error:
        raise ImageError(f"video {path}: {error}", reason="image missing") from error
    return status.st_size, status.st_mtime_ns


@lru_cache(maxsize=_KEPT_TIMELINES)
def _timeline(path: Path, version: tuple[int, ...]) -> _Timeline:
    """Told by the packets: nothing is decoded."""
    with _opened(path) as (container, stream):
        packets = [
            (packet.pts, packet.is_keyframe) for packet in container.demux(stream) if packet.size
        ]
        stamps = tuple(sorted({pts for pts, _ in packets if pts is not None}))
        if not stamps or any(pts is None for pts, _ in packets):
            what = "holds no frame" if not packets else "its frames have no time stamps"
            raise ImageError(f"video {path}: {what}; convert it, for example to MP4")
        keys = tuple(sorted({pts for pts, is_key in packets if is_key})) or stamps[:1]
        times = tuple(float((pts - stamps[0]) * stream.time_base) for pts in stamps)
        rate = float(stream.average_rate or 0)
        if not (math.isfinite(rate) and rate > 0):
            rate = (len(times) - 1) / times[-1] if times[-1] > 0 else 1.0
        return _Timeline(stamps, keys, times, rate)


@lru_cache(maxsize=_KEPT_CLIPS)
def _shown(path: Path, version: tuple[int, ...], sampling: FrameSampling) -> list[bytes]:
    """The frames that are shown, as PNG; decoding begins at the key frame before each."""
    line = _timeline(path, version)
    wanted = [line.stamps[i] for i in sampling.indices(len(line.stamps), line.rate)]
    found: dict[int, bytes] = {}
    with _opened(path) as (container, stream):
        for first, group in _by_key(sorted(set(wanted)), line.keys):
            container.seek(first, stream=stream)
            rest = list(group)
            for frame in container.decode(stream):
                while rest and frame.pts is not None and frame.pts >= rest[0]:
                    found[rest.pop(0)] = _png(frame)
                if not rest:
                    break
    if missing := [stamp for stamp in wanted if stamp not in found]:
        raise ImageError(
            f"video {path}: {len(missing)} of {len(wanted)} frames cannot be decoded; check that "
            "the file is complete"
        )
    return [found[stamp] for stamp in wanted]


def _by_key(wanted: Sequence[int], keys: Sequence[int]) -> Iterator[tuple[int, list[int]]]:
    """Frames that are decoded in one go: those without a key frame between them."""
    groups: dict[int, list[int]] = {}
    for stamp in wanted:
        groups.setdefault(max((k for k in keys if k <= stamp), default=keys[0]), []).append(stamp)
    yield from groups.items()


def _png(frame: Any) -> bytes:
    image: Image.Image = frame.to_image()
    if turned := round(float(getattr(frame, "rotation", 0) or 0)) % 360:
        image = image.rotate(turned, expand=True)  # both count against the clock
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, Any]]:
    """The container of a video and its first video stream; whatever is wrong is an `ImageError`."""
    try:
        import av
    except ImportError as error:
        raise MissingDependency(
            "PyAV is not installed; pip install 'mono-internvl[video]' reads videos"
        ) from error
    av.logging.set_level(None)
    options = {"format_whitelist": _CONTAINERS, "protocol_whitelist": _NO_PROTOCOL}
    try:
        with path.open("rb") as file, av.open(file, options=options) as container:
            if not container.streams.video:
                raise ImageError(f"video {path}: holds no pictures; give a file with a video")
            stream = container.streams.video[0]
            if stream.width * stream.height > MAX_PIXELS:
                raise ImageError(
                    f"video {path}: frames of {stream.width}x{stream.height} px; at most "
                    f"{MAX_PIXELS} pixels are decoded",
                    reason="image too large",
                )
            yield container, stream
    except (ImageError, MissingDependency):
        raise
    except (OSError, ValueError, ArithmeticError, MemoryError, EOFError) as error:
        raise ImageError(
            f"video {path}: cannot be decoded ({type(error).__name__}: {error}); check that the "
            "file is complete and a supported video format"
        ) from error
