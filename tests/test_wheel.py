"""What a user installs: the wheel holds every file that the package reads at run time."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "mono_internvl"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Names of the files in a wheel built from a copy of this tree, without the network."""
    copy = tmp_path_factory.mktemp("tree")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    shutil.copytree(ROOT / "src", copy / "src", ignore=ignored)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", "dist", "."]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (file,) = (copy / "dist").glob("*.whl")
    with zipfile.ZipFile(file) as archive:
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
