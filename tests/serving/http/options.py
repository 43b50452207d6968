"""What prompt look-up and int8 weights would spare: `make serve-options RUN=runs/quickstart`.

Prompt look-up proposes what followed the last tokens where they stood before, and one pass checks
all of it. How many tokens a pass then gives is counted on real answers, what such a pass costs is
timed; the quotient is the gain. Prints rows for `results/rows.jsonl`.
"""

from __future__ import annotations

import copy
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from load import questions_of, row
from transformers.cache_utils import DynamicCache

from mono_internvl import load
from mono_internvl.bench.models import SIZES, random_model
from mono_internvl.checkpoints.loading import quantize_int8
from mono_internvl.generation.engine import Engine
from mono_internvl.generation.request import Request, Result
from mono_internvl.generation.sampling import Sampling
from mono_internvl.model.modeling import MonoInternVLForConditionalGeneration
from mono_internvl.serving.http.encoding import RequestEncoder
from mono_internvl.serving.http.limits import Limits
from mono_internvl.serving.http.schema import parse_request

Model = MonoInternVLForConditionalGeneration
PROPOSED, LONGEST_MATCH, ROUNDS = 4, 3, 7


def proposal(ids: Sequence[int]) -> list[int]:
    """What followed the last tokens where they stood last, the longest match first."""
    for length in range(LONGEST_MATCH, 0, -1):
        last = ids[-length:]
        for place in range(len(ids) - length - 1, -1, -1):
            if ids[place : place + length] == last:
                return list(ids[place + length : place + length + PROPOSED])
    return []


def passes_of(prompt: list[int], answer: list[int]) -> int:
    """Passes that an answer takes if each checks a proposal and gives one token of its own."""
    passes, place = 0, 1  # reading the prompt gives the first
    while place < len(answer):
        proposed = proposal([*prompt, *answer[:place]])
        right = 0
        while right < len(proposed) and proposed[right : right + 1] == answer[place + right :][:1]:
            right += 1
        place += right + 1
        passes += 1
    return passes


def ratio(fast: Callable[[], object], slow: Callable[[], object]) -> float:
    """Median CPU time of `slow` over that of `fast`, in turn."""

    def seconds(run: Callable[[], object]) -> float:
        began = time.process_time()
        run()
        return time.process_time() - began

    return statistics.median([seconds(slow) / seconds(fast) for _ in range(ROUNDS + 1)][1:])


@torch.inference_mode()
def cost_of_pass(model: Model, rows: int) -> float:
    """Time of a pass over proposals, over that of a pass over one token of each row."""
    context = torch.full((rows, 60), 5)

    def decode(tokens: int) -> Callable[[], object]:
        cache = DynamicCache(config=model.config.text_config)
        model(context, past_key_values=cache)
        new = torch.full((rows, tokens), 5)

        def run() -> None:
            for _ in range(10):
                model(new, past_key_values=cache)
                cache.crop(-tokens)

        return run

    return ratio(decode(1), decode(1 + PROPOSED))


def answers(model: Model, requests: list[Request], rows: int) -> list[Result]:
    return Engine(model, max_rows=rows, kv_bytes=2**29).generate(requests)


def main() -> int:
    run = Path(os.environ["RUN"])
    session = load(run / "model", device="cpu", precision="fp32")
    model, limits = session.model, Limits()
    encode = RequestEncoder(session.processor, 1024, limits, None)
    asked = [
        encode(parse_request(json.dumps(one).encode(), encode.most_text)).requests[0]
        for one in questions_of(run)
    ]
    found = answers(model, asked, 16)
    prompts = [list(map(int, request.input_ids)) for request in asked]
    passes = sum(map(passes_of, prompts, [list(result.ids) for result in found]))
    per_pass = sum(len(result.ids) - 1 for result in found) / passes
    eight = copy.deepcopy(model)
    quantize_int8(eight)
    equal = [a.ids == b.ids for a, b in zip(answers(eight, asked, 16), found, strict=True)]
    few = asked[:16]
    middle = random_model(SIZES["middle"], "v1", torch.float32, torch.device("cpu"), "sdpa")
    middle8 = copy.deepcopy(middle)
    quantize_int8(middle8)
    text = [Request(list(range(10, 40)), sampling=Sampling(max_new_tokens=16))]
    command = "make serve-options RUN=runs/quickstart"
    for what, value, unit in (
        ("prompt look-up: tokens of a pass", per_pass, ""),
        ("prompt look-up: gain of one client", per_pass / cost_of_pass(model, 1), "times"),
        ("prompt look-up: gain of 16 clients", per_pass / cost_of_pass(model, 16), "times"),
        ("int8 weights: answers as in fp32", sum(equal) / len(equal), ""),
        (
            "int8 weights: answers per CPU second, int8 / fp32, 16 clients",
            ratio(lambda: answers(eight, few, 16), lambda: answers(model, few, 16)),
            "times",
        ),
        (
            "int8 weights: tokens per CPU second, int8 / fp32, one client, width 1,024, 8 layers",
            ratio(lambda: answers(middle8, text, 1), lambda: answers(middle, text, 1)),
            "times",
        ),
    ):
        print(row(what, round(value, 2), unit, command), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
