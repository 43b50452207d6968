"""`mono-internvl evaluate`: your own records, or published benchmarks."""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mono_internvl.cli.compute_plan import say_plan
from mono_internvl.cli.options import (
    AnswerFormat,
    AnswerPrecision,
    Attention,
    Device,
    Fps,
    Frames,
    Json,
)
from mono_internvl.errors import ConfigError
from mono_internvl.serving.terminal import print_json, quieten

if TYPE_CHECKING:
    from mono_internvl.compute import ComputePlan
    from mono_internvl.evaluation.suite import Suite


def evaluate(
    model: Annotated[
        str | None, typer.Option("--model", metavar="DIR|HUB_ID", help="Checkpoint.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(metavar="FILE.jsonl", help="Records with a kind and its answer.")
    ] = None,
    benchmarks: Annotated[
        str,
        typer.Option(
            "--benchmarks",
            "--benchmark",
            metavar="NAMES",
            help="records (your own) or miniature, with --data; or published ones, with commas "
            "between them, with --data-root: mme,chartqa,... or all.",
        ),
    ] = "records",
    data_root: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder of the published benchmarks' data.")
    ] = Path("benchmarks"),
    fetch: Annotated[
        str | None,
        typer.Option(metavar="NAMES", help="Download these benchmarks' data there, and end."),
    ] = None,
    score_only: Annotated[
        bool, typer.Option("--score-only", help="Score the answers in --out again; ask nothing.")
    ] = False,
    judge_url: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Up to /v1; the key is read from JUDGE_API_KEY."),
    ] = None,
    judge_model: Annotated[
        str | None, typer.Option(metavar="NAME", help="Judge of MM-Vet and MathVista there.")
    ] = None,
    best_of: Annotated[
        int | None,
        typer.Option(min=1, help="Draw so many answers and choose one (your records)."),
    ] = None,
    critic: Annotated[
        str | None,
        typer.Option(metavar="DIR|HUB_ID", help="With --best-of: who scores their steps."),
    ] = None,
    answer_format: AnswerFormat = "whole",
    blind: Annotated[bool, typer.Option("--blind", help="Hide the images (your records).")] = False,
    out: Annotated[
        Path | None,
        typer.Option(help="Predictions file, or folder of a suite; beside the model."),
    ] = None,
    per_kind: Annotated[
        int | None, typer.Option(min=1, help="Only the first so many of each kind, or benchmark.")
    ] = None,
    max_tiles: Annotated[
        int | None, typer.Option(min=1, help="Most tiles of an image; the benchmark's.")
    ] = None,
    frames: Frames = None,
    fps: Fps = None,
    device: Device = "auto",
    precision: AnswerPrecision = "auto",
    attention: Attention = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Of PyTorch.")] = None,
    processes: Annotated[int, typer.Option(min=1, help="That share out a suite's questions.")] = 1,
    as_json: Json = False,
) -> None:
    """Score answers: to the records of a file, or to published benchmarks."""
    from mono_internvl.cli.benchmarks import BENCHMARKS
    from mono_internvl.evaluation.benchmarks.table import rows_named
    from mono_internvl.evaluation.suite import Suite

    quieten()
    if fetch is not None:
        _fetch(fetch, data_root)
        return
    if model is None:
        raise ConfigError("model is missing; name a checkpoint with --model DIR|HUB_ID")
    asks: dict[str, Any] = {
        "device": device,
        "precision": precision,
        "attention": attention,
        "threads": threads,
    }
    if benchmarks in BENCHMARKS and (frames is not None or fps is not None):
        raise ConfigError("frames and fps are for published benchmarks; a record says them itself")
    if best_of is None and critic is not None:
        raise ConfigError(f"critic={critic!r} without --best-of N; say how many answers are drawn")
    if best_of is not None:
        if benchmarks not in BENCHMARKS or data is None or blind:
            raise ConfigError(
                f"best_of={best_of} needs --data FILE.jsonl of {' or '.join(BENCHMARKS)}, and "
                "images that are seen"
            )
        folder = out or _folder_of(model).with_name(f"best-of-{best_of}-{data.stem}")
        _choose_best(
            benchmarks,
            (model, data, folder, best_of),
            {"critic": critic, "answer_format": answer_format, "per_kind": per_kind},
            {"max_tiles": max_tiles, **asks},
            as_json,
        )
        return
    if benchmarks in BENCHMARKS:
        _evaluate_records(
            benchmarks,
            model,
            data,
            {"blind": blind, "out": out, "per_kind": per_kind, "max_tiles": max_tiles, **asks},
            answer_format,
            as_json,
        )
        return
    if data is not None or blind:
        raise ConfigError(
            f"benchmarks={benchmarks!r}; --data and --blind are for {' and '.join(BENCHMARKS)}, "
            "published benchmarks take --data-root DIR"
        )
    suite = Suite(
        model=model,
        names=tuple(row.name for row in rows_named(benchmarks)),
        data_root=data_root,
        out=out or _folder_of(model),
        max_tiles=max_tiles,
        limit=per_kind,
        frames=frames,
        fps=fps,
        **asks,
    )
    _evaluate_suite(suite, processes, score_only, judge_url, judge_model, as_json)


def _folder_of(model: str) -> Path:
    """Where a suite's files go unless a folder is named."""
    if Path(model).is_dir():
        return Path(model) / "evaluation"
    return Path("evaluation-" + model.rsplit("/", 1)[-1])


def _fetch(names: str, root: Path) -> None:
    from mono_internvl.evaluation.benchmarks.table import rows_named
    from mono_internvl.evaluation.fetch import fetch

    problems = []
    for row in rows_named(names):
        try:
            typer.echo(f"{row.name}: {fetch(row, root)}")
        except ConfigError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError("\n".join(problems))


def _choose_best(
    name: str,
    what: tuple[str, Path, Path, int],
    choice: dict[str, Any],
    asks: dict[str, Any],
    as_json: bool,
) -> None:
    from mono_internvl.cli.benchmarks import BENCHMARKS
    from mono_internvl.evaluation.benchmark import named
    from mono_internvl.evaluation.best_of import evaluate_best_of

    chosen = named(BENCHMARKS, name)
    protocol = chosen.protocol.changed(
        attention=asks["attention"], max_tiles=asks["max_tiles"], precision=asks["precision"]
    )
    found = evaluate_best_of(
        *what,
        benchmark=chosen,
        protocol=protocol,
        device=asks["device"],
        threads=asks["threads"],
        **choice,
    )
    if as_json:
        print_json(dataclasses.asdict(found))
        return
    typer.echo(f"{'':<20}" + "".join(f"{way:>9}" for way in found.scores))
    for kind, items in found.items.items():
        cells = "".join(f"{100 * scores[kind]:8.1f} " for scores in found.scores.values())
        typer.echo(f"{kind:<20}{cells} %  of {items}, one of {found.count}")
    typer.echo(f"predictions: {found.predictions}")


def _evaluate_records(
    name: str,
    model: str,
    data: Path | None,
    options: dict[str, Any],
    answer_format: str,
    as_json: bool,
) -> None:
    from mono_internvl.cli.benchmarks import BENCHMARKS
    from mono_internvl.evaluation.answer_formats import format_named
    from mono_internvl.evaluation.benchmark import named
    from mono_internvl.evaluation.evaluate import evaluate as run_evaluation

    if data is None:
        raise ConfigError(f"benchmarks={name!r} needs --data FILE.jsonl; or name published ones")
    chosen = format_named(answer_format).of(named(BENCHMARKS, name))
    protocol = chosen.protocol.changed(
        attention=options.pop("attention"),
        max_tiles=options.pop("max_tiles"),
        precision=options.pop("precision"),
    )
    found = run_evaluation(
        model, data, benchmark=chosen, protocol=protocol, on_plan=say_plan, **options
    )
    if as_json:
        print_json(dataclasses.asdict(found))
        return
    for kind, mean in found.scores.items():
        typer.echo(f"{kind:<20} {100 * mean:5.1f} %  of {found.items[kind]}")
    for one in chosen.published:
        typer.echo(f"published: {one.model} {one.score:g} ({one.source})")
    typer.echo(f"predictions: {found.predictions}")


def _evaluate_suite(
    suite: Suite,
    processes: int,
    score_only: bool,
    judge_url: str | None,
    judge_model: str | None,
    as_json: bool,
) -> None:
    from mono_internvl.distributed import rank, run_processes
    from mono_internvl.evaluation.judge import EndpointJudge
    from mono_internvl.evaluation.suite import ask_suite, score_suite
    from mono_internvl.reports.benchmarks import write_pages

    if (judge_url is None) != (judge_model is None):
        raise ConfigError(
            f"judge_url={judge_url!r}, judge_model={judge_model!r}; expected both or neither"
        )
    if not score_only:
        run_processes(ask_suite, processes, suite, _say_plan, _say_progress, threads=suite.threads)
    if rank():
        return

    def judge_for(row: Any) -> EndpointJudge | None:
        if judge_url is None or judge_model is None:
            return None
        return EndpointJudge(judge_url, judge_model, suite.out / "judge" / f"{row.name}.jsonl")

    results = score_suite(suite, judge_for)
    pages = write_pages(suite.out)
    if as_json:
        print_json([dataclasses.asdict(one) for one in results])
        return
    for one in results:
        scores = "  ".join(
            f"{name} {'-' if score is None else f'{score:.1f}'}"
            for name, score in one.scores.items()
        )
        typer.echo(f"{one.name:<16} {scores}  {one.unit}, {one.answered:,} answers")
    typer.echo(f"table: {pages[0]}" + (f"  chart: {pages[1]}" if pages[1:] else ""))


def _say_plan(plan: ComputePlan) -> None:
    if os.environ.get("RANK", "0") == "0":
        say_plan(plan)


def _say_progress(name: str, through: int, total: int) -> None:
    """One line on a terminal, rewritten; where there is none, a line for each tenth."""
    from mono_internvl.distributed import rank, world_size

    if rank():
        return
    each = f" of about {-(-total // world_size()):,} here" if world_size() > 1 else f" of {total:,}"
    if sys.stderr.isatty():
        typer.echo(f"\r{name}: {through:,}{each} ", err=True, nl=through >= total)
    elif through in (0, total) or through * 10 // total > (through - 1) * 10 // total:
        typer.echo(f"{name}: {through:,}{each}", err=True)
