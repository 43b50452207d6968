"""The labs: what each varies, and what the paper claims of it.

Steps are chosen so that a lab with three seeds ends within an hour on two cores; they are a part of
the quickstart's, and scores are lower than its. The paper's figures are beside ours to be compared
in direction, never in size.

Source: arXiv 2410.08202, tables 4, 5 and 9, figures 4 and 6; of version 1.5 the abstract of arXiv
    2507.12566 and a third party's table (README of NEO, October 2025).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from mono_internvl.configuration.options import EXPERT_PRESETS
from mono_internvl.miniature.lab_analysis import VISION_KINDS, Claim, Lab, with_steps
from mono_internvl.miniature.lab_evip import Variant, pretraining_variants
from mono_internvl.miniature.recipes import PATCHES
from mono_internvl.recipes.groups import ATTENTION, EXPERTS, VISION_PARAMETERS
from mono_internvl.training.recipe import Recipe, Rule, Stage

_V1 = EXPERT_PRESETS["v1"]
_FACTS = ("text: facts replayed", "text: facts never replayed")
_TABLE_5, _TABLE_9 = "arXiv 2410.08202, table 5", "arXiv 2410.08202, table 9"
_FIGURES = "arXiv 2410.08202, figures 4 and 6 (curves; the text gives no values)"
_PERPLEXITY = ("text: perplexity",)


def _of(recipe: Recipe, stages: Sequence[Stage]) -> Recipe:
    return dataclasses.replace(recipe, stages=tuple(stages))


def _without(stage: Stage, *patterns: str) -> Stage:
    """A stage without the rules of some patterns."""
    rules = tuple(rule for rule in stage.rules if rule.pattern not in patterns)
    return dataclasses.replace(stage, rules=rules)


def _full_tuning(stage: Stage) -> Stage:
    """A pre-training stage in which all learns, the language model at the rate of the experts."""
    (rate,) = (rule.learning_rate for rule in stage.rules if rule.pattern == EXPERTS)
    kept = (PATCHES, VISION_PARAMETERS, EXPERTS)
    rules = [rule for rule in stage.rules if rule.pattern in kept]
    return dataclasses.replace(stage, rules=(*rules, Rule(".*", rate)))


def _strategies(recipe: Recipe) -> tuple[Variant, ...]:
    """Table 5: S1.1 and S1.2 in three ways, then the same S2."""
    s11, s12, _, s2 = recipe.stages
    full = [_full_tuning(s11), _full_tuning(s12)]
    bare = [_without(stage, EXPERTS) for stage in (*full, s2)]
    return (
        Variant("full", "full tuning", _of(recipe, bare), ()),
        Variant("experts-full", "+ visual experts, full", _of(recipe, (*full, s2)), _V1),
        Variant("experts-delta", "+ visual experts, delta", _of(recipe, (s11, s12, s2)), _V1),
    )


def _attentions(recipe: Recipe) -> tuple[Variant, ...]:
    """Table 9: the shared attention frozen or learning in S1.3, then the same S2."""
    s11, s12, s13, s2 = recipe.stages
    frozen = _of(recipe, (s11, s12, _without(s13, ATTENTION), s2))
    return (
        Variant("frozen", "attention frozen in S1.3", frozen, _V1),
        Variant("unfrozen", "attention learns in S1.3", recipe, _V1),
    )


def _amounts(recipe: Recipe) -> tuple[Variant, ...]:
    """Figures 4 and 6: more and more pre-training, then the same short instruction tuning."""
    s11, s12, s13, s2 = recipe.stages

    def part(stage: Stage, ratio: float) -> Stage:
        return with_steps(stage, max(1, round(ratio * stage.steps)))

    points: tuple[tuple[str, str, tuple[Stage, ...]], ...] = (
        ("none", "no pre-training", ()),
        ("s11-half", "1/2 S1.1", (part(s11, 1 / 2),)),
        ("s11", "S1.1", (s11,)),
        ("s12-third", "+ 1/3 S1.2", (s11, part(s12, 1 / 3))),
        ("s12-two-thirds", "+ 2/3 S1.2", (s11, part(s12, 2 / 3))),
        ("s12", "+ S1.2", (s11, s12)),
        ("s13-half", "+ 1/2 S1.3", (s11, s12, part(s13, 1 / 2))),
        ("s13", "+ S1.3", (s11, s12, s13)),
    )
    return tuple(
        Variant(name, title, _of(recipe, (*stages, s2)), _V1) for name, title, stages in points
    )


def _zero_shot(recipe: Recipe) -> tuple[Variant, ...]:
    """Table 4: captions after S1.2 and after S1.3, without instruction tuning."""
    s11, s12, s13, _ = recipe.stages
    return (
        Variant("s12", "after S1.2", _of(recipe, (s11, s12)), _V1),
        Variant("s13", "after S1.3", _of(recipe, (s11, s12, s13)), _V1),
    )


LABS: dict[str, Lab] = {
    "table-4": Lab(
        title="Table 4: captions without instruction tuning, after S1.2 and after S1.3",
        steps={"s11": 150, "s12": 1800, "s13": 1200},
        variants=_zero_shot,
        kinds=("caption",),
        num_searched=1,
        claims=(
            Claim(
                "S1.3 makes captions better than S1.2 left them",
                "CIDEr S1.2 -> S1.3: COCO 87.3 -> 135.6 (seen in S1.3), Flickr30k 72.7 -> 77.3, "
                "NoCaps 54.1 -> 116.5 (arXiv 2410.08202, table 4)",
                {"s13": 1, "s12": -1},
                ("caption",),
            ),
        ),
        note="Captions are scored by true attributes named, not by CIDEr; the paper's VQAv2 after "
        "S1.3 has no counterpart, as the miniature first meets questions in S2.",
    ),
    "table-5": Lab(
        title="Table 5: full tuning, visual experts, delta tuning",
        steps={"s11": 100, "s12": 1000, "s2": 700},
        variants=_strategies,
        between={"s12": ("caption",)},
        factors=(0.25, 0.5, 1.0, 2.0),
        claims=(
            Claim(
                "frozen language model: facts are kept through S2 better than with full tuning",
                f"SQA-I 37.7 -> 56.5, AI2D 26.6 -> 42.7, experts full -> delta ({_TABLE_5})",
                {"experts-delta": 1, "experts-full": -1},
                _FACTS,
            ),
            Claim(
                "frozen language model: facts that nothing repeats are kept through S2",
                f"as above ({_TABLE_5})",
                {"experts-delta": 1, "experts-full": -1},
                _FACTS[1:],
            ),
            Claim(
                "frozen language model: lower perplexity on text after S2 (difference of logs)",
                f"not measured there; the same reasoning ({_TABLE_5})",
                {"experts-delta": -1, "experts-full": 1},
                _PERPLEXITY,
            ),
            Claim(
                "delta tuning sees at least as well as full tuning with experts, after S2",
                "MME-P 948 -> 995, DocVQA 18.6 -> 18.9, InfoVQA 11.9 -> 14.6, GQA 53.0 -> 53.4, "
                f"ChartQA 11.1 -> 13.5 ({_TABLE_5})",
                {"experts-delta": 1, "experts-full": -1},
                VISION_KINDS,
            ),
            Claim(
                "the same for colours and shapes that were never seen together",
                f"as above ({_TABLE_5})",
                {"experts-delta": 1, "experts-full": -1},
                ("novel",),
            ),
            Claim(
                "with full tuning, visual experts help seeing",
                f"MME-P 753 -> 948, DocVQA 16.1 -> 18.6, GQA 51.4 -> 53.0 ({_TABLE_5})",
                {"experts-full": 1, "full": -1},
                VISION_KINDS,
            ),
        ),
        note="In the full variants the language model has the rate of the visual experts, and the "
        "search lowers or raises all rates together; it chooses by what is seen, not by text.",
    ),
    "table-9": Lab(
        title="Table 9: attention frozen or not in S1.3",
        steps={"s11": 100, "s12": 1500, "s13": 1100, "s2": 1100},
        variants=_attentions,
        between={"s13": ("caption", "grounding", "ocr")},
        num_searched=2,
        claims=(
            Claim(
                "letting attention learn in S1.3 makes all tasks better, after S2",
                "MME-P 1136 -> 1153, InfoVQA 19.7 -> 22.7, SQA-I 56.5 -> 61.8, GQA 59.1 -> 59.9, "
                f"AI2D 44.1 -> 46.4 ({_TABLE_9})",
                {"unfrozen": 1, "frozen": -1},
                VISION_KINDS,
            ),
            Claim(
                "most of all reading and charts",
                f"DocVQA 39.5 -> 49.3, ChartQA 27.2 -> 49.5 ({_TABLE_9})",
                {"unfrozen": 1, "frozen": -1},
                ("ocr", "chart"),
            ),
            Claim(
                "right after S1.3, captions, boxes and reading are better",
                f"not measured there ({_TABLE_9})",
                {"unfrozen": 1, "frozen": -1},
                ("S1.3: caption", "S1.3: grounding", "S1.3: ocr"),
            ),
        ),
    ),
    "figure-4": Lab(
        title="Figures 4 and 6: scores against pre-training samples",
        steps={"s11": 150, "s12": 1000, "s13": 700, "s2": 350},
        variants=_amounts,
        num_searched=1,
        claims=(
            Claim(
                "S1.2 raises what S1.1 reached",
                f"rises ({_FIGURES})",
                {"s12": 1, "s11": -1},
                VISION_KINDS,
            ),
            Claim(
                "S1.1 levels off: S1.2 adds more than the second half of S1.1",
                f"S1.1 saturates ({_FIGURES})",
                {"s12": 1, "s11": -2, "s11-half": 1},
                VISION_KINDS,
            ),
            Claim(
                "S1.3 raises what S1.2 reached",
                f"rises ({_FIGURES})",
                {"s13": 1, "s12": -1},
                VISION_KINDS,
            ),
            Claim(
                "S1.3 raises boxes, reading and charts",
                f"S1.3 matters most for VQA and MME ({_FIGURES})",
                {"s13": 1, "s12": -1},
                ("ocr", "chart", "grounding"),
            ),
        ),
        note="Each point's last stage is trained to the end of its own schedule, so points are "
        "models, not moments of one training. The searched factor is on the instruction tuning.",
    ),
    "version-1-5": Lab(
        title="Mono-InternVL-1.5: attention experts and EViP++ against EViP",
        steps={"s11": 100, "s12": 1000, "s13": 600, "s2": 700},
        variants=pretraining_variants,
        claims=(
            Claim(
                "with equal data, EViP++ with attention experts is at least as good as EViP",
                "not given; the abstract of arXiv 2507.12566 says better and cheaper",
                {"evip-plus-plus": 1, "evip": -1},
                VISION_KINDS,
                margin=0.01,
            ),
            Claim(
                "with 42 % of the data, EViP++ with attention experts is as good as EViP",
                "v1 -> v1.5: MMMU 33.7 -> 39.1, MMVet 40.1 -> 54.0, OCRBench 767 -> 801, InfoVQA "
                "43.0 -> 47.9; MMB 65.5 -> 64.0, HallB 34.8 -> 32.5, ChartQA 73.7 -> 72.2 "
                "(README of NEO, October 2025)",
                {"evip-plus-plus-42": 1, "evip": -1},
                VISION_KINDS,
                margin=0.01,
            ),
            Claim(
                "EViP++ keeps facts that nothing repeats at least as well",
                "not measured there; its language model is frozen until S2",
                {"evip-plus-plus": 1, "evip": -1},
                _FACTS[1:],
                margin=0.01,
            ),
        ),
        note="EViP++ is a reconstruction: the body of its paper, its data and its rates were not "
        "to be had.",
    ),
}
"""The labs by name, as `mono-internvl lab NAME` takes them."""
