"""What a model is asked on the way to an article with pictures, in Chinese and in English.

Source: the demonstration of InternLM-XComposer (InternLM/InternLM-XComposer, web_demo.py) for the
Chinese texts; the English ones say the same and are ours. Differs: there the words that an answer
begins with stand in the model's turn, here they close the question.
"""

from __future__ import annotations

from dataclasses import dataclass

LETTERS = "ABCD"


@dataclass(frozen=True)
class Wording:
    """The questions in one language; fields in braces are filled in.

    Attributes:
        article: Asks for an article on {title}.
        places: Asks which {count} of the lines of {article} pictures belong behind.
        caption: Asks for the caption of a picture behind line {line} of {article}; {earlier} are
            those that were written already.
        choice: Asks which of the {candidates} belongs behind {context}.
        quotes: That close a caption.
    """

    article: str
    places: str
    caption: str
    choice: str
    quotes: str


WORDINGS = {
    "zh": Wording(
        article="根据给定标题写一个图文并茂，不重复的文章：{title}\n",
        places=(
            '给定文章"{article}" 根据上述文章，选择适合插入图像的{count}行，适合插入图像的行是'
        ),
        caption=(
            '给定文章"{article}" {earlier}给出适合在<Seg{line}>后插入的图像对应的标题。标题是"'
        ),
        choice=(
            "根据给定上下文和候选图像，选择合适的配图：{context}\n"
            "候选图像包括: {candidates}\n最合适的图是"
        ),
        quotes='"”。\n',
    ),
    "en": Wording(
        article="Write an article for the title below, with room for pictures and without "
        "repetition: {title}\n",
        places='Here is an article: "{article}" Choose the {count} lines of it that a picture '
        "belongs behind. These lines are",
        caption='Here is an article: "{article}" {earlier}Give the caption of a picture that fits '
        'behind <Seg{line}>. The caption is "',
        choice="Choose the picture that fits the text: {context}\n"
        "The candidates are: {candidates}\nThe best picture is",
        quotes='"”\n',
    ),
}
