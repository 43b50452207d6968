"""`bench data`: memory of big sources, slots that packing fills, samples per second, decoding."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mono_internvl.bench.images import jpeg
from mono_internvl.bench.length_mixes import lengths
from mono_internvl.bench.models import Setting
from mono_internvl.bench.rows import BenchRow
from mono_internvl.bench.timing import Subject, fields_of, measure
from mono_internvl.data.packing import pack
from mono_internvl.processing.image_files import load_image
from mono_internvl.processing.images import MonoInternVLImageProcessor
from mono_internvl.training.recipe import Stage

PACKED_TOKENS = (8192, 16_384)
"""Of a row: the default, and where samples may fill more than half of it, twice that, too."""
_STEPS = 8
_SHARD_RECORDS, _LISTED, _LINES = 1000, 10_000, 2_000_000
_DRAWN = 2000
_SIDES_PX = ((640, 480), (1280, 960), (2048, 1536))
_PEER_PACKS = (4, 200)  # how many steps of how many packs

# In a process of its own, so that its memory is that of a reader and of nothing else.
_OPEN_AND_DRAW = """
import json, sys, time
from pathlib import Path
from mono_internvl.data.order import Mixture
from mono_internvl.data.sources import read_meta
began = time.perf_counter()
sources = read_meta(Path(sys.argv[1]))
mixture = Mixture(tuple(map(len, sources)), (1.0,) * len(sources), 0)
opened = time.perf_counter() - began
for position in range(int(sys.argv[2])):
    source, index = mixture.locate(position)
    sources[source].record(index)
drawn = time.perf_counter() - began - opened
lines = Path("/proc/self/status").read_text().splitlines()
peak = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
print(json.dumps([len(mixture), opened, int(sys.argv[2]) / drawn, peak / 1024]))
"""


def bench_data(setting: Setting, stages: Sequence[Stage]) -> Iterator[BenchRow]:
    """Rows of all of them.

    Args:
        setting: Rounds and command; all is done on the CPU, in fp32.
        stages: The published ones, whose limits and batches packing is tried with.
    """
    setting = replace(setting, device=torch.device("cpu"), dtype=torch.float32)
    yield from _memory(setting)
    yield from _packing(setting, stages)
    yield from _peer(setting, stages[0])
    yield from _decoding(setting)


def _memory(setting: Setting) -> Iterator[BenchRow]:
    with tempfile.TemporaryDirectory() as folder:
        shards = {"annotation": [_shard(Path(folder) / "0.tar").name] * _LISTED}
        lines = {"annotation": _lines(Path(folder) / "lines.jsonl").name, "root": "."}
        for name, entry in (
            (f"a shard of {_SHARD_RECORDS:,} samples, listed {_LISTED:,} times", shards),
            (f"JSON lines, {_LINES:,} of them", lines),
        ):
            meta = Path(folder) / "meta.json"
            meta.write_text(json.dumps({"a": entry}))
            command = [sys.executable, "-c", _OPEN_AND_DRAW, str(meta), str(_DRAWN)]
            said = subprocess.run(command, capture_output=True, check=True, text=True).stdout
            records, opened, per_second, peak = json.loads(said.splitlines()[-1])
            notes = {"records": records, "drawn": _DRAWN}
            yield _row(setting, "data: memory", name, peak, "MB at most", notes)
            yield _row(setting, "data: opening", name, opened, "s", notes)
            yield _row(setting, "data: drawing", name, per_second, "records/s", notes)


def _packing(setting: Setting, stages: Sequence[Stage]) -> Iterator[BenchRow]:
    for stage in stages:
        drawn = lengths(stage, _STEPS * stage.batch_size)
        steps = [drawn[i : i + stage.batch_size] for i in range(0, len(drawn), stage.batch_size)]
        fills_half = stage.max_tokens > PACKED_TOKENS[0] // 2
        for capacity in PACKED_TOKENS if fills_half else PACKED_TOKENS[:1]:
            began = time.process_time()
            rows = sum(len(pack(step, capacity)) for step in steps)
            seconds = time.process_time() - began
            notes = {
                "packed_tokens": capacity,
                "samples_of_a_step": stage.batch_size,
                "tokens_of_a_sample": round(sum(drawn) / len(drawn)),
                "rows": rows,
                "fewest_rows_possible": sum(fewest_rows(step, capacity) for step in steps),
            }
            name = f"{stage.name}, rows of {capacity:,}"
            used = sum(drawn) / (rows * capacity)
            yield _row(setting, "data: packing", f"{name}, slots used", used, "ratio", notes)
            per_second = len(drawn) / seconds
            yield _row(
                setting, "data: packing", f"{name}, packed", per_second, "samples/s/core", notes
            )


def fewest_rows(lengths: Sequence[int], capacity: int) -> int:
    """A number of rows that no packing can go below.

    Samples longer than half of a row need rows of their own, and only what these leave can be
    filled with shorter ones.

    Source: the bound L2 of Martello and Toth for bin packing.
    """
    least = -(-sum(lengths) // capacity)
    for small in {length for length in lengths if 2 * length <= capacity}:
        alone = sum(length > capacity - small for length in lengths)
        large = [x for x in lengths if 2 * x > capacity and x <= capacity - small]
        rest = sum(x for x in lengths if small <= x and 2 * x <= capacity)
        over = rest - (len(large) * capacity - sum(large))
        least = max(least, alone + len(large) + max(0, -(-over // capacity)))
    return least


def _peer(setting: Setting, stage: Stage) -> Iterator[BenchRow]:
    """Grain's packing of the same samples, where it is installed: the same slots, uneven steps."""
    try:
        import grain
        from grain.experimental import FirstFitPackIterDataset
    except ImportError:
        return
    steps, packs = _PEER_PACKS
    drawn = lengths(stage, steps * stage.batch_size)
    samples = grain.MapDataset.source([{"ids": np.ones(n, np.int32)} for n in drawn])
    packed = iter(
        FirstFitPackIterDataset(
            samples.shuffle(seed=0).repeat().to_iter_dataset(),
            length_struct={"ids": PACKED_TOKENS[0]},
            num_packing_bins=32,
        )
    )
    began, counts, used = time.process_time(), [], 0
    for _ in range(steps):
        found = [next(packed) for _ in range(packs)]
        used += sum(int((one["ids"] != 0).sum()) for one in found)
        counts.append(sum(int(one["ids_segment_ids"].max()) for one in found))
    seconds = time.process_time() - began
    notes = {"samples_of_steps_of_equal_packs": counts, "packs_of_a_step": packs}
    filled = used / (steps * packs * PACKED_TOKENS[0])
    name = f"{stage.name}, slots used, by Grain {grain.__version__}"
    yield _row(setting, "data: packing", name, filled, "ratio", notes)
    name = f"{stage.name}, samples packed, by Grain {grain.__version__}"
    yield _row(setting, "data: packing", name, sum(counts) / seconds, "samples/s/core", notes)


def _decoding(setting: Setting) -> Iterator[BenchRow]:
    """JPEG files to normalised tiles: as the released code does it, and our two ways."""
    exact, fast = MonoInternVLImageProcessor(), MonoInternVLImageProcessor()
    fast.decoding = "fast"
    for width, height in _SIDES_PX:
        file, name = jpeg(width, height, 0), f"{width} x {height} px"

        def released(file: bytes = file) -> Tensor:
            return as_released(exact, file)

        def ours(file: bytes = file) -> Any:
            return exact([file], max_tiles=6)

        def faster(file: bytes = file) -> Any:
            return fast([file], max_tiles=6)

        subjects = [
            Subject(f"{name}, as the released code", released),
            Subject(f'{name}, decoding="exact"', ours),
            Subject(f'{name}, decoding="fast"', faster),
        ]
        yield from measure(
            "data: decoding",
            subjects,
            setting,
            baseline=subjects[0].name,
            shapes={"tile_px": exact.image_size, "max_tiles": 6},
            layers=0,
            unit="s/image",
        )


def as_released(processor: MonoInternVLImageProcessor, file: bytes, max_tiles: int = 6) -> Tensor:
    """The released code's way from a file to (N, 3, S, S): Pillow, then tile by tile.

    Source: dynamic preprocessing of OpenGVLab/Mono-InternVL at 5b17ab4; what torchvision does to a
    tile is written out.
    """
    image, side = load_image(file), processor.image_size
    columns, rows = processor.tiling_with(max_tiles=max_tiles).grid(*image.size)  # type: ignore[attr-defined]
    whole = image.resize((side * columns, side * rows), Image.Resampling.BICUBIC)
    tiles = [
        whole.crop((x * side, y * side, (x + 1) * side, (y + 1) * side))
        for y in range(rows)
        for x in range(columns)
    ]
    if len(tiles) > 1:
        tiles.append(image.resize((side, side), Image.Resampling.BICUBIC))
    settings = (processor.image_mean, processor.image_std)
    mean, std = (torch.tensor(values)[:, None, None] for values in settings)
    out = []
    for tile in tiles:
        x = torch.from_numpy(np.array(tile, copy=True)).permute(2, 0, 1).contiguous()
        out.append(x.to(torch.float32).div(255).sub_(mean).div_(std))
    return torch.stack(out)


def _row(
    setting: Setting, what: str, subject: str, value: float, unit: str, notes: dict[str, Any]
) -> BenchRow:
    """A row of one value."""
    return BenchRow(
        what=what,
        subject=subject,
        shapes={},
        layers=0,
        unit=unit,
        p20=value,
        p50=value,
        p80=value,
        n=1,
        notes=notes,
        **fields_of(setting),
    )


def _shard(file: Path) -> Path:
    picture = jpeg(64, 64, 0)
    with tarfile.open(file, "w") as tar:
        for number in range(_SHARD_RECORDS):
            for extension, data in (("jpg", picture), ("txt", b"a picture of some colours")):
                info = tarfile.TarInfo(f"{number:09d}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return file


def _lines(file: Path) -> Path:
    answer = {"from": "gpt", "value": "an answer of a few words, as captions are"}
    with file.open("w") as out:
        for first in range(0, _LINES, 1000):
            lines = []
            for number in range(first, first + 1000):
                turns = [{"from": "human", "value": f"question {number}?"}, answer]
                lines.append(json.dumps({"id": number, "conversations": turns}))
            out.write("\n".join(lines) + "\n")
    return file
