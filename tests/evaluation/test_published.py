"""Published benchmarks: every row reads its data, scores golden answers, and can fail."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import benchmark_samples as samples
import numpy as np
import pytest
from PIL import Image

from mono_internvl.errors import ConfigError, ImageError, SampleError
from mono_internvl.evaluation.benchmarks.published import PublishedBenchmark
from mono_internvl.evaluation.benchmarks.table import ROWS, TABLE, rows_named
from mono_internvl.evaluation.data_files import read_rows
from mono_internvl.evaluation.questions import Question
from mono_internvl.evaluation.toolkits import SHORT
from mono_internvl.processing.image_files import load_image
from mono_internvl.processing.prompts import ImagePart
from mono_internvl.processing.video import FrameSampling

NAMED = {
    "mmbench", "mmbench-v1.1", "mmbench-test", "ccbench", "mmvet", "mmmu", "mme", "mathvista",
    "seed-image", "ocrbench", "hallusionbench", "textvqa", "scienceqa", "gqa", "docvqa",
    "docvqa-test", "ai2d", "chartqa", "infovqa", "infovqa-test", "coco", "flickr30k", "nocaps",
    "vqav2", "vqav2-testdev", "okvqa", "videomme", "videomme-subtitles",
}  # fmt: skip
GOLDEN = {"mme": 400.0, "ocrbench": 5.0, "coco": 1000.0, "flickr30k": 1000.0, "nocaps": 1000.0}
ROW = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)


class Reading:
    """A judge that compares texts."""

    name = "by equality"

    def grade(self, question: str, truth: str, answer: str) -> float:
        return float(answer == truth)

    def extract(self, question: str, answer: str) -> str:
        return answer


def _load(row: PublishedBenchmark, root: Path) -> list[Question]:
    samples.write_sample(row.name, root)
    return row.load(row.data_files(root), root)


def test_all_benchmarks_are_there_and_described() -> None:
    assert set(TABLE) == NAMED and len(ROWS) == len(NAMED)
    assert [row.name for row in rows_named("mme, chartqa")] == ["mme", "chartqa"]
    assert rows_named("all") == list(ROWS)
    with pytest.raises(ConfigError, match="benchmarks='mmme'; expected some of all, mmbench"):
        rows_named("mme,mmme")
    with pytest.raises(ConfigError, match="every name once"):
        rows_named("mme,mme")


@ROW
def test_row_says_how_it_is_asked_and_where_its_data_are(row: PublishedBenchmark) -> None:
    assert row.protocol.max_tiles and row.protocol.max_new_tokens == row.max_new_tokens
    assert row.source or row.dataset_id
    for one in row.published:
        assert one.score >= 0 and "arXiv 2410.08202, table" in one.source
    assert bool(row.submission) == (row.name in (*samples.NO_ANSWERS, "mmvet"))


@ROW
def test_golden_answers_are_right_and_wrong_ones_wrong(
    row: PublishedBenchmark, tmp_path: Path
) -> None:
    questions = _load(row, tmp_path)
    assert len(questions) in (5, 6)
    assert len({question.sample.record_id for question in questions}) == len(questions)

    def scored(text: Any) -> Any:
        found = [row.predict(q, text(q.record["truth"]), row.protocol) for q in questions]
        json.dumps([one.to_row() for one in found])
        return row.score(found, Reading())

    golden = scored(row.rules.golden)
    if row.name in samples.NO_ANSWERS:
        assert golden.paper is None and golden.corrected is None
        return
    wrong = scored(row.rules.wrong)
    assert golden.paper == pytest.approx(GOLDEN.get(row.name, 100.0))
    assert golden.corrected in (None, pytest.approx(GOLDEN.get(row.name, 100.0)))
    assert wrong.paper == 0.0 and not wrong.corrected
    half = iter([row.rules.golden, row.rules.wrong] * 3)
    assert 0 <= scored(lambda truth: next(half)(truth)).paper < golden.paper


@pytest.mark.parametrize("name", ["mmvet", "mathvista"])
def test_without_a_judge_the_cell_stays_empty(name: str, tmp_path: Path) -> None:
    row = TABLE[name]
    found = [row.predict(q, "x", row.protocol) for q in _load(row, tmp_path)]
    scores = row.score(found, None)
    assert scores.paper is None and scores.by_protocol()["paper"] is None and scores.notes


def test_prompts_tiles_and_images_of_a_question(tmp_path: Path) -> None:
    question = _load(TABLE["mmbench"], tmp_path)[4]
    assert question.text == (
        'A hint.\nWhat is "this"?\nLook.\nA. no\nB. yes\n'
        "Answer with the option's letter from the given choices directly."
    )
    first = _load(TABLE["mme"], tmp_path)[0]
    assert first.text == f"Is it 0? Please answer yes or no. {SHORT}"
    parts = first.prompt[0].parts
    assert isinstance(parts[0], ImagePart) and parts[1] == "\n"
    assert load_image(parts[0].source).getpixel((0, 0)) == samples.COLOURS[0]
    assert TABLE["mme"].protocol.max_tiles == 12 and TABLE["ocrbench"].protocol.max_tiles == 24


def test_an_image_that_rows_share_is_one_image(tmp_path: Path) -> None:
    shared = [q.sample.images for q in _load(TABLE["mmbench"], tmp_path)]
    assert shared[0] == shared[1] == shared[2] != shared[3]  # by reference to another row
    pairs = [q.sample.images for q in _load(TABLE["mme"], tmp_path)]
    assert pairs[0] == pairs[1] != pairs[2]  # by the same bytes


def test_first_image_of_mmmu_is_doubled_and_others_are_one_tile(tmp_path: Path) -> None:
    row = TABLE["mmmu"]
    images = _load(row, tmp_path)[3].sample.images
    assert [load_image(one).size for one in images] == [(112, 112), (56, 56)]
    assert row.protocol.max_tiles_of_later_images == 1


def test_mmmu_leaves_out_the_dev_questions(tmp_path: Path) -> None:
    rows = samples._rows("mmmu")
    rows[0]["split"] = "dev"
    samples.write_tsv(tmp_path / "mmmu.tsv", rows)
    assert len(TABLE["mmmu"].load([tmp_path / "mmmu.tsv"], tmp_path)) == 4


def test_parquet_rows_hold_their_images(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    rows = [
        {
            "question_id": n,
            "question": "what?",
            "image": {"bytes": samples.png(n), "path": f"{n}.png"},
            "answers": [{"answer": f"word{n}"}] * 10,
        }
        for n in range(5)
    ]
    (tmp_path / "okvqa").mkdir()
    for part in range(2):
        table = pa.Table.from_pylist(rows[part * 3 : part * 3 + 3])
        pq.write_table(table, tmp_path / "okvqa" / f"val-{part}.parquet", row_group_size=2)
    row = TABLE["okvqa"]
    questions = row.load(row.data_files(tmp_path), tmp_path)
    assert [q.record["id"] for q in questions] == ["0", "1", "2", "3", "4"]
    shown = [load_image(q.sample.images[0]).getpixel((0, 0)) for q in questions]
    assert shown == list(samples.COLOURS)
    (tmp_path / "okvqa" / "val-1.parquet").write_bytes(b"PAR1 cut off")
    with pytest.raises(SampleError, match=r"val-1\.parquet: not a readable parquet file"):
        row.load(row.data_files(tmp_path), tmp_path)


def test_mme_s_own_folder(tmp_path: Path) -> None:
    for task in ("count", "OCR"):
        (tmp_path / "mme" / "images" / task).mkdir(parents=True)
        (tmp_path / "mme" / "images" / task / "1.png").write_bytes(samples.png(0))
        lines = "1.png\tone?\tYes\n1.png\ttwo?\tNo\n"
        (tmp_path / "mme" / f"{task}.txt").write_text(lines)
    row = TABLE["mme"]
    questions = row.load(row.data_files(tmp_path), tmp_path)
    assert len(questions) == 4
    found = [row.predict(q, q.record["truth"]["answer"], row.protocol) for q in questions]
    assert row.score(found, None).paper == 400.0


def test_chartqa_s_two_files_and_vqa_s_separate_answers(tmp_path: Path) -> None:
    folder = tmp_path / "chartqa"
    folder.mkdir()
    for part in ("human", "augmented"):
        rows = [{"image": n, "question": "?", "question_id": f"{part}{n}", "answer": "7"}
                for n in range(2)]  # fmt: skip
        samples.write_jsonl(folder / f"test_{part}.jsonl", rows)
    row = TABLE["chartqa"]
    questions = row.load(row.data_files(tmp_path), tmp_path)
    said = [row.predict(q, "7" if q.record["truth"]["part"] == "human" else "8", row.protocol)
            for q in questions]  # fmt: skip
    assert row.score(said, None).details == {"human": 100.0, "augmented": 0.0}
    rows = [{"image": 0, "question": "?", "question_id": 5, "answer": "x"}]
    samples.write_jsonl(tmp_path / "textvqa_val.jsonl", rows)
    ten = [{"answer": "stop"}] * 10
    beside = tmp_path / "textvqa_val_annotations.json"
    beside.write_text(json.dumps({"annotations": [{"question_id": 5, "answers": ten}]}))
    row = TABLE["textvqa"]
    assert (
        row.load(row.data_files(tmp_path), tmp_path)[0].record["truth"]["answers"] == ["stop"] * 10
    )


def test_captions_in_coco_s_form(tmp_path: Path) -> None:
    (tmp_path / "coco").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "coco" / "7.jpg")
    value = {
        "images": [{"id": 7, "file_name": "7.jpg"}],
        "annotations": [{"image_id": 7, "caption": "a cat"}, {"image_id": 7, "caption": "cats"}],
    }
    (tmp_path / "coco" / "coco_karpathy_test.json").write_text(json.dumps(value))
    row = TABLE["coco"]
    question = row.load(row.data_files(tmp_path), tmp_path)[0]
    assert question.record["truth"]["answers"] == ["a cat", "cats"]
    assert question.text == "Provide a one-sentence caption for the provided image."


@pytest.mark.parametrize(
    ("name", "change", "complaint"),
    [
        ("mmbench", {"answer": "E"}, "answer='E'; expected one of A, B, C"),
        ("mmbench", {"index": "x"}, "no number as `index`"),
        ("mme", {"category": "sport"}, "category='sport'; expected a subtask of MME"),
        ("mme", {"answer": "maybe"}, "answer='maybe'; expected yes or no"),
        ("hallusionbench", {"index": "VD_1"}, "expected six parts"),
        ("textvqa", {"answer": "['a', 'b']"}, "2 answers; expected the 10"),
        ("textvqa", {"answer": "['a', "}, "expected a list as Python writes it"),
        ("ai2d", {"answer": ""}, "no `answer`; this split is scored by a server"),
        ("gqa", {"image": ""}, "no image; GQA asks about images"),
        ("gqa", {"image": "99"}, "image='99'; no row of that index holds an image"),
        ("mathvista", {"answer_option": "", "answer": "9/11"}, "expected one of choices"),
        ("docvqa", {"index": "1"}, "id '1' is that of"),
    ],
)
def test_damaged_rows_are_refused_by_file_and_line(
    name: str, change: dict[str, Any], complaint: str, tmp_path: Path
) -> None:
    rows = samples._rows(name)
    samples.write_tsv(tmp_path / f"{name}.tsv", [{**rows[0], **change}, *rows[1:]])
    with pytest.raises(SampleError, match=rf"{name}\.tsv:\d+: .*{complaint}"):
        TABLE[name].load([tmp_path / f"{name}.tsv"], tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("a.tsv", "index\tquestion\n1\n", r"a\.tsv:2: 1 cells; the header has 2"),
        ("a.tsv", 'index\tq\n1\t"open\n', "not tab-separated UTF-8"),
        ("a.tsv", b"index\tq\n1\t\xff\xfe\n", "not tab-separated UTF-8"),
        ("a.jsonl", "{\n", "not readable JSON"),
        ("a.jsonl", "[1]\n", r"a\.jsonl:1: a JSON list; expected an object"),
        ("a.jsonl", '{"image": "no.png"}\n', r"image 'no\.png' is neither below"),
        ("a.json", "{}", "expected an array, or `images` and `annotations`"),
        ("count.txt", "a.png\tquestion\n", r"count\.txt:1: 2 cells; expected image, question"),
    ],
)
def test_damaged_files_are_refused(
    name: str, content: str | bytes, complaint: str, tmp_path: Path
) -> None:
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(SampleError, match=complaint):
        list(read_rows(file, tmp_path))


def test_damaged_base64_is_an_error_of_its_image(tmp_path: Path) -> None:
    rows = samples._rows("gqa")
    rows[0]["image"] = "%" * 100
    samples.write_tsv(tmp_path / "gqa.tsv", rows)
    question = TABLE["gqa"].load([tmp_path / "gqa.tsv"], tmp_path)[0]
    with pytest.raises(ImageError, match="not base64"):
        question.sample.images[0].read()


def test_missing_data_say_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(SampleError, match=r"none of ocrbench\{\.tsv,\.jsonl,\.parquet\}"):
        TABLE["ocrbench"].data_files(tmp_path)


def test_answers_of_another_benchmark_are_not_scored(tmp_path: Path) -> None:
    found = [TABLE["gqa"].predict(q, "x", TABLE["gqa"].protocol)
             for q in _load(TABLE["gqa"], tmp_path)]  # fmt: skip
    with pytest.raises(SampleError, match="predictions of 'mme': record '0' is of 'gqa'"):
        TABLE["mme"].score(found, None)


def test_videos_become_labelled_frames_with_what_is_said_in_them(tmp_path: Path) -> None:
    row = TABLE["videomme-subtitles"]
    questions = _load(row, tmp_path)
    text = questions[1].text
    assert text.startswith("Frame-1: \nFrame-2: \n")
    assert "This video's subtitles are listed below:\nearly 1\nSelect the best answer" in text
    assert "never" not in text and text.count("early") == 1
    assert len(questions[1].sample.images) == 8
    shown = load_image(questions[1].sample.images[0]).getpixel((30, 20))
    assert np.abs(np.array(shown) - samples.COLOURS[1]).max() < 12  # type: ignore[arg-type]
    assert (row.protocol.max_tiles, row.protocol.frames, row.protocol.subtitles) == (1, 8, True)
    plain = TABLE["videomme"]
    assert "subtitles" not in plain.load(row.data_files(tmp_path), tmp_path)[1].text
    answers = [row.predict(q, row.rules.golden(q.record["truth"]), row.protocol) for q in questions]
    answers[0] = row.predict(questions[0], "B", row.protocol)
    details = row.score(answers, None).details
    assert details["long"] == 100 and details["short"] == pytest.approx(200 / 3)
    assert details["domain: Film"] == 80 and details["task_type: Order"] == 0


def test_frames_as_images_are_as_many_as_are_asked_for(tmp_path: Path) -> None:
    samples.write_sample("videomme", tmp_path)
    for row, message in (
        (dataclasses.replace(TABLE["videomme"], frames=FrameSampling(4)), "4 frames of a video"),
        (dataclasses.replace(TABLE["videomme"], frames=FrameSampling(None, 2)), "fps=2 of a video"),
        (TABLE["videomme-subtitles"], "ask without subtitles"),
    ):
        with pytest.raises(SampleError, match=message):
            row.load(row.data_files(tmp_path), tmp_path)


def test_missing_video_is_named_with_its_row(tmp_path: Path) -> None:
    row = TABLE["videomme"]
    samples.write_sample("videomme-subtitles", tmp_path)
    (tmp_path / "video" / "clip3.mp4").unlink()
    with pytest.raises(SampleError, match=r"Video-MME\.jsonl:4: no video 'clip3'"):
        row.load(row.data_files(tmp_path), tmp_path)
