"""EViP++, the pre-training of Mono-InternVL-1.5, as far as it is known: a reconstruction.

With visual attention experts the shared attention need not learn to see, so the language model can
stay frozen through all three pre-training stages. Text-only answers then stay those of the language
model, bit for bit, until S2.

Known, from a third party's table (README of NEO, October 2025): 400M samples in S1.1 and S1.2
together, 150M in S1.3, about 7M in S2; that is 42 % of the 1.3B samples of EViP. Known, from the
abstract: visual attention experts and a re-organised, cheaper pre-training.

Ours: how the 400M divide (250M and 150M), that S1.3 trains the visual copies only, that a visual
copy of the output projection exists and norms are shared, and every rate, batch, schedule and
limit, which are EViP's (`recipes/evip.py`). Steps are samples / batch. S2 is EViP's.

Source: abstract of arXiv 2507.12566; the table named above. Differs: unknown; neither the body of
    the recipe nor code or weights were released.
"""

import dataclasses

from mono_internvl.recipes.evip import EVIP
from mono_internvl.recipes.groups import EXPERTS, THE_REST_FROZEN, VISION_PARAMETERS
from mono_internvl.training.recipe import Recipe, Rule, Stage

SAMPLES = {"s11": 250_000_000, "s12": 150_000_000, "s13": 150_000_000}
"""Samples of the pre-training stages; only the sum of the first two, and the third, are known."""

RATIO_TO_EVIP = 0.42
"""Pre-training samples of EViP++ over those of EViP, as third parties report both."""

_TITLES = {
    "s11": "concept learning: 250M noisy pairs (the split of 400M is ours)",
    "s12": "semantic learning: 150M synthetic captions (the split of 400M is ours)",
    "s13": "alignment learning: 150M captions, boxes and texts; the language model is frozen",
}


def _stage(stage: Stage) -> Stage:
    """A pre-training stage of EViP with the samples of EViP++ and the text side frozen."""
    rate = stage.rules[0].learning_rate
    return dataclasses.replace(
        stage,
        title=_TITLES[stage.name],
        rules=(Rule(f"{VISION_PARAMETERS}|{EXPERTS}", rate), THE_REST_FROZEN),
        steps=round(SAMPLES[stage.name] / stage.batch_size),
    )


EVIP_PLUS_PLUS = Recipe(
    name="evip-plus-plus-2b",
    source="our reconstruction from the abstract of arXiv 2507.12566; rates of arXiv 2410.08202",
    notes=(
        "known: 400M samples in S1.1 and S1.2, 150M in S1.3 (a third party's table)",
        "start from a monolithic model of preset v1_5, made of InternLM2-1.8B",
        "never run; batch 2,048 of 256 accelerators, with fewer raise accumulation, not the rate",
    ),
    ours=(
        "that 400M are 250M and 150M, and that s13 trains the visual copies alone",
        "every rate, batch, schedule and limit of the first three stages, which are EViP's",
        *EVIP.ours,
    ),
    stages=(*(_stage(stage) for stage in EVIP.stages[:-1]), EVIP.stages[-1]),
)
