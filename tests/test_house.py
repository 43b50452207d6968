"""The house rules that a machine can hold: who imports whom, file sizes, forbidden packages."""

import ast
import importlib.util
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "mono_internvl"
PACKAGE = "mono_internvl"

# Package -> what it may import besides itself and COMMON; a dotted name is one module.
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "transformers_import": set(),
    "door": set(),
    "compute": {"experts.registry"},
    "distributed": set(),
    "chat_client": set(),
    "runs": set(),
    "experts": set(),
    "configuration": set(),
    "attention": set(),
    "released": set(),
    "model": {"attention", "experts", "released"},
    "auto_classes": {"model", "processing"},
    "processing": set(),
    "checkpoints": {"released", "model", "processing"},
    "generation": {"attention", "experts", "model"},
    "data": {"chat_client", "experts.routing", "processing"},
    "training": {"released", "model", "processing", "data", "costs.accelerators", "costs.training"},
    "recipes": {"training.objectives", "training.recipe"},
    "evaluation": {
        "chat_client",
        "released",
        "model",
        "processing",
        "checkpoints",
        "generation",
        "data",
    },
    "serving": {
        "attention",
        "experts",
        "released",
        "model",
        "processing",
        "checkpoints",
        "generation",
        "door",
        "reports.boxes",
        "reports.attention_pages",
    },
    "costs": {
        "experts",
        "model",
        "processing.images",
        "training.recipe",
        "training.rules",
        "recipes",
    },
    "composition": {"processing"},
    "reports": {"processing"},
    "bench": {
        "attention",
        "experts",
        "model",
        "processing",
        "generation",
        "data",
        "training",
        "costs",
        "recipes",
    },
    "miniature": {
        "released",
        "model",
        "processing",
        "checkpoints",
        "composition",
        "generation",
        "data",
        "training",
        "recipes",
        "evaluation",
        "serving",
        "costs",
        "reports",
    },
}
COMMON = {"errors", "runs", "compute", "distributed", "configuration"}
LAYERLESS = {"cli", "__init__", "__main__"}


def source_files() -> list[Path]:
    return sorted(SOURCE.rglob("*.py"))


def imported_modules(file: Path) -> set[str]:
    """Modules of this package that a file imports, without the package's own name."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names = [node.module]
            if node.module == PACKAGE:
                names = [f"{PACKAGE}.{alias.name}" for alias in node.names]
        else:
            continue
        found |= {n.removeprefix(f"{PACKAGE}.") for n in names if n.startswith(f"{PACKAGE}.")}
    return found


def relative_imports(source: str) -> list[int]:
    """Lines of relative imports: they would escape the test of directions."""
    nodes = ast.walk(ast.parse(source))
    return [n.lineno for n in nodes if isinstance(n, ast.ImportFrom) and n.level > 0]


def test_imports_are_absolute() -> None:
    assert relative_imports("import a\nfrom . import b\nfrom ..c import d") == [2, 3]
    wrong = [
        f"{file.relative_to(SOURCE)}:{line}"
        for file in source_files()
        for line in relative_imports(file.read_text())
    ]
    assert not wrong, "write mono_internvl.…: " + ", ".join(wrong)


def is_allowed(package: str, module: str) -> bool:
    top = module.split(".")[0]
    if top == package or top in COMMON:
        return True
    return any(module == name or module.startswith(f"{name}.") for name in ALLOWED[package])


def test_imports_follow_the_direction() -> None:
    wrong = []
    for file in source_files():
        package = file.relative_to(SOURCE).parts[0].removesuffix(".py")
        if package in LAYERLESS:
            continue
        assert package in ALLOWED, f"{package}: say in ALLOWED what it may import"
        wrong += [
            f"{file.relative_to(SOURCE)} imports {module}"
            for module in imported_modules(file)
            if not is_allowed(package, module)
        ]
    assert not wrong, "\n".join(wrong)


def test_imports_direction_is_checked() -> None:
    assert not is_allowed("model", "training.loop")
    assert not is_allowed("data", "model.modeling")
    assert is_allowed("data", "processing.processor")
    assert imported_modules(SOURCE / "training" / "loop.py") >= {"data.batches", "data.order"}


@pytest.mark.parametrize("file", source_files(), ids=lambda f: str(f.relative_to(SOURCE)))
def test_files_stay_readable(file: Path) -> None:
    assert len(file.read_text().splitlines()) <= 500, "two ideas in one room? split the file"


def test_torchvision_is_absent() -> None:
    assert importlib.util.find_spec("torchvision") is None, (
        "it breaks transformers beside a CPU torch"
    )
    for name in ("pyproject.toml", "constraints.txt"):
        listed = [
            line for line in (ROOT / name).read_text().splitlines() if not line.startswith("#")
        ]
        assert not any("torchvision" in line for line in listed), name


def test_constraints_pin_every_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    wanted = [*project["dependencies"], *(item for extra in extras for item in extra)]
    pinned = {
        re.split(r"[=<>]", line)[0].lower().replace("_", "-")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    }
    names = {re.split(r"[<>=\[ ]", item)[0].lower().replace("_", "-") for item in wanted}
    assert names <= pinned, f"not pinned: {sorted(names - pinned)}"


def test_import_is_light() -> None:
    code = "import sys, mono_internvl; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
