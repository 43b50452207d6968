"""The model in lmms-eval: `python -m lmms_eval --model mono_internvl --model_args pretrained=DIR`.

lmms-eval finds `MANIFEST` by an entry point. Questions are answered side by side by the engine.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from lmms_eval.protocol import ChatMessages
from tqdm import tqdm

from mono_internvl.generation.context import most_tokens
from mono_internvl.generation.engine import Engine
from mono_internvl.generation.request import Request
from mono_internvl.generation.sampling import Sampling
from mono_internvl.serving.loading import load

MANIFEST = ModelManifest("mono_internvl", chat_class_path=f"{__name__}.MonoInternVLLmms")
_ANSWER_TOKENS = 1024
_READ_AHEAD = 2  # questions that are decoded for each that is answered
_UNDERSTOOD = frozenset(
    ("max_new_tokens", "temperature", "top_p", "do_sample", "until", "num_beams")
)


class MonoInternVLLmms(lmms):  # type: ignore[misc]
    """Answers the questions of lmms-eval's tasks.

    Args:
        pretrained: Checkpoint folder or hub id.
        device: As in `load`.
        precision: As in `load`.
        max_tiles: Most tiles of an image; the processor's own unless given.
        batch_size: Questions that are answered side by side.
        max_batch_size: Not read.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        device: str | None = None,
        precision: str = "auto",
        max_tiles: int | None = None,
        batch_size: int | str = 8,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        self._session = load(
            pretrained, device=device or "auto", precision=precision, max_tiles=max_tiles
        )
        self._engine = Engine(self._session.model, max_rows=int(batch_size))

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """The answers, in the order of the questions."""
        answers: list[str] = []
        step = _READ_AHEAD * self._engine.max_rows
        for start in tqdm(range(0, len(requests), step), desc="answers", unit_scale=step):
            encoded = list(self._encoded(requests[start : start + step]))
            answers += [result.text or "" for result in self._engine.generate(encoded)]
        return answers

    def _encoded(self, requests: Sequence[Any]) -> Iterator[Request]:
        session = self._session
        processor, limit = session.processor, most_tokens(session.model.config)
        for request in requests:
            _, to_messages, options, number, task, split = request.args
            document = self.task_dict[task][split][number]
            messages = ChatMessages(messages=to_messages(document)).to_hf_messages()
            batch = processor.encode_prompt(messages, max_tiles=session.max_tiles)
            ids = batch["input_ids"][0]
            yield Request(
                ids,
                batch.get("pixel_values"),
                sampling_of(options, most=max(1, limit - len(ids) - 1)),
                stop_ids=frozenset(processor.stop_token_ids),
                # Tasks name an empty line unless they say otherwise; it ends no answer of a chat.
                stop_strings=[text for text in _until(options) if text.strip()],
                decode=processor.decode_answer,
                feature_order=batch.get("feature_order"),
            )

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Not offered.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError("mono_internvl answers tasks of output_type generate_until")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Not offered.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError("mono_internvl answers tasks of output_type generate_until")


def sampling_of(options: Mapping[str, Any], most: int) -> Sampling:
    """How a task wants its answers.

    Args:
        options: `generation_kwargs` of the task.
        most: Tokens that there is room for.

    Raises:
        ValueError: An option would change answers and is not understood.
    """
    unknown = sorted(set(options) - _UNDERSTOOD)
    if unknown or options.get("num_beams", 1) != 1:
        raise ValueError(
            f"generation_kwargs: {', '.join(unknown) or 'num_beams'} not understood; expected "
            f"{', '.join(sorted(_UNDERSTOOD))} (num_beams: 1)"
        )
    temperature = float(options.get("temperature") or 0)
    return Sampling(
        temperature=temperature if options.get("do_sample", temperature > 0) else 0.0,
        top_p=float(options.get("top_p") or 1),
        max_new_tokens=min(int(options.get("max_new_tokens", _ANSWER_TOKENS)), most),
    )


def _until(options: Mapping[str, Any]) -> Sequence[str]:
    until = options.get("until") or ()
    return [until] if isinstance(until, str) else until
