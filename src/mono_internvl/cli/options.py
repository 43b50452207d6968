"""Options that several verbs share."""

from typing import Annotated

import typer

Model = Annotated[str, typer.Option("--model", metavar="DIR|HUB_ID", help="Checkpoint.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N, xpu or mps.")]
Precision = Annotated[
    str, typer.Option(help="auto (what this machine multiplies faster), bf16 or fp32.")
]
AnswerPrecision = Annotated[
    str, typer.Option(help="auto (by machine and memory), bf16, fp32, or int8 on a CPU.")
]
Attention = Annotated[
    str | None, typer.Option(metavar="NAME", help="sdpa, blocked, eager, ...; by the plan.")
]
Processes = Annotated[
    int | None, typer.Option(min=1, help="On this machine; as many as it has cores for.")
]
Threads = Annotated[
    int | None, typer.Option(min=1, help="Of each process; the cores left to each.")
]
Revision = Annotated[
    str | None, typer.Option(metavar="REV", help="Branch, tag or commit of a hub id.")
]
Experts = Annotated[
    str, typer.Option(metavar="NAME", help="Implementation of the experts: auto, eager or triton.")
]
WorldSeed = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of the rendered world.")]
Json = Annotated[bool, typer.Option("--json", help="JSON for programs.")]
AnswerFormat = Annotated[
    str,
    typer.Option(
        "--format",
        metavar="NAME",
        help="Where a result stands: whole (all of the answer), marked (behind 'Final answer:') or "
        "final (the same, and the question asks for it).",
    ),
]
MaxNewTokens = Annotated[int | None, typer.Option(min=1, help="Longest answer; the benchmark's.")]
Frames = Annotated[int | None, typer.Option(min=1, help="Of a video, at equal distances; 8.")]
Fps = Annotated[float | None, typer.Option(help="Instead: frames a second of a video.")]
