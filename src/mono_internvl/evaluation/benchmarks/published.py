"""A published benchmark: a row of the table, which is asked and scored like any other benchmark."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from mono_internvl.data.records import ImageRef, Record
from mono_internvl.errors import ImageError, SampleError
from mono_internvl.evaluation.data_files import Row, find_data, read_rows
from mono_internvl.evaluation.families import FAMILIES, Answered, Family, Judge, Scores
from mono_internvl.evaluation.protocol import Protocol
from mono_internvl.evaluation.questions import Question, with_suffix
from mono_internvl.evaluation.toolkits import (
    internvl_prompt,
    internvl_tiles,
    is_given,
    vlmevalkit_prompt,
    vlmevalkit_tiles,
)
from mono_internvl.evaluation.videos import said_at, subtitles_of, video_of
from mono_internvl.processing.image_files import load_image
from mono_internvl.processing.prompts import ImagePart, Turn
from mono_internvl.processing.video import FrameSampling, frame_times, frames_of
from mono_internvl.runs.benchmark_results import PublishedScore
from mono_internvl.runs.predictions import Prediction

_IDENTITIES = ("index", "question_id", "questionId", "pid", "id", "videoID")


@dataclass(frozen=True, kw_only=True)
class PublishedBenchmark:
    """One row of the table.

    Attributes:
        name: That it is asked for by.
        title: For tables and charts.
        column: In the paper's tables, as `averages` names it; "" where it has none.
        split: Of the data.
        questions: Published number; None where it is not.
        toolkit: That made the paper's figure: whose prompt, tiles and rules `paper` follows.
        dataset: As that toolkit calls it.
        splits: Values of a row's `split` that are part of it; any where none are given.
        files: Names that its data may have besides `name` and `dataset`.
        family: What its truth is and how it is scored; see `families`.
        max_new_tokens: Longest answer.
        max_tiles: Where neither toolkit's table holds.
        unit: Of the score.
        top: Best possible score.
        drops_text_only: Whether rows without an image are no part of it.
        enlarges_first: Whether the first image is doubled and all others are one tile.
        frames: Which frames of its videos are shown; None where it has none.
        subtitles: Whether what is said while they are seen stands in the question.
        submission: Form of the file for a server, as `submissions` names it; "" for none.
        source: Where the data are: an address, or what to do.
        md5: Beginning of the file's published MD5; "" where there is none.
        dataset_id: On the Hugging Face hub, where there is no single file.
        published: Scores of others.
        breakage: What is known to be broken or not comparable.
    """

    name: str
    title: str
    column: str = ""
    split: str
    questions: int | None
    toolkit: Literal["internvl", "vlmevalkit"] = "internvl"
    dataset: str
    splits: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    family: str
    max_new_tokens: int
    max_tiles: int | None = None
    unit: str = "%"
    top: float = 100.0
    drops_text_only: bool = False
    enlarges_first: bool = False
    frames: FrameSampling | None = None
    subtitles: bool = False
    submission: str = ""
    source: str = ""
    md5: str = ""
    dataset_id: str = ""
    published: tuple[PublishedScore, ...] = ()
    breakage: str = ""

    @property
    def rules(self) -> Family:
        """Truth and scores."""
        return FAMILIES[self.family]

    @property
    def protocol(self) -> Protocol:
        """How it is asked."""
        table = internvl_tiles if self.toolkit == "internvl" else vlmevalkit_tiles
        return Protocol(
            max_new_tokens=self.max_new_tokens,
            max_tiles=self.max_tiles or table(self.dataset),
            max_tiles_of_later_images=1 if self.enlarges_first else None,
            frames=self.frames.count if self.frames else None,
            fps=self.frames.fps if self.frames else None,
            subtitles=self.subtitles or None,
        )

    def data_files(self, root: Path) -> list[Path]:
        """Its data below a folder.

        Raises:
            SampleError: There are none.
        """
        return find_data(root, tuple(dict.fromkeys((self.name, self.dataset, *self.files))))

    def load(self, files: Sequence[Path], root: Path) -> list[Question]:
        """The questions in its files.

        Raises:
            SampleError: A row is damaged, names no image that is there, or holds no truth; or two
                rows have one id.
        """
        questions: dict[str, Question] = {}
        for row in self._rows(files, root):
            question = self._question(row, len(questions))
            before = questions.setdefault(question.sample.record_id, question)
            if before is not question:
                raise SampleError(
                    f"{row.where}: id {question.sample.record_id!r} is that of "
                    f"{before.sample.where} too; remove one of them"
                )
        if not questions:
            raise SampleError(f"{files[0]}: holds no question")
        return list(questions.values())

    def prompt(self, question: Question, protocol: Protocol) -> tuple[Turn, ...]:
        """The turns that ask a question."""
        return with_suffix(question, protocol)

    def predict(self, question: Question, text: str, protocol: Protocol) -> Prediction:
        """The answer to a question, not scored yet."""
        return Prediction(
            question.record, question.text, text, None, question.is_blind, protocol.to_dict()
        )

    def score(self, predictions: Sequence[Prediction], judge: Judge | None) -> Scores:
        """What answers come to.

        Raises:
            SampleError: A prediction is of another benchmark.
        """
        answered = []
        for one in predictions:
            truth = one.record.get("truth")
            if one.kind != self.name or not isinstance(truth, Mapping):
                raise SampleError(
                    f"predictions of {self.name!r}: record {one.record.get('id')!r} is of "
                    f"{one.kind!r}; score the file that this benchmark wrote"
                )
            answered.append(Answered(truth, one.question, one.text))
        try:
            return self.rules.score(answered, judge)
        except (KeyError, TypeError, AttributeError) as error:
            raise SampleError(
                f"predictions of {self.name!r}: a truth is not of the form it was written in "
                f"({error!r}); ask anew"
            ) from error

    def _rows(self, files: Sequence[Path], root: Path) -> Iterator[Row]:
        for file in files:
            for row in read_rows(file, root):
                if self.splits and str(row.fields.get("split", self.splits[0])) not in self.splits:
                    continue
                if self.frames is not None:
                    yield self._with_frames(row, self.frames, (file.parent, root))
                elif row.images:
                    yield row
                elif not self.drops_text_only:
                    raise SampleError(f"{row.where}: no image; {self.title} asks about images")

    def _with_frames(self, row: Row, sampling: FrameSampling, folders: Sequence[Path]) -> Row:
        """A row with the frames of its video; frames that it holds as images are taken as such."""
        if row.images:
            if self.subtitles or len(row.images) != sampling.count:
                asked = f"{sampling.count} frames" if sampling.count else f"fps={sampling.fps:g}"
                raise SampleError(
                    f"{row.where}: {len(row.images)} images; {self.title} ({self.split}) is asked "
                    f"with {asked} of a video: name the video, or give --frames {len(row.images)} "
                    "and ask without subtitles"
                )
            return row
        video = video_of(row.fields, folders, row.where)
        fields = dict(row.fields)
        try:
            frames = frames_of(video, sampling)
            if self.subtitles and (file := subtitles_of(video, folders)) is not None:
                fields["subtitles"] = said_at(file, frame_times(video, sampling))
        except ImageError as error:
            raise SampleError(f"{row.where}: {error}", reason=error.reason) from error
        return Row(fields, frames, row.where)

    def _question(self, row: Row, number: int) -> Question:
        fields = dict(row.fields)
        if is_given(fields.get("query")):  # MathVista's own files
            fields["question"] = fields["query"]
        ask = internvl_prompt if self.toolkit == "internvl" else vlmevalkit_prompt
        try:
            truth, text = (
                self.rules.truth(Row(fields, row.images, row.where)),
                ask(self.dataset, fields),
            )
        except KeyError as error:
            raise SampleError(
                f"{row.where}: no `{error.args[0]}`; expected a row of {self.title}"
            ) from error
        except SampleError as error:
            if str(error).startswith(row.where):
                raise
            raise SampleError(f"{row.where}: {error}") from error
        named = next((str(fields[n]) for n in _IDENTITIES if is_given(fields.get(n))), str(number))
        if self.family == "mme":  # its ids are those of images
            named = f"{truth['category']}/{truth['pair']}/{fields['question']}"
        images: list[ImageRef] = list(row.images)
        if self.enlarges_first:
            images[0] = Doubled(images[0])
        parts: list[str | ImagePart] = []
        for number, image in enumerate(images, 1):
            label = [] if self.frames is None else [f"Frame-{number}: "]
            parts += [*label, ImagePart(image), "\n"]
        turns = (Turn("user", (*parts, text)), Turn("assistant", ("",)))
        record: dict[str, Any] = {"id": named, "kind": self.name, "truth": truth}
        return Question(Record(turns, named, row.where, record))


@dataclass(frozen=True)
class Doubled:
    """An image at twice its width and height, bilinear: MMMU's first.

    Attributes:
        image: As it is stored.
    """

    image: ImageRef

    def __str__(self) -> str:
        return f"{self.image}, doubled"

    def read(self, size: int = -1, /) -> bytes:
        """As PNG; see `ImageRef`."""
        found = load_image(self.image)
        doubled = found.resize((2 * found.width, 2 * found.height), Image.Resampling.BILINEAR)
        buffer = io.BytesIO()
        doubled.save(buffer, "PNG", compress_level=1)
        data = buffer.getvalue()
        return data if size < 0 else data[:size]

    def version(self) -> tuple[int, ...]:
        """Of the stored image; see `ImageRef`."""
        return self.image.version()
