"""Fine-tuning of Mono-InternVL-2B-S1-3 on LLaVA-1.5's mixture of 665,298 records, as released.

Source: the fine-tuning script of OpenGVLab/Mono-InternVL at 5b17ab4, its only training code; the
parts of the mixture by arXiv 2310.03744, table 7.
"""

from mono_internvl.training.recipe import PublishedData, Recipe, Rule, Stage

_PARTS = {
    "conversations about pictures": (158_000, "LLaVA-Instruct (COCO)"),
    "text alone": (40_000, "ShareGPT"),
    "general questions, short answers": (83_000, "VQAv2 (COCO)"),
    "scenes, short answers": (72_000, "GQA"),
    "knowledge, short answers": (9_000, "OKVQA (COCO)"),
    "book covers, short answers": (80_000, "OCR-VQA"),
    "knowledge, options": (66_000, "A-OKVQA (COCO)"),
    "captions with text in them": (22_000, "TextCaps"),
    "boxes of expressions": (48_000, "RefCOCO (COCO)"),
    "boxes of regions": (86_000, "VisualGenome"),
}
"""Task -> records as the source rounds them, and where their images are from."""
_RECORDS = sum(records for records, _ in _PARTS.values())

LLAVA_665K = Recipe(
    name="llava-665k",
    source="fine-tuning script of OpenGVLab/Mono-InternVL at 5b17ab4; parts: arXiv 2310.03744",
    notes=(
        "start from OpenGVLab/Mono-InternVL-2B-S1-3; about 12 hours on 8 A100, says its README",
        "drop path 0.1 of the script is left out: it acts in vision transformers only",
        "images of OCR-VQA that are gone, or are GIFs under another name, are skipped and listed",
    ),
    ours=(
        "a record longer than 2,048 tokens is skipped, not cut; up to a tenth of them",
        "the gradient is clipped to norm 1.0; the cosine falls to 0; states every 500 steps",
        "bf16, the script's precision, is taken where a machine is fast at it",
    ),
    published_data=tuple(
        PublishedData(
            stage="sft", task=task, ratio=round(records / _RECORDS, 3), datasets=(dataset,)
        )
        for task, (records, dataset) in _PARTS.items()
    ),
    stages=(
        Stage(
            name="sft",  # ours
            title="instruction tuning on LLaVA's 665k",  # script
            data="llava_665k.json",  # ours
            rules=(Rule(".*", 4e-5),),  # everything, peak rate of a step; script
            epochs=1.0,  # passes over the data; script
            batch_size=128,  # samples of a step; script
            schedule="cosine",  # behind the warm-up; script
            warmup_ratio=0.03,  # of all steps; script
            weight_decay=0.01,  # of AdamW, per step and rate; script
            betas=(0.9, 0.999),  # of AdamW; default of the script's trainer
            eps=1e-8,  # of AdamW; default of the script's trainer
            max_tokens=2048,  # of a sample, visual ones included; script
            max_tiles=6,  # of an image; script
            checkpoint_every=500,  # optimizer steps; ours
            on_bad_sample="skip",  # ours
        ),
    ),
)
