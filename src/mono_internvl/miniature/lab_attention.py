"""`mono-internvl lab figure-5`: where finished quickstarts look, layer by layer, and the claims.

Each held-out picture is asked for a caption once; the numbers are means over pictures. A layer is a
variant here, and evenly spread attention is one, so that claims and verdicts are those of all labs.

Source: arXiv 2410.08202, figure 5, which shows maps of two pictures and gives no numbers.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean

import torch

from mono_internvl.compute import make_plan
from mono_internvl.errors import ConfigError
from mono_internvl.evaluation.runner import Subject
from mono_internvl.generation.attention_maps import LayerAttention, attention_maps
from mono_internvl.miniature.lab_analysis import PAGE, ROWS, Claim, Lab, LabRun, Measured
from mono_internvl.miniature.lab_verdicts import lab_page
from mono_internvl.miniature.recipes import LANGUAGE_MODEL
from mono_internvl.miniature.scoring import BENCHMARK
from mono_internvl.runs.folder import write_whole
from mono_internvl.runs.provenance import origin
from mono_internvl.runs.schemas import METRICS, RunMetrics, read_metrics

NAME = "figure-5"
_DISTANCE = "distance of visual attention, 1 = evenly spread"
_TO_IMAGE = "part of its attention that text gives to the image"
_TO_TEXT = "part of its attention that the image gives to text"
_SAID = "seen in the maps; no numbers (arXiv 2410.08202, figure 5)"
_LAST = f"layer-{LANGUAGE_MODEL['num_hidden_layers']}"

FIGURE_5 = Lab(
    title="Figure 5: where tokens look",
    steps={},
    variants=lambda recipe: (),
    claims=(
        Claim(
            "visual attention is local in the first layer: nearer than evenly spread",
            _SAID,
            {"even": 1, "layer-1": -1},
            (_DISTANCE,),
        ),
        Claim(
            "it is less local in the last layer",
            _SAID,
            {_LAST: 1, "layer-1": -1},
            (_DISTANCE,),
        ),
        Claim(
            "text looks at the image more in the last layer than in the first",
            _SAID,
            {_LAST: 1, "layer-1": -1},
            (_TO_IMAGE,),
        ),
    ),
    note="The mean of all heads. An image of the miniature has 36 visual tokens, 6 on a side. An "
    "interval is over seeds; a seed is a mean over pictures.",
)


def look(runs: Sequence[Path], out: Path, *, pictures: int = 30) -> Path:
    """Measure finished quickstarts and write rows and a page.

    Args:
        runs: Folders of finished quickstarts, a seed each.
        out: Folder of `runs.jsonl` and `page.md`.
        pictures: Held-out pictures of each.

    Returns:
        The page.

    Raises:
        ConfigError: A run is not finished, or two of them have one seed.
    """
    for run in runs:
        if not (run / METRICS).is_file():
            raise ConfigError(f"{run}: no {METRICS}; expected a finished quickstart, let it end")
    metrics = [read_metrics(run) for run in runs]
    seeds = [one.seed or 0 for one in metrics]
    if len(set(seeds)) < len(seeds):
        raise ConfigError(f"seeds {seeds}: expected runs of different seeds, one each")
    rows = [
        row
        for run, seed, one in zip(runs, seeds, metrics, strict=True)
        for row in _rows(run, seed, one, pictures)
    ]
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / ROWS, "\n".join(json.dumps(asdict(row)) for row in rows))
    write_whole(out / PAGE, lab_page(FIGURE_5, rows))
    return out / PAGE


def _rows(run: Path, seed: int, metrics: RunMetrics, pictures: int) -> list[LabRun]:
    subject = Subject.load(run / "model", make_plan("cpu", "fp32", processes=1))
    questions = BENCHMARK.questions(run / "data" / "heldout.jsonl")
    captions = [q for q in questions if q.kind == "caption" and not q.record.get("aligned")]
    found: list[tuple[LayerAttention, ...]] = []
    for question in captions[:pictures]:
        batch = subject.processor.encode_prompt(question.prompt)
        ids, pixels = batch["input_ids"][0].tolist(), batch["pixel_values"].to(torch.float32)
        found.append(attention_maps(subject.model, ids, pixels, max_side=1).layers)
    made = origin(subject.plan)
    trained = f"{metrics.command} at commit {metrics.versions.get('commit', 'unknown')}"
    made["command"] = f"{made['command']} (trained by: {trained})"

    def row(variant: str, title: str, layer: int | None) -> LabRun:
        """Of one layer, or of evenly spread attention, which is alike in all of them."""
        name = "" if layer is not None else "uniform_"
        layers = [of_picture[layer or 0] for of_picture in found]

        def mean(field: str) -> float:
            return fmean(getattr(one, name + field) for one in layers)

        distance = mean("visual_distance") / fmean(one.uniform_visual_distance for one in layers)
        figures = {
            _DISTANCE: Measured(distance),
            _TO_IMAGE: Measured(mean("text_to_image")),
            _TO_TEXT: Measured(mean("image_to_text")),
        }
        return LabRun(
            lab=NAME,
            variant=variant,
            title=title,
            seed=seed,
            quick=metrics.is_quick,
            factor=1.0,
            searched={},
            samples={},
            figures=figures,
            **made,
        )

    layers = range(len(found[0]))
    return [
        row("even", "evenly spread", None),
        *(row(f"layer-{index + 1}", f"layer {index + 1}", index) for index in layers),
    ]
