"""`mono-internvl lab images`: how visual tokens attend and how far apart they stand, compared.

The first variant is the quickstart's model: causal attention, one position a token. In the second
the tokens of an image see each other in both directions; in the third they stand closer together
than words, by steps that training draws for every image (V2PE). All else is the quickstart's:
recipe, world, order of the data, first weights.

Source: attention within an image: `image_attention` in docs/architecture.md; V2PE: arXiv 2412.09616
    and InternVL3, arXiv 2504.10479, which draw the step from 1, 1/2, ..., 1/256 and answer short
    contexts with a fixed one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mono_internvl.configuration.options import EXPERT_PRESETS
from mono_internvl.miniature.lab_evip import Variant, compare_pretraining
from mono_internvl.miniature.lab_pages import images_page
from mono_internvl.training.recipe import Recipe

V2PE_STEPS = tuple(2.0**-power for power in range(9))
"""Steps that training draws from: 1, 1/2, ..., 1/256."""

V2PE_STEP = 0.25
"""Step of an answer. Ours: a picture of 36 visual tokens then takes as much room as 9 words."""


def image_variants(recipe: Recipe) -> tuple[Variant, ...]:
    """The three models that a recipe is compared with."""
    experts = EXPERT_PRESETS["v1"]
    v2pe = {"visual_position_step": V2PE_STEP, "visual_position_steps": V2PE_STEPS}
    return (
        Variant("causal", "causal, one position a token", recipe, experts),
        Variant(
            "bidirectional",
            "bidirectional within an image",
            recipe,
            experts,
            {"image_attention": "bidirectional"},
        ),
        Variant("v2pe", "V2PE", recipe, experts, v2pe),
    )


def compare_images(run: Path = Path("runs/images"), **options: Any) -> Path:
    """Train and evaluate every variant with every seed; `compare_pretraining` has the options.

    Args:
        run: Output folder.
        **options: `seeds`, `quick`, `against`, `processes`, `device`, `precision`.

    Returns:
        The table.
    """
    return compare_pretraining(run, variants_of=image_variants, page=images_page, **options)
