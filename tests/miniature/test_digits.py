"""The handwritten digits: exported as a user's data, trained on and scored by the ordinary path."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_runs
from PIL import Image

from mono_internvl.data.sources import read_meta
from mono_internvl.errors import MissingDependency
from mono_internvl.evaluation.evaluate import evaluate
from mono_internvl.evaluation.protocol import Protocol
from mono_internvl.miniature.digits import DigitFiles, main, write_digits
from mono_internvl.miniature.recipes import MINIATURE_SFT
from mono_internvl.processing.image_files import load_image
from mono_internvl.training.run import train


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> DigitFiles:
    """The first 120, on the tiles of the tiny model."""
    return write_digits(
        tmp_path_factory.mktemp("digits") / "out", most=120, size_px=tiny_runs.TILE_PX
    )


def test_digits_are_split_without_overlap(digits: DigitFiles) -> None:
    held = [json.loads(line)["image"] for line in digits.heldout.read_text().splitlines()]
    (source,) = read_meta(digits.train)
    learnt = [source.record(i).fields["image"] for i in range(len(source))]
    assert not set(held) & set(learnt)
    assert (len(learnt), len(held)) == (digits.num_train, digits.num_heldout)
    assert len(set(held) | set(learnt)) == 120
    assert 0.1 < len(held) / 120 < 0.3


def test_digits_are_the_pictures_of_their_labels(digits: DigitFiles) -> None:
    from sklearn.datasets import load_digits

    scans = load_digits()
    (source,) = read_meta(digits.train)
    for index in range(0, len(source), 17):
        sample = source.record(index)
        number = int(Path(str(sample.images[0])).stem)
        assert sample.turns[-1].text == str(scans.target[number])
        image = load_image(sample.images[0]).convert("L")
        assert image.size == (tiny_runs.TILE_PX, tiny_runs.TILE_PX)
        small = np.asarray(image.resize((8, 8), Image.Resampling.BOX), float)
        ink = 16 - small * (16 / 255)
        assert np.abs(ink - scans.images[number]).mean() < 1.5


def test_digits_do_not_depend_on_the_run(digits: DigitFiles, tmp_path: Path) -> None:
    again = write_digits(tmp_path, most=120, size_px=tiny_runs.TILE_PX)
    for file in (
        "train.json",
        "heldout.jsonl",
        "annotations/train/digits.jsonl",
        "images/0007.png",
    ):
        assert (tmp_path / file).read_bytes() == (digits.train.parent / file).read_bytes()
    assert again.num_train == digits.num_train


def test_digits_without_scikit_learn_name_the_extra(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(MissingDependency, match=r"mono-internvl\[digits\]"):
        main([str(tmp_path)])


def test_digits_are_trained_on_and_evaluated(digits: DigitFiles, tmp_path: Path) -> None:
    start = tiny_runs.write_checkpoint(tmp_path / "start")
    checkpoint = train(
        MINIATURE_SFT,
        start=str(start),
        data=digits.train,
        run=tmp_path / "run",
        overrides={"steps": "4", "batch_size": "8"},
    )
    assert json.loads((tmp_path / "run" / "recipe.json").read_text())["name"] == "miniature-sft"
    found = evaluate(checkpoint, digits.heldout, device="cpu", protocol=Protocol(max_new_tokens=4))
    assert found.items == {"exact": digits.num_heldout}
    assert 0 <= found.scores["exact"] <= 1
    assert found.predictions.parent == checkpoint
