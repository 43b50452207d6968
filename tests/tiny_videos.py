"""Made-up clips: one colour a frame, or any picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np
from PIL import Image

RATE = 10  # frames a second


def write_clip(
    file: Path,
    frames: Sequence[Image.Image | tuple[int, int, int]],
    *,
    size: tuple[int, int] = (64, 48),
    codec: str = "mpeg4",
    key_every: int = 4,
) -> Path:
    """A video of these frames, with a key frame every so many."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(file), "w") as container:
        stream = container.add_stream(codec, rate=RATE)
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        stream.gop_size = key_every
        for frame in frames:
            image = frame if isinstance(frame, Image.Image) else Image.new("RGB", size, frame)
            pixels = np.asarray(image.resize(size))
            for packet in stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return file
