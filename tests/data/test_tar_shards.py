"""Tar shards: samples as they were written, read in place; damage is named and nothing is lost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_shards

from mono_internvl.data.records import CAPTION_PROMPT
from mono_internvl.data.sources import TarSource, read_meta
from mono_internvl.data.sources.tar_index import index_file, read_index, scan, write_index
from mono_internvl.errors import SampleError
from mono_internvl.processing.image_files import load_image


def _write(folder: Path, count: int = 5) -> Path:
    return tiny_shards.write_tar(folder / "0.tar", tiny_shards.caption_members(range(count)))


def test_caption_shard_is_read_as_img2dataset_writes_it(tmp_path: Path) -> None:
    source = TarSource(_write(tmp_path))
    assert len(source) == 5
    record = source.record(3)
    assert [turn.text for turn in record.turns] == [f"\n{CAPTION_PROMPT}", "red"]
    assert record.where == f"{tmp_path / '0.tar'}:000000003"
    assert record.fields["url"].endswith("/3")
    (image,) = record.images
    assert image.read() == tiny_shards.picture(3) and image.read(4) == tiny_shards.picture(3)[:4]
    assert load_image(image).size == (56, 56)


def test_shard_with_conversations_several_images_and_documents(tmp_path: Path) -> None:
    both = tiny_shards.conversation(0)
    both["conversations"][0]["value"] = "<image> and <image>"
    members = [
        ("a/0.0.png", tiny_shards.picture(0, kind="PNG")),
        ("a/0.1.png", tiny_shards.picture(1, kind="PNG")),
        ("a/0.json", json.dumps(both).encode()),
        ("b/0.json", json.dumps({"text": "just words"}).encode()),
        ("b/1.txt", b"more words"),
        ("b/2.json", json.dumps({"texts": [{"user": "q?", "assistant": "a"}]}).encode()),
        ("b/2.jpg", tiny_shards.picture(2)),
    ]
    source = TarSource(tiny_shards.write_tar(tmp_path / "0.tar", members))
    first, second, third, fourth = (source.record(i) for i in range(4))
    assert [image.read()[:4] for image in first.images] == [b"\x89PNG"] * 2
    assert first.images[1].read() == tiny_shards.picture(1, kind="PNG")
    assert first.record_id == "c0"
    assert (second.document, third.document) == ("just words", "more words")
    assert fourth.turns[0].text == "\nq?" and len(fourth.images) == 1


def test_shards_are_one_source_in_order_and_one_listed_twice_is_read_twice(tmp_path: Path) -> None:
    for number in range(3):
        members = tiny_shards.caption_members(range(number * 10, number * 10 + number + 1))
        tiny_shards.write_tar(tmp_path / f"shards/{number}.tar", members)
    entry = {"annotation": "shards/*.tar", "prompt": "say it", "max_dynamic_patch": 3}
    meta = tiny_shards.write_meta(tmp_path / "m.json", {"captions": entry})
    (source,) = read_meta(meta)
    keys = [source.record(i).fields["key"] for i in range(len(source))]
    assert [int(key) for key in keys] == [0, 10, 11, 20, 21, 22]
    assert source.record(0).turns[0].text == "\nsay it" and source.record(0).max_tiles == 3
    entry["annotation"] = ["shards/1.tar", "shards/0.tar", "shards/1.tar"]
    (source,) = read_meta(tiny_shards.write_meta(tmp_path / "m.json", {"captions": entry}))
    assert [int(source.record(i).fields["key"]) for i in range(5)] == [10, 11, 0, 10, 11]


def test_kept_index_is_the_scanned_one_and_another_shard_is_refused(tmp_path: Path) -> None:
    tar = _write(tmp_path)
    scanned = scan(tar)
    without = TarSource(tar).fingerprint()
    write_index(tar, scanned)
    kept = read_index(tar)
    assert all((kept.tensors()[n] == a).all() for n, a in scanned.tensors().items())
    assert TarSource(tar).fingerprint() == without
    assert TarSource(tar).record(4).turns[-1].text == "green"
    _write(tmp_path, 16)
    with pytest.raises(SampleError, match=r"0\.tar\.index: made of a shard of .* data prepare"):
        TarSource(tar)
    index_file(tar).write_bytes(b"nonsense")
    with pytest.raises(SampleError, match=r"0\.tar\.index: not readable"):
        TarSource(tar)


def test_shard_rewritten_under_a_kept_index_is_noticed(tmp_path: Path) -> None:
    tar = _write(tmp_path)
    write_index(tar, scan(tar))
    source = TarSource(tar)
    content = tar.read_bytes()
    tar.write_bytes(content[:100] + b"\0" * (len(content) - 100))
    with pytest.raises(SampleError, match="changed after it was indexed") as raised:
        source.record(2)
    assert raised.value.reason == "shard damaged"


@pytest.mark.parametrize("where", ["content", "header", "bit"])
def test_damaged_end_of_a_shard_is_one_bad_record_and_the_rest_is_read(
    tmp_path: Path, where: str
) -> None:
    tar = _write(tmp_path)
    offset = int(scan(tar).offset[9])  # the fourth sample's image
    content = bytearray(tar.read_bytes())
    if where == "bit":
        content[offset - 500] ^= 0xFF
    else:
        del content[offset + 10 if where == "content" else offset - 300 :]
    tar.write_bytes(content)
    source = TarSource(tar)
    assert len(source) == 4
    assert source.record(2).turns[-1].text == "blue"
    with pytest.raises(SampleError, match=r"0\.tar: sample 3 .* damaged") as raised:
        source.record(3)
    assert raised.value.reason == "shard damaged"


def test_what_is_no_shard_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.tar").write_text("not a tar file at all, but long enough" * 100)
    with pytest.raises(SampleError, match=r"text\.tar: not a plain tar file"):
        TarSource(tmp_path / "text.tar")
    with pytest.raises(SampleError, match=r"gone\.tar: no such shard"):
        TarSource(tmp_path / "gone.tar")
    tiny_shards.write_tar(tmp_path / "empty.tar", [])
    with pytest.raises(SampleError, match=r"empty\.tar: holds no record"):
        TarSource(tmp_path / "empty.tar")
    meta = tmp_path / "m.json"
    for annotation, complaint in (
        ("none/*.tar", "fits no file"),
        (["text.tar", "a.jsonl"], "write another entry"),
        (["a.jsonl", "b.jsonl"], "a list of 2"),
        ([], "expected a path"),
    ):
        entry = {"root": ".", "annotation": annotation}
        with pytest.raises(SampleError, match=complaint):
            read_meta(tiny_shards.write_meta(meta, {"mine": entry}))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"a.txt": b"\xff\xfe\xff", "a.jpg": b"x"}, "not UTF-8"),
        ({"a.json": b"{", "a.jpg": b"x"}, "not JSON"),
        ({"a.json": b"[]", "a.jpg": b"x"}, "malformed"),
        ({"a.jpg": b"x"}, "no words"),
        ({"a.txt": b" ", "a.jpg": b"x"}, "empty answer"),
        ({"a.mp4": b"x"}, "shard damaged"),
        ({"a.txt": b"x" * (8 << 20) + b"x"}, "line too long"),
    ],
)
def test_bad_sample_of_a_shard_says_of_what_kind(
    tmp_path: Path, content: dict[str, bytes], reason: str
) -> None:
    members = [*content.items(), ("b.txt", b"good")]
    source = TarSource(tiny_shards.write_tar(tmp_path / "0.tar", members))
    with pytest.raises(SampleError, match=r"0\.tar") as raised:
        source.record(0)
    assert raised.value.reason == reason
    assert source.record(1).document == "good"
