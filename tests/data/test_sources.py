"""Annotation files as people write them: readable ones are read, others named by file and line."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from mono_internvl.data.sources import JsonArraySource, JsonlSource, Source, json_files, read_meta
from mono_internvl.errors import SampleError

TURNS = [{"from": "human", "value": "a?"}, {"from": "gpt", "value": "b"}]


def _whole(text: str) -> str:
    """The text with a conversation in each of its records, that give an id alone."""
    return re.sub(r'("id": [^}]+)}', rf'\1, "conversations": {json.dumps(TURNS)}}}', text)


def _ids(source: Source) -> list[Any]:
    return [source.record(i).fields["id"] for i in range(len(source))]


@pytest.mark.parametrize(
    ("content", "lines"),
    [
        ('{"id": 0}\n{"id": 1}\n', [1, 2]),
        ('{"id": 0}\n{"id": 1}', [1, 2]),
        ('{"id": 0}\r\n{"id": 1}\r\n', [1, 2]),
        ('\n\n{"id": 0}\n\n   \n\t\r\n{"id": 1}\n\n', [3, 7]),
        ('\n{"id": 0}\n{"id": 1}\n          ', [2, 3]),
    ],
    ids=["plain", "no_newline_at_the_end", "crlf", "blank_lines", "blank_end"],
)
@pytest.mark.parametrize("chunk_bytes", [3, 1 << 24])
def test_jsonl_source_reads_lines(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    content: str,
    lines: list[int],
    chunk_bytes: int,
) -> None:
    monkeypatch.setattr(json_files, "_CHUNK_BYTES", chunk_bytes)
    file = tmp_path / "a.jsonl"
    file.write_bytes(_whole(content).encode())
    source = JsonlSource(file, tmp_path)
    assert _ids(source) == [0, 1]
    assert [source.record(i).where for i in range(2)] == [f"{file}:{line}" for line in lines]
    assert all(source.size(i) >= len('{"id": 0}') for i in range(2))


def test_jsonl_source_reads_utf8_with_and_without_mark(tmp_path: Path) -> None:
    text = _whole(json.dumps({"id": "日本 ü 🙂"}, ensure_ascii=False))
    for number, prefix in enumerate((b"", b"\xef\xbb\xbf")):
        file = tmp_path / f"{number}.jsonl"
        file.write_bytes(prefix + text.encode() + b"\n")
        assert _ids(JsonlSource(file, tmp_path)) == ["日本 ü 🙂"]


@pytest.mark.parametrize("content", ["", "\n", "  \n\r\n"])
def test_jsonl_source_without_record_is_refused(tmp_path: Path, content: str) -> None:
    file = tmp_path / "empty.jsonl"
    file.write_text(content)
    with pytest.raises(SampleError, match=r"empty\.jsonl: holds no record"):
        JsonlSource(file, tmp_path)


@pytest.mark.parametrize(
    "bad",
    [
        b'{"id": 1',
        b"not json",
        b"[1, 2]",
        b"7",
        b'{"id": "\xff\xfe"}',
        b"\xef\xbb\xbf",
        pytest.param(b"[" * 100_000, id="deep"),
    ],
)
def test_corrupt_line_names_file_and_line(tmp_path: Path, bad: bytes) -> None:
    file = tmp_path / "a.jsonl"
    good = [_whole(f'{{"id": {i}}}').encode() for i in (0, 2)]
    file.write_bytes(good[0] + b"\n\n" + bad + b"\n" + good[1] + b"\n")
    source = JsonlSource(file, tmp_path)
    assert [source.record(i).fields["id"] for i in (0, 2)] == [0, 2]
    with pytest.raises(SampleError, match=r"a\.jsonl:3: "):
        source.record(1)


def test_json_array_as_llava_ships_it(tmp_path: Path) -> None:
    records = [{"id": str(i), "conversations": TURNS} for i in range(3)]
    (tmp_path / "llava.json").write_text(json.dumps(records, indent=1))
    (tmp_path / "meta.json").write_text(
        json.dumps({"llava": {"root": "images", "annotation": "llava.json", "repeat_time": 2}})
    )
    (source,) = read_meta(tmp_path / "meta.json")
    assert isinstance(source, JsonArraySource)
    assert (_ids(source), source.repeat, source.name) == (["0", "1", "2"], 2.0, "llava")
    assert source.size(1) == len(json.dumps(records[1]))
    assert source.record(1).where.endswith("llava.json[1]")


@pytest.mark.parametrize("content", ["[]", "{}", "[1", ""])
def test_json_array_that_is_none_is_refused(tmp_path: Path, content: str) -> None:
    file = tmp_path / "a.json"
    file.write_text(content)
    with pytest.raises(SampleError, match=r"a\.json"):
        JsonArraySource(file, tmp_path)


def test_json_array_holding_another_thing_names_its_place(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text('[{"id": 0}, 5]')
    with pytest.raises(SampleError, match=r"a\.json\[1\]: a JSON int"):
        JsonArraySource(file, tmp_path).record(1)


def _write_meta(folder: Path, entry: object) -> Path:
    (folder / "a.jsonl").write_text('{"id": 0}\n')
    file = folder / "meta.json"
    file.write_text(json.dumps({"mine": entry}))
    return file


def test_meta_paths_are_relative_to_its_folder(tmp_path: Path) -> None:
    entry = {"root": "pictures", "annotation": "a.jsonl", "max_dynamic_patch": 6, "length": 1}
    (source,) = read_meta(_write_meta(tmp_path, entry))
    assert (source.path, source.image_root) == (tmp_path / "a.jsonl", tmp_path / "pictures")
    assert (source.repeat, source.max_tiles, len(source)) == (1.0, 6, 1)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"root": None}, "root=None"),
        ({"annotation": None}, "annotation=None"),
        ({"annotation": "other.jsonl"}, "no such annotation file"),
        ({"repeat_time": 0}, "repeat_time=0.0"),
        ({"repeat_time": -1}, "repeat_time=-1.0"),
        ({"repeat_time": "twice"}, "repeat_time='twice'"),
        ({"repeat_time": True}, "repeat_time=True"),
        ({"repeat_time": float("inf")}, "repeat_time=inf"),
        ({"max_dynamic_patch": 0}, "max_dynamic_patch=0"),
        ({"max_dynamic_patch": True}, "max_dynamic_patch=True"),
        ({"max_dynamic_patch": "all"}, "max_dynamic_patch='all'"),
    ],
)
def test_meta_entry_that_is_wrong_is_named(
    tmp_path: Path, change: dict[str, Any], complaint: str
) -> None:
    file = _write_meta(tmp_path, {"root": ".", "annotation": "a.jsonl", **change})
    with pytest.raises(SampleError, match=complaint) as caught:
        read_meta(file)
    assert "mine" in str(caught.value)


@pytest.mark.parametrize("content", ["{}", "[]", "{", "7", pytest.param("[" * 100_000, id="deep")])
def test_meta_that_is_no_object_is_refused(tmp_path: Path, content: str) -> None:
    file = tmp_path / "meta.json"
    file.write_text(content)
    with pytest.raises(SampleError, match=r"meta\.json"):
        read_meta(file)
    with pytest.raises(SampleError, match="no such meta file"):
        read_meta(tmp_path / "absent.json")
    with pytest.raises(SampleError, match="expected an object"):
        read_meta(_write_meta(tmp_path, "a.jsonl"))


def _ratios(folder: Path, *entries: dict[str, Any]) -> Path:
    """A meta file with sources of 1, 2, ... records."""
    for number in range(1, len(entries) + 1):
        line = json.dumps({"id": 0, "conversations": TURNS}) + "\n"
        (folder / f"{number}.jsonl").write_text(line * number)
    listed = enumerate(entries, 1)
    meta = {str(n): {"root": ".", "annotation": f"{n}.jsonl", **entry} for n, entry in listed}
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder / "meta.json"


def test_ratios_of_a_meta_file_are_those_of_an_epoch(tmp_path: Path) -> None:
    ratios = (0.539, 0.052, 0.409)
    sources = read_meta(_ratios(tmp_path, *({"ratio": ratio} for ratio in ratios)))
    counts = [len(source) * source.repeat for source in sources]
    assert [count / sum(counts) for count in counts] == pytest.approx(ratios)
    # Nothing is left out, and what is rarest beside its ratio is seen once.
    assert min(source.repeat for source in sources) == pytest.approx(1)
    assert sources[1].repeat == pytest.approx(1)


@pytest.mark.parametrize(
    ("entries", "complaint"),
    [
        ([{"ratio": 0.5}, {}], r"'2': ratio=None; expected a number"),
        ([{"ratio": 0.5}, {"ratio": "0.5"}], "'2': ratio='0.5'"),
        ([{"ratio": True}], "ratio=True"),
        ([{"ratio": 0}, {"ratio": 1}], "'1': ratio=0"),
        ([{"ratio": 0.5}, {"ratio": 0.4}], "ratios add up to 0.9; expected 1"),
        ([{"ratio": 1, "repeat_time": 2}], "repeat_time beside ratio=1"),
    ],
)
def test_ratios_that_are_none_are_refused(
    tmp_path: Path, entries: list[dict[str, Any]], complaint: str
) -> None:
    with pytest.raises(SampleError, match=complaint):
        read_meta(_ratios(tmp_path, *entries))
