"""`bench prefill`: image and question up to the first logits, against a plain language model."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from mono_internvl.attention.blocked import BLOCKED
from mono_internvl.bench.limit import against_one_product, one_product
from mono_internvl.bench.models import (
    Setting,
    all_logits_of_ours,
    image_features,
    last_logits_of_llama,
    last_logits_of_ours,
    make_dense,
    plain_llama,
    prompt_of,
    random_model,
    twin,
)
from mono_internvl.bench.rows import BenchRow
from mono_internvl.bench.timing import Subject, measure

LLAMA = "Llama of transformers, sdpa"
LLAMA_BLOCKED = "Llama of transformers, blocked"
PLAIN = "ours v1, sdpa"
BLOCKED_ONLY = "ours v1, blocked"
BEST = "ours v1, blocked, skip"
NEWER = "ours v1.5, blocked, skip"
DENSE = "dense v1, sdpa"
MODULAR = "modular, blocked"
MODULAR_SDPA = "modular, tower sdpa"
TOWER = "modular, blocked: tower and projector alone"
OFFICIAL = "dense v1, as the official code runs"


def bench_prefill(
    setting: Setting, *, with_variants: bool = True, only: Sequence[str] | None = None
) -> list[BenchRow]:
    """Time to the logits of the last row, cache filled.

    Args:
        setting: What to run with.
        with_variants: Also the 1.5 variant, which needs weights of its own.
        only: Names of the subjects to time; all unless given.

    Returns:
        Rows of Llama with sdpa (the baseline) and with our blocked attention, ours with either,
        each compared as well with the Llama that attends alike, ours 1.5, and the dense way with
        sdpa and as the official code runs it (eager attention, logits of every row), each with the
        ratio of one large product's rate that it reaches.
    """
    subjects = [
        subject
        for subject in prefill_subjects(setting, with_variants)
        if only is None or subject.name in only
    ]
    subjects.append(one_product(setting))
    return against_one_product(measure("prefill", subjects, setting, baseline=LLAMA))


def prefill_subjects(setting: Setting, with_variants: bool = True) -> list[Subject]:
    """The subjects of `bench_prefill`; all but the 1.5 variant share their weights."""
    size, dtype, device = setting.size, setting.dtype, setting.device
    ours = random_model(size, "v1", dtype, device, "sdpa")
    prompt = prompt_of(size, ours.config, dtype, device)
    blocked = twin(ours, BLOCKED)
    dense, dense_eager = make_dense(ours, "sdpa"), make_dense(ours, "eager")

    def subject(name: str, model: Any, attention: str, has_skip: bool, peer: str = "") -> Subject:
        run = functools.partial(last_logits_of_ours, model, prompt, has_skip)
        notes = {"attention": attention, "last_layer_skip": has_skip}
        alike = LLAMA_BLOCKED if attention == BLOCKED else LLAMA
        return Subject(name, run, notes, peer=peer or alike)

    def plain(name: str, attention: str) -> Subject:
        llama = plain_llama(ours, attention)
        run = functools.partial(last_logits_of_llama, llama, prompt.input_ids)
        return Subject(name, run, {"attention": attention})

    subjects = [
        plain(LLAMA, "sdpa"),
        plain(LLAMA_BLOCKED, BLOCKED),
        subject(PLAIN, ours, "sdpa", False),
        subject("ours v1, sdpa, skip", ours, "sdpa", True),
        subject(BLOCKED_ONLY, blocked, BLOCKED, False),
        subject(BEST, blocked, BLOCKED, True),
        subject(DENSE, dense, "sdpa", False, peer=PLAIN),
        Subject(
            OFFICIAL,
            functools.partial(all_logits_of_ours, dense_eager, prompt),
            {"attention": "eager", "last_layer_skip": False},
        ),
    ]
    if with_variants:
        newer = random_model(size, "v1.5", dtype, device, BLOCKED)
        subjects.append(subject(NEWER, newer, BLOCKED, True))
    return subjects


def bench_modular(setting: Setting) -> list[BenchRow]:
    """Time to the first token: ours against the modular twin, each at its best.

    The twin has a vision tower and no visual experts. Both decoders attend in blocks and skip what
    the last layer need not compute; the tower attends in blocks or by sdpa, a subject each. The
    tower is timed alone as well: whether it runs at the device's rate decides if it is at its best.
    """
    size, dtype, device = setting.size, setting.dtype, setting.device
    ours = random_model(size, "v1", dtype, device, BLOCKED)
    modular = random_model(size, "modular", dtype, device, BLOCKED)
    with_sdpa = twin(modular, "sdpa")
    with_sdpa.model.language_model.set_attn_implementation(BLOCKED)
    prompt = prompt_of(size, ours.config, dtype, device)

    def subject(name: str, model: Any, tower: str | None) -> Subject:
        notes = {"attention": BLOCKED, "last_layer_skip": True}
        if tower is not None:
            notes["tower_attention"] = tower
        return Subject(name, functools.partial(last_logits_of_ours, model, prompt), notes)

    tower = Subject(
        TOWER,
        functools.partial(image_features, modular, prompt),
        {"tower_attention": BLOCKED},
    )
    subjects = [
        subject(MODULAR, modular, BLOCKED),
        subject(MODULAR_SDPA, with_sdpa, "sdpa"),
        subject(BEST, ours, None),
        tower,
        one_product(setting),
    ]
    return against_one_product(measure("modular", subjects, setting, baseline=MODULAR))
