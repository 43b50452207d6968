"""`python -m` runs the command line, by either name."""

import subprocess
import sys

import pytest

import mono_internvl


@pytest.mark.parametrize("module", ["mono_internvl", "mono_internvl.cli.app"])
def test_module_is_the_command_line(module: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", module, "--version"], capture_output=True, text=True, check=True
    )
    assert mono_internvl.__version__ in done.stdout
