"""`mono-internvl VERB`: parse, call one function, print.

Whatever is heavy is imported inside its command, so that `--help` answers at once.
"""

import dataclasses
import logging
import sys
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from mono_internvl.cli.attention_map import attention_map
from mono_internvl.cli.compose import compose
from mono_internvl.cli.compute_plan import say_plan
from mono_internvl.cli.data import data as data_verbs
from mono_internvl.cli.evaluation import evaluate
from mono_internvl.cli.export import export
from mono_internvl.cli.lab import lab
from mono_internvl.cli.options import (
    AnswerPrecision,
    Attention,
    Device,
    Experts,
    Fps,
    Frames,
    Json,
    Model,
    Precision,
    Processes,
    Revision,
    Threads,
    WorldSeed,
)
from mono_internvl.cli.pictures import check_picture_path, draw_answer
from mono_internvl.cli.plan import plan
from mono_internvl.cli.serve import serve
from mono_internvl.cli.web import web
from mono_internvl.door import pass_through
from mono_internvl.serving.terminal import Picture, answer, converse, print_json, quieten

DEFAULT_PRESET = "mono-internvl-2b"
app = typer.Typer(
    name="mono-internvl",
    help="Mono-InternVL: one decoder that reads pixels and words.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

app.add_typer(data_verbs, name="data")
app.add_typer(lab, name="lab")
app.command()(plan)
app.command()(serve)
app.command()(web)
app.command()(evaluate)
app.command()(attention_map)
app.command()(compose)
app.command()(export)


def main() -> None:
    """Run the command line; a user's mistake becomes one line and exit code 1 or 2."""
    for name in ("torchao", "torch.utils._pytree"):  # where torchao is installed, its CUDA kernels
        logging.getLogger(name).setLevel(logging.ERROR)
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    sys.exit(pass_through(lambda: app(arguments), is_debug="--debug" in sys.argv[1:]))


def _print_version(is_asked: bool) -> None:
    if is_asked:
        import mono_internvl

        typer.echo(f"mono-internvl {mono_internvl.__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show where an error came from; anywhere in the line.")
    ] = False,
) -> None:
    """Options of all verbs; `main` reads `--debug`, wherever it stands."""


@app.command()
def chat(
    model: Model,
    question: Annotated[str | None, typer.Argument(help="Without it, an open chat.")] = None,
    image: Annotated[
        list[str] | None, typer.Option(metavar="FILE", help="Again for each further image.")
    ] = None,
    video: Annotated[
        list[str] | None, typer.Option(metavar="FILE", help="Shown as some of its frames.")
    ] = None,
    frames: Frames = None,
    fps: Fps = None,
    system: Annotated[str | None, typer.Option(help="System message; '' for none.")] = None,
    max_tiles: Annotated[int | None, typer.Option(min=1, help="Most tiles of an image.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, tokens.")] = 512,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Choose from this much probability.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Choose from so many tokens; 0 all.")] = 0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1 repeats less.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Of the choices.")] = None,
    device: Device = "auto",
    precision: AnswerPrecision = "auto",
    attention: Attention = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Of PyTorch.")] = None,
    experts: Experts = "auto",
    revision: Revision = None,
    draw: Annotated[
        Path | None,
        typer.Option(metavar="PNG", help="Draw the answer's boxes on the image, into this file."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Ask about images: one question, or a conversation."""
    from mono_internvl.generation.sampling import Sampling
    from mono_internvl.processing.video import frame_sampling
    from mono_internvl.serving.loading import load

    quieten()
    if draw is not None:
        if question is None or len(image or ()) != 1 or video:
            raise typer.BadParameter("--draw takes one question about one --image")
        check_picture_path(draw, "--draw", (".png", ".jpg", ".jpeg", ".webp"))
    if not video and (frames is not None or fps is not None):
        raise typer.BadParameter("--frames and --fps say which frames of a --video are shown")
    sampling = Sampling(temperature, top_p, top_k, repetition_penalty, max_new_tokens, seed)
    pictures = [Picture.load(name) for name in image or ()]
    for name in video or ():
        pictures += Picture.of_video(name, frame_sampling(frames, fps))
    session = load(
        model,
        device=device,
        precision=precision,
        attention=attention,
        threads=threads,
        revision=revision,
        system=system,
        max_tiles=max_tiles,
        sampling=sampling,
        experts=experts,
    )
    plan = session.plan
    if plan is not None and (sys.stderr.isatty() or plan.precision == "int8"):  # a loss is said
        say_plan(plan)
    if question is not None:
        answer(session, question, pictures, as_json)
        if draw is not None:
            draw_answer(session.history[-1]["content"], pictures[0].image, draw)
    elif converse(session, pictures, as_json) and not sys.stdin.isatty():
        raise typer.Exit(1)


@app.command()
def info(
    model: Annotated[
        str | None, typer.Option(metavar="DIR|HUB_ID", help="Checkpoint; its config is read.")
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help=f"Or v1, v1_5 (ours); {DEFAULT_PRESET}.")
    ] = None,
    tokens: Annotated[
        str | None, typer.Option(metavar="visual=N,text=N", help="A prompt; image=WxH for visual.")
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(metavar="NAME|FILE", help="What is trainable in each stage.")
    ] = None,
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Count parameters, and the operations and bytes of a prompt."""
    if model is not None and preset is not None:
        raise typer.BadParameter("give --model or --preset, not both")
    from mono_internvl.checkpoints.presets import PRESET_NOTES, config_of
    from mono_internvl.cli.printing import info_values, print_info
    from mono_internvl.cli.recipes import RECIPES
    from mono_internvl.costs.info import describe
    from mono_internvl.training.recipe import load_recipe

    quieten()
    config = config_of(model, preset or DEFAULT_PRESET, revision)
    found = describe(config, tokens, load_recipe(recipe, RECIPES) if recipe else None)
    title = model or preset or DEFAULT_PRESET
    if note := PRESET_NOTES.get(preset or ""):
        found = dataclasses.replace(found, config={**found.config, "note": note})
    if as_json:
        print_json({"name": title, **info_values(found)})
    else:
        print_info(title, found)


@app.command()
def convert(
    check: Annotated[
        str, typer.Option("--check", metavar="DIR|HUB_ID", help="Checkpoint to send around.")
    ],
    out: Annotated[Path | None, typer.Option(help="Keep the copy in this new folder.")] = None,
    as_json: Json = False,
) -> None:
    """Prove that a checkpoint is read and written without loss."""
    from mono_internvl.checkpoints.convert import check_round_trip
    from mono_internvl.cli.printing import print_round_trip

    quieten()
    result = check_round_trip(check, out)
    if as_json:
        print_json(dataclasses.asdict(result))
    else:
        print_round_trip(check, result)
    if result.differences:
        raise typer.Exit(1)


@app.command()
def init(
    llm: Annotated[str, typer.Option(metavar="DIR|GGUF|HUB_ID", help="Language model.")],
    out: Annotated[Path, typer.Option(help="New folder of the monolithic model.")],
    preset: Annotated[str, typer.Option(help="v1, or v1_5: our reconstruction of 1.5.")] = "v1",
    visual_experts: Annotated[
        str | None, typer.Option(metavar="PARTS", help="Instead: ffn, attention, norms; none.")
    ] = None,
    chat_template: Annotated[
        str | None, typer.Option(metavar="FILE", help="Jinja, or internlm2-chat; the model's own.")
    ] = None,
    template_date: Annotated[str | None, typer.Option(help="Of dated templates, or today.")] = None,
    tiling: Annotated[
        str, typer.Option(help="How images are cut: internvl or xcomposer_4khd.")
    ] = "internvl",
    tile_px: Annotated[int | None, typer.Option(help="Side of a tile; 448, of 4KHD 336.")] = None,
    patch_width: Annotated[int, typer.Option(min=1, help="Of the patch embedding.")] = 1024,
    max_tiles: Annotated[
        int | None, typer.Option(min=1, help="Most tiles of an image; 12, of 4KHD 25.")
    ] = None,
    image_attention: Annotated[
        str, typer.Option(help="Within an image: causal or bidirectional.")
    ] = "causal",
    position_step: Annotated[
        float, typer.Option(help="Between visual tokens in answers; a word is 1.")
    ] = 1.0,
    position_steps: Annotated[
        str, typer.Option(metavar="LIST", help="That training draws from, as 1,0.5,0.25 (V2PE).")
    ] = "",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    seed: Annotated[int, typer.Option(help="Of patch embedding and projector.")] = 0,
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Make a monolithic model of a language model: the start of pre-training."""
    from mono_internvl.checkpoints.initialize import init as make_model
    from mono_internvl.checkpoints.initialize import summary
    from mono_internvl.cli.printing import in_words
    from mono_internvl.configuration.model import MonoInternVLConfig
    from mono_internvl.configuration.options import (
        EXPERT_PRESETS,
        parse_position_steps,
        parse_visual_experts,
    )
    from mono_internvl.costs.info import describe

    if preset not in EXPERT_PRESETS:
        raise typer.BadParameter(f"--preset {preset}: expected {' or '.join(EXPERT_PRESETS)}")
    quieten()
    experts = parse_visual_experts(preset if visual_experts is None else visual_experts)
    made = make_model(
        llm,
        out,
        visual_experts=experts,
        chat_template=chat_template,
        template_date=template_date,
        tiling=tiling,
        tile_px=tile_px,
        patch_width=patch_width,
        max_tiles=max_tiles,
        image_attention=image_attention,
        visual_position_step=position_step,
        visual_position_steps=parse_position_steps(position_steps),
        dtype=dtype,
        seed=seed,
        revision=revision,
    )
    counts = describe(MonoInternVLConfig.from_pretrained(made)).parameters
    sizes = {"parameters": counts.total, "visual_parameters": counts.total - counts.activated_text}
    next_command = f"mono-internvl train evip-2b --model {made} --data DATA --out RUN"
    if as_json:
        print_json({"out": str(made), **summary(made), **sizes, "next": next_command})
        return
    for name, value in (summary(made) | sizes).items():
        typer.echo(f"{name.replace('_', ' '):<17} {in_words(value)}")
    typer.echo(f"checkpoint: {made}\nnext: {next_command}")


@app.command()
def train(
    recipe: Annotated[str | None, typer.Argument(help="Name, or a Python file.")] = None,
    model: Annotated[
        str | None, typer.Option(metavar="DIR|HUB_ID", help="Checkpoint to start from.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(metavar="META.json|DIR", help="What to train on.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder; runs/RECIPE.")] = None,
    processes: Processes = None,
    threads: Threads = None,
    device: Device = "cpu",
    precision: Precision = "auto",
    attention: Attention = None,
    parallel: Annotated[
        str, typer.Option(metavar="HOW", help="ddp; fsdp shards the model; fsdp_offload.")
    ] = "ddp",
    watch: Annotated[
        list[str] | None, typer.Option(metavar="BY", help="tensorboard, wandb; again for both.")
    ] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="Change a field of every stage."),
    ] = None,
    list_recipes: Annotated[bool, typer.Option("--list", help="Name the recipes.")] = False,
) -> None:
    """Train a recipe; call it again to go on after a stop."""
    if list_recipes:
        _print_recipes()
        return
    if recipe is None:
        raise typer.BadParameter("name a RECIPE, or ask for them with --list")
    overrides = {}
    for assignment in assignments or ():
        field, equals, value = assignment.partition("=")
        if not (field and equals):
            raise typer.BadParameter(f"--set {assignment}: expected FIELD=VALUE")
        overrides[field] = value
    from mono_internvl.cli.recipes import RECIPES
    from mono_internvl.training.recipe import load_recipe
    from mono_internvl.training.run import train as run_recipe

    quieten()
    checkpoint = run_recipe(
        load_recipe(recipe, RECIPES),
        start=model,
        data=data,
        run=out,
        processes=processes,
        threads=threads,
        device=device,
        precision=precision,
        attention=attention,
        parallel=cast(Any, parallel),
        watch=cast(Any, watch or ()),
        overrides=overrides,
    )
    typer.echo(f"checkpoint: {checkpoint}")
    typer.echo(f'ask it:     mono-internvl chat --model {checkpoint} --image FILE "question"')


@app.command()
def quickstart(
    out: Annotated[Path, typer.Option(help="Run folder.")] = Path("runs/quickstart"),
    quick: Annotated[bool, typer.Option(help="The same steps with small numbers.")] = False,
    processes: Processes = None,
    threads: Threads = None,
    device: Device = "cpu",
    precision: Precision = "auto",
    attention: Attention = None,
    llm: Annotated[str, typer.Option(help="shipped, scratch, or a folder.")] = "shipped",
    seed: WorldSeed = 0,
    ask: Annotated[bool, typer.Option(help="End with three questions.")] = True,
) -> None:
    """Train the miniature through all four stages: data, evaluation, report."""
    from mono_internvl.miniature.quickstart import quickstart as run_quickstart

    quieten()
    run_quickstart(
        out,
        quick=quick,
        processes=processes,
        threads=threads,
        device=device,
        precision=precision,
        attention=attention,
        llm=llm,
        seed=seed,
        ask=ask,
    )


@app.command()
def bench(
    what: Annotated[
        str,
        typer.Argument(
            help="targets, prefill, modular, decode, prefix, profile, train, serve, engine, "
            "samples, images, data, experts or gpu."
        ),
    ],
    size: Annotated[str | None, typer.Option(help="tiny, middle or 2b; middle, gpu: 2b.")] = None,
    precision: Precision = "auto",
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved runs of every subject.")] = 5,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Add the rows to its bench.jsonl; write targets.jsonl."),
    ] = None,
    device: Annotated[str | None, typer.Option(help="As elsewhere; cpu, gpu: auto.")] = None,
    as_json: Json = False,
) -> None:
    """Measure speed: compared subjects interleaved in one run."""
    from mono_internvl.bench.rows import keep
    from mono_internvl.bench.run import bench as run_bench

    quieten()
    rows = run_bench(what, size=size, precision=precision, device=device, rounds=rounds)
    for row in rows if out is None else keep(out, rows):
        typer.echo(row.to_json() if as_json else row.to_line())


def _print_recipes() -> None:
    from mono_internvl.cli.recipes import RECIPES
    from mono_internvl.training.progress import summarize_recipe

    for recipe in RECIPES.values():
        typer.echo(summarize_recipe(recipe))


if __name__ == "__main__":
    main()
