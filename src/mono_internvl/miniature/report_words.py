"""What the report of a quickstart says: its kinds of questions, its measures, its limits."""

from mono_internvl.reports.kinds import Kind, TextChart, Words

KINDS = (
    Kind("caption", "Caption", "true attributes named", is_graded=True),
    Kind("colour", "Colour", "exact match"),
    Kind("shape", "Shape", "exact match"),
    Kind("count", "Count", "exact match"),
    Kind("position", "Position", "exact match"),
    Kind("existence", "Existence", "yes or no"),
    Kind("naming", "Naming", "exact match"),
    Kind("novel", "Unseen pairs", "pairs never trained on"),
    Kind("grounding", "Grounding", "mean IoU of the box", full_marks=0.5),
    Kind("ocr", "Reading (OCR)", "1 − char. error rate", is_graded=True),
    Kind("chart", "Charts", "exact match"),
)

_LEAD = """A text-only language model was turned into one that answers questions about images,
in the four stages of the Mono-InternVL paper. The model is <em>monolithic</em>: it has no separate
vision encoder. Patches of the image become tokens and pass through the same decoder as the words;
attention is shared, but in every layer a visual token takes a feed-forward network of its own, the
<em>visual expert</em>, which began as a copy of the text expert. <em>EViP</em>, endogenous visual
pre-training, teaches these new parts from coarse to fine while the language model stays as it was
(S1.1 names of things, S1.2 captions), then opens its attention as well (S1.3 captions, boxes,
reading); S2 trains everything on questions and dialogue."""

_QUICK_NOTE = """<strong>Quick run.</strong> Less data, fewer steps and lower
bounds than the full run: it shows that every part works, not how well the model can do."""

_LIMITS = """\
It shows that the whole path works on one machine, from files on disk through the four stages to
measured answers: a monolithic model learns to see from its own visual experts, and its language
can be watched through every stage. It is one run with one seed in a small rendered world of a
few colours, shapes, words and charts, and its language model is tiny. It says nothing about
photographs or public benchmarks, does not show that one way of training is better than another,
and its figures must not be set beside those of the paper."""

WORDS = Words(
    title="Mono-InternVL in miniature",
    headline="A small language model learns to see",
    lead=_LEAD,
    quick_note=_QUICK_NOTE,
    right_note="a box with an IoU of at least 0.5 counts as right",
    limits=_LIMITS,
    kinds=KINDS,
    text_measures={
        "perplexity": "perplexity (lower is better)",
        "facts_replayed": "facts replayed in S2",
        "facts_never_replayed": "facts never replayed",
        "name_qa": "naming from a description",
        "reading_qa": "questions about a text",
        "copying": "copying from the context",
        "lookup": "looking up one of several things in the context",
    },
    text_charts=(
        TextChart("perplexity", "Perplexity", "held-out English; lower is better", None, 1),
        TextChart("facts_replayed", "Facts, replayed", "known facts that S2 repeats", 1.0, 2),
        TextChart(
            "facts_never_replayed",
            "Facts, never replayed",
            "known facts no stage repeats",
            1.0,
            2,
        ),
    ),
)
