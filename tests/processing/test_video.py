"""Videos: which frames are shown, what a file may be, and the way of a clip to ids and answers."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_runs
from tiny_videos import write_clip

from mono_internvl.cli import app as cli
from mono_internvl.data.encoder import RecordEncoder
from mono_internvl.data.records import Record
from mono_internvl.data.sources import JsonlSource
from mono_internvl.errors import ConfigError, ImageError, MissingDependency, SampleError
from mono_internvl.evaluation.videos import said_at
from mono_internvl.processing.image_files import image_size, load_image
from mono_internvl.processing.processor import MonoInternVLProcessor
from mono_internvl.processing.video import (
    MOST_FRAMES,
    FrameSampling,
    frame_times,
    frames_of,
    with_frames,
)
from mono_internvl.serving.loading import load

GREYS = [(10 * n, 10 * n, 10 * n) for n in range(20)]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Frame n is grey of 10 n; 2 s."""
    return write_clip(tmp_path_factory.mktemp("clips") / "clip.mp4", GREYS)


def _shown(path: Path, sampling: FrameSampling) -> list[int]:
    """Numbers of the frames that are shown, read off their grey."""
    means = [np.asarray(load_image(frame)).mean() for frame in frames_of(path, sampling)]
    return [round(float(mean) / 10) for mean in means]


def test_frames_stand_at_the_published_places(clip: Path) -> None:
    assert _shown(clip, FrameSampling(4)) == [4, 8, 12, 16]
    assert _shown(clip, FrameSampling(8)) == [int(20 / 9 * n) for n in range(1, 9)]
    assert _shown(clip, FrameSampling(1)) == [10]
    assert _shown(clip, FrameSampling(None, 2.0)) == [0, 5, 10, 15]
    assert frame_times(clip, FrameSampling(4)) == pytest.approx([0.4, 0.8, 1.2, 1.6])
    assert FrameSampling(3).indices(1, 10.0) == [0, 0, 0], "a still picture is shown three times"
    assert image_size(frames_of(clip)[0]) == (64, 48)


@pytest.mark.parametrize(
    ("name", "codec"), [("a.mkv", "libx264"), ("a.webm", "libvpx"), ("a.avi", "mpeg4")]
)
def test_other_containers_and_codecs_show_the_same_frames(
    tmp_path: Path, name: str, codec: str
) -> None:
    path = write_clip(tmp_path / name, GREYS, codec=codec, key_every=7)
    assert _shown(path, FrameSampling(5)) == [int(20 / 6 * n) for n in range(1, 6)]
    assert _shown(path, FrameSampling(40))[:4] == [0, 0, 1, 1]


def test_a_changed_video_is_read_again(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.mp4", GREYS[:3])
    assert _shown(path, FrameSampling(1)) == [1]
    write_clip(path, GREYS[10:13])
    assert _shown(path, FrameSampling(1)) == [11]


def test_what_is_no_video_is_refused(clip: Path, tmp_path: Path) -> None:
    whole = clip.read_bytes()
    playlist = f"#EXTM3U\n#EXTINF:1,\n{clip}\n#EXT-X-ENDLIST\n"
    for number, content in enumerate((b"", b"no video", whole[:600], playlist.encode())):
        file = tmp_path / f"{number}.mp4"
        file.write_bytes(content)
        with pytest.raises(ImageError, match=rf"video .*{number}\.mp4: cannot be decoded"):
            frames_of(file)[0].read()
    with pytest.raises(ImageError, match="no such file"):
        frames_of(tmp_path / "missing.mp4")
    with pytest.raises(ImageError, match="at most 512 are shown"):
        frames_of(clip, FrameSampling(None, 1000.0))


@pytest.mark.parametrize(
    ("count", "fps"),
    [(None, None), (4, 1.0), (0, None), (True, None), (MOST_FRAMES + 1, None), (None, 0.0)],
)
def test_senseless_samplings_are_refused(count: Any, fps: Any) -> None:
    with pytest.raises(ConfigError, match=r"frames|fps"):
        FrameSampling(count, fps)


def test_missing_package_names_the_extra(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(MissingDependency, match=r"mono-internvl\[video\]"):
        frames_of(clip, FrameSampling(7))[0].read()
    monkeypatch.setitem(sys.modules, "pysubs2", None)
    with pytest.raises(MissingDependency, match=r"mono-internvl\[video\]"):
        said_at(clip, [0.0])


def test_subtitles_are_those_of_the_frames_each_once_in_order(tmp_path: Path) -> None:
    file = tmp_path / "a.srt"
    file.write_text(
        "1\n00:00:00,000 --> 00:00:01,000\none <i>line</i>\n\n"
        "2\n00:00:01,000 --> 00:00:02,000\ntwo\nrows\n\n"
        "3\n00:00:05,000 --> 00:00:06,000\nthree\n"
    )
    assert said_at(file, [0.2, 0.4, 1.0]) == "one line\ntwo rows"
    assert said_at(file, [5.9]) == "three" and said_at(file, [3.0]) == ""
    file.write_bytes(b"\xff\xfe\x00broken")
    with pytest.raises(SampleError, match="not readable subtitles"):
        said_at(file, [0.0])


# ------------------------------------------------------------------------------ records and models


def _record(folder: Path, **fields: Any) -> Record:
    talk = [{"from": "human", "value": "what moved?"}, {"from": "gpt", "value": "red"}]
    file = folder / "records.jsonl"
    file.write_text(json.dumps({"conversations": talk, **fields}))
    return JsonlSource(file, folder).record(0)


def test_record_with_a_video_shows_labelled_frames(clip: Path) -> None:
    record = _record(clip.parent, video=clip.name, frames=3)
    parts = record.turns[0].parts
    assert [p for p in parts if isinstance(p, str)] == [
        "Frame-1: ", "\nFrame-2: ", "\nFrame-3: ", "\nwhat moved?",
    ]  # fmt: skip
    assert [str(image).split()[-1] for image in record.images] == ["1", "2", "3"]
    assert record.max_tiles == 1
    by_rate = _record(clip.parent, video=[clip.name], fps=1)
    assert len(by_rate.images) == 2


def test_pictures_and_videos_stand_where_their_places_are(clip: Path) -> None:
    load_image(frames_of(clip)[0]).save(clip.parent / "a.png")
    talk = [
        {"from": "human", "value": "<video>\nand <image> or <video>?"},
        {"from": "gpt", "value": "red"},
    ]
    record = _record(
        clip.parent, conversations=talk, image="a.png", video=[clip.name] * 2, frames=2
    )
    names = [str(image).rpartition("/")[2] for image in record.images]
    assert names == ["clip.mp4 frame 1", "clip.mp4 frame 2", "a.png", *names[:2]]
    assert with_frames("<video>|<video>", [1, 2]) == (
        "Frame-1: <image>|Frame-1: <image>\nFrame-2: <image>"
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"video": "none.mp4"}, "none.mp4: no such file"),
        ({"video": 3}, "video=3; expected a path"),
        ({"video": ["clip.mp4", "clip.mp4"]}, "0 <video> placeholders but 2 videos"),
        ({"video": "clip.mp4", "frames": 0}, "frames=0"),
        ({"video": "clip.mp4", "frames": 2, "fps": 1}, "expected one of them"),
    ],
)
def test_records_with_wrong_videos_are_refused(
    clip: Path, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(SampleError, match=rf"records\.jsonl:1: .*{message}"):
        _record(clip.parent, **fields)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_runs.write_checkpoint(tmp_path_factory.mktemp("model") / "checkpoint")


def test_a_frame_is_one_tile_in_training(clip: Path, checkpoint: Path) -> None:
    processor = MonoInternVLProcessor.from_pretrained(checkpoint, max_tiles=6, use_thumbnail=True)
    encode = RecordEncoder(processor, 6)
    record = _record(clip.parent, video=clip.name, frames=3)
    sample = encode(record)
    assert sample.num_tiles == (1, 1, 1)
    assert encode.length(encode.measure(record)) == len(sample.input_ids)


def test_video_is_talked_about(
    clip: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    session = load(checkpoint, precision="fp32", max_tiles=6)
    by_hand = load(checkpoint, precision="fp32", max_tiles=1)
    frames = frames_of(clip, FrameSampling(2))
    first = session.ask("what moved?", frames, max_new_tokens=3)
    pictures = [load_image(frame) for frame in frames]
    said = "Frame-1: <image>\nFrame-2: <image>\nwhat moved?"
    assert by_hand.ask(said, pictures, max_new_tokens=3).ids == first.ids
    words = ["chat", "--model", str(checkpoint), "--video", str(clip), "--frames", "2"]
    monkeypatch.setattr(
        sys, "argv", ["x", *words, "--json", "--max-new-tokens", "3", "what moved?"]
    )
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code
    row = json.loads(capsys.readouterr().out)
    assert row["answer"] == first.text and row["images"] == [str(frame) for frame in frames]
