"""Many requests at once: they join and leave a batch between its steps.

A step reads the prompts for which there is room or, where there are none, decodes one token of
every request in one pass. What a request gets does not depend on who is beside it. What its prompt
has in common with one that is being answered, or was before, is copied instead of read.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice

import torch
from torch import Tensor

from mono_internvl.compute import available_bytes
from mono_internvl.configuration.text_fields import is_scaled_dynamically
from mono_internvl.errors import ConfigError, PromptError
from mono_internvl.generation.cache import BatchCache
from mono_internvl.generation.finite_logits import check_finite
from mono_internvl.generation.prefix import (
    PrefixCache,
    end_of_images,
    num_shared,
    signature_of,
)
from mono_internvl.generation.reading import ATTENTIONS, MOST_PADDING, Prompt, Reader, Row
from mono_internvl.generation.request import Generation, Request, Result, Scored
from mono_internvl.generation.sampling import choose_tokens
from mono_internvl.model.modeling import MonoInternVLForConditionalGeneration

MAX_ROWS = 32
PREFIX_BYTES = 2**28
_UNKNOWN_BYTES = 2**32  # where the system does not say what is free


@dataclass(eq=False)
class _Entry(Row):
    """A request with its place in the batch.

    Attributes:
        generation: What its caller holds.
        signature: Of its prompt, as the prefix cache compares it; None where keys of this prompt
            are not those of another, however it begins.
        is_sound: Whether its keys and values are numbers.
    """

    generation: Generation = field(kw_only=True)
    signature: Tensor | None = field(kw_only=True)
    is_sound: bool = True

    @property
    def columns(self) -> int:
        """Columns in use between steps: of all but the newest token."""
        return len(self.prompt) + max(0, len(self.generation.ids) - 1)

    @property
    def most_columns(self) -> int:
        """Columns that it may come to need."""
        return len(self.prompt) + self.generation.request.sampling.max_new_tokens


class Engine:
    """Answers requests with one model; knows ids and pixels, neither chats nor connections.

    `submit` and the `cancel` of what it returns may be called from any thread; `step`, and what
    calls it, from one thread at a time.

    Args:
        model: On any device, in any dtype; with eager, sdpa or blocked attention if several
            requests are answered at once.
        max_rows: Most requests that are answered at once; others wait, in their order.
        kv_bytes: Most bytes of keys and values of these requests; half of what the device has free
            unless given.
        prefix_bytes: Most bytes of keys and values that are kept for requests that begin alike; 0
            reads every prompt whole.

    Raises:
        ConfigError: A number is out of range, or the model's attention cannot do it.
    """

    def __init__(
        self,
        model: MonoInternVLForConditionalGeneration,
        *,
        max_rows: int = MAX_ROWS,
        kv_bytes: int | None = None,
        prefix_bytes: int = PREFIX_BYTES,
    ) -> None:
        if max_rows < 1 or prefix_bytes < 0 or (kv_bytes is not None and kv_bytes < 1):
            raise ConfigError(
                f"max_rows={max_rows}, kv_bytes={kv_bytes}, prefix_bytes={prefix_bytes}; expected "
                "at least 1, 1 and 0"
            )
        text, device = model.config.text_config, model.device
        if max_rows > 1 and text._attn_implementation not in ATTENTIONS:
            raise ConfigError(
                f"attn_implementation={text._attn_implementation!r}; answering several requests at "
                f"once needs one of {', '.join(ATTENTIONS)}: call model.set_attn_implementation"
            )
        if kv_bytes is None:
            kv_bytes = free_bytes(device) // 2
        self.max_rows, self.kv_bytes = max_rows, kv_bytes
        self.bytes_per_token = (
            2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim
        ) * model.dtype.itemsize
        self.model = model.eval()
        self.cache = BatchCache(text, model.dtype, device, kv_bytes // self.bytes_per_token)
        self.prefixes = PrefixCache(prefix_bytes)
        self._reader = Reader(self.model, self.cache)
        self._waiting: deque[_Entry] = deque()
        self._rows: list[_Entry] = []
        self._ended: list[Generation] = []

    @property
    def num_waiting(self) -> int:
        """Requests that no prompt was read of yet."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Requests in the batch."""
        return len(self._rows)

    def submit(self, request: Request) -> Generation:
        """Put a request in the queue.

        Raises:
            PromptError: Tiles and places do not match, or the request needs more memory for keys
                and values than there will ever be.
        """
        prompt = self._reader.prompt_of(request)
        entry = _Entry(prompt, generation=Generation(request), signature=self._signature_of(prompt))
        if entry.most_columns > self.cache.max_tokens:
            raise PromptError(
                f"a prompt of {len(prompt)} tokens and {request.sampling.max_new_tokens} new ones "
                f"need {entry.most_columns * self.bytes_per_token:,} bytes of keys and values, but "
                f"kv_bytes={self.kv_bytes:,}; ask for fewer tokens or tiles, or give more memory"
            )
        self._waiting.append(entry)
        return entry.generation

    def step(self) -> list[Generation]:
        """Read prompts for which there is room; where there are none, decode a token of each row.

        An error of a request's own functions (`decode`, `on_text`), and logits that are no numbers,
        cancel that request; the error is raised when the step is complete. One in a pass over
        prompts cancels these; one in a pass over tokens changes nothing.

        Returns:
            Requests that have ended since the last step, cancelled ones too.
        """
        self._leave()
        if not self._join() and self._rows:
            self._make_room([])
            for entry in self._rows:  # also where the step before broke off with a token unchosen
                entry.length = entry.columns
            tokens = [entry.generation.ids[-1] for entry in self._rows]
            self._choose(self._rows, self._reader.read_tokens(self._rows, tokens))
        ended, self._ended = self._ended, []
        return ended

    def generate(self, requests: Sequence[Request]) -> list[Result]:
        """Answer requests, along with all others there are; results come in the given order.

        Raises:
            PromptError: As by `submit`; then none of them is answered.
        """
        generations: list[Generation] = []
        try:
            for request in requests:
                generations.append(self.submit(request))
            while any(generation.finish_reason is None for generation in generations):
                self.step()
        finally:
            for generation in generations:
                generation.cancel()
        return [generation.result for generation in generations]

    # ------------------------------------------------------------------ joining

    def _join(self) -> bool:
        """Take in waiting requests, in their order, as far as there is room; whether there was."""
        joining: list[_Entry] = []
        while self._waiting and self._has_room(joining, self._waiting[0]):
            joining.append(self._waiting.popleft())
        has_joined = bool(joining)
        try:
            while joining:
                group = self._next_group(joining)
                joining = [entry for entry in joining if entry not in group]
                self._read(group)
        finally:  # those whose turn did not come, because a pass failed
            self._waiting.extendleft(reversed(joining))
        return has_joined

    def _has_room(self, joining: Sequence[_Entry], entry: _Entry) -> bool:
        """Whether a request fits, were all of them to become as long as the longest."""
        all_of_them = [*self._rows, *joining, entry]
        longest = max(one.most_columns for one in all_of_them)
        fits = len(all_of_them) * longest <= self.cache.max_tokens
        return fits and len(all_of_them) <= self.max_rows

    def _next_group(self, joining: Sequence[_Entry]) -> list[_Entry]:
        """Those that one pass can read; who begins like one of them waits for what it reads."""
        for entry in joining:
            entry.length = self._known(entry)[0]
        group: list[_Entry] = []
        for entry in sorted(joining, key=lambda one: one.length):
            start = group[0].length if group else entry.length
            if any(self._is_worth_waiting(entry, one) for one in group):
                continue
            some = entry.prompt.is_visual[start : entry.length]
            if len(some) <= MOST_PADDING and not some.any():  # cheaper than a pass more
                entry.length = min(entry.length, start)
            if self._reader.fit_together([*group, entry]):
                group.append(entry)
        return group

    def _read(self, group: list[_Entry]) -> None:
        """Read the prompts of a group into new rows, and choose their first tokens."""
        first = len(self._rows)
        try:
            self._make_room(group)
            for row, entry in enumerate(group, first):
                entry.generation.num_cached = entry.length
                if entry.length:
                    self.cache.begin(row, self._known(entry)[1], entry.length)
            logits = self._reader.read_prompts(first, group)
            for row, (entry, is_finite) in enumerate(
                zip(group, _finite_rows(logits), strict=True), first
            ):
                entry.is_sound = is_finite
                self._keep_prompt(row, entry)
        except BaseException:
            for entry in group:
                entry.generation.cancel()
                self._ended.append(entry.generation)
            raise
        self._rows += group
        try:
            self._choose(group, logits)
        finally:
            for entry in group:
                if not entry.generation.ids:  # without a first token it cannot go on
                    entry.generation.cancel()

    def _make_room(self, group: Sequence[_Entry]) -> None:
        """Room for the next token of every request, and for a group that is to be read."""
        lengths = [entry.columns for entry in self._rows]
        self.cache.reserve(
            len(self._rows) + len(group),
            max([*lengths, *(len(entry.prompt) for entry in group)]) + 1,
            lengths,
            max(entry.most_columns for entry in (*self._rows, *group)),
        )

    # ------------------------------------------------------------------ what begins alike

    def _is_shareable(self, num_tokens: int) -> bool:
        """Not where dynamic scaling turns every key by an angle of the whole prompt."""
        text = self.model.config.text_config
        return self.prefixes.max_bytes > 0 and not is_scaled_dynamically(text, num_tokens)

    def _signature_of(self, prompt: Prompt) -> Tensor | None:
        if not self._is_shareable(len(prompt)):
            return None
        return signature_of(prompt.input_ids, prompt.is_visual, prompt.pixel_values, prompt.shown)

    def _known(self, entry: _Entry) -> tuple[int, Sequence[Tensor]]:
        """Tokens of a prompt that need no reading, and keys and values to copy them from."""
        if entry.signature is None:
            return 0, []
        length, tensors = self.prefixes.find(entry.signature)
        found: tuple[int, Sequence[Tensor]] = length, tensors
        for row, other in enumerate(self._rows):
            if (shared := _num_shared(entry, other, beyond=found[0])) > found[0]:
                found = shared, self.cache.row(row)
        return found

    def _is_worth_waiting(self, entry: _Entry, other: _Entry) -> bool:
        """Whether another prompt spares a request much of what it still has to read."""
        rest = len(entry.prompt) - entry.length
        shared = _num_shared(entry, other, beyond=entry.length)
        return shared - entry.length >= min(rest / 2, MOST_PADDING)

    def _keep_prompt(self, row: int, entry: _Entry) -> None:
        """Keep a prompt up to its last image, and what those who wait will read of it."""
        if entry.signature is None or entry.generation.request.is_continued:
            return  # the latter is kept as a whole when it ends
        shared = [
            _num_shared(one, entry)
            for one in list(islice(self._waiting, self.max_rows))  # others may submit meanwhile
            if self._is_worth_waiting(one, entry)
        ]
        self._keep(row, entry, entry.signature[: max([end_of_images(entry.signature), *shared])])

    def _keep_whole(self, row: int, entry: _Entry) -> None:
        """Keep prompt and answer of a request that a later one goes on from."""
        if entry.generation.request.is_continued and self._is_shareable(entry.columns):
            assert entry.signature is not None
            answer = torch.tensor(entry.generation.ids[:-1], dtype=torch.int64)
            self._keep(row, entry, torch.cat((entry.signature, answer)))

    def _keep(self, row: int, entry: _Entry, signature: Tensor) -> None:
        length = len(signature)
        if entry.is_sound and length:
            self.prefixes.keep(
                signature,
                length * self.bytes_per_token,
                lambda: [x[:, :length].clone() for x in self.cache.row(row)],
            )

    # ------------------------------------------------------------------ choosing and leaving

    def _choose(self, entries: Sequence[_Entry], logits: torch.Tensor) -> None:
        """Give every request its next token; those that end with it leave the batch."""
        generations = [entry.generation for entry in entries]
        samplings = [generation.request.sampling for generation in generations]
        contexts = [
            [*entry.prompt.input_ids.tolist(), *entry.generation.ids]
            if sampling.repetition_penalty != 1
            else ()
            for entry, sampling in zip(entries, samplings, strict=True)
        ]
        random_states = [generation.generator for generation in generations]
        tokens = choose_tokens(logits, samplings, contexts, random_states)
        scores = _scores(generations, tokens, logits)
        errors: list[BaseException] = []
        is_finite = _finite_rows(logits)
        for number, (generation, token) in enumerate(zip(generations, tokens, strict=True)):
            if generation.finish_reason is not None:
                continue  # cancelled from another thread meanwhile
            try:
                if not is_finite[number]:
                    entries[number].is_sound = False
                    self.cache.blank(self._rows.index(entries[number]))
                    check_finite(logits[number : number + 1])
                generation.take(token, *scores.get(number, ()))
            except BaseException as error:
                generation.cancel()
                errors.append(error)
        self._leave()
        if errors:
            raise errors[0]

    def _leave(self) -> None:
        """Let go of what has ended; the last row moves where one became free."""
        for entry in list(self._waiting):
            if entry.generation.finish_reason is not None:
                self._waiting.remove(entry)
                self._ended.append(entry.generation)
        for row in reversed(range(len(self._rows))):
            entry = self._rows[row]
            if entry.generation.finish_reason is not None:
                self._ended.append(entry.generation)
                self._keep_whole(row, entry)
                last = self._rows.pop()
                if last is not entry:
                    self.cache.move(len(self._rows), row, last.columns)
                    self._rows[row] = last
        if not self._rows:
            self.cache.release()


def _num_shared(entry: _Entry, other: _Entry, *, beyond: int = 0) -> int:
    if entry.signature is None or other.signature is None:
        return 0
    return num_shared(entry.signature, other.signature, beyond=beyond)


def _scores(
    generations: Sequence[Generation], tokens: Sequence[int], logits: Tensor
) -> dict[int, tuple[float, Scored]]:
    """Where they are wanted, the logarithm of a token's probability, and the likeliest tokens."""
    asked = [n for n, one in enumerate(generations) if one.request.has_logprobs]
    if not asked:
        return {}
    found = logits[asked].log_softmax(-1)
    picked = torch.tensor([tokens[n] for n in asked], device=logits.device)[:, None]
    chosen = found.gather(1, picked).squeeze(1).tolist()
    counts = [min(generations[n].request.num_alternatives, found.shape[1]) for n in asked]
    values, places = (x.tolist() for x in found.topk(max(counts), -1))
    return {
        n: (logprob, tuple(zip(ids[:count], some[:count], strict=True)))
        for n, logprob, ids, some, count in zip(asked, chosen, places, values, counts, strict=True)
    }


def _finite_rows(logits: torch.Tensor) -> list[bool]:
    """Which rows of (B, V) logits hold a number as their largest."""
    found: list[bool] = logits.amax(-1).isfinite().tolist()
    return found


def free_bytes(device: torch.device) -> int:
    """Bytes of memory that a device has free."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return available_bytes() or _UNKNOWN_BYTES
