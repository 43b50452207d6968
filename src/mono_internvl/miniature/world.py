"""Writes the small world to ordinary files: images, JSONL conversations, meta files, plain text.

Nothing here is special to the miniature's training: the files are in the form in which a user
brings data of their own, and are read by the same reader.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from mono_internvl.errors import ConfigError
from mono_internvl.miniature.english import ASSETS
from mono_internvl.miniature.lexicon import Split
from mono_internvl.miniature.records import write_jsonl, write_meta
from mono_internvl.miniature.stages import (
    WorldSize,
    evaluation_records,
    first_lesson,
    image_stages,
    language_datasets,
    last_lesson,
    replay_datasets,
    second_lesson,
)
from mono_internvl.miniature.text_tasks import text_probes

logger = logging.getLogger(__name__)

FULL: Final = WorldSize()
"""The sizes of the quickstart."""

QUICK: Final = WorldSize(
    reading=3000,
    open_questions=1000,
    copying=1000,
    lookups=1000,
    english=2000,
    text_probes=60,
    s11_things=1200,
    s12_scenes=2500,
    s12_signs=400,
    s12_charts=400,
    s13_scenes=1200,
    s13_signs=400,
    s13_charts=300,
    s2_scenes=1500,
    s2_signs=300,
    s2_charts=300,
    s2_dialogues=1500,
    s2_chart_dialogues=300,
    s2_captions=300,
    s2_detection=300,
    replay_reading=300,
    replay_copying=100,
    replay_english=300,
    heldout=40,
    heldout_aligned=10,
    validation=20,
    unnamed_ratio=0.0,  # so few steps hardly learn the shapes
)
"""The sizes of `quickstart --quick` and of tests."""

_MARKER = "world.json"
_FORMAT_VERSION = 17


@dataclass(frozen=True)
class WorldFiles:
    """Where everything is.

    Attributes:
        root: the data root; all paths in the files are relative to it.
        copying: meta file of the language model's first lesson, looking things up in the context.
        finding: meta file of its second, finding one of many things there.
        language: meta file of the text-only conversations for the language model.
        practice: meta file of its last lesson, mostly quoting.
        replay: meta file of the text that S2 repeats (only the replayed facts), for other stages.
        s11: meta file of S1.1, noisy captions; likewise s12, s13 and s2 (with the text of replay).
        validation: JSONL of records to choose settings by; `kind` says how each is scored.
        heldout: JSONL of records to report.
        english_train: plain English, paragraphs separated by an empty line.
        english_heldout: the same, never trained on.
        probes_validation: JSONL of the text skills (`kind` is name_qa, fact_cloze, reading_qa,
            copying or lookup), for choosing settings.
        probes_heldout: the same, for reporting.
    """

    root: Path
    copying: Path
    finding: Path
    language: Path
    practice: Path
    replay: Path
    s11: Path
    s12: Path
    s13: Path
    s2: Path
    validation: Path
    heldout: Path
    english_train: Path
    english_heldout: Path
    probes_validation: Path
    probes_heldout: Path


def write_world(out_dir: Path, size: WorldSize = FULL, seed: int = 0) -> WorldFiles:
    """Write the world, or return the one that is there already.

    The same size and seed give the same bytes. The folder appears only when it is complete; what an
    interrupted run left behind is made anew.

    Args:
        out_dir: the data root; absent, empty, or written by this function before.
        size: how much of everything.
        seed: seed of everything that is drawn (the facts and the splits do not depend on it).

    Returns:
        The paths.

    Raises:
        ConfigError: if `out_dir` holds files of other origin.
    """
    files = _files(out_dir)
    identity = {"version": _FORMAT_VERSION, "seed": seed, "size": dataclasses.asdict(size)}
    marker = out_dir / _MARKER
    if marker.is_file() and json.loads(marker.read_text(encoding="utf-8")) == identity:
        return files
    if out_dir.exists() and not marker.is_file() and any(out_dir.iterdir()):
        raise ConfigError(
            f"out_dir: {out_dir} holds files that are not a finished world; expected an empty or "
            "absent folder; name another one"
        )
    partial = out_dir.with_name(out_dir.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    _write_all(partial, size, seed)
    (partial / _MARKER).write_text(json.dumps(identity, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(out_dir, ignore_errors=True)
    partial.rename(out_dir)
    logger.info("wrote the miniature world to %s", out_dir)
    return files


def read_world(root: Path) -> WorldFiles:
    """The world in a folder, whichever version wrote it.

    Raises:
        ConfigError: There is none.
    """
    if not (root / _MARKER).is_file():
        raise ConfigError(f"{root}: holds no finished world; let its quickstart write it")
    return _files(root)


def _files(root: Path) -> WorldFiles:
    return WorldFiles(
        root=root,
        copying=root / "copying.json",
        finding=root / "finding.json",
        language=root / "language.json",
        practice=root / "practice.json",
        replay=root / "replay.json",
        s11=root / "s11.json",
        s12=root / "s12.json",
        s13=root / "s13.json",
        s2=root / "s2.json",
        validation=root / "validation.jsonl",
        heldout=root / "heldout.jsonl",
        english_train=root / "english_train.txt",
        english_heldout=root / "english_heldout.txt",
        probes_validation=root / "probes_validation.jsonl",
        probes_heldout=root / "probes_heldout.jsonl",
    )


def _write_all(root: Path, size: WorldSize, seed: int) -> None:
    files = _files(root)
    for path in (files.english_train, files.english_heldout, root / "LICENSE-PSF.txt"):
        shutil.copyfile(ASSETS / path.name, path)
    write_meta(root, "copying", first_lesson(size, seed))
    write_meta(root, "finding", second_lesson(size, seed))
    write_meta(root, "language", language_datasets(size, seed))
    write_meta(root, "practice", last_lesson(size, seed))
    write_meta(root, "replay", replay_datasets(size, seed))
    stages = image_stages(root, size, seed)
    for stage in ("s11", "s12", "s13", "s2"):
        write_meta(root, stage, getattr(stages, stage))
    write_jsonl(
        files.validation,
        "validation",
        evaluation_records(root, "validation", size.validation, 0, seed),
    )
    write_jsonl(
        files.heldout,
        "heldout",
        evaluation_records(root, "heldout", size.heldout, size.heldout_aligned, seed),
    )
    splits: tuple[tuple[Split, Path], ...] = (
        ("validation", files.probes_validation),
        ("heldout", files.probes_heldout),
    )
    for split, path in splits:
        probes = text_probes(seed, split, size.text_probes)
        records = [record for part in probes.values() for record in part]
        write_jsonl(path, f"probe-{split}", records)
