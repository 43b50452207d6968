"""InternVL3's native pre-training on a monolithic model: one stage, texts and images together.

Known of it: all parameters are trained jointly, on text-only and multimodal data at once; a token
weighs 1 / sqrt(l) in a sample of l labelled tokens ("square averaging"); the loss is taken on text
tokens only. Known from a third party's summary: some 200 billion tokens, three multimodal ones for
each of text alone. InternVL3 is a modular model; that a monolithic one is trained so, and every
other number, is ours: rates are those of EViP's S1.1 for what is new and of S2 for the rest.

Source: arXiv 2504.10479; the weights of tokens: data code of OpenGVLab/InternVL.
"""

from mono_internvl.recipes.groups import EXPERTS, VISION_PARAMETERS
from mono_internvl.training.recipe import PublishedData, Recipe, Rule, Stage

NATIVE = Recipe(
    name="native-2b",
    source="InternVL3's native pre-training, arXiv 2504.10479, on a monolithic model",
    notes=(
        "some 200 billion tokens, text alone : multimodal 1 : 3, by a third party's summary",
        "start from a monolithic model made of a language model (mono-internvl init)",
        "never run; with fewer than 256 accelerators nothing changes: rows are dealt out",
    ),
    ours=(
        "every rate, batch, schedule and limit; 44,000 steps of 2,048 samples are 200 billion "
        "tokens at 2,220 a sample",
        "what is new learns at 1e-4, the language model at 2e-5",
        "the gradient is clipped to norm 1.0; the cosine falls to 0",
        "bad records are skipped, up to a tenth of them; states every 500 steps",
    ),
    published_data=(
        PublishedData(
            stage="native", task="text alone: one token in four", datasets=("not published",)
        ),
        PublishedData(
            stage="native", task="multimodal: three tokens in four", datasets=("not published",)
        ),
    ),
    stages=(
        Stage(
            name="native",  # ours
            title="texts and images together, everything is trainable",  # arXiv 2504.10479
            data="native.json",  # ours
            rules=(  # all parameters: arXiv 2504.10479; peak rates of a step: ours
                Rule(f"{VISION_PARAMETERS}|{EXPERTS}", 1e-4),
                Rule(".*", 2e-5),
            ),
            loss_weighting="square",  # weight of a token; arXiv 2504.10479
            steps=44_000,  # optimizer steps; ours, of 200 billion tokens
            batch_size=2048,  # samples of a step; ours
            schedule="cosine",  # behind the warm-up; ours
            warmup_steps=500,  # optimizer steps; ours
            weight_decay=0.01,  # of AdamW, per step and rate; ours
            betas=(0.9, 0.999),  # of AdamW; ours
            eps=1e-8,  # of AdamW; ours
            max_tokens=8192,  # of a sample, visual ones included; ours
            max_tiles=12,  # of an image; ours
            packing="best_fit",  # ours
            packed_tokens=8192,  # of a row; ours
            checkpoint_every=500,  # optimizer steps; ours
            on_bad_sample="skip",  # ours
        ),
    ),
)
