"""What a model is made of, counted from its configuration without allocating it."""

from __future__ import annotations

import copy
from dataclasses import dataclass, fields

import torch

from mono_internvl.model.configuration import MonoInternVLConfig
from mono_internvl.model.modeling import MonoInternVLForConditionalGeneration


@dataclass(frozen=True)
class ParameterGroups:
    """Parameters by part; the parts are disjoint and together the whole model.

    Attributes:
        patch_embedding: Convolution and position embedding of tiles, the unused class row included.
        vision_tower: The modular baseline's layers between patches and projector.
        projector: From merged patches to the decoder's width.
        token_embeddings: One row per token; the head as well where they are tied.
        attention: Shared projections of all layers, with query and key norms.
        text_experts: Feed-forward networks of the text tokens.
        visual_experts: Whatever has a visual copy: feed-forward, projections, norms.
        norms: Shared norms of the layers, and the final one.
        head: Output projection; 0 where it is tied to the embeddings.
    """

    patch_embedding: int = 0
    vision_tower: int = 0
    projector: int = 0
    token_embeddings: int = 0
    attention: int = 0
    text_experts: int = 0
    visual_experts: int = 0
    norms: int = 0
    head: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return sum(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters of a model, in total and as one token meets them.

    Attributes:
        total: All parameters.
        activated_text: What a text token goes through: its decoder with the text experts. The whole
            embedding table and head count, as usual.
        activated_visual: What a visual token goes through: patch embedding, vision tower if there
            is one, and projector instead of the token embedding, and the visual experts in place of
            what they are copies of.
        groups: The same parameters by part.
    """

    total: int
    activated_text: int
    activated_visual: int
    groups: ParameterGroups


def parameter_table(config: MonoInternVLConfig) -> ParameterCounts:
    """Count the parameters of a configuration.

    Args:
        config: Of any size; only its shapes are built.

    Source: 3,111,355,392 parameters of the released 2B checkpoints, 1.8B of them activated for a
    text token (arXiv 2410.08202, table 1).
    """
    with torch.device("meta"):
        model = MonoInternVLForConditionalGeneration(copy.deepcopy(config))
    counts = dict.fromkeys((field.name for field in fields(ParameterGroups)), 0)
    replaced = 0  # text parameters that a visual token does not meet
    parameters = dict(model.named_parameters())
    for name, p in parameters.items():
        counts[_group_of(name)] += p.numel()
        if "_visual." in name:
            replaced += parameters[name.replace("_visual.", ".")].numel()
    groups = ParameterGroups(**counts)
    decoder = groups.attention + groups.text_experts + groups.norms
    output = groups.head or groups.token_embeddings
    embedding = groups.token_embeddings if groups.head else 0
    return ParameterCounts(
        total=groups.total,
        activated_text=embedding + decoder + output,
        activated_visual=(
            groups.patch_embedding
            + groups.vision_tower
            + groups.projector
            + decoder
            - replaced
            + groups.visual_experts
            + output
        ),
        groups=groups,
    )


def _group_of(name: str) -> str:
    for part, group in (
        ("vision_embedder.", "patch_embedding"),
        ("vision_tower.", "vision_tower"),
        ("projector.", "projector"),
        ("embed_tokens.", "token_embeddings"),
        ("_visual.", "visual_experts"),
        (".mlp.", "text_experts"),
        (".self_attn.", "attention"),
        ("lm_head.", "head"),
    ):
        if part in name:
            return group
    return "norms"
