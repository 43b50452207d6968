"""`mono-internvl evaluate --fetch NAME`: the published data of a benchmark, checked; or how to."""

from __future__ import annotations

import hashlib
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

from mono_internvl.errors import ConfigError, SampleError
from mono_internvl.evaluation.benchmarks.published import PublishedBenchmark
from mono_internvl.evaluation.data_files import digest_of

_CHUNK_BYTES = 1 << 20
_TIMEOUT_S = 60.0


def commands(row: PublishedBenchmark, root: Path) -> list[str]:
    """What to run, or to do, where this program has no network."""
    if row.source.startswith("https://"):
        file = root / row.source.rsplit("/", 1)[1]
        lines = [f"curl -L --create-dirs -o {file} {row.source}"]
        return [*lines, f"md5sum {file}   # begins with {row.md5}"] if row.md5 else lines
    if row.dataset_id:
        return [f"hf download --repo-type dataset {row.dataset_id} --local-dir {root / row.name}"]
    return [f"by hand, into {root / row.name}: {row.source}"]


def fetch(
    row: PublishedBenchmark, root: Path, on_bytes: Callable[[int], None] | None = None
) -> Path:
    """Download a benchmark's data below a folder; what is there whole already stays.

    Returns:
        The file, or the folder of a dataset.

    Raises:
        ConfigError: There is no network, or the data can be had by hand only; says what to do.
        SampleError: What came is not what was published.
    """
    advice = "; ".join(commands(row, root))
    try:
        if row.source.startswith("https://"):
            return _file(row, root / row.source.rsplit("/", 1)[1], on_bytes)
        if row.dataset_id:
            return _dataset(row, root / row.name)
    except (OSError, urllib.error.URLError) as error:
        raise ConfigError(
            f"fetch={row.name!r}: not to be had from here ({error}); where there is a network: "
            f"{advice}"
        ) from error
    raise ConfigError(f"fetch={row.name!r}: {advice}")


def _file(row: PublishedBenchmark, file: Path, on_bytes: Callable[[int], None] | None) -> Path:
    if file.is_file() and digest_of([file]).startswith(row.md5):
        return file
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.partial")
    md5 = hashlib.md5(usedforsecurity=False)
    with (
        urllib.request.urlopen(row.source, timeout=_TIMEOUT_S) as remote,
        partial.open("wb") as out,
    ):
        while chunk := remote.read(_CHUNK_BYTES):
            out.write(chunk)
            md5.update(chunk)
            if on_bytes is not None:
                on_bytes(len(chunk))
    if not md5.hexdigest().startswith(row.md5):
        partial.unlink()
        raise SampleError(
            f"{row.source}: MD5 {md5.hexdigest()}; expected one that begins with {row.md5}: the "
            "file has been changed since, or the download broke off"
        )
    partial.replace(file)
    return file


def _dataset(row: PublishedBenchmark, folder: Path) -> Path:
    """A dataset of the hub, every large file checked against the hub's SHA-256."""
    from huggingface_hub import HfApi, snapshot_download

    about = HfApi().dataset_info(row.dataset_id, files_metadata=True)
    snapshot_download(row.dataset_id, repo_type="dataset", local_dir=folder, revision=about.sha)
    for one in about.siblings or []:
        if one.lfs is None:
            continue
        with (folder / one.rfilename).open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != one.lfs.sha256:
            raise SampleError(
                f"{folder / one.rfilename}: SHA-256 {found}; expected {one.lfs.sha256}, fetch again"
            )
    return folder
