"""Each published stage as one runnable recipe: pure data, found by name."""

from mono_internvl.recipes.evip import EVIP
from mono_internvl.recipes.evip_plus_plus import EVIP_PLUS_PLUS
from mono_internvl.recipes.llava_665k import LLAVA_665K
from mono_internvl.recipes.mpo import MPO
from mono_internvl.recipes.native import NATIVE
from mono_internvl.recipes.sft import SFT
from mono_internvl.training.recipe import Recipe

PUBLISHED: dict[str, Recipe] = {
    recipe.name: recipe for recipe in (EVIP, EVIP_PLUS_PLUS, NATIVE, LLAVA_665K, SFT, MPO)
}

__all__ = ["PUBLISHED"]
