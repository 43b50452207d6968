"""`mono-internvl lab 4khd`: small text on large pictures, two tilings against the limit of tiles.

The quickstart's model, which has seen pictures of one tile only, learns to read a word on pictures
of up to fifteen tiles: once cut as InternVL does, once as XComposer2-4KHD does, on the same records
in as many steps. Held-out pictures are read under several limits.
"""

from __future__ import annotations

import dataclasses
import json
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from mono_internvl.checkpoints.initialize import save_with_processor
from mono_internvl.compute import ComputePlan
from mono_internvl.evaluation.benchmarks.records import RECORDS
from mono_internvl.evaluation.runner import Subject, ask
from mono_internvl.miniature.drawing import draw_word
from mono_internvl.miniature.lab_pages import Figure
from mono_internvl.miniature.lexicon import Split, sample_sign
from mono_internvl.miniature.neighbours import (
    Ground,
    NeighbourRun,
    block_of,
    compared,
    origins,
    run_seeds,
    verdict,
)
from mono_internvl.miniature.recipes import MINIATURE
from mono_internvl.miniature.records import Record, make_record, write_jsonl
from mono_internvl.miniature.scenes import READ_PROMPT
from mono_internvl.miniature.scoring import PROTOCOL
from mono_internvl.model.modeling import MonoInternVLForConditionalGeneration
from mono_internvl.processing.images import MonoInternVLImageProcessor
from mono_internvl.processing.processor import MonoInternVLProcessor
from mono_internvl.released.keys import read_config
from mono_internvl.runs.folder import write_whole
from mono_internvl.runs.provenance import origin
from mono_internvl.runs.schemas import add_cost, cpu_minutes
from mono_internvl.training.loop import train_stage
from mono_internvl.training.recipe import Stage

RUNS = "4khd.jsonl"
TITLES = {"internvl": "InternVL", "xcomposer_4khd": "XComposer2-4KHD"}
LIMITS = (1, 4, 8, 15)
SHAPES_PX = ((840, 350), (350, 840), (672, 448), (504, 504))
"""Width and height of the pictures; 840 x 350 px is the shape of 3840 x 1600."""


@dataclass(frozen=True)
class Sizes:
    """Of the lab.

    Attributes:
        pictures: To learn from.
        heldout: To be read.
        steps: Of training, of eight pictures each.
    """

    pictures: int = 1600
    heldout: int = 80
    steps: int = 200


FULL, QUICK = Sizes(), Sizes(pictures=8, heldout=4, steps=2)


def compare_tilings(quickstarts: Sequence[Path], run: Path, **options: Any) -> Path:
    """Learn to read with both tilings, and read under every limit; options as of `run_seeds`.

    Returns:
        The table.
    """
    return run_seeds(quickstarts, run, RUNS, _run, tilings_page, **options)


def retiled(checkpoint: Path, out: Path, tiling: str, max_tiles: int, seed: int = 0) -> Path:
    """A checkpoint that cuts images otherwise; learned tokens that it lacks are random.

    Args:
        checkpoint: Folder of a model.
        out: New folder; one that is there already is taken as it is.
        tiling: Name of the tiling.
        max_tiles: Most tiles of an image.
        seed: Of the learned tokens.
    """
    import torch

    if (out / "preprocessor_config.json").exists() or (out / "processor_config.json").exists():
        return out
    before = MonoInternVLForConditionalGeneration.from_pretrained(checkpoint)
    config = read_config(checkpoint)
    config.change(
        {
            "tiling": tiling,
            "max_dynamic_patch": max_tiles,
            "min_dynamic_patch": 1,
            "dynamic_image_size": True,
            "use_thumbnail": True,
        }
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = MonoInternVLForConditionalGeneration._from_config(config, dtype=before.dtype)
    lacking = model.load_state_dict(before.state_dict(), strict=False).missing_keys
    assert all(".marks." in name for name in lacking), lacking
    like = MonoInternVLProcessor.from_pretrained(checkpoint)
    processor = MonoInternVLProcessor(
        MonoInternVLImageProcessor.from_config(config),
        like.tokenizer,
        chat_template=like.chat_template,
        default_system_prompt=like.default_system_prompt,
        prompt_form=like.prompt_form,
    )
    save_with_processor(model, processor, out)
    return out


def stage_of(name: str, sizes: Sizes, seed: int) -> Stage:
    """How a variant learns: as in the miniature's instruction tuning."""
    return dataclasses.replace(
        MINIATURE.stages[-1],
        name=name,
        title=f"small text, {TITLES[name]}",
        data="train.json",
        steps=sizes.steps,
        warmup_steps=min(30, sizes.steps // 2),
        max_tokens=900,
        max_tiles=LIMITS[-1],
        checkpoint_every=100,
        seed=seed,
    )


def _run(ground: Ground, folder: Path, quick: bool, plan: ComputePlan) -> None:
    sizes, began = QUICK if quick else FULL, time.process_time()
    data = folder / "data"
    if not (data / "done").exists():
        _write_data(data, sizes, ground.seed)
    scores: dict[str, dict[str, Figure]] = {}
    for name in TITLES:
        start = retiled(ground.checkpoint, folder / "start" / name, name, LIMITS[-1], ground.seed)
        stage = stage_of(name, sizes, ground.seed)
        trained = train_stage(stage, start, data, folder / name, plan=plan)
        subject = Subject.load(trained.checkpoint, plan)
        questions = RECORDS.questions(data / "heldout.jsonl")
        cutter = subject.processor.image_processor
        scores[name] = {}
        for limit in LIMITS:
            protocol = dataclasses.replace(PROTOCOL, max_tiles=limit, max_new_tokens=16)
            out = folder / "answers" / f"{name}-{limit}.jsonl"
            (mean,) = RECORDS.mean_scores(
                ask(subject, RECORDS, protocol, questions, out=out)
            ).values()
            scores[name][f"at most {limit} tiles"] = Figure(mean.score, mean.items)
            tokens = [cutter.layout_of(*s, max_tiles=limit).num_tokens for s in SHAPES_PX]
            scores[name][f"tokens of a picture, {limit} tiles"] = Figure(fmean(tokens))
    add_cost(folder / "cost.json", "all", time.process_time() - began)
    row = NeighbourRun(
        seed=ground.seed,
        quick=quick,
        cpu_minutes=cpu_minutes(folder),
        scores=scores,
        facts={"pictures": sizes.pictures, "steps": sizes.steps},
        **origin(plan, PROTOCOL.planned(plan).to_dict()),
    )
    write_whole(folder / "row.json", json.dumps(dataclasses.asdict(row)))


def _write_data(data: Path, sizes: Sizes, seed: int) -> None:
    """Pictures with their words; those to learn from stand in the data once for each limit."""
    write_jsonl(data / "train.jsonl", "train", _records(data, "train", sizes.pictures, seed))
    write_jsonl(data / "heldout.jsonl", "heldout", _records(data, "heldout", sizes.heldout, seed))
    meta = {
        f"limit-{limit}": {
            "root": ".",
            "annotation": "train.jsonl",
            "repeat_time": 1,
            "max_dynamic_patch": limit,
        }
        for limit in LIMITS[1:]
    }
    (data / "train.json").write_text(json.dumps(meta), encoding="utf-8")
    write_whole(data / "done", "")


def _records(data: Path, split: Split, count: int, seed: int) -> Iterator[Record]:
    rng = random.Random(f"{seed}/small text/{split}")
    (data / "images").mkdir(parents=True, exist_ok=True)
    for number in range(count):
        word = sample_sign(rng, split)
        path = f"images/{split}-{number:05d}.png"
        draw_word(word, SHAPES_PX[number % len(SHAPES_PX)], rng).save(data / path, compress_level=1)
        yield make_record("small text", [(READ_PROMPT, word)], path, metric="ocr")


def tilings_page(runs: Sequence[NeighbourRun]) -> str:
    """Markdown: reading against the limit of tiles, with the tokens it takes, and the verdict."""
    facts, (plain, hd) = runs[0].facts, TITLES
    most = f"at most {LIMITS[-1]} tiles"
    return "\n".join(
        [
            *compared(runs, TITLES),
            "",
            "Characters read right (1 - error rate). Learnt from "
            f"{facts['pictures']:,.0f} pictures under limits of {LIMITS[1:]} tiles in "
            f"{facts['steps']:,.0f} steps of eight.",
            "",
            f"- XComposer2-4KHD's tiling against InternVL's, {most}: "
            f"{verdict(runs, hd, plain, most)}.",
            "",
            origins(runs),
        ]
    )


tilings_block = block_of(RUNS, tilings_page)
"""The committed rows of `lab 4khd`."""
