"""One tiny checkpoint and data set for all tests of training."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_runs


@pytest.fixture(scope="session")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoint that tiny stages start from."""
    return tiny_runs.write_checkpoint(tmp_path_factory.mktemp("start") / "tiny")


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with `mixed.json`, `images.json` and `text.json`."""
    return tiny_runs.write_data(tmp_path_factory.mktemp("data"))
