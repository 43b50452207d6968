"""`mono-internvl lab seeds`: the quickstart once for each seed, for the spread of what it reaches.

A seed is a world, an order of its data and first weights of patch embedding and projector. Each run
takes one process, and several run side by side; together they cost less than as many quickstarts of
two processes, which wait for each other at every step.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from mono_internvl.errors import ConfigError
from mono_internvl.miniature.quickstart import METRICS, quickstart
from mono_internvl.miniature.recipes import SEEDS
from mono_internvl.reports.markdown import NOTHING, in_words, table
from mono_internvl.runs.provenance import Origin
from mono_internvl.training.distributed import run_side_by_side

RUNS = "quickstart-seeds.jsonl"


@dataclass(frozen=True, kw_only=True)
class SeedRun(Origin):
    """What one quickstart reached.

    Attributes:
        seed: Of the run.
        precision: That it trained and answered in, "bf16" or "fp32".
        instructions: Largest vector instructions that PyTorch used, such as AVX2 or AVX512.
        targets: Its targets, as in `metrics.json`.
        scores: Score by kind of question after the last stage.
    """

    seed: int
    precision: str
    instructions: str
    targets: Sequence[Mapping[str, Any]]
    scores: Mapping[str, float]


def compare_seeds(
    run: Path = Path("runs/seeds"),
    *,
    seeds: Sequence[int] = SEEDS,
    precision: str = "auto",
    processes: int = 1,
) -> Path:
    """Run the quickstart with every seed and add a line for each to `quickstart-seeds.jsonl`.

    A second call goes on where the first stopped, and may add seeds or another precision.

    Args:
        run: Output folder: `PRECISION-seed<n>/` for each run.
        seeds: Which.
        precision: "auto", "bf16" or "fp32".
        processes: Runs side by side, each in one process.

    Returns:
        The file of rows: every finished run in the folder.
    """
    run.mkdir(parents=True, exist_ok=True)
    places = [(run / f"{precision}-seed{seed}", seed, precision) for seed in seeds]
    left = [place for place in places if not (place[0] / METRICS).exists()]
    run_side_by_side(_run, left, processes)
    finished = sorted(run.glob("*-seed*/" + METRICS))
    rows = [json.dumps(asdict(_measured(json.loads(file.read_text())))) for file in finished]
    (run / RUNS).write_text("\n".join(rows) + "\n", encoding="utf-8")
    return run / RUNS


def _run(folder: Path, seed: int, precision: str) -> None:
    quickstart(folder, seed=seed, precision=precision, processes=1, ask=False)
    file = folder / METRICS
    metrics = json.loads(file.read_text(encoding="utf-8"))
    metrics["instructions"] = torch.backends.cpu.get_cpu_capability()
    file.write_text(json.dumps(metrics, indent=2), encoding="utf-8")


def _measured(metrics: Mapping[str, Any]) -> SeedRun:
    origin = {field.name: metrics[field.name] for field in fields(Origin)}
    last = metrics["stages"][-1]["scores"]
    return SeedRun(
        seed=metrics["seed"],
        precision=metrics["plan"]["precision"],
        instructions=metrics["instructions"],
        targets=metrics["targets"],
        scores={kind: score["score"] for kind, score in last.items()},
        **origin,
    )


def read_seed_runs(file: Path) -> list[SeedRun]:
    """The runs in a file of rows; none if there is no such file.

    Raises:
        ConfigError: A line that is no such row.
    """
    if not file.is_file():
        return []
    try:
        return [SeedRun(**json.loads(line)) for line in file.read_text("utf-8").splitlines()]
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{file}: {error}; expected the rows of `lab seeds`") from error


def seeds_block(results: Path) -> str:
    """Targets of all committed runs: for each kind of machine and precision the mean and each."""
    runs = read_seed_runs(results / RUNS)
    if not runs:
        return NOTHING
    groups: dict[tuple[str, str], list[SeedRun]] = {}
    for one in sorted(runs, key=lambda one: one.seed):
        groups.setdefault((one.precision, one.instructions), []).append(one)
    heads = [
        f"{precision} on {instructions}: mean ({', '.join(str(one.seed) for one in group)})"
        for (precision, instructions), group in groups.items()
    ]
    rows = []
    for target in runs[0].targets:
        cells = [_cell(target["name"], group) for group in groups.values()]
        rows.append((target["name"], _bound(target), *cells))
    return table(("held-out figure", "must", *heads), rows) + _origins(runs)


def _cell(name: str, runs: Sequence[SeedRun]) -> str:
    found = [next(t for t in one.targets if t["name"] == name) for one in runs]
    values = [target["value"] for target in found]
    if None in values:
        return "not measured"
    each = [
        f"{target['value']:.3g}" if target["met"] else f"**{target['value']:.3g}**"
        for target in found
    ]
    return f"{fmean(values):.3g} ({', '.join(each)})"


def _bound(target: Mapping[str, Any]) -> str:
    if target["must"] is None:
        return ""
    return f"{'≤' if target['better'] == 'lower' else '≥'} {target['must']:.3g}"


def _origins(runs: Sequence[SeedRun]) -> str:
    said = dict.fromkeys(
        f"`{one.command}`, {one.device}, {in_words(one.versions)}, {one.date}" for one in runs
    )
    return "\nIn bold what misses its bound. Made by " + "; ".join(said) + ".\n"
