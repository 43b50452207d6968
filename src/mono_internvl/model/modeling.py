"""Mono-InternVL: one decoder that reads pixels and words.

Image patches are embedded, merged 2x2 and projected (`visual_tokens.py`; the modular baseline sends
them through a vision tower first, `vision_tower.py`); the visual tokens take their place among the
text tokens here, the routing is made, and the decoder (`decoder.py`) runs over both.

Legend: B batch, T tokens, D width, V vocabulary, S tile side.

Source: arXiv 2410.08202, section 3.1; numbers as the released code gives them (`tests/parity`).
"""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_masks_for_generate
from transformers.utils.generic import can_return_tuple

from mono_internvl.attention.image_layout import (
    check_attention_and_cache,
    chunk_ends,
    has_image_layout,
    lay_out_images,
)
from mono_internvl.configuration.model import MonoInternVLConfig
from mono_internvl.errors import PromptError
from mono_internvl.experts import KeptRows, Routing, labelled_rows
from mono_internvl.model.decoder import (
    MonoInternVLOutput,
    MonoInternVLPreTrainedModel,
    MonoInternVLTextModel,
)
from mono_internvl.model.last_layer import rows_read
from mono_internvl.model.vision_tower import VisionTower
from mono_internvl.model.visual_tokens import PatchEmbedder, VisualProjector, pixel_shuffle
from mono_internvl.released.keys import register_conversion

_IMAGE_INPUTS = ("pixel_values", "image_features")


def _beyond_cache(ids: Tensor, attention_mask: Tensor | None, cache: Cache | None) -> Tensor:
    """Those of the ids given to `generate` that the cache does not hold, as transformers counts."""
    is_whole = attention_mask is None or attention_mask.shape[1] == ids.shape[1]
    return ids if cache is None or not is_whole else ids[:, int(cache.get_seq_length()) :]


def _check_no_places(is_visual: Tensor) -> None:
    if num_places := int(is_visual.sum()):
        raise PromptError(
            f"the prompt has {num_places} image tokens but the images give 0 features; pass the "
            "pixel_values of its images (or, if the tokens were generated, a visual_token_mask)"
        )


class MonoInternVLModel(MonoInternVLPreTrainedModel):
    """Embedder, tower if there is one, projector, decoder; places features, makes the routing."""

    def __init__(self, config: MonoInternVLConfig):
        super().__init__(config)
        self.vision_embedder = PatchEmbedder(config.vision_config)
        is_modular = config.vision_config.kind == "vit"
        self.vision_tower = VisionTower(config.vision_config) if is_modular else None
        self.projector = VisualProjector(config)
        self.language_model = MonoInternVLTextModel(config.text_config, config.visual_experts)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        """The token embedding."""
        return self.language_model.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the token embedding."""
        self.language_model.embed_tokens = value

    def get_image_features(self, pixel_values: Tensor, **kwargs: Any) -> Tensor:
        """Visual tokens of tiles.

        Args:
            pixel_values: (tiles, 3, S, S), normalised.

        Returns:
            (tiles, visual tokens per tile, D).
        """
        x = self.vision_embedder(pixel_values)  # (tiles, h*w, C)
        if self.vision_tower is not None:  # the class token has served its purpose
            x = self.vision_tower(x, self.config.select_layer)[:, 1:]
        side = int(x.shape[1] ** 0.5)
        x = x.unflatten(1, (side, side))
        return self.projector(pixel_shuffle(x, self.config.ps_version))

    def ordered_features(self, pixel_values: Tensor, order: Tensor | None) -> Tensor:
        """Visual tokens of tiles as they stand in the prompt.

        Args:
            pixel_values: (tiles, 3, S, S).
            order: (rows,) int64, which feature stands at each place; tile after tile if None. Below
                0 it is a learned token, counted from the end of `ImageMarks`.

        Returns:
            (rows, D).
        """
        x = self.get_image_features(pixel_values).flatten(0, 1)  # (rows, D)
        if order is None:
            return x
        if self.projector.marks is not None:
            x = torch.cat((x, self.projected_marks().to(x.dtype)))
            order = order.remainder(x.shape[0])
        return x.index_select(0, order)

    def projected_marks(self) -> Tensor:
        """(2, D): the learned tokens of images; (0, D) of a model that has none."""
        projector = self.projector
        if projector.marks is None:
            return projector.fc2.weight.new_empty(0, projector.fc2.weight.shape[0])
        return projector(projector.marks())  # type: ignore[no-any-return]

    def place_features(self, input_ids: Tensor, image_features: Tensor, routing: Routing) -> Tensor:
        """Embed the tokens and put the image features into the visual rows.

        Args:
            input_ids: (B, T).
            image_features: (rows, D), in flattened batch order.
            routing: Which rows are visual. It is known to the host: nothing waits for the device.

        Returns:
            Embeddings (B, T, D).

        Raises:
            PromptError: The number of visual rows differs from the number of features.
        """
        if routing.num_visual != image_features.shape[0]:
            raise PromptError(
                f"the prompt has {routing.num_visual} image tokens but the images give "
                f"{image_features.shape[0]} features; expand one placeholder per image with the "
                "processor of this checkpoint"
            )
        x = self.get_input_embeddings()(input_ids)  # (B, T, D)
        if routing.visual_rows is None:
            return image_features.to(x.dtype).view_as(x) if routing.num_visual else x
        rows = x.flatten(0, 1).index_copy(0, routing.visual_rows, image_features.to(x.dtype))
        return rows.view_as(x)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_features: Tensor | None = None,
        visual_token_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        routing: Routing | None = None,
        feature_order: Tensor | None = None,
        **kwargs: Any,
    ) -> MonoInternVLOutput:
        """Pixels and words to hidden states; see `MonoInternVLForConditionalGeneration.forward`."""
        if pixel_values is not None:
            image_features = self.ordered_features(pixel_values, feature_order)  # (rows, D)
        if image_features is not None and input_ids is None:
            raise PromptError("images need input_ids: they say where the features go")
        if routing is None and image_features is not None and visual_token_mask is None:
            visual_token_mask = input_ids == self.config.image_token_id
        has_visual = image_features is not None or inputs_embeds is not None
        if routing is None and visual_token_mask is not None and has_visual:
            routing = Routing.from_mask(visual_token_mask)
        if image_features is not None and input_ids is not None and routing is not None:
            inputs_embeds = self.place_features(input_ids, image_features, routing)
        if has_image_layout(self.config):
            x = input_ids if inputs_embeds is None else inputs_embeds
            assert x is not None
            is_visual = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
            if routing is not None:
                is_visual = routing.is_visual(x.device).view(x.shape[:2])
            cache = kwargs.get("past_key_values")
            if cache is None and kwargs.get("use_cache"):
                cache = kwargs["past_key_values"] = DynamicCache(config=self.config.text_config)
            kwargs["image_layout"] = lay_out_images(
                self.config,
                is_visual,
                kwargs.get("position_ids"),
                cache,
                is_training=self.training,
            )
        return self.language_model(
            input_ids if inputs_embeds is None else None, inputs_embeds, routing, **kwargs
        )


class MonoInternVLForConditionalGeneration(MonoInternVLPreTrainedModel, GenerationMixin):
    """Mono-InternVL with its language-model head: `generate`, loss, released checkpoints."""

    _tied_weights_keys: ClassVar = {"lm_head.weight": "model.language_model.embed_tokens.weight"}

    def __init__(self, config: MonoInternVLConfig):
        super().__init__(config)
        text = config.text_config
        self.model = MonoInternVLModel(config)
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.post_init()

    def get_image_features(self, pixel_values: Tensor, **kwargs: Any) -> Tensor:
        """(tiles, visual tokens per tile, D) of (tiles, 3, S, S) pixels."""
        return self.model.get_image_features(pixel_values, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        loss_weight: Tensor | None = None,
        num_items_in_batch: Tensor | float | None = None,
        image_features: Tensor | None = None,
        visual_token_mask: Tensor | None = None,
        logits_to_keep: int | Tensor | None = 0,
        labelled: KeptRows | None = None,
        output_label_losses: bool = False,
        **kwargs: Any,
    ) -> MonoInternVLOutput:
        """One pass: prefill, a chunk of it, a later cached turn, a decoding step, a training batch.

        A row is visual exactly where a feature is placed. Without images every token is text, a
        generated `<IMG_CONTEXT>` too.

        Args:
            input_ids: (B, T).
            pixel_values: (tiles, 3, S, S), all tiles of the batch in order.
            attention_mask: (B, T_kv), 0 at padding.
            position_ids: (B, T), integers or floats.
            past_key_values: Cache of what came before.
            inputs_embeds: (B, T, D) instead of `input_ids`; visual ones by `visual_token_mask`.
            labels: (B, T), `IGNORED_LABEL` where nothing is learnt; shifted by one in here.
            loss_weight: (B, T) weight of each label; the loss is sum(w * ce) / sum(w).
            num_items_in_batch: Denominator of the loss (accumulation, data parallel).
            image_features: (rows, D) precomputed features instead of pixels (chunked prefill).
            visual_token_mask: (B, T) bool, where features go; the context tokens unless given.
            logits_to_keep: 0 all rows, n the last n, a tensor those rows, None no logits at all.
            labelled: The rows of `labels`; looked for on the device unless given.
            output_label_losses: Whether the cross-entropy of each label is returned, too.
            **kwargs: As the decoder's; `routing`, of the mask of visual tokens: with it and
                `labelled`, made on the host as a `Batch` has them, nothing waits for the device;
                and `feature_order`, (rows,) int64, which feature of `pixel_values` stands at each
                visual row, where they do not stand tile after tile.
        """
        with_label = None  # (R,) rows
        if labels is not None:
            with_label = labelled_rows(labels) if labelled is None else labelled.rows
        x = input_ids if inputs_embeds is None else inputs_embeds
        keep = None
        if x is not None and not (
            kwargs.get("output_hidden_states") or kwargs.get("output_attentions")
        ):
            keep = rows_read(x, with_label, logits_to_keep)
        out = self.model(
            input_ids,
            pixel_values,
            image_features,
            visual_token_mask,
            inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            rows_to_keep=labelled if labelled is not None and keep is labelled.rows else keep,
            return_dict=True,
            **kwargs,
        )
        x = out.last_hidden_state  # (B, T, D), or of the rows to keep: (B, T', D) or (R, D)
        if labels is not None and with_label is not None:
            of_labels = x if keep is not None else x.flatten(0, 1).index_select(0, with_label)
            targets = labels.flatten().index_select(0, with_label + 1)
            ce = F.cross_entropy(self.lm_head(of_labels).float(), targets, reduction="none")
            out.loss = self._loss(ce, with_label, loss_weight, num_items_in_batch)
            out.label_losses = ce if output_label_losses else None
        if logits_to_keep is not None:
            if keep is None:
                is_count = isinstance(logits_to_keep, int)
                x = x[:, slice(-logits_to_keep, None) if is_count else logits_to_keep]
            # Rows in two dimensions: with three, bf16 on a CPU would copy the whole head.
            out.logits = self.lm_head(x.flatten(0, 1)).float().unflatten(0, x.shape[:2])
        out.last_hidden_state = None
        return out

    def _loss(
        self,
        ce: Tensor,
        labelled: Tensor,
        weight: Tensor | None,
        denominator: Tensor | float | None,
    ) -> Tensor:
        """The weighted mean of next-token cross-entropies.

        Without any label, or with weights of 0 alone, the loss is 0 and has a graph: every gradient
        is 0, so that a batch with nothing to learn changes nothing. It is never 0 / 0.

        Args:
            ce: (R,) fp32, of the labelled rows.
            labelled: (R,) their numbers among the B * T rows.
            weight: (B, T) or None.
            denominator: Of the sum; the weight of the labels in this batch unless given.
        """
        if weight is None:
            total: Tensor | float = labelled.numel()
        else:
            w = weight.flatten().index_select(0, labelled + 1).to(ce.dtype)
            ce, total = ce * w, w.sum()
        loss = ce.sum()
        if denominator is not None:
            total = denominator
        total = torch.as_tensor(total, dtype=loss.dtype, device=loss.device)
        return loss / total.masked_fill((total == 0) & (loss.detach() == 0), 1.0)

    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """As transformers does it, all its options included.

        Which tokens of the prompt are visual is settled here, so that an `<IMG_CONTEXT>` that is
        generated later stays text, with a cache and without.

        Args:
            inputs: (B, T) ids, also accepted as `input_ids`; with a cache from earlier turns the
                whole conversation or, with an `attention_mask` of all of it, only what is new.
            *args: As `GenerationMixin.generate`.
            **kwargs: As there; `pixel_values` are the images of what the cache has not seen. A
                prompt that repeats a *generated* `<IMG_CONTEXT>` says with a `visual_token_mask`,
                (B, T) bool, that no image stands there. `inputs_embeds`, (B, T, D), are the whole
                prompt, features in their places; the `visual_token_mask` says which rows are
                visual, as ids beside them do.

        Raises:
            PromptError: What the cache has not seen has places for images, but there are no images.
        """
        order = kwargs.pop("feature_order", None)
        if order is not None and (pixels := kwargs.pop("pixel_values", None)) is not None:
            with torch.no_grad():  # here, so that rows are repeated with features in their order
                kwargs["image_features"] = self.model.ordered_features(pixels, order)
        ids = kwargs.get("input_ids") if inputs is None else inputs
        if ids is not None and kwargs.get("visual_token_mask") is None:
            if any(kwargs.get(name) is not None for name in (*_IMAGE_INPUTS, "inputs_embeds")):
                kwargs["visual_token_mask"] = ids == self.config.image_token_id
            else:
                new = _beyond_cache(
                    ids, kwargs.get("attention_mask"), kwargs.get("past_key_values")
                )
                _check_no_places(new == self.config.image_token_id)
        if has_image_layout(self.config):  # what the cache remembers grows: nothing to compile
            kwargs.setdefault("disable_compile", True)
        return super().generate(inputs, *args, **kwargs)

    def create_masks_for_generate(self, **kwargs: Any) -> Any:
        """The mask of a static cache; left to `forward` where it depends on the images."""
        check_attention_and_cache(
            self.config.text_config._attn_implementation, kwargs.get("past_key_values")
        )
        if self.config.image_attention != "causal":
            return kwargs["attention_mask"]
        return create_masks_for_generate(**kwargs)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        is_first_iteration: bool | None = False,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """As transformers does it; images enter only where a prompt or a new turn is read."""
        mask = kwargs.pop("visual_token_mask", None)
        inputs = super().prepare_inputs_for_generation(
            input_ids,
            inputs_embeds=inputs_embeds,  # named in the signature: transformers looks for it there
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        reads_prompt = is_first_iteration or not kwargs.get("use_cache", True)
        if not reads_prompt:
            inputs["pixel_values"] = inputs["image_features"] = None
        elif mask is not None:
            read = inputs.get("inputs_embeds")
            length = (inputs["input_ids"] if read is None else read).shape[1]
            num_generated = max(0, length - mask.shape[1])
            inputs["visual_token_mask"] = F.pad(mask, (0, num_generated))[:, -length:]
        return inputs

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: Tensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[Tensor, dict[str, Any]]:
        """Repeat every row (beams, several answers), with its own images."""
        mask = model_kwargs.get("visual_token_mask")
        if mask is None or expand_size == 1:
            return super()._expand_inputs_for_generation(
                expand_size, is_encoder_decoder, input_ids, **model_kwargs
            )
        images = {
            name: model_kwargs.pop(name)
            for name in _IMAGE_INPUTS
            if model_kwargs.get(name) is not None
        }
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size, is_encoder_decoder, input_ids, **model_kwargs
        )
        for name, x in images.items():
            tokens = mask.sum(dim=1)  # (B,)
            tokens_each = max(int(tokens.sum()) // x.shape[0], 1)
            counts = (tokens // tokens_each).tolist()
            if int(tokens.sum()) != tokens_each * x.shape[0] or sum(counts) != x.shape[0]:
                raise PromptError(
                    f"{name} has {x.shape[0]} entries for {int(tokens.sum())} image tokens; to "
                    "repeat rows, pass the whole prompt and all of its images"
                )
            model_kwargs[name] = torch.cat([y for y in x.split(counts) for _ in range(expand_size)])
        return input_ids, model_kwargs

    @torch.no_grad()
    def prefill(
        self,
        input_ids: Tensor,
        past_key_values: Cache,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        chunk_tokens: int | None = None,
        feature_order: Tensor | None = None,
    ) -> MonoInternVLOutput:
        """Read a prompt in chunks, with a boundary anywhere, also inside a causal image.

        Args:
            input_ids: (B, T), what the cache has not seen yet.
            past_key_values: Cache to extend.
            pixel_values: (tiles, 3, S, S), images of these tokens.
            attention_mask: (B, T_seen + T), 0 at padding.
            chunk_tokens: Tokens per forward pass; by default 2,048, and in one piece images that
                attend both ways and prompts that dynamic rotary scaling is for.
            feature_order: (rows,) int64, as `forward` takes it.

        Returns:
            The output of the last chunk, with the logits of its last row.

        Raises:
            PromptError: A chunk of the given size ends inside what must be read in one piece.
        """
        features = None
        if pixel_values is not None:
            features = self.model.ordered_features(pixel_values, feature_order)
            is_visual = input_ids == self.config.image_token_id
            routing = Routing.from_mask(is_visual)
            embeds = self.model.place_features(input_ids, features, routing)
        else:
            embeds = self.get_input_embeddings()(input_ids)
            is_visual = torch.zeros_like(input_ids, dtype=torch.bool)
        seen = past_key_values.get_seq_length()
        position_ids = None
        if attention_mask is not None:  # as generate counts them: padding takes no place
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp_min(0)[:, seen:]
        out, start = MonoInternVLOutput(), 0
        for stop in chunk_ends(self.config, is_visual, chunk_tokens, int(seen)):
            out = self(
                inputs_embeds=embeds[:, start:stop],
                visual_token_mask=is_visual[:, start:stop],
                attention_mask=None if attention_mask is None else attention_mask[:, : seen + stop],
                position_ids=None if position_ids is None else position_ids[:, start:stop],
                past_key_values=past_key_values,
                logits_to_keep=1,
            )
            start = stop
        return out


register_conversion()
