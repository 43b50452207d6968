"""How many tokens a model reads, prompt and answer together."""

import sys

from mono_internvl.configuration.model import MonoInternVLConfig


def most_tokens(config: MonoInternVLConfig) -> int:
    """Tokens within the range of the rotary angles; `sys.maxsize` where they scale with length."""
    text = config.get_text_config()
    rope = text.rope_parameters
    if rope["rope_type"] == "dynamic":
        return sys.maxsize
    stretch = rope.get("factor", 1.0) if rope["rope_type"] == "linear" else 1.0
    limit = int(text.max_position_embeddings * stretch)
    if rope["rope_type"] == "yarn":
        trained = rope.get("original_max_position_embeddings", text.max_position_embeddings)
        limit = max(limit, int(trained * rope["factor"]))
    return limit
