"""Each published stage as one runnable recipe: pure data, found by name."""

from mono_internvl.recipes.evip import EVIP
from mono_internvl.recipes.miniature import LANGUAGE, MINIATURE
from mono_internvl.recipes.miniature_modular import MINIATURE_MODULAR
from mono_internvl.recipes.sft import MINIATURE_SFT, SFT
from mono_internvl.training.recipe import Recipe

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (EVIP, SFT, MINIATURE, MINIATURE_MODULAR, LANGUAGE, MINIATURE_SFT)
}

__all__ = ["RECIPES"]
