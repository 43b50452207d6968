"""`bench samples`: several answers to one question on an image, against as many generations."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from mono_internvl.attention.blocked import BLOCKED
from mono_internvl.bench.models import Setting, prompt_of, random_model
from mono_internvl.bench.rows import BenchRow, Claim
from mono_internvl.bench.timing import Subject, measure
from mono_internvl.generation.engine import PREFIX_BYTES, Engine
from mono_internvl.generation.request import Request
from mono_internvl.generation.sampling import Sampling

SAMPLES, ANSWER_TOKENS = 8, 32
SEPARATELY = f"{SAMPLES} generations, one after another"
TOGETHER = f"{SAMPLES} samples at once, the prompt read once"
REREAD = f"{SAMPLES} samples at once, the prompt read with each"


def bench_samples(setting: Setting) -> Iterator[BenchRow | Claim]:
    """What answers to choose from cost; on a CPU, at the middle size, it is judged."""
    rows = _bench_samples(setting)
    yield from rows
    if setting.device.type == "cpu" and setting.size.name == "middle":
        yield target_of(rows)


def target_of(rows: list[BenchRow]) -> Claim:
    """The claim that the rows are measured for."""
    together = next(row for row in rows if row.subject == TOGETHER)
    assert together.ratio is not None
    return Claim.judge(
        f"{SAMPLES} samples of one prompt: speed / {SAMPLES} generations, {together.dtype}",
        ">=",
        3,
        1 / together.ratio,
        f"{together.shapes['tokens']} + {ANSWER_TOKENS} tokens, {together.layers} layers",
        together.device,
    )


def _bench_samples(setting: Setting) -> list[BenchRow]:
    size, dtype, device = setting.size, setting.dtype, setting.device
    model = random_model(size, "v1", dtype, device, BLOCKED)
    one = prompt_of(size, model.config, dtype, device)
    most = 4 if size.name == "tiny" else ANSWER_TOKENS
    sampling = Sampling(temperature=0.7, max_new_tokens=most, seed=0)
    requests = Request(one.input_ids[0], one.pixel_values, sampling).samples(SAMPLES)

    @torch.inference_mode()
    def separately() -> None:
        for request in requests:
            Engine(model, max_rows=1, prefix_bytes=0).generate([request])

    @torch.inference_mode()
    def together(prefix_bytes: int) -> None:
        Engine(model, prefix_bytes=prefix_bytes).generate(requests)

    notes = {"attention": BLOCKED, "answer_tokens": most}
    return measure(
        "samples",
        [
            Subject(SEPARATELY, separately, notes),
            Subject(REREAD, lambda: together(0), notes),
            Subject(TOGETHER, lambda: together(PREFIX_BYTES), notes),
        ],
        setting,
        baseline=SEPARATELY,
    )
