"""vLLM's tokens are ours: whatever a step is made of, and whichever experts there are.

`make test-vllm` has an environment with a build of vLLM for CPUs; answers are compared in fp32.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from PIL import Image
from tiny_models import ALL_EXPERTS, randomize

pytest.importorskip("vllm", reason="`make test-vllm` has an environment with vLLM")
os.environ.update(  # one process, so that a test can plant a fault in the model
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
)

from tiny_runs import write_checkpoint
from transformers import LogitsProcessorList
from vllm import LLM, RequestOutput, SamplingParams

from mono_internvl import ChatSession, load
from mono_internvl.serving.plugins.vllm_model import MonoInternVLForVllm

NEW_TOKENS = 10
Message = dict[str, Any]
Tokens = tuple[list[int], list[int]]
"""Ids of a prompt and of its answer."""


def picture(seed: int, width: int = 56, height: int = 56) -> Image.Image:
    rng = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (height, width, 3), generator=rng, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def user(text: str, *images: Image.Image) -> list[Message]:
    parts = [{"type": "image", "image": image} for image in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


WIDE = picture(3, 224, 56)
LATER_IMAGE = [  # its beginning fills a block of keys and values
    *user("what colour is this? say one two three four five six", WIDE),
    {"role": "assistant", "content": "red"},
    *user("and this?", picture(2, 112, 112)),
]
PROMPTS = {
    "text": user("say one two three"),
    "one image": user("what colour is this?", picture(1)),
    "several tiles": user("what colour is this?", WIDE),
    "two images": user("what colour is this?", picture(2), WIDE),
    "later image": LATER_IMAGE,
}


class Allowed:
    """Keeps generation to a few tokens."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self.tokens = list(tokens)

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        kept = torch.full_like(scores, -torch.inf)
        kept[:, self.tokens] = scores[:, self.tokens]
        return kept


@pytest.fixture(scope="module", params=[("ffn",), ALL_EXPERTS], ids=["ffn", "all"])
def session(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> ChatSession:
    folder = tmp_path_factory.mktemp("vllm") / "checkpoint"
    write_checkpoint(folder, request.param, max_dynamic_patch=4, hidden_size=64)
    session = load(folder, device="cpu", precision="fp32")
    randomize(session.model)
    session.model.save_pretrained(folder)
    session.folder = folder  # type: ignore[attr-defined]
    return session


@pytest.fixture(
    scope="module",
    params=[
        {"max_num_batched_tokens": 512, "enable_prefix_caching": True},
        {"max_num_batched_tokens": 32, "enable_prefix_caching": False},
    ],
    ids=["prefix cache", "chunks of 32"],
)
def engine(request: pytest.FixtureRequest, session: ChatSession) -> Iterator[LLM]:
    found = LLM(
        str(session.folder),  # type: ignore[attr-defined]
        dtype="float32",
        max_model_len=256,
        max_num_seqs=8,
        block_size=32,
        limit_mm_per_prompt={"image": 2},
        **request.param,
    )
    yield found
    found.llm_engine.engine_core.shutdown()


def asked(session: ChatSession, messages: list[Message]) -> dict[str, Any]:
    """A prompt as vLLM takes it."""
    text = session.processor.apply_chat_template(messages, add_generation_prompt=True)
    parts = [part for one in messages if one["role"] == "user" for part in one["content"]]
    images = [part["image"] for part in parts if part["type"] == "image"]
    return {"prompt": text, **({"multi_modal_data": {"image": images}} if images else {})}


def as_chat(messages: list[Message]) -> list[Message]:
    """Messages as vLLM renders them itself."""

    def part(one: dict[str, Any]) -> dict[str, Any]:
        return {"type": "image_pil", "image_pil": one["image"]} if "image" in one else one

    return [
        {**one, "content": [part(each) for each in one["content"]]}
        if one["role"] == "user"
        else one
        for one in messages
    ]


def greedy(**options: Any) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, **options)


def ids_of(outputs: list[RequestOutput]) -> list[Tokens]:
    return [(list(one.prompt_token_ids), list(one.outputs[0].token_ids)) for one in outputs]


def theirs(engine: LLM, prompts: list[dict[str, Any]], **options: Any) -> list[Tokens]:
    rendered = {"add_special_tokens": False}  # a rendered prompt begins with BOS
    return ids_of(
        engine.generate(prompts, greedy(**options), use_tqdm=False, tokenization_kwargs=rendered)
    )


def ours(session: ChatSession, messages: list[Message], allowed: Sequence[int] = ()) -> Tokens:
    batch = session.processor.encode_prompt(messages)
    processors = LogitsProcessorList([Allowed(allowed)] if allowed else [])
    ids = session.model.generate(
        **batch,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=-1,
        logits_processor=processors,
    )
    prompt = batch["input_ids"][0].tolist()
    return prompt, ids[0, len(prompt) :].tolist()


def test_tokens_are_ours_one_by_one(session: ChatSession, engine: LLM) -> None:
    for name, messages in PROMPTS.items():
        assert theirs(engine, [asked(session, messages)])[0] == ours(session, messages), name


def test_tokens_are_ours_in_a_mixed_batch_and_again(session: ChatSession, engine: LLM) -> None:
    prompts = [asked(session, messages) for messages in PROMPTS.values()]
    expected = [ours(session, messages) for messages in PROMPTS.values()]
    assert theirs(engine, prompts) == expected
    assert theirs(engine, prompts[::-1]) == expected[::-1]


def test_chat_is_ours(session: ChatSession, engine: LLM) -> None:
    for name, messages in PROMPTS.items():
        outputs = engine.chat(as_chat(messages), greedy(), use_tqdm=False)
        assert ids_of(outputs)[0] == ours(session, messages), name


def test_image_behind_a_known_beginning_is_routed(session: ChatSession, engine: LLM) -> None:
    theirs(engine, [asked(session, LATER_IMAGE[:1])])
    for seed in (2, 4, 5):
        messages = [*LATER_IMAGE[:2], *user("and this?", picture(seed, 112, 112))]
        assert theirs(engine, [asked(session, messages)])[0] == ours(session, messages)


def test_generated_context_token_is_text(session: ChatSession, engine: LLM) -> None:
    context = session.processor.image_token_id
    num_generated = 0
    for seed in range(6):
        allowed = [context, *range(20 + 9 * seed, 22 + 9 * seed)]
        messages = user("what colour is this?", picture(seed))
        expected = ours(session, messages, allowed)
        got = theirs(engine, [asked(session, messages)], allowed_token_ids=allowed)[0]
        assert got == expected
        num_generated += expected[1][:-1].count(context)
    assert num_generated > 3, "no case had one"


def test_text_experts_alone_answer_otherwise(
    session: ChatSession, engine: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.reset_prefix_cache()
    monkeypatch.setattr(
        MonoInternVLForVllm, "take_is_visual", lambda _, rows: torch.zeros(rows, dtype=torch.bool)
    )
    names = ["one image", "several tiles", "two images", "later image"]
    got = theirs(engine, [asked(session, PROMPTS[name]) for name in names])
    engine.reset_prefix_cache()
    expected = [ours(session, PROMPTS[name]) for name in names]
    assert [prompt for prompt, _ in got] == [prompt for prompt, _ in expected]
    pairs = zip(names, got, expected, strict=True)
    changed = [name for name, (_, one), (_, other) in pairs if one != other]
    assert len(changed) > 1, changed
