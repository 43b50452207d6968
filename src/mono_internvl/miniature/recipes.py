"""EViP in miniature: the paper's four stages on a rendered world, in minutes on a CPU.

What trains in each stage is the paper's; sizes, rates and steps are ours, chosen on the validation
split. The 2B recipe (`recipes/evip.py`) differs in data and numbers only.
"""

import dataclasses

from mono_internvl.recipes.groups import ATTENTION, EXPERTS, THE_REST_FROZEN, VISION_PARAMETERS
from mono_internvl.training.recipe import Recipe, Rule, Stage

LANGUAGE_MODEL = {
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 6,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.04,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
    "tie_word_embeddings": False,
}
"""Fields of the miniature's Llama configuration."""

VISION = {"kind": "patch", "hidden_size": 96, "image_size": 168, "patch_size": 14}
"""Patch embedding of the miniature: 168 px tiles, 36 visual tokens."""

PATCHES = r"patch_embedding\."
"""Trained more slowly than the other visual parameters: the convolution sums 588 pixels that mostly
agree, so one step moves its output by up to so many times the rate."""


def _stage(name: str, title: str, **fields: object) -> Stage:
    common: dict[str, object] = {
        "batch_size": 8,  # many small steps: 16 learns less from as many samples
        "loss_weighting": "square",
        "schedule": "cosine",
        "warmup_steps": 50,
        "final_rate_ratio": 0.05,
        "weight_decay": 0.05,
        "betas": (0.9, 0.95),
        "max_tokens": 320,
        "max_tiles": 1,
        "checkpoint_every": 500,
        "data": f"{name}.json",
    }
    return Stage(name=name, title=title, **{**common, **fields})  # type: ignore[arg-type]


LANGUAGE = Recipe(
    name="miniature-language",
    source="ours: the language model that the miniature starts from",
    stages=(
        _stage(
            "copying",
            "looking things up in the context",
            batch_size=32,
            loss_weighting="token",
            steps=400,
            schedule="constant",
            rules=(Rule(VISION_PARAMETERS, None), Rule(".*", 2e-3)),
        ),
        _stage(
            "finding",
            "finding one of many things in the context",
            batch_size=32,
            loss_weighting="token",
            steps=800,
            schedule="constant",
            rules=(Rule(VISION_PARAMETERS, None), Rule(".*", 2e-3)),
        ),
        _stage(
            "language",
            "a small language model",
            batch_size=32,
            steps=2500,
            warmup_steps=100,
            loss_weighting="sample",  # English answers are twenty times as long as the others
            rules=(Rule(VISION_PARAMETERS, None), Rule(".*", 2e-3)),
        ),
        _stage(
            "practice",
            "quoting once more, and some of everything",
            batch_size=32,
            steps=1200,
            warmup_steps=100,
            loss_weighting="square",
            rules=(Rule(VISION_PARAMETERS, None), Rule(".*", 1.5e-3)),
        ),
    ),
)

_FROZEN_LANGUAGE = (
    Rule(PATCHES, 6e-4),
    Rule(VISION_PARAMETERS, 4e-3),
    Rule(EXPERTS, 2e-3),
    THE_REST_FROZEN,
)
"""After S1.2, behind a shorter S1.1 of whole captions, single runs said .45 of the shapes at half
of these rates, .84 and .78 at these, .73 at twice them."""

MINIATURE = Recipe(
    name="miniature",
    source="arXiv 2410.08202, section 3.2 (what trains); sizes and rates ours",
    stages=(
        _stage(
            "s11",
            "concept learning",
            steps=600,
            final_rate_ratio=0.5,  # S1.2 goes on at the same rates
            rules=_FROZEN_LANGUAGE,
        ),
        _stage(
            "s12",
            "semantic learning",
            steps=1800,
            rules=_FROZEN_LANGUAGE,
        ),
        _stage(
            "s13",
            "alignment learning",
            steps=1750,
            rules=(
                Rule(PATCHES, 4.5e-4),
                Rule(VISION_PARAMETERS, 1.5e-3),
                Rule(EXPERTS, 1.5e-3),
                Rule(ATTENTION, 6e-4),
                THE_REST_FROZEN,
            ),
        ),
        _stage(
            "s2",
            "instruction tuning",
            steps=2500,
            rules=(
                Rule(PATCHES, 3e-4),
                Rule(VISION_PARAMETERS, 1e-3),
                Rule(EXPERTS, 1e-3),
                Rule(ATTENTION, 6e-4),
                Rule(".*", 2e-4),
            ),
        ),
    ),
)
"""The four stages. Answers of one word weigh more than their share of tokens (`square`)."""


SEEDS = (0, 1, 2)
"""Of the runs that the pages report."""
RATE_FACTORS = (0.5, 1.0, 2.0)
"""On all rates, of the runs that `lab rates` compares."""


def seeded(recipe: Recipe, seed: int) -> Recipe:
    """The recipe with another order of the data in every stage."""
    stages = tuple(dataclasses.replace(stage, seed=seed) for stage in recipe.stages)
    return dataclasses.replace(recipe, stages=stages)


def _quick(recipe: Recipe, steps: dict[str, int]) -> Recipe:
    stages = tuple(
        dataclasses.replace(
            stage,
            steps=(count := steps[stage.name]),
            warmup_steps=min(stage.warmup_steps, count // 2),
        )
        for stage in recipe.stages
    )
    return dataclasses.replace(recipe, name=f"{recipe.name}-quick", stages=stages)


QUICK_LANGUAGE = _quick(LANGUAGE, {"copying": 20, "finding": 20, "language": 60, "practice": 10})
QUICK_MINIATURE = _quick(MINIATURE, {"s11": 100, "s12": 600, "s13": 250, "s2": 350})

MINIATURE_SFT = Recipe(
    name="miniature-sft",
    source="ours",
    start="runs/quickstart/model",
    stages=(
        Stage(
            name="sft",
            title="the miniature on your own data",
            data="train.json",
            rules=(Rule(f"{VISION_PARAMETERS}|{EXPERTS}", 1e-3), Rule(".*", 2e-4)),
            epochs=8.0,
            batch_size=32,
            schedule="cosine",
            warmup_ratio=0.05,
            weight_decay=0.05,
            betas=(0.9, 0.95),
            max_tokens=512,
            max_tiles=1,
            checkpoint_every=200,
        ),
    ),
)
