"""Every recipe that a name on the command line means: the published ones and the miniature's."""

from mono_internvl.miniature.recipes import LANGUAGE, MINIATURE, MINIATURE_SFT
from mono_internvl.miniature.recipes_modular import MINIATURE_MODULAR
from mono_internvl.miniature.recipes_plus_plus import MINIATURE_PLUS_PLUS, MINIATURE_PLUS_PLUS_42
from mono_internvl.recipes import PUBLISHED
from mono_internvl.training.recipe import Recipe

RECIPES: dict[str, Recipe] = PUBLISHED | {
    recipe.name: recipe
    for recipe in (
        MINIATURE,
        MINIATURE_MODULAR,
        MINIATURE_PLUS_PLUS,
        MINIATURE_PLUS_PLUS_42,
        LANGUAGE,
        MINIATURE_SFT,
    )
}
