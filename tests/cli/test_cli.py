"""The command line as a user types it: what it prints, where, and its exit code."""

import inspect
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import mono_internvl
from mono_internvl.cli import app as cli
from mono_internvl.model.modeling import MonoInternVLForConditionalGeneration
from mono_internvl.serving.session import ChatSession

GOLDEN = Path(os.environ.get("GOLDEN_DIR") or Path(__file__).parents[1] / "parity" / "golden")
CHAT_A, CHAT_B = GOLDEN / "python" / "chat_a.png", GOLDEN / "python" / "chat_b.png"
QUESTION = "Please describe the image shortly."
JSON_FIELDS = {"question", "answer", "boxes", "images", "tokens", "seconds", "finish_reason"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    for name in ("config.json", "model.safetensors"):
        shutil.copy(GOLDEN / "mono_a" / name, folder)
    for file in (GOLDEN / "tokenizer").iterdir():
        shutil.copy(file, folder)
    return folder


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs `mono-internvl ...` in this process: exit code, standard output, standard error."""

    def run(*arguments, stdin=""):
        monkeypatch.setattr(sys, "argv", ["mono-internvl", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        try:
            cli.main()
            code = 0
        except SystemExit as end:
            code = end.code or 0
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


@pytest.fixture
def chat(command, checkpoint):
    def run(*arguments, stdin=""):
        common = ("--model", checkpoint, "--device", "cpu", "--max-tiles", 2)
        return command("chat", *common, "--max-new-tokens", 12, *arguments, stdin=stdin)

    return run


def golden_response(turn):
    chat = json.loads((GOLDEN / "python" / "chat.json").read_text(encoding="utf-8"))
    return chat[turn]["response"]


# ------------------------------------------------------------------------------- the program


def test_program_answers_as_json(checkpoint):
    program = Path(sys.executable).with_name("mono-internvl")
    arguments = ["chat", "--model", str(checkpoint), "--image", str(CHAT_A), "--max-tiles", "2"]
    arguments += ["--max-new-tokens", "12", "--device", "cpu", "--json", QUESTION]
    run = subprocess.run([program, *arguments], capture_output=True, encoding="utf-8", timeout=120)
    assert (run.returncode, run.stderr) == (0, "")
    assert json.loads(run.stdout)["answer"] == golden_response("chat_turn1")


def test_package_import_is_light_and_names_resolve():
    code = (
        "import sys, mono_internvl as m; from mono_internvl.cli import app; "
        "heavy = {'torch', 'transformers', 'numpy', 'PIL'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    assert len(mono_internvl.__all__) <= 12
    assert all(getattr(mono_internvl, name) for name in mono_internvl.__all__)
    with pytest.raises(AttributeError, match="eyes"):
        _ = mono_internvl.eyes


def test_version_is_printed(command):
    assert command("--version") == (0, f"mono-internvl {mono_internvl.__version__}\n", "")


@pytest.mark.parametrize("verb", ["chat", "info", "convert", "train", "quickstart"])
def test_help_fits_a_terminal(command, verb):
    code, out, _ = command(verb, "--help")
    assert code == 0
    assert max(map(len, out.splitlines())) <= 80


# ------------------------------------------------------------------------------- chat


def test_chat_streams_the_golden_answer(chat):
    code, out, err = chat("--image", CHAT_A, QUESTION)
    assert (code, out, err) == (0, golden_response("chat_turn1") + "\n", "")


def test_chat_json_schema(chat):
    code, out, _ = chat("--image", CHAT_A, "--image", CHAT_B, "--json", "What differs?")
    answer = json.loads(out)
    assert code == 0 and out.count("\n") == 1
    assert set(answer) == JSON_FIELDS
    assert answer["images"] == [str(CHAT_A), str(CHAT_B)]
    assert set(answer["tokens"]) == {"prompt", "cached", "generated"}
    assert answer["tokens"]["generated"] == 12 and answer["finish_reason"] == "length"
    assert answer["seconds"] > 0 and answer["boxes"] == []


def test_chat_options_reach_the_session(chat, monkeypatch):
    seen = {}

    def record(self, question, images=(), **options):
        seen.update(vars(self.sampling), system=self.system, max_tiles=self.max_tiles)
        raise KeyboardInterrupt

    monkeypatch.setattr(ChatSession, "ask", record)
    options = ["--temperature", 0.7, "--top-p", 0.9, "--top-k", 5, "--repetition-penalty", 1.2]
    code, _, _ = chat(*options, "--seed", 3, "--system", "Be brief.", "Hi?")
    assert code == 130
    assert seen == {
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 5,
        "repetition_penalty": 1.2,
        "max_new_tokens": 12,
        "seed": 3,
        "system": "Be brief.",
        "max_tiles": 2,
    }


def test_chat_experts_are_a_name(chat):
    code, out, _ = chat("--image", CHAT_A, "--experts", "eager", QUESTION)
    assert (code, out) == (0, golden_response("chat_turn1") + "\n")
    code, _, err = chat("--experts", "fast", QUESTION)
    assert code == 1 and "auto, eager, triton" in err


def test_chat_piped_lines_share_one_conversation(chat):
    lines = [QUESTION, f"/image {CHAT_B}", "And this?", "/reset", "Hello?", "/quit", "Unread"]
    code, out, err = chat("--json", "--image", CHAT_A, stdin="\n".join(lines))
    first, second, third = map(json.loads, out.splitlines())
    assert (code, err) == (0, "")
    assert first["answer"] == golden_response("chat_turn1")
    assert first["images"] == [str(CHAT_A)] and second["images"] == [str(CHAT_B)]
    assert second["tokens"]["cached"] == first["tokens"]["prompt"] + 12 - 1
    # A reset keeps what every conversation begins with, the system message, and no image.
    assert 0 < third["tokens"]["cached"] < third["tokens"]["prompt"]
    assert third["tokens"]["cached"] < first["tokens"]["prompt"] and third["images"] == []


def test_chat_piped_commands_print_text(chat):
    code, out, err = chat(stdin=f"/image '{CHAT_A}'\n{QUESTION}\n\n/history\n/help\n")
    assert code == 0 and err == ""
    answer = golden_response("chat_turn1")
    assert out.startswith(f"{answer}\nuser: [image] {QUESTION}\nassistant: {answer}\n/image PATH")
    assert "> " not in out


def test_chat_piped_errors_go_on_and_fail_at_the_end(chat):
    code, out, err = chat("--json", stdin="/image nowhere.png\n/fly\n/usr/bin is what?\n")
    assert code == 1
    assert json.loads(out)["question"] == "/usr/bin is what?"
    first, second = err.splitlines()
    assert first.startswith("error: ") and "nowhere.png" in first
    assert second == "error: /fly is no command; /help names them all"


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_chat_terminal_survives_interrupts(chat, monkeypatch, capsys):
    lines = iter(["Hello?", KeyboardInterrupt, "/history", EOFError])

    def type_line(prompt):
        assert prompt == "> "
        line = next(lines)
        if not isinstance(line, str):
            raise line
        return line

    def interrupted(self, *arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", type_line)
    monkeypatch.setattr(io, "StringIO", Terminal)
    monkeypatch.setattr(ChatSession, "ask", interrupted)
    code, out, err = chat()
    assert code == 0
    assert "(stopped)" in err and "(nothing was said yet)" in out


def _text_file(folder):
    file = folder / "notes.png"
    file.write_text("this is no image")
    return file


def test_chat_bad_input_is_one_line(command, chat, checkpoint, tmp_path):
    text = _text_file(tmp_path)
    for arguments, expected in (
        (("--image", tmp_path / "none.png", "What?"), "none.png"),
        (("--image", text, "What?"), "notes.png"),
        ((" ",), "question"),
        (("--precision", "int3", "What?"), "precision='int3'"),
        (("--device", "abacus", "What?"), "device='abacus'"),
        (("--top-p", 7, "What?"), "top_p=7"),
        (("<image> and <image>", "--image", CHAT_A), "2 <image> placeholders but 1 images"),
    ):
        code, out, err = chat(*arguments)
        assert (code, out, err.count("\n")) == (1, "", 1), err
        assert err.startswith("error: ") and expected in err
    code, _, err = command("chat", "--model", tmp_path / "nothing", "What?")
    assert code == 1 and str(tmp_path / "nothing") in err
    code, _, err = command("chat", "--model", tmp_path, "What?")
    assert code == 1 and err.startswith("error: ") and err.count("\n") == 1


def test_chat_debug_shows_the_origin(chat, tmp_path):
    with pytest.raises(mono_internvl.MonoInternVLError, match="notes"):
        chat("--debug", "--image", _text_file(tmp_path), "What?")


@pytest.mark.parametrize(
    "arguments",
    [
        ("chat", "What?"),
        ("chat", "--model", "x", "--max-tiles", 0, "What?"),
        ("chat", "--model", "x", "--colour", "red"),
        ("convert",),
        ("train",),
        ("train", "miniature", "--set", "steps"),
        ("info", "--model", "x", "--preset", "y"),
        ("dance",),
    ],
)
def test_wrong_usage_exits_with_2(command, arguments):
    code, out, err = command(*arguments)
    assert (code, out) == (2, "") and "Usage" in err


# ------------------------------------------------------------------------------- convert


def test_convert_proves_the_round_trip(command, checkpoint, tmp_path):
    code, out, err = command("convert", "--check", checkpoint, "--out", tmp_path / "copy")
    assert (code, err) == (0, "")
    stored = load_file(checkpoint / "model.safetensors")
    assert f"tensors     {len(stored)}\n" in out
    assert f"parameters  {sum(x.numel() for x in stored.values()):,}\n" in out
    assert "dtype       F32" in out and "identical" in out
    copy = load_file(tmp_path / "copy" / "model.safetensors")
    assert stored.keys() == copy.keys()
    assert all(torch.equal(stored[key], copy[key]) for key in stored)
    again = command("convert", "--check", tmp_path / "copy", "--json")
    result = json.loads(again[1])
    assert again[0] == 0 and result["differences"] == [] and result["out"] is None
    assert f"sha256      {result['digest']}\n" in out


@pytest.mark.parametrize("fault", ["bit", "dtype", "lost", "config"])
def test_convert_reports_a_difference(command, checkpoint, monkeypatch, fault):
    save = MonoInternVLForConditionalGeneration.save_pretrained
    key = "language_model.model.layers.1.attention.wqkv.weight"

    def save_badly(self, folder, **options):
        save(self, folder, **options)
        file, config = Path(folder) / "model.safetensors", Path(folder) / "config.json"
        tensors = load_file(file)
        if fault == "bit":
            tensors[key].view(torch.int32)[3, 3] ^= 1
        elif fault == "dtype":
            tensors[key] = tensors[key].double()
        elif fault == "lost":
            del tensors[key]
        else:
            config.write_text(
                config.read_text().replace('"rope_theta": 1000000', '"rope_theta": 7')
            )
        save_file(tensors, file)

    monkeypatch.setattr(MonoInternVLForConditionalGeneration, "save_pretrained", save_badly)
    code, out, _ = command("convert", "--check", checkpoint)
    assert code == 1 and "identical" not in out
    assert ("rope_theta" if fault == "config" else key) in out


def test_convert_overwrites_nothing(command, checkpoint, tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    code, _, err = command("convert", "--check", checkpoint, "--out", tmp_path)
    assert code == 1 and "not an empty folder" in err
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("name", ["file/copy", "n" * 300, "/proc/x"])
def test_convert_out_that_cannot_be_made_is_one_line(command, checkpoint, tmp_path, name):
    (tmp_path / "file").touch()
    code, out, err = command("convert", "--check", checkpoint, "--out", tmp_path / name)
    assert (code, out, err.count("\n")) == (1, "", 1), err
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_convert_on_a_full_disk_leaves_nothing(command, checkpoint, monkeypatch, tmp_path):
    def save(self, folder, **options):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(MonoInternVLForConditionalGeneration, "save_pretrained", save)
    code, _, err = command("convert", "--check", checkpoint, "--out", tmp_path / "copy")
    assert code == 1 and err.count("\n") == 1 and "make room on the disk" in err
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------- info


def test_info_counts_what_is_stored(command, checkpoint):
    code, out, _ = command("info", "--model", checkpoint, "--json")
    stored = load_file(checkpoint / "model.safetensors")
    info = json.loads(out)
    assert code == 0
    assert info["parameters"]["total"] == sum(x.numel() for x in stored.values())
    assert info["config"]["visual_experts"] == ["ffn"]


def test_info_preset_is_the_published_2b(command):
    code, out, _ = command("info")
    assert code == 0 and "3,111,355,392" in out and "1,207,959,552" in out
    assert max(map(len, out.splitlines())) <= 80


def test_info_refuses_the_unknown(command, tmp_path):
    assert "preset 'tiny'" in command("info", "--preset", "tiny")[2]
    assert "no config.json" in command("info", "--model", tmp_path)[2]


# ------------------------------------------------------------------------------- train, quickstart


def record_calls(monkeypatch, module, name):
    calls = []
    signature = inspect.signature(getattr(module, name))

    def record(*arguments, **options):
        calls.append(dict(signature.bind(*arguments, **options).arguments))
        return Path("runs/x/checkpoint")

    monkeypatch.setattr(module, name, record)
    return calls


def test_train_passes_its_arguments_on(command, monkeypatch):
    from mono_internvl.cli.recipes import RECIPES
    from mono_internvl.training import run as train

    calls = record_calls(monkeypatch, train, "train")
    options = ["--model", "start", "--data", "meta.json", "--out", "run", "--processes", 2]
    options += ["--precision", "fp32", "--attention", "eager", "--parallel", "fsdp"]
    options += ["--watch", "tensorboard"]
    code, out, _ = command("train", "miniature", *options, "--set", "steps=3", "--set", "seed=1")
    assert code == 0 and "runs/x/checkpoint" in out
    assert calls == [
        {
            "recipe": RECIPES["miniature"],
            "start": "start",
            "data": Path("meta.json"),
            "run": Path("run"),
            "processes": 2,
            "threads": None,
            "device": "cpu",
            "precision": "fp32",
            "attention": "eager",
            "parallel": "fsdp",
            "watch": ["tensorboard"],
            "overrides": {"steps": "3", "seed": "1"},
        }
    ]


def test_train_lists_recipes(command):
    from mono_internvl.cli.recipes import RECIPES

    code, out, _ = command("train", "--list")
    assert code == 0
    assert all(f"{name}: " in out for name in RECIPES)
    for recipe in RECIPES.values():
        assert all(f"  note: {note}\n" in out for note in recipe.notes)
        assert all(f"  ours: {choice}\n" in out for choice in recipe.ours)
    assert "never run" in out and "frozen with the embedding and the head until s2" in out


def test_quickstart_passes_its_arguments_on(command, monkeypatch):
    from mono_internvl.miniature import quickstart

    calls = record_calls(monkeypatch, quickstart, "quickstart")
    options = ["--quick", "--no-ask", "--out", "run", "--seed", 5]
    assert command("quickstart", *options, "--precision", "bf16", "--threads", 2)[0] == 0
    assert calls == [
        {
            "run": Path("run"),
            "quick": True,
            "processes": None,
            "threads": 2,
            "device": "cpu",
            "precision": "bf16",
            "attention": None,
            "llm": "shipped",
            "seed": 5,
            "ask": False,
        }
    ]
