"""The miniature's modular baseline: a small vision transformer in place of the visual experts.

What trains follows InternVL-1.5: tower and projector while the language model stands still, then
everything. Data, steps and batches are the monolithic miniature's, stage by stage. The rates are
ours and were not tuned; the tower starts from random weights, where InternVL's was pre-trained.

Source: arXiv 2404.16821, section 3.3 (what trains in pre-training and in fine-tuning).
"""

import dataclasses

from mono_internvl.miniature.recipes import MINIATURE, QUICK_MINIATURE, VISION
from mono_internvl.recipes.groups import THE_REST_FROZEN, VISION_PARAMETERS
from mono_internvl.training.recipe import Recipe, Rule

VISION_TOWER = {
    **VISION,
    "kind": "vit",
    "hidden_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "intermediate_size": 768,
}
"""Vision tower of the baseline: as many weights in its linear layers as the visual experts have."""

_TOWER_RATE, _LANGUAGE_RATE = 1e-3, 5e-4


def _modular(recipe: Recipe) -> Recipe:
    """The same stages on the same data, with a modular model's rules."""
    last = recipe.stages[-1]
    stages = [
        dataclasses.replace(stage, rules=(Rule(VISION_PARAMETERS, _TOWER_RATE), THE_REST_FROZEN))
        for stage in recipe.stages[:-1]
    ]
    everything = (Rule(VISION_PARAMETERS, _TOWER_RATE), Rule(".*", _LANGUAGE_RATE))
    return dataclasses.replace(
        recipe,
        name=recipe.name.replace("miniature", "miniature-modular"),
        source="arXiv 2404.16821, section 3.3 (what trains); sizes and rates ours",
        stages=(*stages, dataclasses.replace(last, rules=everything)),
    )


MINIATURE_MODULAR = _modular(MINIATURE)
QUICK_MINIATURE_MODULAR = _modular(QUICK_MINIATURE)
