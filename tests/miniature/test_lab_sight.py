"""The labs of videos and of 4K tilings in their smallest form, their pages, and what clips show."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from mono_internvl.cli.app import app
from mono_internvl.errors import ConfigError
from mono_internvl.miniature import lab_4khd, lab_compose, lab_video
from mono_internvl.miniature.clips import DIRECTIONS, NUM_FRAMES, sample_clip
from mono_internvl.miniature.drawing import _RGB, draw_word
from mono_internvl.miniature.lab_4khd import LIMITS, retiled, tilings_block, tilings_page
from mono_internvl.miniature.lab_video import BLIND, FRAMES, SINGLE, frames_block, frames_page
from mono_internvl.miniature.language_model import add_vision
from mono_internvl.miniature.neighbours import MEAN, read_neighbour_runs
from mono_internvl.miniature.quickstart import SETTINGS, SHIPPED_LANGUAGE_MODEL
from mono_internvl.miniature.world import WorldFiles
from mono_internvl.processing.image_files import load_image
from mono_internvl.processing.video import FrameSampling, frames_of
from mono_internvl.serving.loading import load


@pytest.fixture(scope="module")
def ground(world: WorldFiles, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What looks like a quickstart: a world, and a model that has seen nothing yet."""
    folder = tmp_path_factory.mktemp("ground") / "quickstart"
    folder.mkdir()
    (folder / SETTINGS).write_text(json.dumps({"quick": True, "llm": "shipped", "seed": 0}))
    shutil.copytree(world.root, folder / "data")
    add_vision(SHIPPED_LANGUAGE_MODEL, folder / "model", seed=0)
    return folder


def _lab(name: str, ground: Path, run: Path) -> str:
    words = ["lab", name, str(ground), "--out", str(run), "--quick", "--precision", "fp32"]
    result = CliRunner().invoke(app, words, catch_exceptions=False)
    assert result.exit_code == 0
    return result.output


def _results(run: Path, rows: str, folder: Path) -> Path:
    folder.mkdir()
    shutil.copy(run / rows, folder)
    return folder


def test_video_lab_learns_and_asks_three_ways(
    monkeypatch: pytest.MonkeyPatch, ground: Path, tmp_path: Path
) -> None:
    monkeypatch.setattr(lab_video, "QUICK", lab_video.Sizes(clips=3, heldout=3, steps=1))
    run = tmp_path / "run"
    assert "Four frames against the middle one" in _lab("video", ground, run)
    (row,) = read_neighbour_runs(run / lab_video.RUNS)
    assert list(row.scores) == [BLIND, SINGLE, FRAMES]
    assert set(row.scores[FRAMES]) == {"moved", "where", "first", MEAN}
    asked = [json.loads(s) for s in (run / "seed0" / "data" / "frames-heldout.jsonl").open()]
    assert {one["frames"] for one in asked} == {4} and len(asked) == 5
    page = frames_page([row, dataclasses.replace(row, seed=1)])
    assert "| where (2) |" in page and "over 2 seeds" in page
    with pytest.raises(ConfigError, match="a quick one"):
        frames_block(_results(run, lab_video.RUNS, tmp_path / "results"))


def test_4khd_lab_reads_under_every_limit(
    monkeypatch: pytest.MonkeyPatch, ground: Path, tmp_path: Path
) -> None:
    monkeypatch.setattr(lab_4khd, "QUICK", lab_4khd.Sizes(pictures=4, heldout=2, steps=1))
    monkeypatch.setattr(lab_4khd, "LIMITS", (1, 4))
    run = tmp_path / "run"
    assert "XComposer2-4KHD's tiling against InternVL's" in _lab("4khd", ground, run)
    (row,) = read_neighbour_runs(run / lab_4khd.RUNS)
    for figures in row.scores.values():
        assert {"at most 1 tiles", "at most 4 tiles"} <= set(figures)
    tokens = [figures["tokens of a picture, 1 tiles"].value for figures in row.scores.values()]
    assert tokens == [36, 2 * 36 + 1 + 2 * 6]
    page = tilings_page([row, dataclasses.replace(row, seed=1)])
    assert "| at most 4 tiles (2) |" in page
    with pytest.raises(ConfigError, match="a quick one"):
        tilings_block(_results(run, lab_4khd.RUNS, tmp_path / "results"))


def test_compose_lab_looks_for_planted_pictures(
    monkeypatch: pytest.MonkeyPatch, ground: Path, tmp_path: Path
) -> None:
    monkeypatch.setattr(lab_compose, "QUICK", lab_compose.Sizes(album=5))
    run = tmp_path / "run"
    assert "A line finds its picture" in _lab("compose", ground, run)
    (row,) = read_neighbour_runs(run / lab_compose.RUNS)
    assert row.scores["chance"][lab_compose.BY_LINE].value == pytest.approx(4 / 5)
    assert set(row.scores["model"]) == set(row.scores["chance"])
    index = json.loads((run / "seed0" / "index.json").read_text())
    assert len(index["pictures"]) == 5
    with pytest.raises(ConfigError, match="a quick one"):
        lab_compose.compose_block(_results(run, lab_compose.RUNS, tmp_path / "results"))


def test_retiled_checkpoint_answers_text_as_before(ground: Path, tmp_path: Path) -> None:
    out = retiled(ground / "model", tmp_path / "hd", "xcomposer_4khd", LIMITS[-1])
    before, after = (load(folder, precision="fp32") for folder in (ground / "model", out))
    assert after.processor.image_processor.tiling == "xcomposer_4khd"
    options = {"max_new_tokens": 4}
    question = "what does Mira keep?"
    assert before.ask(question, **options).ids == after.ask(question, **options).ids
    picture = draw_word("ABC", (300, 100), random.Random(0))
    assert after.ask("what is this?", picture, **options).tokens.prompt > 36 * 4


def test_no_single_frame_tells_what_a_clip_asks() -> None:
    rng = random.Random(0)
    clips = [sample_clip(rng, number) for number in range(600)]
    middle: dict[bool, list[int]] = {True: [], False: []}
    for clip in clips:
        assert clip.things[0] != clip.things[1]
        for place in (0, 1):
            middle[place == clip.actor].append(clip.middles[place])
    assert abs(np.mean(middle[True]) - np.mean(middle[False])) < 3
    answers = [answer for clip in clips for _, _, answer in clip.questions()]
    counts = [answers.count(direction) for direction in DIRECTIONS]
    assert counts == [100] * 4
    firsts = [clip.actor for clip in clips if clip.direction is None]
    assert 0.4 < np.mean(firsts) < 0.6 and len(firsts) == 200


def test_clips_show_what_they_say() -> None:
    rng = random.Random(1)
    for number in range(9):
        clip = sample_clip(rng, number)
        frames = [np.asarray(frame).astype(int) for frame in clip.draw(rng)]
        assert len(frames) == NUM_FRAMES

        def place(index: int, thing: int) -> np.ndarray | None:
            colour = _RGB[clip.things[thing][0]]  # noqa: B023
            found = np.argwhere((frames[index] == colour).all(-1))  # noqa: B023
            return found.mean(0) if len(found) else None

        other = 1 - clip.actor
        if clip.things[0][0] == clip.things[1][0]:
            continue
        if clip.direction is None:
            assert place(0, clip.actor) is not None and place(0, other) is None
            assert place(NUM_FRAMES // 2, other) is not None
            continue
        first, last = place(0, clip.actor), place(NUM_FRAMES - 1, clip.actor)
        assert first is not None and last is not None
        down, right = last - first
        moved = {"left": -right, "right": right, "up": -down, "down": down}[clip.direction]
        assert moved > 50
        stays = place(0, other)
        assert stays is not None and np.allclose(stays, place(NUM_FRAMES - 1, other))


def test_written_clip_is_read_as_drawn(tmp_path: Path) -> None:
    from mono_internvl.miniature.clips import write_video

    drawn = sample_clip(random.Random(2), 0).draw(random.Random(2))
    write_video(tmp_path / "a.mp4", drawn)
    (frame,) = frames_of(tmp_path / "a.mp4", FrameSampling(1))
    difference = np.asarray(load_image(frame)).astype(int) - np.asarray(drawn[NUM_FRAMES // 2])
    assert np.abs(difference).mean() < 6
