"""Endogenous Visual Pre-training of Mono-InternVL-2B as published, one `Stage` per published stage.

Token limits per image count 28 px visual tokens with the thumbnail: 1,280 = (4 + 1) * 256 and so
on. The paper's drop path of 0.1 has no effect on a patch embedding and is left out. The data
mixtures are not redistributed; name yours `s11.json` to `s2.json`.

Source: arXiv 2410.08202, tables 1, 7 and 8 and the appendix on hyper-parameters.
"""

from mono_internvl.recipes.groups import ATTENTION, EXPERTS, EYES, THE_REST_FROZEN
from mono_internvl.training.recipe import Recipe, Rule, Stage

EVIP = Recipe(
    name="evip-2b",
    source="arXiv 2410.08202, tables 1, 7, 8",
    notes=(
        "batch 2,048 of 256 accelerators; with fewer, raise accumulation, not the rate",
        "start from a monolithic model made of InternLM2-1.8B (mono-internvl init)",
        "rows of the nine visual tokens are frozen with the embedding and the head until s2",
    ),
    stages=(
        Stage(
            name="s11",
            title="concept learning: 922M noisy pairs",
            data="s11.json",
            rules=(Rule(f"{EYES}|{EXPERTS}", 1e-4), THE_REST_FROZEN),
            steps=450_000,
            batch_size=2048,
            schedule="constant",
            warmup_steps=100,
            max_tokens=1425,
            max_tiles=4,
            checkpoint_every=1000,
            on_bad_sample="skip",
        ),
        Stage(
            name="s12",
            title="semantic learning: 258M synthetic captions",
            data="s12.json",
            rules=(Rule(f"{EYES}|{EXPERTS}", 1e-4), THE_REST_FROZEN),
            steps=126_000,
            batch_size=2048,
            schedule="constant",
            warmup_steps=100,
            max_tokens=1925,
            max_tiles=6,
            checkpoint_every=1000,
            on_bad_sample="skip",
        ),
        Stage(
            name="s13",
            title="alignment learning: 143M captions, boxes and texts",
            data="s13.json",
            rules=(Rule(f"{EYES}|{EXPERTS}|{ATTENTION}", 5e-5), THE_REST_FROZEN),
            steps=70_000,
            batch_size=2048,
            schedule="cosine",
            warmup_steps=100,
            max_tokens=4096,
            max_tiles=12,
            checkpoint_every=1000,
            on_bad_sample="skip",
        ),
        Stage(
            name="s2",
            title="instruction tuning: 5-7M conversations",
            data="s2.json",
            rules=(Rule(".*", 2e-5),),
            steps=14_000,
            batch_size=1024,
            accumulation=4,
            schedule="cosine",
            warmup_steps=420,
            max_tokens=8192,
            max_tiles=24,
            checkpoint_every=500,
            on_bad_sample="skip",
        ),
    ),
)
