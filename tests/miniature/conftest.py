"""One quick world for all tests of the miniature."""

from __future__ import annotations

from pathlib import Path

import pytest

from mono_internvl.miniature import QUICK, WorldFiles, write_world


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> WorldFiles:
    """The world of `quickstart --quick`, seed 0."""
    root: Path = tmp_path_factory.mktemp("miniature") / "world"
    return write_world(root, QUICK, seed=0)
