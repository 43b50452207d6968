"""A small checkpoint of ours, as `mono-internvl init` and the stages write it."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image
from tiny_runs import TILE_PX, write_checkpoint


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("ecosystem") / "checkpoint")


@pytest.fixture(scope="session")
def picture() -> Image.Image:
    return Image.new("RGB", (TILE_PX, TILE_PX), (220, 30, 30))
