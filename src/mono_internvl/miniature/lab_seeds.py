"""`mono-internvl lab seeds`: the quickstart once for each seed, for the spread of what it reaches.

A seed is a world, an order of its data and first weights of patch embedding and projector. Each run
takes one process, and several run side by side; together they cost less than as many quickstarts of
two processes, which wait for each other at every step.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from mono_internvl.distributed import run_side_by_side
from mono_internvl.errors import ConfigError
from mono_internvl.miniature.lab_pages import check_one_protocol
from mono_internvl.miniature.quickstart import quickstart
from mono_internvl.miniature.recipes import SEEDS
from mono_internvl.reports.markdown import NOTHING, in_words, table
from mono_internvl.runs.json_lines import read_lines
from mono_internvl.runs.provenance import Origin
from mono_internvl.runs.schemas import METRICS, RunMetrics, Target, read_metrics

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
    targets: Sequence[Target]
    scores: Mapping[str, float | None]

    def to_row(self) -> dict[str, Any]:
        """As it stands in files."""
        return {**asdict(self), "targets": [target.to_row() for target in self.targets]}

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> SeedRun:
        """What `to_row` gives, read again.

        Raises:
            KeyError, TypeError: It is no such row.
        """
        targets = [Target.from_row(target) for target in row["targets"]]
        return cls(**{**row, "targets": targets})


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
    rows = [json.dumps(_measured(read_metrics(file.parent)).to_row()) for file in finished]
    (run / RUNS).write_text("\n".join(rows) + "\n", encoding="utf-8")
    return run / RUNS


def _run(folder: Path, seed: int, precision: str) -> None:
    quickstart(folder, seed=seed, precision=precision, processes=1, ask=False)


def _measured(metrics: RunMetrics) -> SeedRun:
    if metrics.seed is None or metrics.plan is None:
        raise ConfigError(f"{metrics.name}: its metrics.json has no seed or plan; run it again")
    return SeedRun(
        seed=metrics.seed,
        precision=metrics.plan["precision"],
        instructions=metrics.plan["cpu_capability"],
        targets=metrics.targets,
        scores={kind: one.value for kind, one in metrics.stages[-1].scores.items()},
        **metrics.origin,
    )


def read_seed_runs(file: Path) -> list[SeedRun]:
    """The runs in a file of rows; none if there is no such file.

    Raises:
        ConfigError: A line that is no such row.
    """
    if not file.is_file():
        return []
    try:
        return [SeedRun.from_row(json.loads(line)) for line in read_lines(file)]
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{file}: {error}; expected the rows of `lab seeds`") from error


def seeds_block(results: Path) -> str:
    """Targets of all committed runs: for each kind of machine and precision the mean and each."""
    runs = read_seed_runs(results / RUNS)
    if not runs:
        return NOTHING
    groups: dict[tuple[str, str], list[SeedRun]] = {}
    for one in sorted(runs, key=lambda one: one.seed):
        groups.setdefault((one.precision, one.instructions), []).append(one)
    for group in groups.values():
        check_one_protocol(group, str(results / RUNS))
    heads = [
        f"{precision} on {instructions}: mean ({', '.join(str(one.seed) for one in group)})"
        for (precision, instructions), group in groups.items()
    ]
    rows = []
    for target in runs[0].targets:
        cells = [_cell(target.name, group) for group in groups.values()]
        bounds = (_bound(_target(target.name, group[0])) for group in groups.values())
        rows.append((target.name, "; ".join(dict.fromkeys(bounds)), *cells))
    return table(("held-out figure", "must", *heads), rows) + _origins(runs)


def _cell(name: str, runs: Sequence[SeedRun]) -> str:
    found = [_target(name, one) for one in runs]
    values = [target.value for target in found if isinstance(target.value, float)]
    if len(values) < len(found):
        return "not measured"
    each = [
        f"{value:.3g}" if target.is_met else f"**{value:.3g}**"
        for target, value in zip(found, values, strict=True)
    ]
    return f"{fmean(values):.3g} ({', '.join(each)})"


def _target(name: str, run: SeedRun) -> Target:
    return next(target for target in run.targets if target.name == name)


def _bound(target: Target) -> str:
    if target.must is None:
        return ""
    return f"{'≥' if target.higher_is_better else '≤'} {target.must:.3g}"


def _origins(runs: Sequence[SeedRun]) -> str:
    said = dict.fromkeys(
        f"`{one.command}`, {one.device}, {in_words(one.versions)}, {one.date}" for one in runs
    )
    return "\nIn bold what misses its bound. Made by " + "; ".join(said) + ".\n"
