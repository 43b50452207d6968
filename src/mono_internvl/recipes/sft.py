"""Fine-tuning on your own conversations, from a released 2B checkpoint.

Source: the released fine-tuning script (`recipes/llava_665k.py`), whose numbers it has.
"""

import dataclasses

from mono_internvl.recipes.llava_665k import LLAVA_665K
from mono_internvl.training.recipe import Recipe

SFT = Recipe(
    name="sft",
    source="fine-tuning script of OpenGVLab/Mono-InternVL at 5b17ab4",
    ours=LLAVA_665K.ours,
    stages=(
        dataclasses.replace(
            LLAVA_665K.stages[0],
            name="sft",  # ours
            title="instruction tuning on your own data",  # ours
            data="train.json",  # ours
        ),
    ),
)
