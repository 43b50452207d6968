"""Real pictures that nobody rendered: scikit-learn's handwritten digits as data of a user's own.

1,797 scans of 8x8 px become PNG files with conversations in the InternVL form, and are read,
trained on and scored as any other such data: `python -m mono_internvl.miniature.digits OUT_DIR`.

Source: "Optical Recognition of Handwritten Digits" of the UCI repository (CC BY 4.0), test part.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from PIL import Image

from mono_internvl.errors import MissingDependency
from mono_internvl.miniature.records import (
    Dataset,
    Record,
    make_record,
    write_jsonl,
    write_meta,
)

QUESTION: Final = "which digit is this?"
TILE_PX: Final = 168
_HIGHEST = 16  # grey levels of the scans
_HELDOUT_OF_FIVE = 1


@dataclass(frozen=True)
class DigitFiles:
    """Where the data is.

    Attributes:
        train: Meta file for `mono-internvl train --data`.
        heldout: JSON lines for `mono-internvl evaluate --data`, none of them in `train`.
        num_train: Records to learn from.
        num_heldout: Records to report.
    """

    train: Path
    heldout: Path
    num_train: int
    num_heldout: int


def write_digits(out_dir: Path, *, most: int | None = None, size_px: int = TILE_PX) -> DigitFiles:
    """Write the digits as images and conversations.

    Which are held out, one in five, follows from a hash of their number in the data set.

    Args:
        out_dir: Folder for `train.json`, `heldout.jsonl`, `annotations/` and `images/`.
        most: Only the first so many; all unless given.
        size_px: Side of the images, px; one tile of the miniature unless given.

    Raises:
        MissingDependency: scikit-learn is not installed.
    """
    scans, labels = _load()
    parts: dict[bool, list[Record]] = {False: [], True: []}
    (out_dir / "images").mkdir(parents=True, exist_ok=True)
    for number, (scan, label) in enumerate(zip(scans[:most], labels[:most], strict=True)):
        name = f"images/{number:04d}.png"
        _picture(scan, size_px).save(out_dir / name)
        record = make_record("exact", [(QUESTION, str(label))], image=name)
        parts[_is_heldout(number)].append(record)
    train = write_meta(out_dir, "train", [Dataset("digits", parts[False])])
    heldout = out_dir / "heldout.jsonl"
    write_jsonl(heldout, "heldout", parts[True])
    return DigitFiles(train, heldout, len(parts[False]), len(parts[True]))


def _load() -> tuple[Any, Any]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingDependency(
            "scikit-learn, which brings the handwritten digits, is not installed; "
            "pip install 'mono-internvl[digits]'"
        ) from error
    data = load_digits()
    return data.images, data.target


def _picture(scan: np.ndarray, size_px: int) -> Image.Image:
    """Dark ink on white paper, smoothly enlarged."""
    grey = np.round(255 - scan * (255 / _HIGHEST)).clip(0, 255).astype(np.uint8)
    return Image.fromarray(grey).resize((size_px, size_px), Image.Resampling.BICUBIC)


def _is_heldout(number: int) -> bool:
    digest = hashlib.sha256(f"digit {number}".encode()).digest()
    return digest[0] % 5 < _HELDOUT_OF_FIVE


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the digits to the folder named on the command line."""
    parser = argparse.ArgumentParser(prog="python -m mono_internvl.miniature.digits")
    parser.add_argument("out_dir", type=Path, metavar="OUT_DIR")
    files = write_digits(parser.parse_args(arguments).out_dir)
    parser.exit(
        message=f"{files.train}: {files.num_train} to learn from\n"
        f"{files.heldout}: {files.num_heldout} held out\n"
    )


if __name__ == "__main__":
    main()
