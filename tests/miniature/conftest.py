"""One quick world for all tests of the miniature, and a quickstart to begin labs from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from mono_internvl.miniature import QUICK, WorldFiles, write_world
from mono_internvl.miniature.language_model import add_vision
from mono_internvl.miniature.quickstart import SETTINGS, SHIPPED_LANGUAGE_MODEL


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> WorldFiles:
    """The world of `quickstart --quick`, seed 0."""
    root: Path = tmp_path_factory.mktemp("miniature") / "world"
    return write_world(root, QUICK, seed=0)


@pytest.fixture(scope="session")
def ground(world: WorldFiles, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What looks like a quickstart: a world, and a model that has seen nothing yet."""
    folder = tmp_path_factory.mktemp("ground") / "quickstart"
    folder.mkdir()
    (folder / SETTINGS).write_text(json.dumps({"quick": True, "llm": "shipped", "seed": 0}))
    shutil.copytree(world.root, folder / "data")
    add_vision(SHIPPED_LANGUAGE_MODEL, folder / "model", seed=0)
    return folder
