"""Chooses sample answers by a rule, right and wrong in proportion, and prepares their pictures."""

from __future__ import annotations

import base64
import hashlib
import io
import logging
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mono_internvl.errors import ImageError
from mono_internvl.processing.image_files import load_image
from mono_internvl.reports.boxes import Box, boxes_to_draw
from mono_internvl.reports.kinds import Kind, Words
from mono_internvl.runs.predictions import Answer

logger = logging.getLogger(__name__)

RIGHT, PARTLY, WRONG = "right", "partly right", "wrong"

_MAX_EDGE_PX = 448
_MAX_PNG_BYTES = 30_000  # a larger picture is a photograph: JPEG


@dataclass(frozen=True)
class Picture:
    """An image ready to stand in a page.

    Attributes:
        uri: data URI of a PNG or JPEG.
        width_px: width; likewise `height_px`.
    """

    uri: str
    width_px: int
    height_px: int


@dataclass(frozen=True)
class Sample:
    """One answer as the gallery shows it.

    Attributes:
        kind: kind of task.
        question: what was asked.
        said: what the model answered, boxes in short form.
        truth: the true answer, boxes in short form.
        verdict: `right`, `partly right` or `wrong`.
        score: in [0, 1].
        picture: the image; None if it cannot be read.
        said_boxes: boxes in the model's answer; likewise `true_boxes`.
    """

    kind: Kind
    question: str
    said: str
    truth: str
    verdict: str
    score: float
    picture: Picture | None
    said_boxes: Sequence[Box]
    true_boxes: Sequence[Box]


@dataclass(frozen=True)
class Gallery:
    """Samples, and how they compare with all the answers they were chosen from.

    Attributes:
        samples: the samples, kind by kind.
        num_answers: number of answers they were chosen from.
        right_share: share of right answers among those, each kind with the weight it has here.
    """

    samples: Sequence[Sample]
    num_answers: int
    right_share: float

    @property
    def counts(self) -> Mapping[str, int]:
        """Number of samples by verdict."""
        return Counter(sample.verdict for sample in self.samples)


def verdict_on(answer: Answer, words: Words) -> str:
    """Return whether an answer is `right`, `partly right` or `wrong` by its kind."""
    kind = words.kind_named(answer.kind)
    if answer.score >= kind.full_marks:
        return RIGHT
    return PARTLY if kind.is_graded and answer.score > 0 else WRONG


def choose(answers: Sequence[Answer], count: int, words: Words) -> list[Answer]:
    """Choose answers of all kinds that are as often right as all the answers are.

    The kinds share the places evenly. How many places go to answers that are not right is computed
    over all places together and handed to the kinds by largest remainder, so that kinds with few
    errors do not hide them all by rounding. The right ones are taken in the order of a hash of
    their ids; of the others, evenly from the best to the worst score.

    Args:
        answers: what to choose from.
        count: number of places.
        words: what is known of their kinds.

    Returns:
        At most `count` answers, kind by kind; the same for the same answers, in whatever order.
    """
    by_kind: dict[str, list[Answer]] = defaultdict(list)
    for answer in sorted(answers, key=_hash):
        by_kind[answer.kind].append(answer)
    kinds = [kind.name for kind in words.in_order(by_kind)]
    places = _share_places([len(by_kind[kind]) for kind in kinds], count)
    right: dict[str, list[Answer]] = defaultdict(list)
    other: dict[str, list[Answer]] = defaultdict(list)
    for kind in kinds:
        for answer in by_kind[kind]:
            (right if verdict_on(answer, words) == RIGHT else other)[kind].append(answer)
    expected = [
        number * len(other[kind]) / len(by_kind[kind])
        for kind, number in zip(kinds, places, strict=True)
    ]
    chosen: list[Answer] = []
    seen: set[str] = set()
    for kind, number, misses in zip(kinds, places, _largest_remainder(expected), strict=True):
        hits = _first_unseen(right[kind], number - misses, seen)
        ranked = sorted(other[kind], key=lambda answer: -answer.score)
        picked = [ranked[int((i + 0.5) * len(ranked) / misses)] for i in range(misses)]
        seen.update(answer.image for answer in (*hits, *picked))
        chosen += [*hits, *picked]
    return chosen


def make_gallery(answers: Sequence[Answer], data_root: Path, count: int, words: Words) -> Gallery:
    """Choose samples and load their pictures.

    Args:
        answers: what to choose from.
        data_root: folder that the paths of the images are relative to.
        count: number of samples.
        words: what is known of their kinds.

    Returns:
        The gallery; without samples if there are no answers.
    """
    chosen = choose(answers, count, words)
    totals = Counter(answer.kind for answer in answers)
    right = Counter(answer.kind for answer in answers if verdict_on(answer, words) == RIGHT)
    shares = [right[answer.kind] / totals[answer.kind] for answer in chosen]
    return Gallery(
        samples=[_sample(answer, data_root, words) for answer in chosen],
        num_answers=len(answers),
        right_share=sum(shares) / len(shares) if shares else 0.0,
    )


def load_picture(data_root: Path, name: str) -> Picture | None:
    """Read an image below the data root as a data URI, made smaller if it is large.

    Args:
        data_root: folder that `name` is relative to; nothing outside it is read.
        name: path of the image.

    Returns:
        The picture; None, with a warning in the log, if it cannot be read.
    """
    try:
        path = (data_root / name).resolve()
        if not path.is_relative_to(data_root.resolve()):
            logger.warning("image %r lies outside %s; shown without it", name, data_root)
            return None
        image = load_image(path)
    except (ImageError, OSError, ValueError, RuntimeError) as error:  # or a name that cannot be
        reason = str(error).encode(errors="backslashreplace").decode()  # logs are UTF-8
        logger.warning("image %.200r: %s; shown without it", name, reason)
        return None
    image.thumbnail((_MAX_EDGE_PX, _MAX_EDGE_PX))
    buffer, media_type = io.BytesIO(), "image/png"
    image.save(buffer, "PNG", optimize=True)
    if buffer.tell() > _MAX_PNG_BYTES:
        buffer, media_type = io.BytesIO(), "image/jpeg"
        image.save(buffer, "JPEG", quality=85)
    encoded = base64.b64encode(buffer.getvalue()).decode("ascii")
    return Picture(f"data:{media_type};base64,{encoded}", *image.size)


def _sample(answer: Answer, data_root: Path, words: Words) -> Sample:
    said_boxes, true_boxes = boxes_to_draw(answer.text), boxes_to_draw(answer.truth)
    return Sample(
        kind=words.kind_named(answer.kind),
        question=answer.question.replace("<ref>", "").replace("</ref>", ""),
        said=_in_short(answer.text, said_boxes),
        truth=_in_short(answer.truth, true_boxes),
        verdict=verdict_on(answer, words),
        score=answer.score,
        picture=load_picture(data_root, answer.image),
        said_boxes=said_boxes,
        true_boxes=true_boxes,
    )


def _in_short(text: str, boxes: Sequence[Box]) -> str:
    """Write boxes without control tokens; text without a box that can be read stays as it is."""
    if not boxes:
        return text
    return "; ".join(
        f"{box.label} ({box.x1}, {box.y1}) – ({box.x2}, {box.y2})".strip() for box in boxes
    )


def _hash(answer: Answer) -> tuple[str, str]:
    identity = f"{answer.kind}\n{answer.id}\n{answer.question}"
    return hashlib.sha256(identity.encode()).hexdigest(), answer.text


def _share_places(available: Sequence[int], count: int) -> list[int]:
    """Hand out places one by one, round the kinds, until they or the answers are used up."""
    places = [0] * len(available)
    while sum(places) < min(count, sum(available)):
        for index, number in enumerate(available):
            if places[index] < number and sum(places) < count:
                places[index] += 1
    return places


def _largest_remainder(expected: Sequence[float]) -> list[int]:
    """Round numbers so that their sum is the rounded sum; none goes up past the next integer."""
    rounded = [int(number) for number in expected]
    missing = int(sum(expected) + 0.5) - sum(rounded)
    by_remainder = sorted(range(len(expected)), key=lambda i: (rounded[i] - expected[i], i))
    for index in by_remainder[:missing]:
        rounded[index] += 1
    return rounded


def _first_unseen(answers: Sequence[Answer], count: int, seen: set[str]) -> list[Answer]:
    """Return the first answers, those about images not shown yet before the others."""
    return sorted(answers, key=lambda answer: answer.image in seen)[:count]
