"""Endogenous Visual Pre-training of Mono-InternVL-2B as published, one `Stage` per published stage.

The paper limits visual tokens per image: 1,280, 1,792, 3,328 and 6,400. That these are 4, 6, 12 and
24 tiles and a thumbnail, 1,280 = (4 + 1) * 256 and so on, is inferred. The data mixtures are not
redistributed (`evip_data.py` names them); `docs/data.md` says what stands in for them and how it is
staged as `s11.json` to `s2.json`.

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
        "drop path 0.1 (table 8) is left out: the released code applies it to the blocks of a "
        "vision transformer only, and this model has none",
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
            name="s11",  # table 1
            title="concept learning: 922M noisy pairs",  # table 1
            data="s11.json",  # ours
            rules=(  # what is trainable: table 1; peak rate of a step: table 8
                Rule(f"{VISION_PARAMETERS}|{EXPERTS}", 1e-4),
                THE_REST_FROZEN,
            ),
            steps=450_000,  # optimizer steps; table 8
            batch_size=2048,  # samples of a step; table 8
            accumulation=1,  # micro-batches of a step; table 8
            schedule="constant",  # behind the warm-up; table 8
            warmup_steps=100,  # optimizer steps; table 8
            weight_decay=0.01,  # of AdamW, per step and rate; table 8
            betas=(0.9, 0.999),  # of AdamW; table 8
            eps=1e-8,  # of AdamW; table 8
            max_tokens=1425,  # of a sample, visual ones included; table 8
            max_tiles=4,  # of an image; inferred: 1,280 visual tokens in table 8
            checkpoint_every=1000,  # optimizer steps; ours
            on_bad_sample="skip",  # ours
        ),
        Stage(
            name="s12",  # table 1
            title="semantic learning: 258M synthetic captions",  # table 1
            data="s12.json",  # ours
            rules=(  # what is trainable: table 1; peak rate of a step: table 8
                Rule(f"{VISION_PARAMETERS}|{EXPERTS}", 1e-4),
                THE_REST_FROZEN,
            ),
            steps=126_000,  # optimizer steps; table 8
            batch_size=2048,  # samples of a step; table 8
            accumulation=1,  # micro-batches of a step; table 8
            schedule="constant",  # behind the warm-up; table 8
            warmup_steps=100,  # optimizer steps; table 8
            weight_decay=0.01,  # of AdamW, per step and rate; table 8
            betas=(0.9, 0.999),  # of AdamW; table 8
            eps=1e-8,  # of AdamW; table 8
            max_tokens=1925,  # of a sample, visual ones included; table 8
            max_tiles=6,  # of an image; inferred: 1,792 visual tokens in table 8
            checkpoint_every=1000,  # optimizer steps; ours
            on_bad_sample="skip",  # ours
        ),
        Stage(
            name="s13",  # table 1
            title="alignment learning: 143M captions, boxes and texts",  # table 1
            data="s13.json",  # ours
            rules=(  # what is trainable: table 1; peak rate of a step: table 8
                Rule(f"{VISION_PARAMETERS}|{EXPERTS}|{ATTENTION}", 5e-5),
                THE_REST_FROZEN,
            ),
            steps=70_000,  # optimizer steps; table 8
            batch_size=2048,  # samples of a step; table 8
            accumulation=1,  # micro-batches of a step; table 8
            schedule="cosine",  # behind the warm-up; table 8
            warmup_steps=100,  # optimizer steps; table 8
            weight_decay=0.01,  # of AdamW, per step and rate; table 8
            betas=(0.9, 0.999),  # of AdamW; table 8
            eps=1e-8,  # of AdamW; table 8
            max_tokens=4096,  # of a sample, visual ones included; table 8
            max_tiles=12,  # of an image; inferred: 3,328 visual tokens in table 8
            checkpoint_every=1000,  # optimizer steps; ours
            on_bad_sample="skip",  # ours
        ),
        Stage(
            name="s2",  # table 1
            title="instruction tuning: 5-7M conversations",  # table 1
            data="s2.json",  # ours
            rules=(Rule(".*", 2e-5),),  # everything: table 1; peak rate of a step: table 8
            steps=14_000,  # optimizer steps; table 8
            batch_size=1024,  # samples of a step; table 8
            accumulation=4,  # micro-batches of a step; table 8
            schedule="cosine",  # behind the warm-up; table 8
            warmup_steps=420,  # optimizer steps; table 8
            weight_decay=0.01,  # of AdamW, per step and rate; table 8
            betas=(0.9, 0.999),  # of AdamW; table 8
            eps=1e-8,  # of AdamW; table 8
            max_tokens=8192,  # of a sample, visual ones included; table 8
            max_tiles=24,  # of an image; inferred: 6,400 visual tokens in table 8
            checkpoint_every=500,  # optimizer steps; ours
            on_bad_sample="skip",  # ours
        ),
    ),
)
