"""Endogenous Visual Pre-training of Mono-InternVL-2B as published, one `Stage` per published stage.

The paper limits visual tokens per image: 1,280, 1,792, 3,328 and 6,400. That these are 4, 6, 12 and
24 tiles and a thumbnail, 1,280 = (4 + 1) * 256 and so on, is inferred. The paper's drop path of 0.1
has no effect on a patch embedding and is left out. The data mixtures are not redistributed
(`evip_data.py` names them); name yours `s11.json` to `s2.json`.

Source: arXiv 2410.08202, table 1 (stages and data) and table 8 (hyper-parameters).
"""

from mono_internvl.recipes.evip_data import EVIP_DATA
from mono_internvl.recipes.groups import ATTENTION, EXPERTS, THE_REST_FROZEN, VISION_PARAMETERS
from mono_internvl.training.recipe import Recipe, Rule, Stage

EVIP = Recipe(
    name="evip-2b",
    source="arXiv 2410.08202, tables 1, 8; data table 7",
    notes=(
        "batch 2,048 of 256 accelerators; with fewer, raise accumulation, not the rate",
        "start from a monolithic model made of InternLM2-1.8B (mono-internvl init)",
        "rows of the nine visual tokens are frozen with the embedding and the head until s2",
        "the four stages at full scale were never run here",
    ),
    ours=(
        "the gradient is clipped to norm 1.0, and every token of an answer weighs the same",
        "tiles per image (4, 6, 12, 24) are inferred from the published limits of visual tokens",
        "the cosine falls to 0; bf16, the published precision, where a machine is fast at it",
        "bad records are skipped, up to a tenth of them; states every 1,000 steps, in s2 500",
    ),
    published_data=EVIP_DATA,
    stages=(
        Stage(
            name="s11",
            title="concept learning: 922M noisy pairs",
            data="s11.json",
            rules=(Rule(f"{VISION_PARAMETERS}|{EXPERTS}", 1e-4), THE_REST_FROZEN),
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
            rules=(Rule(f"{VISION_PARAMETERS}|{EXPERTS}", 1e-4), THE_REST_FROZEN),
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
            rules=(Rule(f"{VISION_PARAMETERS}|{EXPERTS}|{ATTENTION}", 5e-5), THE_REST_FROZEN),
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
