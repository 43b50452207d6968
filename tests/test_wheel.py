"""What a user installs: the wheel holds every file that is read at run time, and it runs."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import tiny_runs

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "mono_internvl"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of this tree, without the network."""
    copy = tmp_path_factory.mktemp("tree")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    shutil.copytree(ROOT / "src", copy / "src", ignore=ignored)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", "dist", "."]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (file,) = (copy / "dist").glob("*.whl")
    return file


@pytest.fixture(scope="module")
def wheel(built: Path) -> list[str]:
    """Names of the files in it."""
    with zipfile.ZipFile(built) as archive:
        return archive.namelist()


def test_wheel_holds_every_asset_and_module(wheel: list[str]) -> None:
    needed = {
        str(file.relative_to(PACKAGE.parent))
        for file in PACKAGE.rglob("*")
        if file.is_file() and (file.suffix == ".py" or "assets" in file.parts)
        if "__pycache__" not in file.parts and not file.name.startswith(".")
    }
    assets = "mono_internvl/miniature/assets"
    assert {f"{assets}/english_train.txt", f"{assets}/english_heldout.txt"} <= needed
    assert needed <= set(wheel), sorted(needed - set(wheel))


def test_wheel_is_typed_licensed_and_has_its_command(wheel: list[str]) -> None:
    assert "mono_internvl/py.typed" in wheel
    assert any(name.endswith("licenses/LICENSE") for name in wheel)
    assert any(name.endswith("entry_points.txt") for name in wheel)
    assert not [name for name in wheel if name.startswith("tests")]


_RUN = """
import sys
from pathlib import Path

import mono_internvl
from mono_internvl.miniature.english import load_english

assert Path(mono_internvl.__file__).is_relative_to(sys.argv[1]), mono_internvl.__file__
chat = mono_internvl.load(sys.argv[2], device="cpu")
answer = chat.ask("say one", max_new_tokens=3)
print(mono_internvl.__version__, answer.tokens.generated, len(load_english()) > 100)
"""


def test_wheel_alone_loads_a_model_answers_and_reads_its_assets(
    built: Path, tmp_path: Path
) -> None:
    """Unpacked outside of the checkout, with the test environment's dependencies."""
    site, model = tmp_path / "site", tiny_runs.write_checkpoint(tmp_path / "model")
    with zipfile.ZipFile(built) as archive:
        archive.extractall(site)
    environment = {**os.environ, "PYTHONPATH": str(site), "HF_HUB_OFFLINE": "1"}

    def run(*command: str) -> str:
        done = subprocess.run(
            [sys.executable, *command],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    version, generated, has_assets = run("-c", _RUN, str(site), str(model)).split()
    assert version in built.name
    assert 0 <= int(generated) <= 3
    assert has_assets == "True"
    command = "from mono_internvl.cli.app import main; main()"
    listed = run("-c", command, "train", "--list")
    assert "evip-2b: " in listed
    assert "3,111,355,392" in run("-c", command, "info", "--preset", "v1")
