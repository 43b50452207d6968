"""What the published stages of EViP were trained on: data for a person, which nothing reads.

The sets are not redistributed. A run's mixture is that of its meta files; these rows say what to
put there, and what the paper's model has seen.

Source: arXiv 2410.08202: appendix on data (S1.1 to S1.3), table 7 (S2), appendix A.4 (grounding
prompt). S1.2's sets stand in table 1; its prompt is not given there.
"""

from mono_internvl.training.recipe import PublishedData

CAPTION_PROMPT = "provide a one-sentence caption for the image"
GROUNDING_PROMPT = "Detect the <ref>NAME</ref> in the image with its bounding box."

_INSTRUCTIONS: dict[str, tuple[str, ...]] = {
    "captioning": ("TextCaps", "ShareGPT-4o"),
    "general questions": ("VQAv2", "GQA", "OKVQA", "VSR", "VisualDialog"),
    "science": ("AI2D", "ScienceQA", "TQA"),
    "charts": ("ChartQA", "MMC-Inst", "DVQA", "PlotQA", "LRV-Instruction"),
    "mathematics": ("GeoQA+", "TabMWP", "MathQA", "CLEVR-Math/Super", "Geometry3K"),
    "knowledge": ("KVQA", "A-OKVQA", "ViQuAE", "Wikipedia"),
    "OCR": (
        *("OCRVQA", "InfoVQA", "TextVQA", "ArT", "COCO-Text", "CTW", "LSVT", "RCTW-17"),
        *("ReCTs", "SynthDoG", "ST-VQA"),
    ),
    "documents": ("DocVQA", "CommonCrawl PDF"),
    "grounding": ("RefCOCO/+/g", "VisualGenome"),
    "conversation": (
        *("LLaVA-150K", "LVIS-Instruct4V", "ALLaVA", "Laion-GPT4V", "ShareGPT", "SVIT"),
    ),
    "text only": ("OpenHermes2.5", "Alpaca-GPT4", "COIG-CQIA", "ShareGPT"),
    "video": (
        *("EgoTaskQA", "Mementos", "STAR", "NTU RGB+D", "VideoChat2-IT", "LSMDC-QA"),
        "ShareGPT-4o",
    ),
    "handwriting": ("SROIE", "FUNSD", "POIE"),
}

EVIP_DATA = (
    PublishedData(
        stage="s11",
        task="noisy captions, 922M",
        datasets=("LAION-2B (en)", "COYO-700M (en)"),
        prompt=CAPTION_PROMPT,
    ),
    PublishedData(
        stage="s12",
        task="captions written by InternVL-8B, 258M",
        datasets=("LAION (en)", "COYO (en)", "SA-1B (en)"),
    ),
    PublishedData(
        stage="s13",
        task="captioning",
        ratio=0.539,
        datasets=(*("LAION (en, zh)", "COYO (zh)", "GRIT (zh)", "COCO (en)", "TextCaps (en)"),),
    ),
    PublishedData(
        stage="s13",
        task="detection",
        ratio=0.052,
        datasets=("Objects365 (en, zh)", "GRIT (en, zh)", "All-Seeing (en, zh)"),
        prompt=GROUNDING_PROMPT,
    ),
    PublishedData(
        stage="s13",
        task="OCR",
        ratio=0.409,
        datasets=(
            *("Wukong-OCR (zh)", "LaionCOCO-OCR (en)", "CommonCrawl PDF (en, zh)", "MMC-Inst"),
            *("LSVT", "ST-VQA", "RCTW-17", "ReCTs", "ArT", "SynthDoG (en, zh)", "COCO-Text"),
            *("ChartQA", "CTW", "DocVQA", "TextOCR", "PlotQA", "InfoVQA"),
        ),
    ),
    *(
        PublishedData(stage="s2", task=task, datasets=datasets)
        for task, datasets in _INSTRUCTIONS.items()
    ),
)
"""S1.3's task prompts are those of InternVL-1.5; the paper shows the grounding one."""
