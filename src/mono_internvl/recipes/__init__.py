"""Each published stage as one runnable recipe: pure data, found by name."""

from mono_internvl.recipes.evip import EVIP
from mono_internvl.recipes.evip_plus_plus import EVIP_PLUS_PLUS
from mono_internvl.recipes.mpo import MPO
from mono_internvl.recipes.sft import SFT
from mono_internvl.training.recipe import Recipe

PUBLISHED: dict[str, Recipe] = {recipe.name: recipe for recipe in (EVIP, EVIP_PLUS_PLUS, SFT, MPO)}

__all__ = ["PUBLISHED"]
