"""Pages of the labs: figures, differences with an interval, the paper's claim and a verdict."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

from mono_internvl.errors import ConfigError
from mono_internvl.miniature.lab_analysis import (
    Claim,
    Lab,
    LabRun,
    Measured,
    read_lab_runs,
)
from mono_internvl.miniature.lab_pages import QUICK_NOTE, check_one_protocol, origin_of
from mono_internvl.reports.markdown import NOTHING, table
from mono_internvl.runs.schemas import stage_label

ANALYSIS_FILE = "analysis.jsonl"
"""Name under `results/` of the rows of all labs."""

FEWEST_SEEDS = 3
"""With fewer there is no verdict."""

SHOWN, NOT_SHOWN, CONTRADICTED = "shown", "not shown at this scale", "contradicted"

_T_95 = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
"""Two-sided 95 % quantile of Student's t by number of seeds; beyond them 1.96 is near enough."""


@dataclass(frozen=True)
class Difference:
    """A claim's number.

    Attributes:
        by_seed: Of each seed.
        half_width: Of the 95 % interval around the mean; None where there is nothing to have it
            from.
        is_over_seeds: Whether the interval is of the spread over seeds; else of the records of one
            seed alone, which leaves out what another seed would give.
    """

    by_seed: tuple[float, ...]
    half_width: float | None
    is_over_seeds: bool

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return fmean(self.by_seed)


def difference(claim: Claim, runs: Sequence[LabRun]) -> Difference | None:
    """A claim's weighted sum of variants, seed by seed; None where a figure is missing."""
    by_seed, errors = [], []
    for seed in sorted({run.seed for run in runs}):
        of_seed = {run.variant: run for run in runs if run.seed == seed}
        total, variance = 0.0, 0.0
        for variant, weight in claim.contrast.items():
            run = of_seed.get(variant)
            if run is None or any(measure not in run.figures for measure in claim.measures):
                break
            figures = [(measure, run.figures[measure]) for measure in claim.measures]
            total += weight * fmean(_number(*one) for one in figures)
            variance += weight**2 * sum(_variance(one) for _, one in figures) / len(figures) ** 2
        else:
            by_seed.append(total)
            errors.append(math.sqrt(variance))
    if not by_seed:
        return None
    count = len(by_seed)
    if count > 1:
        width = _T_95.get(count, 1.96) * stdev(by_seed) / math.sqrt(count)
        return Difference(tuple(by_seed), width, is_over_seeds=True)
    return Difference(tuple(by_seed), 1.96 * errors[0] or None, is_over_seeds=False)


def _number(measure: str, figure: Measured) -> float:
    return math.log(figure.value) if measure.endswith("perplexity") else figure.value


def _variance(figure: Measured) -> float:
    """Of a mean over records, at most: that of right and wrong answers."""
    return figure.value * (1 - figure.value) / figure.items if figure.items else 0.0


def verdict(claim: Claim, found: Difference | None) -> str:
    """What a claim's number says: nothing without the seeds that an interval needs.

    Shown: the whole interval lies above minus the margin. Contradicted: all of it lies below.
    """
    if found is None:
        return "not measured"
    if len(found.by_seed) < FEWEST_SEEDS or found.half_width is None:
        needed = f"no verdict with fewer than {FEWEST_SEEDS} seeds"
        if found.mean == -claim.margin:
            return f"{needed}; no difference"
        side = "in" if found.mean > -claim.margin else "against"
        return f"{needed}; {side} the claimed direction"
    if found.mean - found.half_width > -claim.margin:
        return f"**{SHOWN}**"
    if found.mean + found.half_width < -claim.margin:
        return f"**{CONTRADICTED}**"
    return f"**{NOT_SHOWN}**"


def lab_page(lab: Lab, runs: Sequence[LabRun]) -> str:
    """Markdown of one lab."""
    check_one_protocol(runs, lab.title)
    titles = {run.variant: run.title for run in runs}
    seeds = sorted({run.seed for run in runs})
    lines = [QUICK_NOTE] if runs[0].quick else []
    count = f"{len(seeds)} seed{'s' if len(seeds) != 1 else ''}"
    lines.append(
        f"{count} ({', '.join(map(str, seeds))}). In brackets: each seed; behind a number in the "
        "claims: half of its 95 % interval"
        + (", over seeds.\n" if len(seeds) > 1 else ", of this seed's records only.\n")
    )
    lines.append(_claims(lab, runs))
    lines.append(_figures(runs, titles))
    if any(run.searched for run in runs):
        lines.append(_rates(runs, titles))
    if lab.note:
        lines.append(f"{lab.note}\n")
    origins = dict.fromkeys(origin_of(vars(run)) for run in runs)
    lines.append("\n".join(f"Made by {origin}." for origin in origins))
    return "\n".join(lines)


def _claims(lab: Lab, runs: Sequence[LabRun]) -> str:
    rows = []
    for claim in lab.claims:
        found = difference(claim, runs)
        number = "-"
        if found is not None:
            number = f"{found.mean:+.3f}"
            if found.half_width is not None:
                number += f" ± {found.half_width:.3f}"
            if len(found.by_seed) > 1:
                number += f" ({', '.join(f'{one:+.3f}' for one in found.by_seed)})"
        said = claim.text
        if claim.margin:
            said += f" (no worse than by {claim.margin:g})"
        rows.append((said, claim.paper, number, verdict(claim, found)))
    return table(("claim", "the paper", "here: above 0 is as claimed", "verdict"), rows, False)


def _figures(runs: Sequence[LabRun], titles: dict[str, str]) -> str:
    measures = list(dict.fromkeys(name for run in runs for name in run.figures))
    measures.sort(key=lambda name: (": " in name, "text: " in name))
    rows, marks = [], []
    for measure in measures:
        found = [(run, run.figures[measure]) for run in runs if measure in run.figures]
        items = found[0][1].items
        cells = [
            _cell([one.value for run, one in found if run.variant == variant]) for variant in titles
        ]
        blind = max((one.blind for _, one in found if one.blind is not None), default=None)
        chance = next((one.chance for _, one in found if one.chance is not None), None)
        rows.append((measure + (f" ({items})" if items else ""), *cells))
        marks.append(tuple("" if x is None else f"{x:.3f}" for x in (blind, chance)))
    head: tuple[str, ...] = ("held-out (records)", *titles.values())
    if any(any(pair) for pair in marks):
        head = (*head, "blind, best", "chance")
        rows = [(*row, *pair) for row, pair in zip(rows, marks, strict=True)]
    return table(head, rows)


def _cell(values: Sequence[float]) -> str:
    if not values:
        return "-"
    digits = ",.0f" if max(values) >= 1000 else ".1f" if max(values) >= 10 else ".3f"
    each = ", ".join(f"{value:{digits}}" for value in values)
    return f"{fmean(values):{digits}} ({each})" if len(values) > 1 else each


def _rates(runs: Sequence[LabRun], titles: dict[str, str]) -> str:
    """What each variant trained on, and what the search of its rates found."""
    rows = []
    for variant, title in titles.items():
        run = next(run for run in runs if run.variant == variant)
        samples = ", ".join(f"{stage_label(name)} {n:,}" for name, n in run.samples.items())
        searched = ", ".join(f"x {name}: {score:.3f}" for name, score in run.searched.items())
        rows.append((title, samples, searched, f"x {run.factor:g}"))
    return table(
        ("variant", "samples", "validation score by factor on the rates", "taken"), rows, False
    )


def analysis_block(name: str, lab: Lab) -> Callable[[Path], str]:
    """What writes the committed rows of a lab.

    Args:
        name: Of the lab.
        lab: What it compares and claims.
    """

    def block(results: Path) -> str:
        runs = [run for run in read_lab_runs(results / ANALYSIS_FILE) if run.lab == name]
        if not runs:
            return NOTHING
        if any(run.quick for run in runs):
            raise ConfigError(
                f"{results / ANALYSIS_FILE}: quick rows of lab {name!r}; commit those of a full lab"
            )
        return lab_page(lab, runs) + "\n"

    return block
