"""Four stages that give SmolLM2-135M sight on real pictures: `mono-internvl train recipe.py`.

EViP++ in small: visual copies of feed-forward network and attention, the language model frozen
through all of pre-training (its answers to text stay bit for bit what they were), then S2 on
everything. The CPU and the GPU size differ in batch, steps and rates alone; the data folders differ
in names and pixels.
"""

from __future__ import annotations

import os

from mono_internvl.recipes.groups import EXPERTS, THE_REST_FROZEN, VISION_PARAMETERS
from mono_internvl.training.recipe import Recipe, Rule, Schedule, Stage


def _recipe(size: str, batch: int, steps: tuple[int, ...], rate: float, workers: int) -> Recipe:
    """One size of the recipe.

    Args:
        size: Its name.
        batch: Samples of a step.
        steps: Of each stage.
        rate: Peak rate of what sees.
        workers: Processes that read pictures ahead.
    """

    def stage(name: str, title: str, count: int, schedule: Schedule, share: float, last: float,
              language: float | None = None) -> Stage:  # fmt: skip
        seeing = Rule(f"{VISION_PARAMETERS}|{EXPERTS}", rate * share)
        rest = THE_REST_FROZEN if language is None else Rule(".*", language)
        return Stage(
            name=name,
            title=title,
            data=f"{name}.json",
            rules=(seeing, rest),
            steps=count,
            batch_size=batch,
            schedule=schedule,
            warmup_steps=min(60, count // 5 + 1),
            final_rate_ratio=last,
            weight_decay=0.05,
            betas=(0.9, 0.98),
            max_tokens=256,
            max_tiles=1,
            loss_weighting="sample",
            checkpoint_every=200,
            loader_workers=workers,
        )

    s11, s12, s13, s2 = steps
    return Recipe(
        name=f"real-{size}",
        source="stages of arXiv 2410.08202 and 2507.12566; sizes and rates ours",
        notes=("higher rates stall: the projector's output grows to a large constant",),
        stages=(
            stage("s11", "concept learning: names", s11, "constant", 1.0, 0.0),
            stage("s12", "semantic learning: captions", s12, "cosine", 1.0, 0.5),
            stage("s13", "alignment: captions, counts, places, words", s13, "cosine", 0.6, 0.1),
            stage("s2", "instruction tuning: questions", s2, "cosine", 0.3, 0.0, 2e-5),
        ),
    )


SIZES = {
    "quick": _recipe("quick", 8, (10, 4, 4, 4), 4e-4, 0),
    "cpu": _recipe("cpu", 32, (620, 250, 180, 110), 4e-4, 0),
    "gpu": _recipe("gpu", 256, (1200, 450, 300, 150), 5e-4, 12),
}
"""A size's recipe: a check of minutes, 90 minutes of two cores, ten minutes of a large GPU."""
RECIPE = SIZES[os.environ.get("REAL_SIZE", "cpu")]
