"""EViP++ in miniature: its stages, data and rates, with the language model frozen until S2.

Everything but the rules of S1.3 is the miniature's, so that the two differ in one thing: where the
miniature lets the shared attention learn, this one lets its visual copies. They need a model with
the experts of preset `v1_5`.

Source: see `recipes/evip_plus_plus.py`. Ours: at 42 % of the data all three pre-training stages are
    cut alike, where the third parties' figures say the cut was mostly in the first.
"""

import dataclasses

from mono_internvl.miniature.recipes import MINIATURE, QUICK_MINIATURE
from mono_internvl.recipes.evip_plus_plus import RATIO_TO_EVIP
from mono_internvl.recipes.groups import ATTENTION
from mono_internvl.training.recipe import Recipe


def plus_plus(recipe: Recipe, share: float = 1.0) -> Recipe:
    """The EViP++ form of a recipe of EViP's four stages.

    Args:
        recipe: With the shared attention learning in S1.3; all stages but the last are
            pre-training.
        share: Of its pre-training samples, and so of its steps.
    """
    *pretraining, last = recipe.stages
    stages = [
        dataclasses.replace(
            stage,
            rules=tuple(rule for rule in stage.rules if rule.pattern != ATTENTION),
            steps=max(1, round(share * stage.steps)),
            warmup_steps=min(stage.warmup_steps, max(1, round(share * stage.steps))),
        )
        for stage in pretraining
    ]
    suffix = "" if share == 1 else f"-{round(100 * share)}"
    return dataclasses.replace(
        recipe,
        name=recipe.name.replace("miniature", "miniature-plus-plus") + suffix,
        source="our reconstruction of EViP++ (what trains); sizes and rates as in the miniature",
        stages=(*stages, last),
    )


MINIATURE_PLUS_PLUS = plus_plus(MINIATURE)
MINIATURE_PLUS_PLUS_42 = plus_plus(MINIATURE, RATIO_TO_EVIP)
QUICK_MINIATURE_PLUS_PLUS = plus_plus(QUICK_MINIATURE)
QUICK_MINIATURE_PLUS_PLUS_42 = plus_plus(QUICK_MINIATURE, RATIO_TO_EVIP)
