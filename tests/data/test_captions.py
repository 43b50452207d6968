"""Captions of a server that misbehaves: every image once or listed, nothing asked twice."""

from __future__ import annotations

import dataclasses
import email.utils
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import caption_server
import pytest
import tiny_shards
from caption_server import CaptionServer, digest

from mono_internvl.chat_client import Reply
from mono_internvl.cli import app as cli
from mono_internvl.data import captions as module
from mono_internvl.data.caption_filters import CaptionFilter, clean
from mono_internvl.data.captions import CaptionJob, caption
from mono_internvl.data.sources import TarSource, read_meta
from mono_internvl.errors import ConfigError, MissingDependency

TIMEOUT_S = 0.4


@pytest.fixture
def server() -> Iterator[CaptionServer]:
    with caption_server.running() as found:
        yield found


def _job(server: CaptionServer, **fields: Any) -> CaptionJob:
    common = {"timeout_s": TIMEOUT_S, "wait_s": 0.01, "concurrency": 8}
    return CaptionJob(server.url, "some-model", **{**common, **fields})


def _shard(folder: Path, numbers: range, name: str = "00000.tar") -> Path:
    """Pictures that differ, with captions that are not read."""
    return tiny_shards.write_tar(folder / name, tiny_shards.caption_members(numbers))


def _image(number: int) -> str:
    return digest(tiny_shards.picture(number))


def _captions(shard: Path) -> dict[str, str]:
    """Caption by what the image is known by."""
    source, found = TarSource(shard), {}
    for number in range(len(source)):
        record = source.record(number)
        (image,) = record.images
        found[digest(image.read())] = record.turns[-1].text
    return found


def _listed(shard: Path) -> dict[str, str]:
    """Reason by key."""
    lines = shard.with_name(f"{shard.stem}.left-out.jsonl").read_text().splitlines()
    return {one["key"]: one["reason"] for one in map(json.loads, lines)}


def _until(times: int, first: str, then: str = "caption") -> Callable[[int], str]:
    return lambda asked: first if asked < times else then


def test_every_image_of_a_server_that_misbehaves_is_captioned_once_or_listed(
    tmp_path: Path, server: CaptionServer
) -> None:
    recovers = ["slow", "drip", "gone", "half", "not json", "other json", "list", "500", "503"]
    recovers += ["429", "429 0", "408", f"429 {email.utils.formatdate(time.time(), usegmt=True)}"]
    never = {
        "500": "no answer",
        "400": "refused by the endpoint",
        "413": "refused by the endpoint",
        "no text": "empty",
        "say I'm sorry, I can't help with that.": "refusal",
        "say red red red red red": "repetition",
        "say a cat": "too short",
        "cut": "cut off",
        f"say {' '.join(f'word{n}' for n in range(70))}": "too long",
    }
    behaviours = [*recovers, *never]
    for number, what in enumerate(behaviours):
        is_for_good = number >= len(recovers)
        server.behaviour[_image(number)] = _until(10**6 if is_for_good else 2, what)
    shard = _shard(tmp_path / "in", range(len(behaviours) + 20))
    (done,) = caption([shard], tmp_path / "out", _job(server))
    found, listed = _captions(done.shard), _listed(done.shard)
    assert done.captions == len(found) == len(recovers) + 20
    for number in range(len(behaviours) + 20):
        key, image = f"{number:09d}", _image(number)
        if image in found:
            assert found[image] == f"A picture of the colours {image}." and key not in listed
            assert server.answered[image] == 1, behaviours[number : number + 1]
        else:
            assert listed[key] == list(never.values())[number - len(recovers)]
    assert sum(done.left_out.values()) == len(listed) == len(never)
    assert server.asked[_image(len(recovers))] == 5, "attempts at what answers 500"
    assert server.asked[_image(len(recovers) + 1)] == 1, "attempts at what is refused"
    assert 1 < server.most_at_once <= 8


def test_what_is_no_image_is_listed_and_not_asked(tmp_path: Path, server: CaptionServer) -> None:
    members = [
        ("a.jpg", tiny_shards.picture(1)),
        ("b.jpg", b"\xff\xd8 not an image"),
        ("c.txt", b"words alone"),
        ("d.0.jpg", tiny_shards.picture(2)),
        ("d.1.png", tiny_shards.picture(3, kind="PNG")),
        ("e.png", tiny_shards.picture(4, kind="PNG")),
    ]
    shard = tiny_shards.write_tar(tmp_path / "in/x.tar", members)
    (done,) = caption([shard], tmp_path / "out", _job(server))
    reasons = {"/b": "image damaged", "/c": "no image", "/d": "several images"}
    assert {f"/{key}": why for key, why in _listed(done.shard).items()} == reasons
    assert len(server.messages) == done.captions == 2
    asked = {one["messages"][0]["content"][0]["image_url"]["url"][:15] for one in server.messages}
    assert asked == {"data:image/jpeg", "data:image/png;"}
    body = server.messages[0]
    assert body["model"] == "some-model" and body["temperature"] == 0
    assert body["messages"][0]["content"][1]["text"].startswith("Provide a one-sentence caption")


def test_shard_that_is_cut_short_is_described_up_to_there(
    tmp_path: Path, server: CaptionServer
) -> None:
    shard = _shard(tmp_path / "in", range(4))
    shard.write_bytes(shard.read_bytes()[:8000])
    (done,) = caption([shard], tmp_path / "out", _job(server))
    assert done.captions == len(server.answered) >= 1
    assert dict(done.left_out) == {"shard damaged": 1}


def test_captioned_shards_are_read_by_training(tmp_path: Path, server: CaptionServer) -> None:
    shards = [_shard(tmp_path / "in", range(n, n + 3), f"{n}.tar") for n in (0, 3)]
    caption(shards, tmp_path / "out", _job(server))
    meta = tiny_shards.write_meta(tmp_path / "out/meta.json", {"s12": {"annotation": "*.tar"}})
    (source,) = read_meta(meta)
    assert len(source) == 6 and source.record(4).record_id == "000000004"
    about = json.loads((tmp_path / "out/0.about.json").read_text())
    assert (about["source"], about["captions"], about["model"]) == ("0.tar", 3, "some-model")
    assert {"digest", "prompt", "url", "commit", "date", "min_words"} <= set(about)


def test_server_that_answers_nobody_stops_the_run_and_nothing_is_lost(
    tmp_path: Path, server: CaptionServer
) -> None:
    for number in range(5, 40):
        server.behaviour[_image(number)] = lambda asked: "500"
    shard, job = _shard(tmp_path / "in", range(40)), _job(server, concurrency=2)
    with pytest.raises(ConfigError, match=r"no answer .*500.*call again: what it has said is kept"):
        caption([shard], tmp_path / "out", job)
    assert not (tmp_path / "out/00000.tar").exists() and len(server.answered) == 5
    server.behaviour.clear()
    (done,) = caption([shard], tmp_path / "out", job)
    assert done.captions == 40 and set(server.answered.values()) == {1}
    assert caption([shard], tmp_path / "out", job) == [done], "a third call asks nothing"
    assert sum(server.answered.values()) == 40


def test_key_that_is_refused_stops_at_once(
    tmp_path: Path, server: CaptionServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CAPTION_API_KEY", "secret")
    for number in range(20):
        server.behaviour[_image(number)] = lambda asked: "401"
    with pytest.raises(ConfigError, match=r"401.*CAPTION_API_KEY") as refused:
        caption([_shard(tmp_path / "in", range(20))], tmp_path / "out", _job(server))
    assert len(server.messages) <= 8 and "secret" not in str(refused.value)


def test_requests_keep_to_a_rate_and_to_what_the_server_asks(
    tmp_path: Path, server: CaptionServer
) -> None:
    job = _job(server, requests_per_minute=60 * 50)
    caption([_shard(tmp_path / "in", range(10))], tmp_path / "out", job)
    assert server.times[-1] - server.times[0] > 9 / 50 * 0.9
    server.times.clear()
    server.behaviour[_image(20)] = _until(1, "429 1")
    job = _job(server, concurrency=1)
    caption([_shard(tmp_path / "in", range(20, 22), "b.tar")], tmp_path / "out", job)
    assert server.times[1] - server.times[0] > 0.95


KILLED = """
import sys
from pathlib import Path
from mono_internvl.data.captions import CaptionJob, caption
shard, out, url = sys.argv[1:]
caption([Path(shard)], Path(out), CaptionJob(url, "some-model", concurrency=2))
"""


def test_killed_run_goes_on_and_asks_nothing_twice(tmp_path: Path, server: CaptionServer) -> None:
    server.delay_s = 0.02
    shard, out = _shard(tmp_path / "in", range(60)), tmp_path / "out"
    words = [sys.executable, "-c", KILLED, str(shard), str(out), server.url]
    process = subprocess.Popen(words, env=os.environ, stderr=subprocess.DEVNULL)
    while len(server.answered) < 15 and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    journal = out / ".00000.tar.journal.jsonl"
    with journal.open("ab") as file:
        file.write(b'{"sample": 59, "capt')  # as a kill in the middle of a line leaves it
    answered = len(server.answered)
    assert 15 <= answered < 60 and not (out / shard.name).exists()
    (done,) = caption([shard], out, CaptionJob(server.url, "some-model", concurrency=2))
    assert done.captions == 60 and len(_captions(done.shard)) == 60
    # What was under way when the process died is all that may be asked again.
    assert sum(server.answered.values()) <= 60 + 2
    assert not journal.exists()


def test_folder_of_another_job_or_shard_is_refused(tmp_path: Path, server: CaptionServer) -> None:
    shard, out, job = _shard(tmp_path / "in", range(2)), tmp_path / "out", _job(server)
    caption([shard], out, job)
    with pytest.raises(ConfigError, match="begun with prompt="):
        caption([shard], out, dataclasses.replace(job, prompt="what?"))
    _shard(tmp_path / "in", range(3))
    with pytest.raises(ConfigError, match="made of another shard of that name"):
        caption([shard], out, job)
    (out / "00000.about.json").write_text("{")
    with pytest.raises(ConfigError, match=r"about\.json: not readable"):
        caption([shard], out, job)
    with pytest.raises(ConfigError, match=r"00000\.tar stands there twice"):
        caption([shard, tmp_path / "other/00000.tar"], out, job)
    with pytest.raises(ConfigError, match="is the folder of the shards"):
        caption([shard], tmp_path / "in", job)
    with pytest.raises(ConfigError, match="url='ftp://x'; expected http"):
        caption([shard], out, dataclasses.replace(job, url="ftp://x"))


def test_journal_of_a_shard_that_was_changed_is_not_taken(
    tmp_path: Path, server: CaptionServer
) -> None:
    shard, out = _shard(tmp_path / "in", range(2)), tmp_path / "out"
    out.mkdir()
    journal = module._Journal(out / ".00000.tar.journal.jsonl")
    with journal.open("another digest") as write:
        write(0, {"caption": "of another picture"})
    (done,) = caption([shard], out, _job(server))
    assert "of another picture" not in _captions(done.shard).values()


def test_ray_is_asked_for_by_its_extra(
    tmp_path: Path, server: CaptionServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingDependency, match=r"mono-internvl\[ray\]"):
        caption([_shard(tmp_path / "in", range(2))], tmp_path / "o", _job(server), engine="ray")


def test_row_of_a_worker_tells_its_error_as_a_value(tmp_path: Path, server: CaptionServer) -> None:
    shard = _shard(tmp_path / "in", range(3))
    (tmp_path / "out").mkdir()
    row = module._row({"shard": str(shard)}, tmp_path / "out", _job(server))
    assert (row["captions"], row["left_out"], row["error"]) == (3, "{}", "")
    row = module._row({"shard": str(tmp_path / "no.tar")}, tmp_path / "out", _job(server))
    assert "no.tar: no such shard" in row["error"]


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ("A dog runs on a beach.", ""),
        ("一只狗在海滩上奔跑。", ""),
        ("The sign says sorry, we are closed today.", ""),
        ("A building that serves as a language school.", ""),
        ("A man walks and walks along the long, long road.", ""),
        ("", "empty"),
        (" ... ", "empty"),
        ("As an AI model I see a dog.", "refusal"),
        ("I cannot describe this picture of people.", "refusal"),
        ("很抱歉，我无法查看这张图片。", "refusal"),
        ("a dog on a beach, a dog on a beach, a dog on a beach", "repetition"),
        ("very very very very nice dog", "repetition"),
        ("A dog.", "too short"),
        (" ".join(f"w{n}" for n in range(61)), "too long"),
    ],
)
def test_filter_tells_captions_from_the_rest(said: str, reason: str) -> None:
    assert CaptionFilter().why_not(Reply(said, is_cut=False)) == reason


def test_replies_are_cleaned() -> None:
    assert clean('Sure! Here is a caption:\n\n"A dog\non a beach."') == "A dog on a beach."
    assert clean("**Caption: A dog**") == "A dog"
    assert clean("A sign: here is the way") == "A sign: here is the way"


def test_caption_verb_sums_up(
    tmp_path: Path,
    server: CaptionServer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("a.tar", "b.tar"):
        _shard(tmp_path / "in", range(3), name)
    server.behaviour[_image(0)] = lambda asked: "say no"

    def said(*options: str) -> tuple[int, str]:
        words = ["mono-internvl", "data", "caption", str(tmp_path / "in/*.tar"), "--url"]
        words += [server.url, "--model", "m", "--out", str(tmp_path / "out"), *options]
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as end:
            cli.main()
        out = capsys.readouterr()
        return int(end.value.code or 0), out.out + out.err

    code, text = said()
    assert code == 0 and "4 captions in 2 shards" in text and "2  left out: too short" in text
    assert said("--engine", "slurm")[0] and "engine='slurm'" in said("--engine", "slurm")[1]
    assert "min_words=9 is above max_words=4" in said("--min-words", "9", "--max-words", "4")[1]


@pytest.mark.slow
def test_ray_shares_shards_out_over_a_cluster(tmp_path: Path, server: CaptionServer) -> None:
    ray = pytest.importorskip("ray", reason="in the extra [ray]")
    shards = [_shard(tmp_path / "in", range(5 * n, 5 * n + 5), f"{n}.tar") for n in range(3)]
    server.behaviour[_image(7)] = lambda asked: "400"
    job, memory = _job(server, timeout_s=30.0), 100 << 20
    ray.init(num_cpus=1, include_dashboard=False, object_store_memory=memory, log_to_driver=False)
    try:
        found = caption(shards, tmp_path / "out", job, engine="ray")
        again = caption(shards, tmp_path / "out", job, engine="ray")
        for number in range(20, 25):
            server.behaviour[_image(number)] = lambda asked: "401"
        more = _shard(tmp_path / "in", range(20, 25), "more.tar")
        with pytest.raises(ConfigError, match="401"):
            caption([more], tmp_path / "out", job, engine="ray")
    finally:
        ray.shutdown()
    assert sorted(done.shard.name for done in found) == ["0.tar", "1.tar", "2.tar"]
    assert sum(done.captions for done in found) == 14 and set(server.answered.values()) == {1}
    assert [dict(done.left_out) for done in found if done.left_out] == [
        {"refused by the endpoint": 1}
    ]
    assert sorted(map(str, again)) == sorted(map(str, found))
