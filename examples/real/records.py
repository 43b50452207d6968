"""The data folder: pictures, records of four stages, held-out questions, terms, a contact sheet."""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import matplotlib
import sources
from canvas import Placed, compose, varied
from drawings import (
    Concept,
    IconSet,
    RasterSet,
    Titled,
    read_clipart,
    read_concepts,
    read_stamps,
)
from names import NEVER_NAMED, is_animal, known_names, thing_in
from PIL import Image, ImageDraw, ImageFont
from registries import Unreachable

WHAT = "what is this?"
DESCRIBE = "describe the picture."
GROUNDS = {
    "white": (255, 255, 255),
    "pink": (250, 190, 205),
    "blue": (170, 200, 250),
    "green": (175, 230, 175),
    "yellow": (250, 240, 160),
    "grey": (190, 190, 190),
}
COUNTS = ("one", "two", "three", "four")
WORDS = ("hat", "sun", "tea", "map", "box", "milk", "door", "stop", "exit", "open")
_FONTS = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif", "DejaVuSansMono")
STAGES = ("s11", "s12", "s13", "s2")
SETTINGS, HELD_OUT = "data.json", "heldout.jsonl"


@dataclass(frozen=True)
class Size:
    """How much is made.

    Attributes:
        names: Things that are named.
        variants: Of each training picture, each varied anew.
        composed: Canvases of several pictures, and of words, for the later stages.
        held_out_composed: The same, held out: of each kind.
        px: Side of a picture.
        seed: Of the variations.
    """

    names: int = 40
    variants: int = 48
    composed: int = 4000
    held_out_composed: int = 40
    px: int = 112
    seed: int = 0


Record = dict[str, Any]


class Drawings:
    """Drawings of the same things by several artists, of packages in a cache.

    Args:
        cache: Folder of the packages; what is not there is fetched.
        artists: Whose.
    """

    def __init__(self, cache: Path, artists: Sequence[str] = tuple(sources.ARTISTS)):
        self.concepts = read_concepts(sources.NAMES.fetch(cache))
        self._sets: dict[str, IconSet | RasterSet] = {
            artist: _open_set(sources.ARTISTS[artist], cache) for artist in artists
        }

    def of(self, name: str) -> dict[str, Image.Image]:
        """The drawings of a thing, by artist."""
        concept = self.concepts[name]
        found = {artist: drawn.picture(concept) for artist, drawn in self._sets.items()}
        return {artist: picture for artist, picture in found.items() if picture is not None}

    @cached_property
    def drawn_by(self) -> dict[str, int]:
        """Name -> how many training artists have drawn it."""
        training = [s for artist, s in self._sets.items() if artist not in sources.HELD_OUT]
        return {
            name: sum(drawn.has(concept) for drawn in training)
            for name, concept in self.concepts.items()
        }


def _open_set(package: sources.Package, cache: Path) -> IconSet | RasterSet:
    folder = package.fetch(cache)
    return IconSet(folder) if (folder / "icons.json").is_file() else RasterSet(folder)


def make_data(out: Path, cache: Path, size: Size) -> dict[str, int]:
    """Fetch, render and write a data folder; one that is there is left as it is.

    Args:
        out: The folder.
        cache: Of the packages.
        size: How much.

    Returns:
        Records by file.

    Raises:
        Unreachable: A registry that is needed does not answer; the test collections are left out
            where there is no apt.
        ValueError: The folder was made in another size, or holds something else.
    """
    settings = out / SETTINGS
    if settings.is_file():
        found = json.loads(settings.read_text())
        if found["size"] != asdict(size):
            raise ValueError(f"{out} holds data of another size; choose another folder")
        made: dict[str, int] = found["counts"]
        return made
    if out.exists():
        raise ValueError(f"{out} holds something else than this data; choose another folder")
    partial = out.with_name(f"{out.name}.partial")  # what a killed call left is made anew
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "images").mkdir(parents=True)
    counts = _write(partial, cache, size)
    partial.rename(out)
    return counts


def _write(out: Path, cache: Path, size: Size) -> dict[str, int]:
    """See `make_data`."""
    maker = Maker(out, Drawings(cache), size)
    train = maker.training()
    titled, left_out = _collections(cache)
    held_out = [*maker.held_out(), *maker.titled(titled)]
    counts: dict[str, int] = {}
    for name, records in {**train, "heldout": held_out, "plain": maker.plain()}.items():
        text = "".join(json.dumps(record) + "\n" for record in records)
        (out / f"{name}.jsonl").write_text(text, encoding="utf-8")
        source = {"root": ".", "annotation": f"{name}.jsonl", "repeat_time": 1}
        (out / f"{name}.json").write_text(json.dumps({name: source}, indent=1))
        counts[name] = len(records)
    counts |= {f"heldout: {kind}": n for kind, n in Counter(r["kind"] for r in held_out).items()}
    used = [package for package in sources.ALL if package.name not in left_out]
    (out / "LICENSES.md").write_text(sources.licences(used), encoding="utf-8")
    contact_sheet(out, held_out).save(out / "contact-sheet.png")
    left_out |= {f"{kind}, unreadable": f"{n} pictures" for kind, n in maker.unreadable.items()}
    about = {"size": asdict(size), "counts": counts, "names": maker.names, "left_out": left_out}
    (out / SETTINGS).write_text(json.dumps(about, indent=1))
    return counts


def _collections(cache: Path) -> tuple[dict[str, list[Titled]], dict[str, str]]:
    """Pictures of the test collections by kind, and why a collection is not there."""
    found: dict[str, list[Titled]] = {}
    left_out: dict[str, str] = {}
    for kind, package, read in (
        ("stamps", sources.STAMPS, read_stamps),
        ("clipart", sources.CLIPART, read_clipart),
    ):
        try:
            found[kind] = read(package.fetch(cache))
        except Unreachable as error:
            left_out[package.name] = str(error)
    return found, left_out


class Maker:
    """Writes pictures into a folder and gives the records that speak of them.

    Args:
        out: The folder.
        drawings: What there is.
        size: How much is made.

    Attributes:
        unreadable: Pictures of known things that no reader opens, too large or empty, by kind.
    """

    def __init__(self, out: Path, drawings: Drawings, size: Size):
        self.out, self.size = out, size
        self.concepts: dict[str, Concept] = drawings.concepts
        self.names = known_names(drawings.concepts, drawings.drawn_by, size.names)
        self._drawn = {name: drawings.of(name) for name in (*self.names, *NEVER_NAMED)}
        self._rng = random.Random(size.seed)
        self._count = 0
        self.unreadable: Counter[str] = Counter()

    def training(self) -> dict[str, list[Record]]:
        """Records by stage: names; captions; captions, counts, places and words; questions."""
        singles = list(self._singles())
        self._rng.shuffle(singles)
        names = [self._record("name", image, WHAT, name) for image, name, _ in singles]
        captions = [
            self._record("caption", image, DESCRIBE, f"{article(name)} on {ground}")
            for image, name, ground in singles
        ]
        half = len(singles) // 2
        asked = [record for single in singles[:half] for record in self._questions_on(*single)]
        composed = [self._composed(self._training_picture) for _ in range(self.size.composed)]
        return {
            "s11": names,
            "s12": captions + names[:half],
            "s13": captions[:half] + names[half:] + [r for many in composed for r in many[:2]],
            "s2": names + asked + [r for many in composed for r in many],
        }

    def plain(self) -> list[Record]:
        """The training pictures as they are, which the pixel baselines are fitted to."""
        found = []
        for name in self.names:
            for artist, picture in self._drawn[name].items():
                if artist not in sources.HELD_OUT:
                    image = self._save(compose([Placed(picture)], self.size.px))
                    found.append(self._record("name", image, WHAT, name, artist=artist))
        return found

    def held_out(self) -> list[Record]:
        """Questions on the held-out artists, on things never named, and on composed canvases."""
        found = []
        for name in (*self.names, *NEVER_NAMED):
            is_known = name in self.names
            for artist in sources.HELD_OUT:
                if (picture := self._drawn[name].get(artist)) is not None:
                    kind = artist if is_known else "never named"
                    image = self._save(compose([Placed(picture)], self.size.px))
                    found.append(self._record(kind, image, WHAT, name, artist=artist))
                    if is_known and artist == sources.HELD_OUT[0]:
                        animal = "yes" if is_animal(self.concepts[name]) else "no"
                        question = "is this an animal?"
                        found.append(self._record("animal", image, question, animal))
        wanted = ("ground", "count", "left", "word")
        missing = dict.fromkeys(wanted, self.size.held_out_composed)
        while any(missing.values()):
            for record in self._composed(self._held_out_picture):
                if missing.get(record["kind"], 0):
                    missing[record["kind"]] -= 1
                    found.append(record)
        return found

    def titled(self, collections: dict[str, list[Titled]]) -> list[Record]:
        """Questions on pictures of the test collections whose titles name known things."""
        found = []
        for kind, pictures in collections.items():
            for one in pictures:
                name = thing_in(one.title, self.names)
                if not name:
                    continue
                picture = one.picture()
                if picture is None or not picture.getchannel("A").getbbox():
                    self.unreadable[kind] += 1
                    continue
                image = self._save(compose([Placed(picture)], self.size.px))
                found.append(self._record(kind, image, WHAT, name, title=one.title))
        return found

    def _singles(self) -> Iterator[tuple[str, str, str]]:
        """Image, name and colour of the ground of every varied training picture."""
        for name in self.names:
            for artist, picture in self._drawn[name].items():
                if artist in sources.HELD_OUT:
                    continue
                for _ in range(self.size.variants):
                    ground = self._ground()
                    yield self._varied_single(picture, ground), name, ground

    def _varied_single(self, picture: Image.Image, ground: str) -> str:
        rng = self._rng
        placed = Placed(varied(picture, rng), rng.random(), rng.random(), rng.uniform(0.6, 1))
        return self._save(compose([placed], self.size.px, GROUNDS[ground]))

    def _questions_on(self, image: str, name: str, ground: str) -> list[Record]:
        animal = "yes" if is_animal(self.concepts[name]) else "no"
        return [
            self._record("animal", image, "is this an animal?", animal),
            self._record("ground", image, "what colour is the ground?", ground),
        ]

    def _composed(self, picture_of: Any) -> list[Record]:
        """Records of one canvas: so many of a thing, two things side by side, or a word."""
        rng, kind = self._rng, self._rng.choice(("count", "left", "word"))
        ground = self._ground()
        if kind == "word":
            return self._word(ground)
        name = rng.choice(self.names)
        if kind == "count":
            number = rng.randint(1, len(COUNTS))
            spots = rng.sample([(0.27, 0.27), (0.73, 0.27), (0.27, 0.73), (0.73, 0.73)], number)
            placed = [Placed(picture_of(name), x, y, rng.uniform(0.35, 0.48)) for x, y in spots]
            image = self._save(compose(placed, self.size.px, GROUNDS[ground]))
            shown = f"{COUNTS[number - 1]} pictures of {article(name)}"
            return [
                self._record("caption", image, DESCRIBE, shown if number > 1 else article(name)),
                self._record("count", image, "how many are there?", COUNTS[number - 1]),
                self._record("ground", image, "what colour is the ground?", ground),
            ]
        other = rng.choice([one for one in self.names if one != name])
        placed = [
            Placed(picture_of(thing), x, rng.uniform(0.3, 0.7), rng.uniform(0.4, 0.5))
            for thing, x in ((name, 0.25), (other, 0.75))
        ]
        image = self._save(compose(placed, self.size.px, GROUNDS[ground]))
        return [
            self._record("caption", image, DESCRIBE, f"{article(name)} left of {article(other)}"),
            self._record("left", image, "what is on the left?", name),
            self._record("right", image, "what is on the right?", other),
        ]

    def _word(self, ground: str) -> list[Record]:
        rng, word, side = self._rng, self._rng.choice(WORDS), self.size.px
        file = Path(matplotlib.get_data_path()) / f"fonts/ttf/{rng.choice(_FONTS)}.ttf"
        font = ImageFont.truetype(str(file), round(side * rng.uniform(0.22, 0.3)))
        image = Image.new("RGB", (side, side), GROUNDS[ground])
        _, _, right, bottom = font.getbbox(word)
        x, y = rng.uniform(0, max(0, side - right)), rng.uniform(0, max(0, side - bottom))
        ImageDraw.Draw(image).text((x, y), word, font=font, fill=(0, 0, rng.randint(0, 120)))
        record = self._record("word", self._save(image), "what does it say?", word, metric="ocr")
        return [record]

    def _training_picture(self, name: str) -> Image.Image:
        mine = [p for a, p in self._drawn[name].items() if a not in sources.HELD_OUT]
        return varied(self._rng.choice(mine), self._rng)

    def _held_out_picture(self, name: str) -> Image.Image:
        mine = self._drawn[name]
        return next(mine[artist] for artist in (*sources.HELD_OUT, *mine) if artist in mine)

    def _ground(self) -> str:
        """White in half of all cases, so that plain pictures are the usual ones."""
        return "white" if self._rng.random() < 0.5 else self._rng.choice(list(GROUNDS))

    def _save(self, image: Image.Image) -> str:
        file = f"images/{self._count:06d}.png"
        image.save(self.out / file, compress_level=1)
        self._count += 1
        return file

    def _record(
        self, kind: str, image: str, question: str, answer: str, metric: str = "exact", **rest: str
    ) -> Record:
        turns = [
            {"from": "human", "value": f"<image>\n{question}"},
            {"from": "gpt", "value": answer},
        ]
        name = f"{kind}-{image[7:13]}"
        return {"id": name, "image": image, "kind": kind, "metric": metric, "answer": answer} | {
            **rest,
            "conversations": turns,
        }


def article(name: str) -> str:
    """The name with an article, where it takes one."""
    if name in ("grapes", "cherries", "scissors", "fire"):
        return name
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def contact_sheet(out: Path, records: Sequence[Record], columns: int = 16) -> Image.Image:
    """The first pictures of each kind, a row for a kind."""
    rows: dict[str, list[str]] = {}
    for record in records:
        row = rows.setdefault(record["kind"], [])
        if len(row) < columns:
            row.append(record["image"])
    side = 64
    sheet = Image.new("RGB", (columns * side, len(rows) * side), (255, 255, 255))
    for y, images in enumerate(rows.values()):
        for x, image in enumerate(images):
            sheet.paste(Image.open(out / image).resize((side, side)), (x * side, y * side))
    return sheet
