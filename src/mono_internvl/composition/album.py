"""A folder of pictures, and which of them are nearest to a caption.

The index says every picture in the model's own words; a caption is compared with what was said,
rare words counting more. It is a JSON file that a person can read, and correct.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from mono_internvl.errors import ConfigError, ImageError, MissingDependency
from mono_internvl.processing.image_files import image_size, load_image
from mono_internvl.runs.folder import write_whole

CAPTION_PROMPT = "Provide a one-sentence caption for the image."
_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")
_WORD = re.compile(r"[\u4e00-\u9fff]|\w+")  # a Chinese character is a word


class Encoder(Protocol):
    """Says how near pictures are to captions.

    Attributes:
        name: Part of an index: one of another encoder is not used.
    """

    @property
    def name(self) -> str: ...

    def describe(self, picture: Path) -> list[float] | str:
        """What an index keeps of a picture."""
        ...

    def nearness(self, caption: str, kept: Sequence[list[float] | str]) -> list[float]:
        """How near pictures are to a caption, by what was kept of them."""
        ...


@dataclass(frozen=True)
class OwnWords:
    """Pictures as a model describes them.

    Attributes:
        name: Of the model.
        say: Answers a question about a picture.
    """

    name: str
    say: Callable[[str, Path], str]

    def describe(self, picture: Path) -> str:
        """A sentence."""
        return self.say(CAPTION_PROMPT, picture)

    def nearness(self, caption: str, kept: Sequence[list[float] | str]) -> list[float]:
        """Cosine between bags of words, a word weighed by how few pictures it is said of."""
        bags = [Counter(words_of(str(one))) for one in kept]
        spread = Counter(word for bag in bags for word in bag)
        weight = {word: math.log(1 + len(bags) / count) for word, count in spread.items()}
        asked = {w: n * weight[w] for w, n in Counter(words_of(caption)).items() if w in weight}
        return [_cosine(asked, {w: n * weight[w] for w, n in bag.items()}) for bag in bags]


class TwoTowers:
    """A model of transformers that puts texts and pictures into one space, such as CLIP.

    Args:
        name: Folder or hub id.

    Raises:
        MissingDependency: What its processor needs is not installed.
        ConfigError: It is no such model.
    """

    def __init__(self, name: str) -> None:
        from transformers import AutoModel, AutoProcessor

        self.name = name
        try:
            self._model = AutoModel.from_pretrained(name).eval()
            self._processor = AutoProcessor.from_pretrained(name, use_fast=False)
        except ImportError as error:
            raise MissingDependency(f"encoder {name}: {error}") from error
        except (OSError, ValueError) as error:
            raise ConfigError(f"encoder {name}: {error}") from error
        if not hasattr(self._model, "get_text_features"):
            raise ConfigError(f"encoder {name}: gives no features of texts; expected one as CLIP")

    def describe(self, picture: Path) -> list[float]:
        """Its features, of length 1."""
        inputs = self._processor(images=load_image(picture), return_tensors="pt")
        return self._features("get_image_features", inputs)

    def nearness(self, caption: str, kept: Sequence[list[float] | str]) -> list[float]:
        """Cosine."""
        inputs = self._processor(text=[caption], return_tensors="pt", truncation=True)
        asked = self._features("get_text_features", inputs)
        vectors = ([float(value) for value in one] for one in kept)
        return [sum(a * b for a, b in zip(asked, one, strict=True)) for one in vectors]

    def _features(self, method: str, inputs: Mapping[str, object]) -> list[float]:
        import torch

        with torch.no_grad():
            found = getattr(self._model, method)(**inputs)
        found = getattr(found, "pooler_output", found)[0]
        return [float(value) for value in found / found.norm()]


@dataclass(frozen=True)
class Album:
    """Pictures with what an index keeps of them.

    Attributes:
        pictures: In the order of their names.
        kept: Of each.
        unread: What could not be read, and why.
    """

    pictures: tuple[Path, ...]
    kept: tuple[list[float] | str, ...]
    unread: tuple[str, ...]

    def nearest(
        self, caption: str, encoder: Encoder, count: int, used: Sequence[Path] = ()
    ) -> list[Path]:
        """The pictures nearest to a caption, nearest first, without those that are used."""
        near = encoder.nearness(caption, self.kept)
        free = [i for i, picture in enumerate(self.pictures) if picture not in used]
        return [self.pictures[i] for i in sorted(free, key=lambda i: -near[i])[:count]]


def open_album(folder: Path, encoder: Encoder, index: Path) -> Album:
    """Read the pictures of a folder; those that the index knows unchanged are not described again.

    Args:
        folder: Searched with all folders in it.
        encoder: Describes pictures.
        index: File that is read, and written after every picture.

    Raises:
        ConfigError: There is no such folder, or no picture in it that can be read.
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder; name one with pictures")
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in _SUFFIXES and p.is_file())
    known, unread = _read_index(index, encoder.name), []
    entries: dict[str, dict[str, Any]] = {}
    for file in files:
        name, status = file.relative_to(folder).as_posix(), file.stat()
        key = [status.st_size, status.st_mtime_ns]
        entry = known.get(name)
        try:
            if entry is None or entry["file"] != key:
                image_size(file)
                entry = {"file": key, "kept": encoder.describe(file)}
        except ImageError as error:
            unread.append(str(error))
            continue
        entries[name] = entry
        if name not in known or known[name] is not entry:
            _write_index(index, encoder.name, {**known, **entries})
    if not entries:
        reason = f": {unread[0]}" if unread else ""
        raise ConfigError(f"{folder}: holds no picture that can be read{reason}")
    _write_index(index, encoder.name, entries)
    return Album(
        tuple(folder / name for name in entries),
        tuple(entry["kept"] for entry in entries.values()),
        tuple(unread),
    )


def words_of(text: str) -> list[str]:
    """Words in lower case, a Chinese character each."""
    return _WORD.findall(text.lower())


def _read_index(file: Path, encoder: str) -> dict[str, dict[str, Any]]:
    if not file.is_file():
        return {}
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
        pictures = {
            str(name): {"file": list(entry["file"]), "kept": entry["kept"]}
            for name, entry in stored["pictures"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{file}: no index of pictures ({error!r}); remove it") from error
    return pictures if stored.get("encoder") == encoder else {}


def _write_index(file: Path, encoder: str, pictures: Mapping[str, object]) -> None:
    index = {"encoder": encoder, "pictures": pictures}
    write_whole(file, json.dumps(index, ensure_ascii=False, indent=1))


def _cosine(one: Mapping[str, float], other: Mapping[str, float]) -> float:
    lengths = [math.sqrt(sum(value**2 for value in bag.values())) for bag in (one, other)]
    product = sum(value * other.get(word, 0.0) for word, value in one.items())
    return product / (lengths[0] * lengths[1]) if all(lengths) else 0.0
