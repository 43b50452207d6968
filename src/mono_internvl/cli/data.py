"""Verbs of `mono-internvl data`: look at training data, check it, bring it into shards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mono_internvl.cli.caption import data_caption
from mono_internvl.cli.options import (
    AnswerFormat,
    AnswerPrecision,
    Device,
    Json,
    MaxNewTokens,
    Model,
)
from mono_internvl.serving.terminal import print_json, quieten

if TYPE_CHECKING:
    from mono_internvl.data.encoder import RecordEncoder
    from mono_internvl.data.survey import Finding, SourceCount, Survey

data = typer.Typer(help="Look at training data, check it, shard it.", no_args_is_help=True)
data.command("caption")(data_caption)

Meta = Annotated[Path, typer.Argument(metavar="META.json", help="Names the sources.")]
Tokenizer = Annotated[
    str, typer.Option("--model", metavar="DIR|HUB_ID", help="Checkpoint that would be trained.")
]
MaxTokens = Annotated[int, typer.Option(min=1, help="Longest sample.")]
MaxTiles = Annotated[int, typer.Option(min=1, help="Most tiles of a sample.")]
Workers = Annotated[int, typer.Option(min=0, help="Processes; 0 works in this one.")]


@data.command("prepare")
def data_prepare(
    meta: Meta,
    model: Tokenizer,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the shards.")],
    shard_records: Annotated[int, typer.Option(min=1, help="Records of a shard.")] = 1000,
    workers: Workers = 0,
    max_skipped_ratio: Annotated[
        float, typer.Option(min=0, max=1, help="Of all records, how many may be bad.")
    ] = 0.1,
    as_json: Json = False,
) -> None:
    """Turn sources into indexed tar shards; call it again to go on after a stop."""
    from mono_internvl.data.prepare import prepare

    quieten()
    encode = _encoder(model, max_tiles=1)
    done = prepare(
        meta,
        out,
        encode,
        shard_records=shard_records,
        workers=workers,
        max_skipped_ratio=max_skipped_ratio,
    )
    counts = done.counts
    if as_json:
        print_json({"meta": str(done.meta), "shards": done.shards, **counts.to_dict()})
        return
    typer.echo(f"records: {counts.num_records:,} in {done.shards:,} shards")
    if counts.num_skipped:
        typer.echo(f"bad, left out, listed in {out / 'quarantine.jsonl'}:\n{counts.table()}")
    typer.echo(f"meta:    {done.meta}")


@data.command("verify")
def data_verify(
    meta: Meta,
    model: Tokenizer,
    max_tokens: MaxTokens = 2048,
    max_tiles: MaxTiles = 12,
    workers: Workers = 0,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE.jsonl", help="List the bad records there.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Read every record as training would, images decoded; exit 1 if one is bad."""
    import dataclasses

    from mono_internvl.data.survey import count
    from mono_internvl.runs.json_lines import to_line

    quieten()
    survey = _survey(meta, model, max_tokens, max_tiles)
    bad: Counter[tuple[str, str]] = Counter()

    def noted() -> Iterator[Finding]:
        # Truncated first: what an earlier call listed is not today's.
        file = None if out is None else out.open("w", encoding="utf-8")
        try:
            for finding in survey.findings(range(len(survey)), workers):
                if finding.bad is not None:
                    key = (finding.bad.source, finding.bad.reason)
                    bad[key] += 1
                    if bad[key] <= 10 and not as_json:
                        typer.echo(f"bad: {finding.bad.message}", err=True)
                    if file is not None:
                        file.write(to_line(dataclasses.asdict(finding.bad)))
                yield finding
        finally:
            if file is not None:
                file.close()

    _print_counts(count(noted()), as_json)
    if bad:
        raise typer.Exit(1)


@data.command("inspect")
def data_inspect(
    meta: Meta,
    model: Tokenizer,
    out: Annotated[Path, typer.Option(metavar="FILE.html", help="Contact sheet.")] = Path(
        "data.html"
    ),
    records: Annotated[int, typer.Option(min=1, help="Looked at, spread over all.")] = 1000,
    samples: Annotated[int, typer.Option(min=0, help="Shown on the sheet.")] = 24,
    max_tokens: MaxTokens = 2048,
    max_tiles: MaxTiles = 12,
    workers: Workers = 0,
    as_json: Json = False,
) -> None:
    """Count tokens and tiles of some records; show samples with what is learnt of them."""
    from mono_internvl.data.survey import count
    from mono_internvl.processing.image_files import load_image
    from mono_internvl.reports.contact_sheet import shown_sample, write_contact_sheet

    quieten()
    survey = _survey(meta, model, max_tokens, max_tiles)
    places = survey.spread(records)
    findings = list(survey.findings(places, workers))
    counts = count(findings)
    decode = survey.encode.processor.tokenizer.decode
    shown = []
    good = [p for p, finding in zip(places, findings, strict=True) if finding.bad is None]
    for place in good[:samples]:
        record, sample = survey.sample(place)
        pairs = zip(sample.input_ids.tolist(), (sample.labels >= 0).tolist(), strict=True)
        tokens = [(decode([index]), learnt) for index, learnt in pairs]
        images = (load_image(image) for image in record.images)
        shown.append(shown_sample(record.where, images, tokens))
    totals = {s.name: {"all records": len(s), "repeat": s.repeat} for s in survey.sources}
    said = {name: {**totals[name], **found.summary()} for name, found in counts.items()}
    bad = [finding.bad.message for finding in findings if finding.bad is not None]
    write_contact_sheet(out, str(meta), said, shown, bad[:50])
    _print_counts(counts, as_json)
    typer.echo(f"sheet: {out}", err=as_json)


@data.command("pairs")
def data_pairs(
    model: Model,
    records: Annotated[
        Path, typer.Option("--data", metavar="FILE.jsonl", help="Records with a kind and a truth.")
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the pairs.")],
    benchmark: Annotated[
        str, typer.Option(metavar="NAME", help="Who asks and scores: records or miniature.")
    ] = "records",
    samples: Annotated[int, typer.Option(min=1, help="Answers to each question.")] = 32,
    per_question: Annotated[int, typer.Option(min=1, help="Most pairs of a question.")] = 15,
    answer_format: AnswerFormat = "whole",
    dropout: Annotated[
        bool, typer.Option("--dropout", help="Also truths against answers without the image.")
    ] = False,
    max_new_tokens: MaxNewTokens = None,
    max_tiles: Annotated[int | None, typer.Option(min=1, help="Most tiles of an image.")] = None,
    device: Device = "auto",
    precision: AnswerPrecision = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="Of PyTorch.")] = None,
    as_json: Json = False,
) -> None:
    """Draw answers of a model and pair right with wrong ones; call it again to go on."""
    import dataclasses

    from mono_internvl.cli.benchmarks import BENCHMARKS
    from mono_internvl.evaluation.benchmark import named
    from mono_internvl.evaluation.pairs import META, PairPlan, make_pairs

    quieten()
    chosen = named(BENCHMARKS, benchmark)
    protocol = chosen.protocol.changed(attention=None, max_tiles=max_tiles, precision=precision)
    counts = make_pairs(
        model,
        records,
        out,
        benchmark=chosen,
        protocol=protocol.of_length(max_new_tokens),
        plan=PairPlan(samples, per_question, answer_format, dropout),
        device=device,
        threads=threads,
    )
    if as_json:
        print_json(dataclasses.asdict(counts))
        return
    typer.echo(
        f"answers: {counts.right:,} right, {counts.wrong:,} wrong, {counts.unreadable:,} without a "
        f"result, to {counts.questions:,} questions; {counts.without:,} questions give no pair"
    )
    for name, number in counts.pairs.items():
        typer.echo(f"pairs:   {number:,} in {out / name}.jsonl")
    typer.echo(f"meta:    {out / META}")


@data.command("steps")
def data_steps(
    model: Model,
    records: Annotated[
        Path, typer.Option("--data", metavar="FILE.jsonl", help="Records with a kind and a truth.")
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the judged steps.")],
    benchmark: Annotated[
        str, typer.Option(metavar="NAME", help="Who asks and scores: records or miniature.")
    ] = "records",
    samples: Annotated[int, typer.Option(min=1, help="Answers to each question.")] = 4,
    continuations: Annotated[
        int, typer.Option(min=1, help="From the end of each step of an answer.")
    ] = 16,
    answer_format: AnswerFormat = "final",
    max_new_tokens: MaxNewTokens = None,
    max_tiles: Annotated[int | None, typer.Option(min=1, help="Most tiles of an image.")] = None,
    device: Device = "auto",
    precision: AnswerPrecision = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="Of PyTorch.")] = None,
    as_json: Json = False,
) -> None:
    """Judge the steps of a model's answers by going on from them, for a critic to learn from."""
    import dataclasses

    from mono_internvl.cli.benchmarks import BENCHMARKS
    from mono_internvl.evaluation.benchmark import named
    from mono_internvl.evaluation.pairs import META
    from mono_internvl.evaluation.step_data import StepPlan, make_steps

    quieten()
    chosen = named(BENCHMARKS, benchmark)
    protocol = chosen.protocol.changed(attention=None, max_tiles=max_tiles, precision=precision)
    counts = make_steps(
        model,
        records,
        out,
        benchmark=chosen,
        protocol=protocol.of_length(max_new_tokens),
        plan=StepPlan(samples, continuations, format=answer_format),
        device=device,
        threads=threads,
    )
    if as_json:
        print_json(dataclasses.asdict(counts))
        return
    typer.echo(
        f"{counts.answers:,} different answers to {counts.questions:,} questions, "
        f"{counts.right:,} of them right; {counts.good:,} of {counts.steps:,} steps are +"
    )
    typer.echo(f"meta:    {out / META}")


def _encoder(model: str, max_tiles: int) -> RecordEncoder:
    from mono_internvl.data.encoder import RecordEncoder
    from mono_internvl.processing.processor import MonoInternVLProcessor

    return RecordEncoder(MonoInternVLProcessor.from_pretrained(model), max_tiles)


def _survey(meta: Path, model: str, max_tokens: int, max_tiles: int) -> Survey:
    from mono_internvl.data.sources import read_meta
    from mono_internvl.data.survey import Survey

    return Survey(read_meta(meta), _encoder(model, max_tiles), max_tokens)


def _print_counts(counts: dict[str, SourceCount], as_json: bool) -> None:
    if as_json:
        print_json({name: found.summary() for name, found in counts.items()})
        return
    for name, found in counts.items():
        said = found.summary()
        typer.echo(f"{name}: {found.records:,} records, {sum(found.bad.values()):,} bad")
        for reason, number in found.bad.most_common():
            typer.echo(f"  {number:>10,}  {reason}")
        typer.echo(
            f"  tokens {said['tokens']:,}, learnt {said['learnt_tokens']:,}; of a record "
            f"{said['tokens_of_a_record']}; images by tiles {said['images_by_tiles']}"
        )
