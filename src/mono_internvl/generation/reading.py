"""The model's passes over a batch: prompts read side by side, then one token of every row.

Rows are as long as they are: a pass writes each row's tokens behind what it holds, with the
positions of that row and a mask that ends where the row ends. Which rows of the stream are visual
is settled here, on the host; every token that is decoded is text.

Legend: B rows, T tokens of a pass, L columns it sees, D width, V vocabulary, S tile side.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from mono_internvl.attention.blocked import BLOCKED
from mono_internvl.attention.image_layout import (
    ImageLayout,
    chunk_ends,
    has_image_layout,
    lay_out_images,
    moves_positions,
)
from mono_internvl.configuration.text_fields import LAYER_TYPES, is_scaled_dynamically
from mono_internvl.errors import PromptError
from mono_internvl.experts import Routing
from mono_internvl.generation.cache import BatchCache, Rows
from mono_internvl.generation.few_rows import few_rows
from mono_internvl.generation.request import Request
from mono_internvl.model.modeling import MonoInternVLForConditionalGeneration

TOKENS_PER_PASS = 2048
"""Of prompts read side by side; a longer one is read alone, in chunks."""
MOST_PADDING = 64
"""Tokens of padding that are cheaper than a pass more: with fewer, reading weights is what takes
time."""
ATTENTIONS = ("eager", "sdpa", BLOCKED)
"""Those that take a mask of their own for every row."""


@dataclass(frozen=True, eq=False)
class Prompt:
    """A request's prompt, checked.

    Attributes:
        input_ids: (T,) int64, on the CPU.
        is_visual: (T,) bool, on the CPU.
        pixel_values: (tiles, 3, S, S), or None without images.
        shown: (visual tokens, 2) int64, tile and feature of it that stand at each; -1 and what
            `feature_order` says for a learned token.
    """

    input_ids: Tensor
    is_visual: Tensor
    pixel_values: Tensor | None
    shown: Tensor

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(eq=False)
class Row:
    """What a row of the batch holds.

    Attributes:
        prompt: Its prompt.
        length: Columns in use before the next pass.
        lag: How far its next token's rotary position stays behind its column.
    """

    prompt: Prompt
    length: int = 0
    lag: int = 0


class Reader:
    """Reads tokens into the rows of a cache.

    Args:
        model: In eval mode.
        cache: Of the same model.
    """

    def __init__(self, model: MonoInternVLForConditionalGeneration, cache: BatchCache) -> None:
        self.model, self.config, self.cache = model, model.config, cache
        self.device = model.device

    def prompt_of(self, request: Request) -> Prompt:
        """The prompt of a request, on the host.

        Raises:
            PromptError: Tiles, places and order do not match, or an id is outside the vocabulary.
        """
        ids = torch.as_tensor(request.input_ids).detach().cpu().long()
        vocabulary = self.config.text_config.vocab_size
        low, high = int(ids.min()), int(ids.max())
        if ids.dim() != 1 or low < 0 or high >= vocabulary:
            raise PromptError(
                f"input_ids of shape {tuple(ids.shape)} with ids {low} to {high}; expected (T,) "
                f"with ids from 0 to {vocabulary - 1}"
            )
        is_visual = request.visual_token_mask
        is_visual = (
            ids == self.config.image_token_id if is_visual is None else is_visual.cpu().bool()
        )
        if is_visual.shape != ids.shape:
            raise PromptError(
                f"visual_token_mask of shape {tuple(is_visual.shape)}; expected {tuple(ids.shape)}"
            )
        tiles = 0 if request.pixel_values is None else len(request.pixel_values)
        shown = self._shown(tiles, int(is_visual.sum()), request.feature_order)
        return Prompt(ids, is_visual, request.pixel_values if tiles else None, shown)

    def _shown(self, tiles: int, wanted: int, order: Tensor | None) -> Tensor:
        """(visual tokens, 2) int64: `Prompt.shown` of so many tiles and visual tokens."""
        per_tile = self.config.num_image_tokens_per_tile
        features = torch.arange(tiles * per_tile)  # tile after tile
        shown = features if order is None else order.detach().cpu().long().flatten()
        is_mark = shown < 0
        if wanted != len(shown) or len(features) != wanted - int(is_mark.sum()):
            raise PromptError(
                f"the prompt has {wanted} image tokens but {tiles} tiles give {len(features)}"
                f"{f' and {int(is_mark.sum())} learned ones' if is_mark.any() else ''}; expand one "
                "placeholder per image with the processor of this checkpoint, and pass on its "
                "feature_order if it gives one"
            )
        least = -2 if self.config.has_image_marks else 0
        if not torch.equal(shown[~is_mark].sort().values, features) or (shown < least).any():
            raise PromptError(
                f"feature_order of shape {tuple(shown.shape)}; expected each of 0 to "
                f"{len(features) - 1} once, one for each image token, as the processor gives it"
            )
        tile = torch.where(is_mark, -1, shown // per_tile)
        return torch.stack((tile, torch.where(is_mark, shown, shown % per_tile)), dim=1)

    def fit_together(self, rows: Sequence[Row]) -> bool:
        """Whether prompts may be read in one pass: from the same column on, and nearly as long."""
        rests = [len(row.prompt) - row.length for row in rows]
        return len(rows) == 1 or (
            len({row.length for row in rows}) == 1
            and len(rows) * max(rests) <= TOKENS_PER_PASS
            and max(rests) - min(rests) <= MOST_PADDING
            and not is_scaled_dynamically(self.config.text_config, rows[0].length + max(rests))
        )

    @torch.inference_mode()
    def read_prompts(self, first: int, rows: Sequence[Row]) -> Tensor:
        """Read what is left of the prompts of neighbouring rows that `fit_together`.

        Args:
            first: Row of the cache that is the first of them.
            rows: What is to be read; `length` of each prompt is there already.

        Returns:
            (B, V) logits of what follows each.
        """
        rests = [row.prompt.input_ids[row.length :] for row in rows]
        ids = torch.nn.utils.rnn.pad_sequence(rests, batch_first=True)  # (B, T)
        is_visual = torch.nn.utils.rnn.pad_sequence(
            [row.prompt.is_visual[row.length :] for row in rows], batch_first=True
        )
        features = self._features(rows)
        layout = ImageLayout()  # of whole prompts
        if has_image_layout(self.config):
            whole = torch.nn.utils.rnn.pad_sequence(
                [row.prompt.is_visual for row in rows], batch_first=True
            )
            layout = lay_out_images(self.config, whole, None, None)
        start, used, logits = rows[0].length, 0, ids.new_empty(0)
        last = torch.tensor([len(rest) - 1 for rest in rests])  # (B,)
        for begin, stop in pairwise((0, *self._chunk_ends(is_visual, start))):
            routing = Routing.from_mask(is_visual[:, begin:stop]).to(self.device)
            x = self.model.model.place_features(
                ids[:, begin:stop].to(self.device),
                features[used : used + routing.num_visual],
                routing,
            )
            used += routing.num_visual
            logits = self._pass(
                self.cache.rows(first, [start + begin] * len(rows), stop - begin),
                x,
                routing,
                ImageLayout(
                    _sliced(layout.image_numbers, 0, start + stop, self.device),
                    _sliced(layout.positions, start + begin, start + stop, self.device),
                ),
                last.clamp_max(stop - 1) - begin,
            )
        if layout.positions is not None:
            for number, row in enumerate(rows):
                place = len(row.prompt) - 1
                row.lag = math.floor(place - float(layout.positions[number, place]))
        return logits

    @torch.inference_mode()
    def read_tokens(self, rows: Sequence[Row], tokens: Sequence[int]) -> Tensor:
        """Read a token behind what every row of the batch holds; (B, V) logits of what follows."""
        logits = []
        for begin, stop in self._runs(rows):
            run = rows[begin:stop]
            view = self.cache.rows(begin, [row.length for row in run], 1)
            ids = torch.tensor(tokens[begin:stop], device=self.device)[:, None]
            layout = ImageLayout()
            if moves_positions(self.config):
                lags = torch.tensor([row.lag for row in run], device=self.device)
                layout = ImageLayout(positions=(view.columns - lags[:, None]).float())
            x = self.model.get_input_embeddings()(ids)
            with few_rows(x):
                logits.append(self._pass(view, x, Routing.all_text(len(run)), layout))
        return torch.cat(logits)

    # ------------------------------------------------------------------ parts of a pass

    def _pass(
        self,
        view: Rows,
        x: Tensor,
        routing: Routing,
        layout: ImageLayout,
        last: Tensor | None = None,
    ) -> Tensor:
        """(B, V) logits behind token `last` (B,) of every row of (B, T, D)."""
        tokens, keep = x.shape[1], None
        if last is not None and tokens > 1:
            keep = (last + torch.arange(0, last.numel() * tokens, tokens)).to(self.device)
        out = self.model.model.language_model(
            inputs_embeds=x,
            routing=routing,
            attention_mask=None if view.is_level else self._masks(view, x.dtype),
            position_ids=view.columns,
            past_key_values=view,
            image_layout=layout,
            rows_to_keep=keep,
        )
        return self.model.lm_head(out.last_hidden_state.flatten(0, -2)).float()  # type: ignore[no-any-return]

    def _masks(self, view: Rows, dtype: torch.dtype) -> dict[str, Tensor]:
        """(B, 1, T, L) masks of layers that see every column up to a token's own, or a window."""
        columns = torch.arange(view.get_mask_sizes(view.columns.shape[1])[0], device=self.device)
        own = view.columns[:, None, :, None]
        masks = [columns <= own]
        if (window := self.config.text_config.sliding_window) is not None:
            masks.append(masks[0] & (columns > own - window))
        if self.config.text_config._attn_implementation == "eager":  # adds its mask to the scores
            lowest = torch.finfo(dtype).min
            masks = [torch.zeros_like(m, dtype=dtype).masked_fill_(~m, lowest) for m in masks]
        return dict(zip(LAYER_TYPES, masks, strict=False))

    def _features(self, rows: Sequence[Row]) -> Tensor:
        """(visual tokens, D) of the images that are still to be read."""
        pixels, order, count = [], [], 0
        per_tile = self.config.num_image_tokens_per_tile
        for row in rows:
            rest = row.prompt.shown[int(row.prompt.is_visual[: row.length].sum()) :]
            if row.prompt.pixel_values is not None and len(rest):
                # Where other tokens stand within an image, a tile may have been read in part.
                tile, feature = rest.unbind(1)
                first = int(tile[tile >= 0].min())
                pixels.append(row.prompt.pixel_values[first:])
                number = (tile - first + count) * per_tile + feature
                order.append(torch.where(tile >= 0, number, feature))
                count += len(pixels[-1])
        if not pixels:
            weight = self.model.get_input_embeddings().weight
            return weight.new_empty(0, weight.shape[1])  # type: ignore[no-any-return]
        return self.model.model.ordered_features(
            torch.cat(pixels).to(self.device), torch.cat(order).to(self.device)
        )

    def _chunk_ends(self, is_visual: Tensor, start: int) -> list[int]:
        """In one piece where a chunk would be given other rotary angles than the whole."""
        tokens = is_visual.shape[1]
        if tokens <= TOKENS_PER_PASS or is_scaled_dynamically(
            self.config.text_config, start + tokens
        ):
            return [tokens]
        return chunk_ends(self.config, is_visual, None)

    def _runs(self, rows: Sequence[Row]) -> Iterator[tuple[int, int]]:
        """Neighbours that one pass can read: those whose angles depend on their length go alone."""
        begin = 0
        for number, row in enumerate(rows):
            if is_scaled_dynamically(self.config.text_config, row.length + 1):
                if begin < number:
                    yield begin, number
                yield number, number + 1
                begin = number + 1
        if begin < len(rows):
            yield begin, len(rows)


def _sliced(x: Tensor | None, begin: int, stop: int, device: torch.device) -> Tensor | None:
    return None if x is None else x[:, begin:stop].to(device)
