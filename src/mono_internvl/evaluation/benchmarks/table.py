"""The published benchmarks, row by row: data, prompt and tiles (by toolkit), rules, scores.

Which toolkit made a figure of the paper was found by comparing the paper's InternVL-1.5-2B column
with that model's published logs. The paper states no prompt, tiles or decoding for Mono-InternVL;
InternVL-1.5's protocol is taken, which is documented.

Source: arXiv 2410.08202, tables 2 to 4; internvl.readthedocs.io; VLMEvalKit at 058f673.
"""

from __future__ import annotations

from mono_internvl.errors import ConfigError
from mono_internvl.evaluation.benchmarks.published import PublishedBenchmark
from mono_internvl.processing.video import EVENLY
from mono_internvl.runs.benchmark_results import PublishedScore

_TABLES = "https://opencompass.openxlab.space/utils/VLMEval"
_LATER_TABLES = "https://opencompass.openxlab.space/utils/benchmarks"
_MODELS = ("Mono-InternVL-2B", "InternVL-1.5-2B", "EVE-7B", "EVE-7B (HD)", "Emu3")


def _paper(table: str, *scores: float | None, split: str = "") -> tuple[PublishedScore, ...]:
    """Scores of `_MODELS` in a table of the paper."""
    source = f"arXiv 2410.08202, {table}" + (f"; {split}" if split else "")
    return tuple(
        PublishedScore(model, score, source)
        for model, score in zip(_MODELS, scores, strict=False)
        if score is not None
    )


def _pretrained(*scores: float, note: str = "") -> tuple[PublishedScore, ...]:
    """Scores of the last so many stages of pre-training, zero-shot, in the paper's table 4."""
    stages = ("S1.2", "S1.3")[-len(scores) :]
    source = "arXiv 2410.08202, table 4" + (f"; {note}" if note else "")
    return tuple(
        PublishedScore(f"Mono-InternVL-2B, after {stage}", score, source)
        for stage, score in zip(stages, scores, strict=True)
    )


_MMB = (65.5, 70.9, 49.5, 52.3, 58.5)
_DOC = (80.0, 85.0, 22.0, 53.0, 76.3)
_INFO = (43.0, 55.4, 20.0, 25.0, 43.8)
_MMB_SERVER = "the server closed on 2026-03-31"

ROWS = (
    PublishedBenchmark(
        name="mmbench",
        title="MMBench-EN dev v1.0",
        split="dev v1.0",
        questions=1164,
        dataset="mmbench_dev_en",
        files=("MMBench_DEV_EN",),
        family="circular",
        max_new_tokens=100,
        source=f"{_LATER_TABLES}/MMBench/MMBench_DEV_EN.tsv",
        md5="b6caf113",
        published=_paper("table 2", *_MMB, split="test v1.0, not this split"),
        breakage=f"papers report test v1.0, whose answers were never released; {_MMB_SERVER}",
    ),
    PublishedBenchmark(
        name="mmbench-v1.1",
        title="MMBench-EN test v1.1",
        split="test v1.1",
        questions=None,
        dataset="mmbench_test_en_v11",
        files=("MMBench_TEST_EN_V11",),
        family="circular",
        max_new_tokens=100,
        source=f"{_LATER_TABLES}/MMBench/MMBench_TEST_EN_V11.tsv",
        published=_paper("table 2", *_MMB, split="test v1.0, not this split"),
        breakage="answers released on 2026-06-18: files from before hold none, and "
        "the number of questions is not published with them",
    ),
    PublishedBenchmark(
        name="mmbench-test",
        title="MMBench-EN test v1.0",
        column="MMB",
        split="test v1.0",
        questions=1784,
        dataset="mmbench_test_en_20231003",
        files=("MMBench_TEST_EN",),
        family="circular, server",
        max_new_tokens=100,
        submission="mmbench",
        source=f"{_LATER_TABLES}/MMBench/MMBench_TEST_EN.tsv",
        md5="6939fadb",
        published=_paper("table 2", *_MMB),
        breakage=f"no public answers, and {_MMB_SERVER}: the paper's figure cannot be remade",
    ),
    PublishedBenchmark(
        name="ccbench",
        title="CCBench",
        column="CCB",
        split="dev",
        questions=510,
        dataset="ccbench_dev_cn",
        files=("CCBench", "CCBench_legacy"),
        family="circular",
        max_new_tokens=100,
        source=f"{_TABLES}/CCBench.tsv",
        md5="f5dde47f",
        published=_paper("table 2", 66.3, 63.5, 12.4, 16.3),
        breakage="papers used the server, closed since; answers are in VLMEvalKit's file",
    ),
    PublishedBenchmark(
        name="mmvet",
        title="MM-Vet",
        column="MMVet",
        split="all",
        questions=218,
        dataset="mmvet",
        files=("MMVet",),
        family="mmvet",
        max_new_tokens=1000,
        submission="mmvet",
        source=f"{_TABLES}/MMVet.tsv",
        md5="748aa6d4",
        published=_paper("table 2", 40.1, 39.3, 25.6, 25.7, 37.2),
        breakage="graded by a model: in the paper by gpt-4-0613 on the official server, which "
        "grades higher than VLMEvalKit; figures of two judges do not compare",
    ),
    PublishedBenchmark(
        name="mmmu",
        title="MMMU",
        column="MMMU",
        split="val",
        questions=900,
        dataset="mmmu_val",
        files=("MMMU_DEV_VAL", "MMMU"),
        splits=("val", "validation"),
        family="mmmu",
        max_new_tokens=10,
        enlarges_first=True,
        source=f"{_TABLES}/MMMU_DEV_VAL.tsv",
        md5="521afc0f",
        published=_paper("table 2", 33.7, 34.6, 32.3, 32.6, 31.6),
        breakage="VLMEvalKit scores the same answers 2 to 3 points higher; its file holds the 150 "
        "dev questions too, which are left out by their split",
    ),
    PublishedBenchmark(
        name="mme",
        title="MME",
        column="MME",
        split="all 14 subtasks",
        questions=2374,
        dataset="mme",
        files=("MME",),
        family="mme",
        max_new_tokens=20,
        unit="points of 2800",
        top=2800.0,
        source=f"{_TABLES}/MME.tsv",
        md5="b36b43c3",
        published=_paper("table 2", 1875, 1902, 1483, 1628),
        breakage="licence: on request, for research",
    ),
    PublishedBenchmark(
        name="mathvista",
        title="MathVista",
        column="MathVista",
        split="testmini",
        questions=1000,
        toolkit="vlmevalkit",
        dataset="MathVista_MINI",
        files=("MathVista",),
        family="mathvista",
        max_new_tokens=1024,
        source=f"{_TABLES}/MathVista_MINI.tsv",
        md5="f199b98e",
        published=_paper("table 2", 45.7, 41.1, 25.2, 34.2),
        breakage="answers extracted by gpt-4-1106-preview; free-form texts and lists never count",
    ),
    PublishedBenchmark(
        name="seed-image",
        title="SEED-Image",
        column="SEED_I",
        split="image questions",
        questions=14232,
        dataset="seed",
        files=("SEEDBench_IMG",),
        family="first character",
        max_new_tokens=100,
        source=f"{_LATER_TABLES}/SEEDBench/SEEDBench_IMG.tsv",
        md5="68017231",
        published=_paper("table 2", 67.4, 69.8, 61.3, 64.6, 68.2),
        breakage="the set of 17,990 with frames of videos is another one",
    ),
    PublishedBenchmark(
        name="ocrbench",
        title="OCRBench",
        column="OCRBench",
        split="test",
        questions=1000,
        toolkit="vlmevalkit",
        dataset="OCRBench",
        family="ocrbench",
        max_new_tokens=1024,
        unit="points of 1000",
        top=1000.0,
        source=f"{_TABLES}/OCRBench.tsv",
        md5="e953d98a",
        published=_paper("table 2", 767, 654, 327, 398, 687),
    ),
    PublishedBenchmark(
        name="hallusionbench",
        title="HallusionBench",
        column="HallB",
        split="image questions",
        questions=951,
        toolkit="vlmevalkit",
        dataset="HallusionBench",
        family="hallusion",
        max_new_tokens=1024,
        drops_text_only=True,
        source=f"{_TABLES}/HallusionBench.tsv",
        md5="0c23ac0d",
        published=_paper("table 2", 34.8, 37.5, 21.1, 26.4),
        breakage="the paper's figure is the mean of aAcc, fAcc and qAcc",
    ),
    PublishedBenchmark(
        name="textvqa",
        title="TextVQA",
        column="TextVQA",
        split="val",
        questions=5000,
        dataset="textvqa_val",
        files=("TextVQA_VAL",),
        family="vqa",
        max_new_tokens=10,
        source=f"{_TABLES}/TextVQA_VAL.tsv",
        md5="b233b31f",
        published=_paper("table 3", 72.6, 70.5, 51.9, 56.8, 64.7),
        breakage="without OCR tokens in the prompt",
    ),
    PublishedBenchmark(
        name="scienceqa",
        title="ScienceQA-Image",
        column="SQA_I",
        split="test",
        questions=2017,
        dataset="scienceqa",
        files=("ScienceQA_TEST", "scienceqa_test_img"),
        family="first letter",
        max_new_tokens=100,
        drops_text_only=True,
        source=f"{_TABLES}/ScienceQA_TEST.tsv",
        md5="e42e9e00",
        published=_paper("table 3", 93.6, 84.9, 63.0, 64.9, 89.2),
    ),
    PublishedBenchmark(
        name="gqa",
        title="GQA",
        column="GQA",
        split="test-dev balanced",
        questions=12578,
        dataset="gqa_testdev",
        files=("GQA_TestDev_Balanced",),
        family="gqa",
        max_new_tokens=10,
        source=f"{_TABLES}/GQA_TestDev_Balanced.tsv",
        md5="99b62f22",
        published=_paper("table 3", 59.5, 61.6, 60.8, 62.6, 60.3),
        breakage="the file changed after 2024 (MD5 fead7df2 before)",
    ),
    PublishedBenchmark(
        name="docvqa",
        title="DocVQA val",
        split="val",
        questions=5349,
        dataset="docvqa_val",
        files=("DocVQA_VAL",),
        family="anls",
        max_new_tokens=100,
        source=f"{_TABLES}/DocVQA_VAL.tsv",
        published=_paper("table 3", *_DOC, split="test, not this split"),
    ),
    PublishedBenchmark(
        name="docvqa-test",
        title="DocVQA test",
        column="DocVQA",
        split="test",
        questions=5188,
        dataset="docvqa_test",
        files=("DocVQA_TEST",),
        family="server",
        max_new_tokens=100,
        submission="rrc",
        source=f"{_TABLES}/DocVQA_TEST.tsv",
        published=_paper("table 3", *_DOC),
        breakage="no public answers: hand in at rrc.cvc.uab.es (with an account)",
    ),
    PublishedBenchmark(
        name="ai2d",
        title="AI2D",
        column="AI2D",
        split="test, letters masked",
        questions=3088,
        dataset="ai2diagram_test",
        files=("AI2D_TEST",),
        family="letter alone",
        max_new_tokens=10,
        source=f"{_TABLES}/AI2D_TEST.tsv",
        md5="0f593e0d",
        published=_paper("table 3", 68.6, 69.8, 48.5, 61.0, 70.0),
        breakage="AI2D_TEST_NO_MASK scores much higher and is another benchmark",
    ),
    PublishedBenchmark(
        name="chartqa",
        title="ChartQA",
        column="ChartQA",
        split="test, human and augmented",
        questions=2500,
        dataset="chartqa_test",
        files=("ChartQA_TEST",),
        family="relaxed",
        max_new_tokens=100,
        source=f"{_TABLES}/ChartQA_TEST.tsv",
        md5="c902e0aa",
        published=_paper("table 3", 73.7, 74.8, 19.5, 59.1, 68.6),
        breakage="the paper's scorer takes the 5 % of the prediction instead of the truth",
    ),
    PublishedBenchmark(
        name="infovqa",
        title="InfographicVQA val",
        split="val",
        questions=2801,
        dataset="infographicsvqa_val",
        files=("InfoVQA_VAL",),
        family="anls",
        max_new_tokens=100,
        source=f"{_TABLES}/InfoVQA_VAL.tsv",
        published=_paper("table 3", *_INFO, split="test, not this split"),
    ),
    PublishedBenchmark(
        name="infovqa-test",
        title="InfographicVQA test",
        column="InfoVQA",
        split="test",
        questions=3288,
        dataset="infographicsvqa_test",
        files=("InfoVQA_TEST",),
        family="server",
        max_new_tokens=100,
        submission="rrc",
        source=f"{_TABLES}/InfoVQA_TEST.tsv",
        published=_paper("table 3", *_INFO),
        breakage="no public answers: hand in at rrc.cvc.uab.es (with an account)",
    ),
    PublishedBenchmark(
        name="coco",
        title="COCO captions",
        split="Karpathy test",
        questions=5000,
        dataset="coco_karpathy_test",
        family="captions",
        max_new_tokens=30,
        unit="CIDEr x 100",
        source="InternVL's coco_karpathy_test.json and COCO's val2014 images (cocodataset.org)",
        published=_pretrained(87.3, 135.6, note="COCO images seen in S1.3"),
        breakage="the paper's prompt is not stated; InternVL wants at least 8 new tokens, ours 1",
    ),
    PublishedBenchmark(
        name="flickr30k",
        title="Flickr30k captions",
        split="Karpathy test",
        questions=1000,
        dataset="flickr30k_test_karpathy",
        family="captions",
        max_new_tokens=30,
        unit="CIDEr x 100",
        source="InternVL's flickr30k_test_karpathy.json and Flickr30k's images",
        published=_pretrained(72.7, 77.3),
        breakage="lmms-eval's flickr30k_test is all 31,783 images; shortest answer: see coco",
    ),
    PublishedBenchmark(
        name="nocaps",
        title="NoCaps",
        split="val",
        questions=4500,
        dataset="nocaps_val",
        family="captions",
        max_new_tokens=30,
        unit="CIDEr x 100",
        dataset_id="lmms-lab-encoder/NoCaps",
        published=_pretrained(54.1, 116.5),
        breakage="shortest answer: see coco",
    ),
    PublishedBenchmark(
        name="vqav2",
        title="VQAv2 val",
        split="val",
        questions=214354,
        dataset="vqav2_val",
        family="vqa",
        max_new_tokens=10,
        dataset_id="lmms-lab-encoder/VQAv2",
        published=_pretrained(71.1, note="split not stated"),
    ),
    PublishedBenchmark(
        name="vqav2-testdev",
        title="VQAv2 test-dev",
        split="test-dev",
        questions=107394,
        dataset="vqav2_testdev",
        family="server",
        max_new_tokens=10,
        submission="evalai",
        source="InternVL's vqav2_testdev.jsonl and COCO's test2015 images (visualqa.org)",
        published=_pretrained(71.1, note="split not stated"),
        breakage="no public answers: hand in at eval.ai",
    ),
    PublishedBenchmark(
        name="okvqa",
        title="OKVQA",
        split="val",
        questions=5046,
        dataset="okvqa_val",
        family="vqa",
        max_new_tokens=10,
        dataset_id="lmms-lab-encoder/OK-VQA",
        breakage="the paper shows it in figure 6 only",
    ),
    *(
        PublishedBenchmark(
            name=f"videomme{suffix}",
            title=f"Video-MME, {split}",
            split=split,
            questions=2700,
            toolkit="vlmevalkit",
            dataset="Video-MME",
            files=("videomme",),
            family="video",
            max_new_tokens=1024,
            frames=EVENLY,
            subtitles=bool(suffix),
            source="huggingface.co/datasets/lmms-lab/Video-MME: its parquet file, videos in a "
            "folder video, subtitles in a folder subtitle; or 8 frames of each as images",
            breakage="the paper reports no video; 8 frames are few: others take 32 to 64"
            + ("; 744 of 900 videos have subtitles" if suffix else ""),
        )
        for suffix, split in (("", "without subtitles"), ("-subtitles", "with subtitles"))
    ),
)  # fmt: skip

TABLE = {row.name: row for row in ROWS}
"""Published benchmarks by name."""


def rows_named(names: str) -> list[PublishedBenchmark]:
    """The benchmarks of a list with commas; "all" is every one.

    Raises:
        ConfigError: A name is unknown, or stands twice.
    """
    asked = list(TABLE) if names == "all" else [name.strip() for name in names.split(",")]
    for name in asked:
        if name not in TABLE:
            raise ConfigError(f"benchmarks={name!r}; expected some of all, {', '.join(TABLE)}")
    if len(set(asked)) < len(asked):
        raise ConfigError(f"benchmarks={names!r}; expected every name once")
    return [TABLE[name] for name in asked]
