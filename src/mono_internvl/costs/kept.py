"""Bytes that a training step keeps for its backward pass, by running it on tensors without memory.

The forward pass of the definition is run in bf16 autocast on fake tensors, and every storage that
autograd keeps is counted once, weights cast to bf16 included. All layers but the last one keep
alike, so that a shallow model tells what a deep one keeps. Temporaries and what the allocator
wastes are not in it.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from mono_internvl.configuration.labels import IGNORED_LABEL
from mono_internvl.configuration.model import MonoInternVLConfig
from mono_internvl.costs.training import SampleShape
from mono_internvl.experts.routing import KeptRows, Routing
from mono_internvl.model.modeling import MonoInternVLForConditionalGeneration
from mono_internvl.training.recipe import Stage
from mono_internvl.training.rules import apply_rules

_DEPTH = 4  # the first may keep less, the second what all share, the last reads fewer rows


@dataclass(frozen=True)
class KeptBytes:
    """What is kept of one micro-batch.

    Attributes:
        layer: By a decoder layer other than the last one.
        rest: By the last one and everything outside the layers.
        layer_input: Of it, what enters a layer: all that is kept where layers are recomputed.
        num_layers: Of the decoder.
    """

    layer: int
    rest: int
    layer_input: int
    num_layers: int

    @property
    def total(self) -> int:
        """Without recomputation."""
        return self.rest + (self.num_layers - 1) * self.layer

    @property
    def recomputed(self) -> int:
        """With `recompute="full"`: one layer at a time keeps all of it."""
        return self.rest + self.layer + (self.num_layers - 1) * self.layer_input


class Sketch:
    """A model without memory, of few layers of the configuration's, whose steps can be run.

    Args:
        config: Of any size; nothing of it is allocated.
    """

    def __init__(self, config: MonoInternVLConfig) -> None:
        self.num_layers = config.text_config.num_hidden_layers
        self.config = copy.deepcopy(config)
        self.config.text_config.num_hidden_layers = _DEPTH
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        with self.mode:
            self.model = MonoInternVLForConditionalGeneration(self.config).train()

    def kept_bytes(self, stage: Stage, sample: SampleShape, num_samples: int) -> KeptBytes:
        """What a micro-batch of a stage keeps.

        Args:
            stage: Its rules say what is trainable.
            sample: Tokens of every sample.
            num_samples: Of the micro-batch.

        Raises:
            RecipeError: The rules do not fit the model.
        """
        apply_rules(self.model, self.config, stage)
        weights = {p.untyped_storage()._cdata for p in self.model.parameters()}
        kept: dict[int, Tensor] = {}

        def keep(tensor: Tensor) -> Tensor:
            kept[tensor.untyped_storage()._cdata] = tensor
            return tensor

        def count() -> int:
            return sum(
                t.untyped_storage().nbytes() for key, t in kept.items() if key not in weights
            )

        before: list[int] = []  # each layer
        layers = self.model.model.language_model.layers
        watched = [
            layer.register_forward_pre_hook(lambda *_: before.append(count())) for layer in layers
        ]
        inputs = self.inputs(sample, num_samples)
        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        with self.mode, hooks, torch.autocast("cpu", torch.bfloat16):
            loss = self.model(**inputs).loss
        for one in watched:
            one.remove()
        whole, layer = count(), before[3] - before[2]
        del loss  # until here the graph has to live
        tokens = num_samples * (sample.visual_tokens + sample.text_tokens)
        return KeptBytes(
            layer=layer,
            rest=whole - (_DEPTH - 1) * layer,
            layer_input=4 * tokens * self.config.text_config.hidden_size,  # the residual is fp32
            num_layers=self.num_layers,
        )

    def inputs(self, sample: SampleShape, num_samples: int) -> dict[str, Any]:
        """What the model is called with: the image first, labels last."""
        shape = (num_samples, sample.visual_tokens + sample.text_tokens)
        is_visual = torch.zeros(shape, dtype=torch.bool)
        is_visual[:, : sample.visual_tokens] = True
        labels = torch.full(shape, IGNORED_LABEL)
        labels[:, shape[1] - sample.labelled_tokens :] = 0
        routing = Routing.from_mask(is_visual)  # known to the host, as in training
        tiles = num_samples * sample.visual_tokens // self.config.num_image_tokens_per_tile
        side, fake, order = self.config.force_image_size, self.mode.from_tensor, None
        if sample.tiles is not None:  # learned tokens stand among those of the tiles
            tiles = num_samples * sample.tiles
            order = fake(torch.zeros(num_samples * sample.visual_tokens, dtype=torch.int64))
        with self.mode:
            fake_tiles = torch.empty(tiles, 3, side, side)
        return {
            "input_ids": fake(is_visual * self.config.image_token_id),
            "pixel_values": fake_tiles if tiles else None,
            "labels": fake(labels),
            "routing": routing,
            "feature_order": order,
            "labelled": KeptRows.labelled(labels, routing),
            "loss_weight": fake(torch.ones(shape)),
            "num_items_in_batch": fake(torch.ones(())),
            "logits_to_keep": None,
        }
