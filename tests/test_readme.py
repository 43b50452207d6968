"""What the README and the docs say is executed, parsed or looked up here.

Every fenced `bash` and `python` block is run in a quick form on a tiny model, or stands in
`NOT_EXECUTED` with the reason. A fenced block that follows a line ending in "`path`:" is written
to that path first, so the examples are the data that the commands read.
"""

import contextlib
import io
import json
import re
import shlex
import shutil
import sys
import tomllib
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import click
import fill_pages
import numpy as np
import pytest
import typer
from PIL import Image
from test_house import ALLOWED
from tiny_runs import write_checkpoint

from mono_internvl.cli import app as cli
from mono_internvl.cli.recipes import RECIPES
from mono_internvl.errors import ConfigError
from mono_internvl.evaluation.benchmarks.records import RECORDS
from mono_internvl.miniature.drawing import _RGB
from mono_internvl.miniature.lexicon import POSITIONS
from mono_internvl.miniature.targets import Bound, judge
from mono_internvl.runs.predictions import Prediction
from mono_internvl.runs.schemas import TextMeasures
from mono_internvl.serving import terminal
from mono_internvl.serving.session import ChatSession

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
ALL_PAGES = [
    *PAGES,
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    ROOT / "results" / "README.md",
]
IMAGES = ROOT / "tests" / "parity" / "golden" / "python"

NETWORK = "needs the network"
MINUTES = "takes minutes; .ci/run walks the quick form"
PAIRS = "needs a model that is right at times; tests/evaluation/test_pairs.py has one"
MINUTES_MODULAR = "takes minutes; tests/miniature/test_lab_modular.py walks a smaller form"
MINUTES_LLM = "takes minutes; tests/miniature/test_quickstart_llm.py walks a smaller form"
MINUTES_EVIP = "takes hours; tests/miniature/test_lab_evip.py walks a smaller form"
MINUTES_LAB = "takes an hour; tests/miniature/test_lab_analysis.py walks a smaller form"
LAB_SIGHT = "takes half an hour; tests/miniature/test_lab_sight.py walks a smaller form"
PROCESSES = "starts processes; tests/training/test_loop.py does"
DIGITS = "exports 1,797 images; tests/miniature/test_digits.py does it in a quick form"
LLAVA = "needs LLaVA-665k and eight GPUs"
SERVES = "needs a server; tests/serving/http/test_page.py has one"
NOT_EXECUTED = {
    "make quickstart": MINUTES,
    "make test": "is what runs this",
    "make bench": MINUTES,
    "mono-internvl bench prefill --size 2b --rounds 3 --out results": MINUTES,
    "make setup": NETWORK,
    "python3 -m venv .venv": "is what `make setup` does",
    ".venv/bin/pip install torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu": NETWORK,
    "mono-internvl chat --model OpenGVLab/Mono-InternVL-2B --image a.png "
    "'Please describe the image shortly.'": NETWORK,
    "mono-internvl init --llm Qwen/Qwen3-0.6B --out runs/qwen3-vl --preset v1_5": NETWORK,
    "mono-internvl train sft --model OpenGVLab/Mono-InternVL-2B --data my-data/meta.json "
    "--out runs/mine-2b --device cuda": "needs the network and a GPU",
    "mono-internvl train miniature-sft --model runs/quickstart/model --data my-data/meta.json "
    "--out runs/two --processes 2": PROCESSES,
    "torchrun --nproc-per-node 8 -m mono_internvl train sft --model MODEL "
    "--data my-data/meta.json --device cuda --parallel fsdp": "needs eight GPUs",
    "sbatch --nodes 4 examples/cluster/slurm.sbatch evip-2b --model START --data DATA "
    "--out RUN": "needs a cluster",
    "FIRST=node-0 examples/cluster/nodes.sh sft --model START --data META.json "
    "--out RUN": "needs two nodes; tests/training/test_launch.py walks it on one",
    "mono-internvl data prepare llava/source.json --model START --out llava/shards": LLAVA,
    "mono-internvl data verify llava/shards/meta.json --model START --max-tokens 2048 "
    "--max-tiles 6 --out llava/bad.jsonl": LLAVA,
    "torchrun --nproc-per-node 8 -m mono_internvl train llava-665k --model START "
    "--data llava/shards/meta.json --out runs/llava --device cuda --parallel fsdp "
    "--watch tensorboard --set loader_workers=8 --set packing=best_fit "
    "--set recompute=selective": LLAVA,
    "mono-internvl export runs/llava --out runs/llava-model --dtype bfloat16": LLAVA,
    "mono-internvl chat --model runs/llava-model --image a.png 'What is this?'": LLAVA,
    "pytest -m gpu tests/experts": "needs a GPU",
    "mono-internvl bench gpu --out results": "needs a GPU",
    "mono-internvl quickstart": MINUTES,
    "mono-internvl quickstart --quick --out runs/quick": MINUTES,
    "mono-internvl quickstart --llm scratch --out runs/scratch": MINUTES,
    "mono-internvl quickstart --quick --llm DIR --out runs/other": MINUTES_LLM,
    "mono-internvl init --llm Qwen/Qwen3-0.6B --out runs/start "
    "--image-attention bidirectional": NETWORK,
    "mono-internvl init --llm Qwen/Qwen3-0.6B --out runs/start --position-step 0.25 "
    "--position-steps 1,0.5,0.25,0.125": NETWORK,
    "mono-internvl init --llm Qwen/Qwen3-0.6B --out runs/start-4khd "
    "--tiling xcomposer_4khd": NETWORK,
    "mono-internvl chat --model runs/quickstart/model --video clip.mp4 --frames 8 "
    "'what moved?'": "needs a video; tests/processing/test_video.py has one",
    "mono-internvl evaluate --model MODEL --benchmarks videomme,videomme-subtitles "
    "--data-root benchmarks --frames 16": "needs the benchmark's data",
    "mono-internvl lab images --against runs/quickstart": "trains two more models; "
    "tests/miniature/test_lab_images.py walks the path",
    "mono-internvl lab modular --against runs/quickstart": MINUTES,
    "mono-internvl lab mpo runs/seeds/auto-seed0 runs/seeds/auto-seed1 runs/seeds/auto-seed2 "
    "--out runs/mpo": "takes an hour; tests/miniature/test_lab_mpo.py walks a smaller form",
    "mono-internvl compose --model runs/quickstart/model --title Shapes --text article.txt "
    "--images album --out article.html": "needs an album; tests/composition/test_compose.py has "
    "one",
    "mono-internvl lab video runs/seeds/auto-seed0 runs/seeds/auto-seed1 runs/seeds/auto-seed2 "
    "--out runs/video": LAB_SIGHT,
    "mono-internvl lab compose runs/seeds/auto-seed0 runs/seeds/auto-seed1 runs/seeds/auto-seed2 "
    "--out runs/compose": LAB_SIGHT,
    "mono-internvl lab 4khd runs/seeds/auto-seed0 runs/seeds/auto-seed1 runs/seeds/auto-seed2 "
    "--out runs/4khd": LAB_SIGHT,
    "mono-internvl lab best-of runs/seeds/auto-seed0 runs/seeds/auto-seed1 runs/seeds/auto-seed2 "
    "--out runs/best-of": "takes an hour; tests/miniature/test_lab_best_of.py walks a smaller form",
    "mono-internvl data pairs --model runs/quickstart/model --benchmark miniature "
    "--data runs/quickstart/data/validation.jsonl --out runs/own-pairs": PAIRS,
    "mono-internvl lab modular --quick --out runs/modular-quick": MINUTES_MODULAR,
    "mono-internvl lab evip-plus-plus --processes 2": MINUTES_EVIP,
    "mono-internvl lab evip-plus-plus --seeds 1 --against runs/quickstart": MINUTES_EVIP,
    "mono-internvl lab evip-plus-plus --quick --seeds 1 --out runs/plus-quick": MINUTES_EVIP,
    "mono-internvl chat --model runs/quickstart/model --image a.png --draw drawn.png "
    "'Detect the <ref>red circle</ref> in the image with its bounding box.'": "the tiny model "
    "here writes no box; tests/cli/test_pictures.py has answers",
    "mono-internvl lab table-5": MINUTES_LAB,
    "mono-internvl lab table-9 --seeds 1 --out runs/table-9": MINUTES_LAB,
    "mono-internvl lab figure-4 --quick": MINUTES_LAB,
    "mono-internvl serve --model runs/quickstart/model --name quickstart": SERVES,
    "mono-internvl web --model runs/quickstart/model "
    "--examples runs/quickstart/data/validation.jsonl": "serves; `make test-web` opens the page",
    "curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' -d "
    '\'{"model": "quickstart", "messages": [{"role": "user", '
    '"content": "what does Mira keep?"}]}\'': SERVES,
    "python -m mono_internvl.miniature.digits runs/digits": DIGITS,
    "mono-internvl train miniature-sft --model runs/quickstart/model "
    "--data runs/digits/train.json --out runs/digits/run": DIGITS,
    "mono-internvl evaluate --model runs/digits/run/sft/checkpoint "
    "--data runs/digits/heldout.jsonl": DIGITS,
    ".venv/bin/pip install -c constraints.txt -e '.[real]'": NETWORK,
    "python examples/real/run.py --size quick --out runs/real-quick": NETWORK,
    "python examples/real/run.py --size cpu --out runs/real": NETWORK,
    "mono-internvl chat --model runs/real/s2/checkpoint --image "
    "runs/real/data/images/000000.png 'what is this?'": "needs the run of the command before",
    "vllm serve OpenGVLab/InternVL3_5-8B --port 8000": "needs a GPU",
    "mono-internvl data caption 'images/*.tar' --url http://127.0.0.1:8000/v1 --model "
    "OpenGVLab/InternVL3_5-8B --out my-data/s12": "needs a server; tests/data/test_captions.py "
    "has one",
}
"""Command, as `shlex` writes it -> why it is only parsed."""

SERVER = "127.0.0.1:8000"
"""Python that asks a server is run by tests/serving/http/test_page.py, which has one."""

QUICK_OPTIONS = {"train": ("--set", "steps=1", "--set", "batch_size=2", "--set", "warmup_steps=0")}
"""What a verb is given on top here, so that it ends at once."""

LONGEST_ANSWER = 6


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        language: After the fence.
        text: Between the fences.
        path: Path that the line before it names, or an empty string.
    """

    language: str
    text: str
    path: str


@dataclass
class Run:
    """A page that was worked through: its folder, what each command printed, what failed."""

    folder: Path
    printed: dict[str, str] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, but for those that are filled from results."""
    text = re.sub(r"<!-- results:.*?<!-- /results -->", "", page.read_text("utf-8"), flags=re.S)
    found = re.findall(r"([^\n]*)\n\n```(\w*)\n(.*?)^```", text, flags=re.S | re.M)
    assert text.count("```") == 2 * len(found), f"{page.name}: a fence without an empty line before"
    paths = [re.search(r"`([^`\s]+)`:$", line) for line, _, _ in found]
    return [
        Block(language, body, path[1] if path else "")
        for (_, language, body), path in zip(found, paths, strict=True)
    ]


def commands(block: Block) -> list[list[str]]:
    """The command lines of a bash block, without leading variables."""
    lines = [
        shlex.split(line, comments=True) for line in block.text.replace("\\\n", " ").splitlines()
    ]
    return [
        [w for i, w in enumerate(line) if i or not re.match(r"[A-Z_]+=", w)]
        for line in lines
        if line
    ]


def all_commands(pages: list[Path] = ALL_PAGES) -> list[list[str]]:
    return [c for page in pages for b in blocks(page) if b.language == "bash" for c in commands(b)]


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.S | re.M)


def code_spans(page: Path) -> list[str]:
    return re.findall(r"`([^`\n]+)`", prose(page))


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the pages assume it: a quickstart's model, two images, the examples as files."""
    folder = tmp_path_factory.mktemp("ground")
    write_checkpoint(folder / "tiny")
    shutil.copytree(folder / "tiny", folder / "runs" / "quickstart" / "model")
    for place in (folder, folder / "my-data" / "images"):
        place.mkdir(parents=True, exist_ok=True)
        shutil.copy(IMAGES / "chat_a.png", place / "a.png")
        shutil.copy(IMAGES / "chat_b.png", place / "b.png")
    (folder / "results").mkdir()
    shutil.copy(ROOT / "results" / "quickstart.png", folder / "results")
    for block in (block for page in PAGES for block in blocks(page) if block.path):
        file = folder / block.path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(block.text)
    return folder


@pytest.fixture(scope="module")
def runs(ground: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Run]]:
    """Every page, its blocks executed in order in a folder of its own."""
    patch = pytest.MonkeyPatch()
    patch.setattr(ChatSession, "_room_after", lambda self, num_prompt: LONGEST_ANSWER)
    done = {}
    for page in PAGES:
        run = Run(tmp_path_factory.mktemp(page.stem) / "ground")
        shutil.copytree(ground, run.folder)
        with contextlib.chdir(run.folder):
            for block in blocks(page):
                _execute(block, run, patch)
        done[page.name] = run
    patch.undo()
    yield done


def _execute(block: Block, run: Run, patch: pytest.MonkeyPatch) -> None:
    if block.language == "python" and not block.path and SERVER not in block.text:
        name = block.text.splitlines()[-1]
        run.printed[name] = _printed(name, run, lambda: exec(compile(block.text, name, "exec"), {}))
    for words in commands(block) if block.language == "bash" else ():
        line = shlex.join(words)
        if line in NOT_EXECUTED:
            continue
        if words[0] != "mono-internvl":
            run.failures.append(f"{line}: neither executed nor in NOT_EXECUTED")
            continue
        patch.setattr(sys, "argv", [*words, *QUICK_OPTIONS.get(words[1], ())])
        run.printed[line] = _printed(line, run, cli.main)


def _printed(name: str, run: Run, call: typing.Callable[[], object]) -> str:
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            call()
    except SystemExit as end:
        if end.code:
            run.failures.append(f"{name}: exit {end.code}: {err.getvalue()[-400:]}")
    except Exception as error:
        run.failures.append(f"{name}: {type(error).__name__}: {error}")
    return out.getvalue()


# ------------------------------------------------------------------------------ what is executed


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_page_commands_run(page: Path, runs: dict[str, Run]) -> None:
    assert not runs[page.name].failures, "\n".join(runs[page.name].failures)


def test_execution_can_fail(ground: Path) -> None:
    run, patch = Run(ground), pytest.MonkeyPatch()
    text = "mono-internvl chat --model nowhere hello\nls\n"
    _execute(Block("bash", text, ""), run, patch)
    _execute(Block("python", "import no_such_module\n", ""), run, patch)
    patch.undo()
    assert len(run.failures) == 3, run.failures


def test_not_executed_commands_are_in_the_pages() -> None:
    found = {shlex.join(words) for words in all_commands(PAGES)}
    assert set(NOT_EXECUTED) <= found, f"no longer documented: {set(NOT_EXECUTED) - found}"


def test_reasons_name_existing_tests() -> None:
    for reason in NOT_EXECUTED.values():
        for path in re.findall(r"tests/\S+\.py|\.ci/run", reason):
            assert (ROOT / path).is_file(), reason


def test_documented_answer_has_the_fields_of_a_real_one(runs: dict[str, Run]) -> None:
    (printed,) = (text for line, text in runs["chat.md"].printed.items() if "--json" in line)
    (shown,) = (block for block in blocks(ROOT / "docs" / "chat.md") if block.language == "json")
    real, example = json.loads(printed), json.loads(shown.text)
    assert list(real) == list(example)
    assert list(real["tokens"]) == list(example["tokens"])


def test_documented_metrics_are_the_fields_of_a_real_row(runs: dict[str, Run]) -> None:
    file = runs["training.md"].folder / "runs" / "mine" / "sft" / "metrics.jsonl"
    section = (ROOT / "docs" / "training.md").read_text().split("## What a run leaves behind")[1]
    table = re.findall(r"^\| (`.*?) \|", section.split("\n## ")[0], flags=re.M)
    assert re.findall(r"`(\w+)`", " ".join(table)) == list(
        json.loads(file.read_text().split("\n")[0])
    )


def test_user_recipe_trains_its_stages(runs: dict[str, Run]) -> None:
    run = runs["training.md"].folder / "runs" / "my-recipe"
    assert all((run / stage / "checkpoint" / "config.json").is_file() for stage in ("see", "talk"))


def test_heldout_example_is_scored(ground: Path) -> None:
    questions = RECORDS.questions(ground / "my-data" / "heldout.jsonl")
    assert [question.kind for question in questions] == ["exact", "grounding"]


# ------------------------------------------------------------------------------ what is looked up


def _program() -> click.Group:
    program = typer.main.get_command(cli.app)
    assert hasattr(program, "commands")
    return typing.cast(click.Group, program)


def _check_usage(words: list[str]) -> None:
    """Raise UsageError unless verb and options of a `mono-internvl` command exist."""
    command: click.Command = _program()
    rest = words[1:]
    while hasattr(command, "commands"):  # a group, as `lab`, has verbs of its own
        if rest[0] not in command.commands:
            raise click.UsageError(f"no verb {rest[0]}")
        command, rest = command.commands[rest[0]], rest[1:]
    command.make_context(words[1], list(rest))


def _all_commands(command: click.Command) -> Iterator[click.Command]:
    """A command and, of a group, every command in it."""
    yield command
    for inner in getattr(command, "commands", {}).values():
        yield from _all_commands(inner)


def test_documented_commands_have_existing_verbs_and_options() -> None:
    wrong = []
    for words in all_commands():
        start = words.index("mono-internvl") if "mono-internvl" in words else None
        try:
            if start is not None:
                _check_usage(words[start:])
        except Exception as error:
            wrong.append(f"{shlex.join(words)}: {error}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "line", ["mono-internvl dance", "mono-internvl chat --modell x", "mono-internvl lab dance"]
)
def test_usage_check_can_fail(line: str) -> None:
    with pytest.raises(Exception, match=r"dance|--modell"):
        _check_usage(line.split())


def test_options_and_verbs_in_the_text_exist() -> None:
    program = _program()
    known = {o for c in _all_commands(program) for p in c.params for o in p.opts}
    known |= {"--check", "--help"}
    for page in ALL_PAGES:
        for span in code_spans(page):
            if match := re.match(r"(--[a-z][a-z-]*)\b", span):
                assert match[1] in known, f"{page.name}: {span}"
            if match := re.match(r"mono-internvl ([a-z]\S*)", span):
                assert match[1] in program.commands, f"{page.name}: {span}"


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    for words in all_commands():
        if words[0] == "make":
            assert set(words[1:]) <= targets, shlex.join(words)


def test_modules_of_commands_exist() -> None:
    for words in all_commands():
        if words[0] == "python" and words[1] == "-m":
            module = ROOT / "src" / Path(*words[2].split(".")).with_suffix(".py")
            assert module.is_file(), shlex.join(words)
        elif words[0] == "python":
            assert (ROOT / words[1]).is_file(), shlex.join(words)


def test_torch_of_the_readme_is_the_pinned_one() -> None:
    pins = re.findall(r"\btorch==([\d.]+)", (ROOT / "README.md").read_text())
    (pinned,) = re.findall(r"^torch==([\d.]+)", (ROOT / "constraints.txt").read_text(), flags=re.M)
    assert set(pins) == {pinned}


def _ragged_rows(text: str) -> list[str]:
    """Lines of Markdown tables with more or fewer cells than their head."""
    wrong, width = [], 0
    for line in text.splitlines():
        if not line.startswith("|"):
            width = 0
            continue
        cells = len(re.findall(r"(?<!\\)\|", re.sub(r"`[^`]*`", "", line)))
        width = width or cells
        if cells != width:
            wrong.append(line)
    return wrong


@pytest.mark.parametrize("page", ALL_PAGES, ids=lambda page: page.name)
def test_tables_have_all_their_cells(page: Path) -> None:
    assert not _ragged_rows(prose(page))


def test_ragged_tables_are_found() -> None:
    assert _ragged_rows("| a | b |\n|---|---|\n| c |\n| `x|y` | d |\n") == ["| c |"]


def test_links_lead_somewhere() -> None:
    wrong = []
    for page in ALL_PAGES:
        for name, target, anchor in re.findall(r"\[([^\]]*)\]\(([^)#\s]*)#?([^)]*)\)", prose(page)):
            if target.startswith("http"):
                continue
            file = page.parent / target if target else page
            if not file.exists():
                wrong.append(f"{page.name}: {target} does not exist")
            elif anchor and anchor not in _anchors(file):
                wrong.append(f"{page.name}: {target} has no heading #{anchor}")
            elif file.suffix == ".py" and (defined := re.fullmatch(r"`(\w+)`", name)):
                pattern = rf"^\s*(class|def) {defined[1]}\b|^{defined[1]}\b.*="
                if not re.search(pattern, file.read_text(), flags=re.M):
                    wrong.append(f"{page.name}: {target} does not define {defined[1]}")
    assert not wrong, "\n".join(wrong)


def _anchors(page: Path) -> set[str]:
    heads = re.findall(r"^#+ (.+)$", prose(page), flags=re.M)
    return {re.sub(r"[^\w -]", "", head).strip().lower().replace(" ", "-") for head in heads}


def test_paths_in_the_text_exist() -> None:
    for page in ALL_PAGES:
        for span in code_spans(page):
            if re.match(r"(src|docs|tests|results)/[\w./-]+$", span):
                assert (ROOT / span).exists(), f"{page.name}: {span}"


def test_project_map_is_the_tree() -> None:
    (tree,) = (b.text for b in blocks(ROOT / "README.md") if b.text.startswith("src/"))
    listed = re.findall(r"^  (\S+)", tree, flags=re.M)
    package = ROOT / "src" / "mono_internvl"
    assert all((package / name).exists() for name in listed), listed
    folders = {f"{p.parent.name}/" for p in package.glob("*/__init__.py")}
    assert folders <= set(listed), folders - set(listed)


def test_documented_import_directions_are_the_tested_ones() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text().split("## Who imports whom")[1]
    lines = dict(re.findall(r"^(\w+)\s*-> (.+)$", text, flags=re.M))
    for package, allowed in ALLOWED.items():
        if package in lines:
            assert {x for x in lines[package].split(", ") if x != "(nothing)"} == allowed, package


def test_documented_recipes_are_the_known_ones() -> None:
    text = (ROOT / "docs" / "training.md").read_text().split("## Rules")[0]
    assert set(re.findall(r"^\| `([\w-]+)` \|", text, flags=re.M)) == set(RECIPES)


def test_documented_chat_commands_are_the_help_text() -> None:
    assert terminal.HELP in (ROOT / "docs" / "chat.md").read_text()


def test_every_departure_of_the_source_is_in_the_faithfulness_page() -> None:
    package = ROOT / "src" / "mono_internvl"
    departing = [f for f in package.rglob("*.py") if re.search(r"\bDiffers: ", f.read_text())]
    page = (ROOT / "docs" / "faithfulness.md").read_text()
    assert departing
    for file in departing:
        assert f"(../{file.relative_to(ROOT)})" in page, f"{file.name} departs, the page is silent"


def test_pages_speak_of_the_project_alone() -> None:
    files = [*ALL_PAGES, *(f for f in (ROOT / "results").iterdir() if f.suffix != ".png")]
    for file in files:
        place = re.search(r"(?<![\w.:/])/(home|root|tmp|work|Users)/\S+", file.read_text("utf-8"))
        assert place is None, f"{file.name}: {place}"


def test_package_ships_readme_and_licence() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert (project["readme"], project["license"]) == ("README.md", "MIT")
    assert (ROOT / "LICENSE").read_text().startswith("MIT License")


# ------------------------------------------------------------------------------ figures


def _metrics(**changes: object) -> dict[str, object]:
    """`metrics.json` of a made-up run of two stages."""
    answers = [
        Prediction({"kind": "colour"}, "what colour?", "red", score, is_blind)
        for is_blind, score in ((False, 0.75), (True, 0.25))
    ]
    bounds = {
        "colour question, above blind and chance": Bound(0.30, 0.60),
        "perplexity, after S2 / start": Bound(1.25, 1.10, "lower"),
        "grounding IoU": Bound(0.45, None),
        "questions of all kinds": Bound(None, 0.85),
    }
    text = {"start": TextMeasures(40.0, True), "s2": TextMeasures(42.0, False)}
    targets = judge(bounds, {"start": answers, "s2": answers}, text, 9.0)
    stage = {
        "scores": {"colour": {"score": 0.75, "blind": 0.25, "chance": 1 / 6, "aligned": None}},
        "text": {"perplexity": 42.0},
        "text_logits_identical": False,
    }
    return {
        "quick": False,
        "command": "mono-internvl quickstart",
        "device": "cpu",
        "processes": 2,
        "cpu_minutes": 9.0,
        "versions": {"torch": "2.13.0", "commit": "0123456789ab"},
        "targets": [target.to_row() for target in targets],
        "stages": [{"name": "start", **stage}, {"name": "s11", **stage}],
        **changes,
    }


def _page(name: str) -> str:
    return f"before\n<!-- results:{name} -->\nold\n<!-- /results -->\nafter\n"


def _row(**changes: object) -> str:
    row = {"group": "digits", "what": "held-out accuracy", "value": 0.9375, "unit": ""}
    row |= {"command": "mono-internvl evaluate", "commit": "0123456789ab", "device": "cpu"}
    return json.dumps({**row, "versions": {"torch": "2.13.0"}, "date": "2026-01-31", **changes})


def test_pages_are_up_to_date() -> None:
    stale = [page.name for page in fill_pages.stale_pages(ROOT)]
    assert not stale, f"{stale}: run python tools/fill_pages.py"


@pytest.mark.parametrize("name", sorted(fill_pages.BLOCKS.keys() - fill_pages.COMPUTED.keys()))
def test_block_without_measurement_claims_nothing(name: str, tmp_path: Path) -> None:
    filled = fill_pages.fill(_page(name), tmp_path)
    assert "nothing is claimed here" in filled and "old" not in filled
    assert filled.startswith("before\n") and filled.endswith("after\n")
    assert fill_pages.fill(filled, tmp_path) == filled


def test_blocks_show_what_was_measured(tmp_path: Path) -> None:
    (tmp_path / "quickstart.json").write_text(json.dumps(_metrics()))
    (tmp_path / "quickstart.txt").write_text("Q: what is this?\nA: a red circle\n")
    (tmp_path / "rows.jsonl").write_text(_row() + "\n")
    targets = fill_pages.fill(_page("quickstart"), tmp_path)
    assert "| colour question, above blind and chance | ≥ 0.3 | ≥ 0.6 | 0.5 | must |" in targets
    assert "| perplexity, after S2 / start | ≤ 1.25 | ≤ 1.1 | 1.05 | must, aim |" in targets
    assert "| grounding IoU | ≥ 0.45 |  |  | **no** |" in targets
    assert "| questions of all kinds |  | ≥ 0.85 | 0.75 | reported |" in targets
    assert "2 processes on cpu, 9.0 CPU minutes; torch 2.13.0, commit 0123456789ab" in targets
    stages = fill_pages.fill(_page("quickstart-stages"), tmp_path)
    assert "| kind | start | S1.1 | S1.1, aligned | S1.1, blind | chance |" in stages
    assert "| colour | 0.75 | 0.75 |  | 0.25 | 0.167 |" in stages
    language = fill_pages.fill(_page("quickstart-language"), tmp_path)
    assert "| perplexity | 42 | 42 |" in language
    assert "```text\nQ: what is this?" in fill_pages.fill(_page("quickstart-output"), tmp_path)
    digits = fill_pages.fill(_page("digits"), tmp_path)
    assert "| held-out accuracy | 0.938 | `mono-internvl evaluate` | cpu |" in digits


def test_first_run_has_a_column_for_a_machine(tmp_path: Path) -> None:
    rows = [
        _row(group="first-run", what="`make quickstart`", value=19.6, unit="minutes", device="A"),
        _row(group="first-run", what="`make quickstart`", value=38, unit="minutes", device="B"),
        _row(group="first-run", what="memory", value=2.4, unit="GB", device="B"),
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows) + "\n")
    text = fill_pages.fill(_page("first-run"), tmp_path)
    assert "|  | A | B |" in text and "| `make quickstart` | 19.6 minutes | 38 minutes |" in text
    assert "| memory | not measured | 2.4 GB |" in text


def test_first_screen_asks_what_was_answered() -> None:
    (first, *_) = (b for b in blocks(ROOT / "README.md") if b.language == "python")
    found = fill_pages.first_answer(ROOT / "results")
    assert found is not None and f'"{found["question"]}"' in first.text


def test_first_picture_is_that_of_the_answer() -> None:
    """Colour and place of the only thing in it are those of the truth that the run printed."""
    found = fill_pages.first_answer(ROOT / "results")
    assert found is not None
    pixels = np.asarray(Image.open(ROOT / "results" / "quickstart.png").convert("RGB"), dtype=int)
    is_thing = np.abs(pixels - pixels[0, -1]).sum(axis=-1) > 100
    y, x = (int(3 * where.mean() / 168) for where in is_thing.nonzero())
    colour = pixels[is_thing].mean(axis=0)
    nearest = min(_RGB, key=lambda name: np.abs(colour - _RGB[name]).sum())
    assert pixels.shape == (168, 168, 3)
    assert found["truth"].endswith(f"at the {POSITIONS[3 * y + x]}.")
    assert f" {nearest} " in found["truth"]


def test_stale_page_is_found_and_written(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text(_page("digits"))
    assert fill_pages.stale_pages(tmp_path) == [tmp_path / "README.md"]
    assert fill_pages.write_pages(tmp_path) == [tmp_path / "README.md"]
    assert fill_pages.stale_pages(tmp_path) == []


@pytest.mark.parametrize(("check", "code"), [(True, 1), (False, 0)])
def test_results_command_exits(
    check: bool, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "README.md").write_text(_page("gpu"))
    words = ["results", "--root", str(tmp_path), *(["--check"] if check else [])]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as end:
        fill_pages.main()
    assert end.value.code == code
    assert ("old" in (tmp_path / "README.md").read_text()) is check


@pytest.mark.parametrize(
    ("page", "file", "content", "message"),
    [
        (_page("digit"), None, "", "results:digit is unknown"),
        ("<!-- results:digits -->\n", None, "", "stands alone"),
        (_page("digits"), "rows.jsonl", _row(group="speed"), "rows.jsonl:1: group='speed'"),
        (_page("digits"), "rows.jsonl", '{"what": "x"}', "rows.jsonl:1: .*missing"),
        (_page("digits"), "rows.jsonl", "{", "rows.jsonl:1"),
        (_page("quickstart"), "quickstart.json", "[]", "not the metrics.json"),
        (_page("quickstart"), "quickstart.json", json.dumps(_metrics(quick=True)), "a quick"),
    ],
)
def test_results_refuse_what_they_do_not_know(
    page: str, file: str | None, content: str, message: str, tmp_path: Path
) -> None:
    if file:
        (tmp_path / file).write_text(content)
    with pytest.raises(ConfigError, match=message):
        fill_pages.fill(page, tmp_path)
