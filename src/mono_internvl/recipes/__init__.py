"""Each published stage as one runnable recipe: pure data, found by name."""

from mono_internvl.recipes.evip import EVIP
from mono_internvl.recipes.evip_plus_plus import EVIP_PLUS_PLUS
from mono_internvl.recipes.miniature import LANGUAGE, MINIATURE
from mono_internvl.recipes.miniature_modular import MINIATURE_MODULAR
from mono_internvl.recipes.miniature_plus_plus import MINIATURE_PLUS_PLUS, MINIATURE_PLUS_PLUS_42
from mono_internvl.recipes.sft import MINIATURE_SFT, SFT
from mono_internvl.training.recipe import Recipe

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        EVIP,
        EVIP_PLUS_PLUS,
        SFT,
        MINIATURE,
        MINIATURE_MODULAR,
        MINIATURE_PLUS_PLUS,
        MINIATURE_PLUS_PLUS_42,
        LANGUAGE,
        MINIATURE_SFT,
    )
}

__all__ = ["RECIPES"]
