"""Verbs of `mono-internvl lab`: experiments in the miniature."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from mono_internvl.cli.options import Device, Precision, Processes, WorldSeed
from mono_internvl.serving.terminal import quieten

lab = typer.Typer(help="Experiments in the miniature.", no_args_is_help=True)

EXPERIMENTS = {
    "table-4": "Captions without instruction tuning, after S1.2 and after S1.3.",
    "table-5": "Full tuning, visual experts, delta tuning.",
    "table-9": "Attention frozen or not in S1.3.",
    "figure-4": "Scores against pre-training samples, through S1.1, S1.2 and S1.3.",
    "version-1-5": "Attention experts and EViP++ against EViP, at equal data and at 42 %.",
}
"""What `miniature.lab_experiments` has, named here so that `--help` answers at once."""


@lab.command("seeds")
def lab_seeds(
    out: Annotated[Path, typer.Option(help="Run folder.")] = Path("runs/seeds"),
    seeds: Annotated[
        list[int] | None, typer.Option("--seed", help="One run each; 0, 1 and 2.")
    ] = None,
    precision: Annotated[str, typer.Option(help="auto, bf16 or fp32.")] = "auto",
    processes: Annotated[int, typer.Option(min=1, help="Runs side by side.")] = 1,
) -> None:
    """Run the quickstart with several seeds; a row for each."""
    from mono_internvl.miniature.lab_seeds import compare_seeds
    from mono_internvl.miniature.recipes import SEEDS

    rows = compare_seeds(out, seeds=seeds or SEEDS, precision=precision, processes=processes)
    typer.echo(f"rows: {rows}")


@lab.command("rates")
def lab_rates(
    out: Annotated[Path, typer.Option(help="Run folder.")] = Path("runs/rates"),
    quick: Annotated[bool, typer.Option(help="The same path with small numbers.")] = False,
    processes: Annotated[int, typer.Option(min=1, help="Runs side by side.")] = 1,
) -> None:
    """Multiply all rates by 0.5, 1 and 2 and score each on the validation split."""
    from mono_internvl.miniature.lab_rates import compare_rates

    rows = compare_rates(out, quick=quick, processes=processes)
    typer.echo(f"rows: {rows}")


@lab.command("modular")
def lab_modular(
    out: Annotated[Path, typer.Option(help="Run folder.")] = Path("runs/modular"),
    against: Annotated[
        Path | None, typer.Option(metavar="DIR", help="A finished quickstart to compare with.")
    ] = None,
    quick: Annotated[bool, typer.Option(help="The same steps with small numbers.")] = False,
    processes: Processes = None,
    device: Device = "cpu",
    precision: Precision = "auto",
    seed: WorldSeed = 0,
) -> None:
    """Train the modular baseline of the quickstart's model on the same data."""
    from mono_internvl.miniature.lab_modular import train_modular

    quieten()
    train_modular(
        out,
        against=against,
        quick=quick,
        processes=processes,
        device=device,
        precision=precision,
        seed=seed,
    )
    typer.echo((out / "table.md").read_text(encoding="utf-8"))
    typer.echo(f"comparison: {out / 'comparison.json'}")


@lab.command("images")
def lab_images(
    out: Annotated[Path, typer.Option(help="Run folder.")] = Path("runs/images"),
    seeds: Annotated[int, typer.Option(min=1, help="How many; more may follow later.")] = 1,
    quick: Annotated[bool, typer.Option(help="The same steps with small numbers.")] = False,
    against: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="A finished quickstart: it is the causal run of seed 0."),
    ] = None,
    processes: Annotated[int, typer.Option(min=1, help="Runs side by side.")] = 1,
    device: Device = "cpu",
    precision: Precision = "auto",
) -> None:
    """Compare attention within images and V2PE with the quickstart's model."""
    from mono_internvl.miniature.lab_images import compare_images

    quieten()
    table = compare_images(
        out,
        seeds=seeds,
        quick=quick,
        against=against,
        processes=processes,
        device=device,
        precision=precision,
    )
    typer.echo(table.read_text(encoding="utf-8"))
    typer.echo(f"table: {table}")


Quickstarts = Annotated[
    list[Path], typer.Argument(metavar="RUN...", help="Finished quickstarts, one for each seed.")
]


@lab.command("mpo")
def lab_mpo(
    quickstarts: Quickstarts,
    out: Annotated[Path, typer.Option(help="Run folder.")] = Path("runs/mpo"),
    quick: Annotated[bool, typer.Option(help="The same steps with small numbers.")] = False,
    processes: Annotated[int, typer.Option(min=1, help="Seeds side by side.")] = 1,
    precision: Precision = "auto",
) -> None:
    """Learn from pairs of the model's own answers; all kinds of questions before and after."""
    from mono_internvl.miniature.lab_mpo import compare_preferences

    quieten()
    table = compare_preferences(
        quickstarts, out, quick=quick, processes=processes, precision=precision
    )
    typer.echo(table.read_text(encoding="utf-8"))
    typer.echo(f"table: {table}")


@lab.command("best-of")
def lab_best_of(
    quickstarts: Quickstarts,
    out: Annotated[Path, typer.Option(help="Run folder.")] = Path("runs/best-of"),
    quick: Annotated[bool, typer.Option(help="The same steps with small numbers.")] = False,
    processes: Annotated[int, typer.Option(min=1, help="Seeds side by side.")] = 1,
    precision: Precision = "auto",
) -> None:
    """Answers in steps: the best of N by a critic, against a vote, by N."""
    from mono_internvl.miniature.lab_best_of import compare_choices

    quieten()
    table = compare_choices(quickstarts, out, quick=quick, processes=processes, precision=precision)
    typer.echo(table.read_text(encoding="utf-8"))
    typer.echo(f"table: {table}")


@lab.command("video")
def lab_video(
    quickstarts: Quickstarts,
    out: Annotated[Path, typer.Option(help="Run folder.")] = Path("runs/video"),
    quick: Annotated[bool, typer.Option(help="The same steps with small numbers.")] = False,
    processes: Annotated[int, typer.Option(min=1, help="Seeds side by side.")] = 1,
    precision: Precision = "auto",
) -> None:
    """Ask about made-up clips: with frames, with a single one, and blind."""
    from mono_internvl.miniature.lab_video import compare_frames

    quieten()
    table = compare_frames(quickstarts, out, quick=quick, processes=processes, precision=precision)
    typer.echo(table.read_text(encoding="utf-8"))
    typer.echo(f"table: {table}")


@lab.command("4khd")
def lab_4khd(
    quickstarts: Quickstarts,
    out: Annotated[Path, typer.Option(help="Run folder.")] = Path("runs/4khd"),
    quick: Annotated[bool, typer.Option(help="The same steps with small numbers.")] = False,
    processes: Annotated[int, typer.Option(min=1, help="Seeds side by side.")] = 1,
    precision: Precision = "auto",
) -> None:
    """Read small text on large pictures: two tilings against the limit of tiles."""
    from mono_internvl.miniature.lab_4khd import compare_tilings

    quieten()
    table = compare_tilings(quickstarts, out, quick=quick, processes=processes, precision=precision)
    typer.echo(table.read_text(encoding="utf-8"))
    typer.echo(f"table: {table}")


@lab.command("compose")
def lab_compose(
    quickstarts: Quickstarts,
    out: Annotated[Path, typer.Option(help="Run folder.")] = Path("runs/compose"),
    quick: Annotated[bool, typer.Option(help="The same steps with small numbers.")] = False,
    processes: Annotated[int, typer.Option(min=1, help="Seeds side by side.")] = 1,
    precision: Precision = "auto",
) -> None:
    """Look for the pictures of lines of text in an album, and choose among candidates."""
    from mono_internvl.miniature.lab_compose import compare_choices

    quieten()
    table = compare_choices(quickstarts, out, quick=quick, processes=processes, precision=precision)
    typer.echo(table.read_text(encoding="utf-8"))
    typer.echo(f"table: {table}")


@lab.command("evip-plus-plus")
def lab_evip_plus_plus(
    out: Annotated[Path, typer.Option(help="Run folder.")] = Path("runs/evip-plus-plus"),
    seeds: Annotated[int, typer.Option(min=1, help="How many; more may follow later.")] = 3,
    quick: Annotated[bool, typer.Option(help="The same steps with small numbers.")] = False,
    against: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="A finished quickstart: it is EViP's run of seed 0."),
    ] = None,
    processes: Annotated[int, typer.Option(min=1, help="Runs side by side.")] = 1,
    device: Device = "cpu",
    precision: Precision = "auto",
) -> None:
    """Compare EViP, EViP++ at equal data and EViP++ at 42 % of it, over seeds."""
    from mono_internvl.miniature.lab_evip import compare_pretraining

    quieten()
    table = compare_pretraining(
        out,
        seeds=seeds,
        quick=quick,
        against=against,
        processes=processes,
        device=device,
        precision=precision,
    )
    typer.echo(table.read_text(encoding="utf-8"))
    typer.echo(f"table: {table}")


@lab.command("figure-5")
def lab_figure_5(
    runs: Annotated[
        list[Path], typer.Option("--run", metavar="DIR", help="A finished quickstart; a seed each.")
    ],
    out: Annotated[Path, typer.Option(help="Folder of rows and page.")] = Path("runs/figure-5"),
    pictures: Annotated[int, typer.Option(min=1, help="Held-out pictures of each.")] = 30,
) -> None:
    """Where the tokens of finished quickstarts look, layer by layer."""
    from mono_internvl.miniature.lab_attention import look

    quieten()
    page = look(runs, out, pictures=pictures)
    typer.echo(page.read_text(encoding="utf-8"))
    typer.echo(f"page: {page}")


def _experiment(name: str) -> Callable[..., None]:
    """The verb of one experiment of the paper; all of them take the same options."""

    def run(
        out: Annotated[Path, typer.Option(help="Run folder.")] = Path("runs") / name,
        seeds: Annotated[int, typer.Option(min=1, help="How many; more may follow later.")] = 3,
        quick: Annotated[bool, typer.Option(help="The same steps with small numbers.")] = False,
        processes: Annotated[int, typer.Option(min=1, help="Runs side by side.")] = 2,
        device: Device = "cpu",
        precision: Precision = "auto",
    ) -> None:
        from mono_internvl.miniature.lab_analysis import run_lab
        from mono_internvl.miniature.lab_experiments import LABS
        from mono_internvl.miniature.lab_verdicts import lab_page

        quieten()
        page = run_lab(
            name,
            LABS[name],
            lab_page,
            out,
            seeds=seeds,
            quick=quick,
            processes=processes,
            device=device,
            precision=precision,
        )
        typer.echo(page.read_text(encoding="utf-8"))
        typer.echo(f"page: {page}")

    return run


for _name, _help in EXPERIMENTS.items():
    lab.command(_name, help=_help)(_experiment(_name))
