"""`mono-internvl data caption`: the images of tar shards, described by a model at an address.

Each shard becomes one of the same name with image and caption, a list of the images that were left
out, and a note of what made it. Answers are kept in a journal as they come, so that a killed run
asks no question twice; a shard is there whole or not at all.
"""

from __future__ import annotations

import base64
import json
import logging
import tarfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from mono_internvl.chat_client import ChatClient
from mono_internvl.data.caption_filters import CaptionFilter, clean
from mono_internvl.data.records import CAPTION_PROMPT, shortened
from mono_internvl.data.shard_files import add_member, image_extension
from mono_internvl.data.sources.tar_index import IMAGE, TarIndex, scan
from mono_internvl.data.sources.tar_shards import TarImage, sample_key
from mono_internvl.errors import (
    ConfigError,
    EndpointError,
    ImageError,
    MissingDependency,
    SampleError,
)
from mono_internvl.processing.image_files import image_size
from mono_internvl.runs.folder import begin, exclusive, resumable, write_whole
from mono_internvl.runs.json_lines import read_lines, to_line
from mono_internvl.runs.provenance import command, commit, today

Engine = Literal["threads", "ray"]
SETTINGS_FILE = "caption.json"
KEY_VARIABLE = "CAPTION_API_KEY"
"""Environment variable of the key; `OPENAI_API_KEY` where it is not set."""

_NO_ANSWER = "no answer"
_FEWEST_FAILURES = 10
_MEDIA_TYPES = {"jpg": "image/jpeg", "png": "image/png", "webp": "image/webp", "gif": "image/gif"}
_MEDIA_TYPES |= {"bmp": "image/bmp", "tif": "image/tiff", "avif": "image/avif"}


@dataclass(frozen=True)
class CaptionJob:
    """How images are described.

    Attributes:
        url: Of the model, up to `/v1`.
        model: As the endpoint calls it.
        prompt: What it is asked of every image.
        max_tokens: Longest reply.
        limits: What a caption has to be.
        concurrency: Questions under way at once, on each machine.
        requests_per_minute: Of each machine; None for no limit.
        timeout_s: Of one attempt.
        wait_s: Before the second attempt.
    """

    url: str
    model: str
    prompt: str = CAPTION_PROMPT
    max_tokens: int = 96
    limits: CaptionFilter = field(default_factory=CaptionFilter)
    concurrency: int = 32
    requests_per_minute: float | None = None
    timeout_s: float = 120.0
    wait_s: float = 1.0

    @property
    def settings(self) -> dict[str, Any]:
        """What a caption depends on: shards of one folder have it in common."""
        return {
            "model": self.model,
            "prompt": self.prompt,
            "max_tokens": self.max_tokens,
            **asdict(self.limits),
        }

    def client(self) -> ChatClient:
        """Asks the model, for all threads of a process."""
        return ChatClient(
            self.url,
            self.model,
            key_variables=(KEY_VARIABLE, "OPENAI_API_KEY"),
            wait_s=self.wait_s,
            timeout_s=self.timeout_s,
            requests_per_minute=self.requests_per_minute,
        )


@dataclass(frozen=True)
class Captioned:
    """A shard that is done.

    Attributes:
        shard: The new one.
        captions: Images with one.
        left_out: Images without, by reason.
    """

    shard: Path
    captions: int
    left_out: Mapping[str, int]


def caption(
    shards: Sequence[Path],
    out: Path,
    job: CaptionJob,
    *,
    engine: Engine = "threads",
    on_shard: Callable[[Captioned], None] = lambda done: None,
) -> list[Captioned]:
    """Describe the images of shards; a second call goes on where the first one was stopped.

    Args:
        shards: Plain tar files, of different names; what their samples hold besides one image is
            not read.
        out: Folder of the new shards.
        job: How.
        engine: "threads" works here, one shard after another; "ray" on every machine of a Ray
            cluster, for which `shards` and `out` have to be the same folders everywhere.
        on_shard: Called as each is done.

    Raises:
        ConfigError: Names repeat, `out` was begun with other settings, or the endpoint answers
            nobody: what it has said already is kept.
        SampleError: A shard is no tar file.
        MissingDependency: Ray is not installed.
    """
    names = Counter(shard.name for shard in shards)
    repeated = [name for name, count in names.items() if count > 1]
    if repeated or not shards:
        said = f"{repeated[0]} stands there twice" if repeated else "there is none"
        raise ConfigError(f"shards: {said}; give shards of different names")
    if any(shard.parent.resolve() == out.resolve() for shard in shards):
        raise ConfigError(f"out={str(out)!r} is the folder of the shards; give another one")
    job.client()  # a bad address is said before anything is read
    found = []
    with exclusive(out), resumable(out):
        begin(out / SETTINGS_FILE, job.settings)
        for done in _ENGINES[engine](shards, out, job):
            found.append(done)
            on_shard(done)
    return found


def caption_shard(shard: Path, out: Path, job: CaptionJob) -> Captioned:
    """One shard, as `caption` does it."""
    target = out / shard.name
    index = scan(shard)
    if target.is_file():
        return _read_done(target, index)
    journal = _Journal(out / f".{shard.name}.journal.jsonl")
    answers = journal.read(index.digest())
    asker = _Asker(shard, index, job)
    with journal.open(index.digest()) as write:
        for sample, answer in asker.ask(n for n in range(len(index)) if n not in answers):
            answers[sample] = answer
            if answer.get("reason") != _NO_ANSWER:  # which another run may get
                write(sample, answer)
    done = _write_shard(shard, target, index, answers, job)
    journal.file.unlink()
    return done


def _with_threads(shards: Sequence[Path], out: Path, job: CaptionJob) -> Iterator[Captioned]:
    for shard in shards:
        yield caption_shard(shard, out, job)


def _with_ray(shards: Sequence[Path], out: Path, job: CaptionJob) -> Iterator[Captioned]:
    """On every machine of the cluster one shard at a time."""
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise MissingDependency(
            "engine='ray': ray is not installed; pip install 'mono-internvl[ray]'"
        ) from error
    logging.getLogger("ray.data").setLevel(logging.WARNING)  # shards are told as they are done
    if not ray.is_initialized():
        ray.init(log_to_driver=False)
    machines = max(1, sum(bool(node["Alive"]) for node in ray.nodes()))
    work = partial(_row, out=out.resolve(), job=job)
    listed = ray.data.from_items([{"shard": str(shard.resolve())} for shard in shards])
    rows = listed.repartition(len(shards))  # a block is a task
    spread = ray.data.TaskPoolStrategy(size=machines)
    for row in rows.map(work, compute=spread, num_cpus=1).iter_rows():
        if row["error"]:
            raise ConfigError(row["error"])
        left_out = json.loads(row["left_out"])
        yield Captioned(Path(row["shard"]), int(row["captions"]), left_out)


def _row(row: dict[str, Any], out: Path, job: CaptionJob) -> dict[str, Any]:
    """A shard on a worker; its error is a value, without the worker's traceback."""
    try:
        done = caption_shard(Path(row["shard"]), out, job)
    except (ConfigError, SampleError) as error:
        return {"shard": row["shard"], "captions": 0, "left_out": "{}", "error": str(error)}
    left_out = json.dumps(done.left_out)
    return {"shard": str(done.shard), "captions": done.captions, "left_out": left_out, "error": ""}


_ENGINES: dict[str, Callable[[Sequence[Path], Path, CaptionJob], Iterator[Captioned]]] = {
    "threads": _with_threads,
    "ray": _with_ray,
}


class _Asker:
    """Asks for the images of a shard, many at once."""

    def __init__(self, shard: Path, index: TarIndex, job: CaptionJob) -> None:
        self.shard, self.index, self.job = shard, index, job
        self.client = job.client()
        self.failures, self.lock = 0, threading.Lock()

    def ask(self, samples: Iterator[int]) -> Iterator[tuple[int, dict[str, Any]]]:
        """Answers as they come; no more samples are read than questions are under way."""
        with ThreadPoolExecutor(self.job.concurrency) as pool:
            under_way: dict[Future[dict[str, Any]], int] = {}
            try:
                while True:
                    for sample in islice(samples, self.job.concurrency - len(under_way)):
                        under_way[pool.submit(self.answer, sample)] = sample
                    if not under_way:
                        return
                    for future in wait(under_way, return_when=FIRST_COMPLETED).done:
                        yield under_way.pop(future), future.result()
            finally:
                for future in under_way:
                    future.cancel()
                self.client.close()

    def answer(self, sample: int) -> dict[str, Any]:
        """A caption, or why there is none.

        Raises:
            ConfigError: The endpoint answers nobody.
        """
        try:
            data = image_of(self.shard, self.index, sample).read()
            image_size(data)
        except (SampleError, ImageError) as error:
            return {"reason": error.reason, "said": str(error)}
        media_type = _MEDIA_TYPES[image_extension(data)]
        encoded = base64.b64encode(data).decode()
        content: list[dict[str, Any]] = [
            {"type": "image_url", "image_url": {"url": f"data:{media_type};base64,{encoded}"}},
            {"type": "text", "text": self.job.prompt},
        ]
        try:
            reply = self.client.ask(content, self.job.max_tokens)
        except EndpointError as error:
            return self.failed(error)
        with self.lock:
            self.failures = 0
        if reason := self.job.limits.why_not(reply):
            return {"reason": reason, "said": shortened(reply.text)}
        return {"caption": clean(reply.text)}

    def failed(self, error: EndpointError) -> dict[str, Any]:
        """What a question without an answer means: for its image alone, or for all."""
        if error.scope == "request":
            return {"reason": "refused by the endpoint", "said": str(error)}
        with self.lock:
            self.failures += 1
            is_dead = self.failures >= max(_FEWEST_FAILURES, self.job.concurrency)
        if is_dead or error.scope == "endpoint":
            raise ConfigError(
                f"url={self.job.url!r}, model={self.job.model!r}: no answer ({error}); check "
                f"address, model and {KEY_VARIABLE}, and call again: what it has said is kept"
            ) from error
        return {"reason": _NO_ANSWER, "said": str(error)}


def image_of(shard: Path, index: TarIndex, sample: int) -> TarImage:
    """The one image of a sample.

    Raises:
        SampleError: It has none, or several, or the shard was changed.
    """
    if not index.members(sample):
        raise SampleError(
            f"{shard}: sample {sample} has no image; or the shard is damaged from there on",
            reason="shard damaged",
        )
    members = [member for member in index.members(sample) if index.kind[member] == IMAGE]
    if len(members) != 1:
        what = "no image" if not members else "several images"
        raise SampleError(f"{shard}: sample {sample} has {what}; one is described", reason=what)
    (member,) = members
    key = sample_key(shard, index, member)
    return TarImage(shard, int(index.offset[member]), int(index.size[member]), key)


@dataclass
class _Journal:
    """Answers to a shard's questions as they come, a line each behind one that names the shard."""

    file: Path

    def read(self, digest: str) -> dict[int, dict[str, Any]]:
        """What was answered already; nothing if the shard was changed since."""
        answers: dict[int, dict[str, Any]] = {}
        if not self.file.is_file():
            return answers
        head, *lines = self.file.read_bytes().split(b"\n")
        if head.decode("utf-8", "replace") + "\n" != to_line({"digest": digest}):
            self.file.unlink()
            return answers
        for line in lines:
            try:
                value = json.loads(line)
                answers[int(value.pop("sample"))] = value
            except (ValueError, KeyError, TypeError, AttributeError):  # cut in two by a kill
                continue
        return answers

    def open(self, digest: str) -> _JournalWriter:
        """To add answers to."""
        return _JournalWriter(self.file, digest)


class _JournalWriter:
    """Appends answers; each is on disk before the next question is asked."""

    def __init__(self, path: Path, digest: str) -> None:
        is_new = not path.is_file() or not path.stat().st_size
        self.file = path.open("a", encoding="utf-8")
        # Behind a line that a kill has cut, the next one would be lost.
        self.file.write(to_line({"digest": digest}) if is_new else "\n")

    def __enter__(self) -> Callable[[int, dict[str, Any]], None]:
        return self.write

    def __exit__(self, *exception: object) -> None:
        self.file.close()

    def write(self, sample: int, answer: dict[str, Any]) -> None:
        """Keep an answer."""
        self.file.write(to_line({"sample": sample, **answer}))
        self.file.flush()


def _write_shard(
    shard: Path,
    target: Path,
    index: TarIndex,
    answers: Mapping[int, Mapping[str, Any]],
    job: CaptionJob,
) -> Captioned:
    """Images with captions, the list of the others, and what made them; the shard last."""
    partial_file = target.with_name(f".{target.name}.partial")
    left_out: list[dict[str, Any]] = []
    count = 0
    try:
        with tarfile.open(partial_file, "w") as tar:
            for sample in range(len(index)):
                answer = answers[sample]
                members = index.members(sample)
                key = sample_key(shard, index, members[0]) if members else ""
                if "caption" not in answer:
                    left_out.append({"sample": sample, "key": key, **answer})
                    continue
                data = image_of(shard, index, sample).read()
                count += 1
                name = f"{sample:09d}"
                add_member(tar, f"{name}.{image_extension(data)}", data)
                add_member(tar, f"{name}.json", to_line({"key": key}).encode())
                words = str(answer["caption"]).encode("utf-8", "replace")
                add_member(tar, f"{name}.txt", words)
        reasons = Counter(str(one["reason"]) for one in left_out)
        about = {
            "source": shard.name,
            "digest": index.digest(),
            "captions": count,
            "left_out": dict(reasons.most_common()),
            "url": job.url,
            **job.settings,
            "command": command(),
            "commit": commit(),
            "date": today(),
        }
        listed = "".join(to_line(one) for one in left_out).encode()
        write_whole(_beside(target, "left-out.jsonl"), listed)
        write_whole(_beside(target, "about.json"), json.dumps(about, indent=2, ensure_ascii=False))
        partial_file.replace(target)
    except (OSError, ImageError, SampleError) as error:
        raise ConfigError(
            f"{target}: not written ({error}); make room on the disk and call again, answers are "
            "kept"
        ) from error
    return Captioned(target, count, reasons)


def _read_done(target: Path, index: TarIndex) -> Captioned:
    """What the note beside a shard says of it.

    Raises:
        ConfigError: It is not readable, or of another source.
    """
    file = _beside(target, "about.json")
    try:
        about = json.loads("\n".join(read_lines(file)))
        digest, captions, left_out = about["digest"], int(about["captions"]), about["left_out"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{file}: not readable ({error}); delete {target} to describe its images again"
        ) from error
    if digest != index.digest():
        raise ConfigError(
            f"{target}: made of another shard of that name; give another folder, or delete it"
        )
    return Captioned(target, captions, dict(left_out))


def _beside(target: Path, name: str) -> Path:
    return target.with_name(f"{target.stem}.{name}")
