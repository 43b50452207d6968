"""Forms in which stores keep samples, brought to the one that `parse_record` reads.

Conversations in LLaVA's form are taken as they are. `texts` is FineVision's, a list of questions
(`user`) and answers (`assistant`). A caption beside images answers the source's prompt; a text
without images is a document.

Source: the columns of HuggingFaceM4/FineVision and lmms-lab/LLaVA-OneVision-Data, and the members
that img2dataset writes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mono_internvl.data.records import shortened
from mono_internvl.errors import SampleError
from mono_internvl.processing.prompts import IMAGE_PLACEHOLDER

TEXT_FIELDS = ("conversations", "texts", "caption", "text")
"""Where the words of a sample may stand, the first that is there counts."""
ID_FIELDS = ("id", "key")


def raw_record(
    fields: Mapping[str, Any], num_images: int, prompt: str, where: str
) -> dict[str, Any]:
    """A stored sample as `parse_record` takes it, its images named "0", "1", ...

    Args:
        fields: As stored, without its images.
        num_images: Stored with it.
        prompt: What a caption answers.
        where: Its place, for messages.

    Raises:
        SampleError: It has no words.
    """
    raw = {name: value for name, value in fields.items() if name not in TEXT_FIELDS}
    for name in ID_FIELDS:
        if fields.get(name) is not None:
            raw.setdefault("id", fields[name])
    raw["image"] = [str(number) for number in range(num_images)]
    form = next((name for name in TEXT_FIELDS if fields.get(name) is not None), None)
    if form is None:
        raise SampleError(
            f"{where}: no words; expected one of {', '.join(TEXT_FIELDS)}, or a .txt member",
            reason="no words",
        )
    words = fields[form]
    if form == "conversations":
        raw[form] = words
    elif form == "texts":
        raw["conversations"] = _turns(words, num_images, where)
    elif not isinstance(words, str):
        raise SampleError(f"{where}: {form}={shortened(repr(words))}; expected text")
    elif num_images:
        places = f"{IMAGE_PLACEHOLDER}\n" * num_images
        raw["conversations"] = [
            {"from": "human", "value": f"{places}{prompt}"},
            {"from": "gpt", "value": words.replace(IMAGE_PLACEHOLDER, "").strip()},
        ]
    else:
        raw["text"] = words
    return raw


def _turns(texts: Any, num_images: int, where: str) -> list[dict[str, Any]]:
    """FineVision's pairs as turns; images that no placeholder names go in front."""
    if not isinstance(texts, list) or not all(isinstance(pair, Mapping) for pair in texts):
        raise SampleError(
            f"{where}: texts={shortened(repr(texts))}; expected a list of user and assistant"
        )
    turns = []
    for pair in texts:
        turns.append({"from": "human", "value": pair.get("user")})
        turns.append({"from": "gpt", "value": pair.get("assistant")})
    has_places = any(IMAGE_PLACEHOLDER in str(turn["value"]) for turn in turns)
    if turns and not has_places and isinstance(turns[0]["value"], str):
        turns[0]["value"] = f"{IMAGE_PLACEHOLDER}\n" * num_images + turns[0]["value"]
    return turns
