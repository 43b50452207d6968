"""Which parameters belong together: the patterns that the rules of all recipes are made of."""

from mono_internvl.training.recipe import Rule

VISION_PARAMETERS = r"vision_embedder\.|vision_tower\.|projector\."
"""Patch embedding, the modular baseline's vision tower, and projector."""

EXPERTS = r"_visual\."
"""Every visual copy of a part of a decoder layer."""

ATTENTION = r"self_attn\.(q|k|v|o)_proj\."
"""The projections of attention that text and images share."""

THE_REST_FROZEN = Rule(".*", None)
"""Closes a table of rules: what no rule before it names is frozen."""
