"""Mixed preference optimisation after instruction tuning, with InternVL3's numbers.

Source: script `internvl3_2b_mpo.sh` of OpenGVLab/InternVL at 2410d1d; weights and formulas of arXiv
    2411.10442. InternVL3-2B gained 1.7 points on seven reasoning benchmarks, 30.7 to 32.4 (arXiv
    2504.10479, table 13).
Differs: the script drops paths of its vision tower, which a monolithic model does not have.
"""

from mono_internvl.training.objectives import mpo
from mono_internvl.training.recipe import PublishedData, Recipe, Rule, Stage

MPO = Recipe(
    name="mpo",
    source="MPO script of OpenGVLab/InternVL at 2410d1d (InternVL3-2B); arXiv 2411.10442",
    notes=(
        "start from an instruction-tuned checkpoint; it is kept beside the model as the reference",
        "`mono-internvl data pairs` makes pairs of a model's own answers; MMPR's files are read, "
        "too",
        "never run at this size; batch 256 of 256 accelerators, with fewer raise accumulation",
    ),
    ours=(
        "at most 12 tiles of a sample whose source says nothing",
        "a pair longer than 12,288 tokens is skipped, not cut; up to a tenth of them",
        "the gradient is clipped to norm 1.0; the cosine falls to 0; states every 100 steps",
    ),
    stages=(
        Stage(
            name="mpo",  # ours
            title="of two answers the better one: preference, quality, generation",  # the paper
            data="mpo.json",  # ours
            rules=(Rule(".*", 2e-7),),  # everything, peak rate of a step; script
            objective=mpo.MPO(),  # weights 0.8, 0.2, 1; script
            loss_weighting="sample",  # weight of a token, 1 / |y_c|; arXiv 2411.10442
            epochs=1.0,  # passes over the data; script
            batch_size=256,  # pairs of a step; script
            schedule="cosine",  # behind the warm-up; script
            warmup_ratio=0.03,  # of all steps; script
            weight_decay=0.05,  # of AdamW, per step and rate; script
            max_tokens=12_288,  # of a pair, see `ours`; script
            max_tiles=12,  # of an image; ours
            checkpoint_every=100,  # optimizer steps; ours
            on_bad_sample="skip",  # ours
        ),
    ),
    published_data=(
        PublishedData(
            stage="mpo",
            task="about 300,000 pairs: right against wrong answers, and answers that go on without "
            "their image (Dropout-NTP)",
            datasets=("MMPR-v1.2 (en)",),
        ),
    ),
)
