"""Fine-tuning on your own conversations, from a released 2B checkpoint.

Source: the released fine-tuning script (LLaVA-665k).
"""

from mono_internvl.training.recipe import Recipe, Rule, Stage

SFT = Recipe(
    name="sft",
    source="fine-tuning script of OpenGVLab/Mono-InternVL at 5b17ab4",
    ours=(
        "a record longer than 2,048 tokens is skipped, not cut; up to a tenth of them",
        "the gradient is clipped to norm 1.0; the cosine falls to 0; states every 500 steps",
        "bf16, the script's precision, is taken where a machine is fast at it",
    ),
    stages=(
        Stage(
            name="sft",
            title="instruction tuning on your own data",
            data="train.json",
            rules=(Rule(".*", 4e-5),),
            epochs=1.0,
            batch_size=128,
            schedule="cosine",
            warmup_ratio=0.03,
            max_tokens=2048,
            max_tiles=6,
            checkpoint_every=500,
            on_bad_sample="skip",
        ),
    ),
)
