"""`bench images`: files to tiles, images per second and core."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import torch
from PIL import Image

from mono_internvl.bench.models import Setting
from mono_internvl.bench.rows import BenchRow
from mono_internvl.bench.timing import Subject, measure
from mono_internvl.processing.image_files import load_image
from mono_internvl.processing.images import MonoInternVLImageProcessor

FILES = 4
SIDES_PX = ((448, 448), (1280, 960))


def bench_images(setting: Setting, *, max_tiles: int = 6) -> list[BenchRow]:
    """Seconds of an image, decoded from JPEG and cut into normalised tiles, by size.

    Args:
        setting: Rounds and command; images are cut on the CPU, in fp32.
        max_tiles: Most tiles of an image, thumbnail not counted.
    """
    processor = MonoInternVLImageProcessor()
    subjects = []
    for width, height in SIDES_PX:
        files = [jpeg(width, height, seed) for seed in range(FILES)]

        def decode(files: list[bytes] = files) -> None:
            for file in files:
                load_image(file)

        def cut(files: list[bytes] = files) -> None:
            for file in files:
                processor([load_image(file)], max_tiles=max_tiles)

        name, notes = f"{width} x {height} px", {"max_tiles": max_tiles}
        subjects.append(Subject(f"{name}, decode", decode, notes, units=FILES))
        subjects.append(Subject(f"{name}, decode and tile", cut, notes, units=FILES))
    return measure(
        "images",
        subjects,
        replace(setting, device=torch.device("cpu"), dtype=torch.float32),
        baseline=subjects[0].name,
        shapes={"tile_px": processor.image_size},
        layers=0,
        unit="s/image",
    )


def jpeg(width: int, height: int, seed: int) -> bytes:
    """A picture of smooth colours with some noise: neither flat nor incompressible."""
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 255, (12, 16, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
    noise = generator.normal(0, 6, smooth.shape)
    pixels = np.clip(smooth + noise, 0, 255).astype(np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG", quality=90)
    return out.getvalue()
