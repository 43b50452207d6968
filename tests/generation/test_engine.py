"""Requests side by side: the same tokens as one by one, whoever joins, leaves or waits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import pytest
import torch
from tiny_models import (
    ALL_EXPERTS,
    IMAGE_TOKEN,
    VOCAB,
    image_ids,
    text_ids,
    tile_pixels,
    tiny_model,
)
from torch import Tensor

from mono_internvl.attention import image_layout
from mono_internvl.errors import CheckpointError, ConfigError, PromptError
from mono_internvl.generation import engine as engine_module
from mono_internvl.generation import reading
from mono_internvl.generation.engine import Engine
from mono_internvl.generation.request import Generation, Request, Result
from mono_internvl.generation.sampling import Sampling, choose_tokens
from mono_internvl.model.modeling import MonoInternVLForConditionalGeneration

Model = MonoInternVLForConditionalGeneration


def _request(*parts: Tensor, pixels: Tensor | None = None, new: int = 8, **fields: Any) -> Request:
    sampling = fields.pop("sampling", Sampling(max_new_tokens=new))
    return Request(torch.cat(parts, dim=1)[0], pixels, sampling, **fields)


def _mixed() -> list[Request]:
    """Text, one image, an image of two tiles, two images, the same images again; all lengths."""
    one, two = tile_pixels(1), tile_pixels(2, seed=3)
    start = text_ids(3, 1)
    return [
        _request(text_ids(5, 2), new=9),
        _request(start, image_ids(1), text_ids(4, 3), pixels=one, new=4),
        _request(start, image_ids(2), text_ids(2, 4), pixels=two, new=7),
        _request(start, image_ids(1), text_ids(11, 5), pixels=one, new=8),
        _request(text_ids(1, 6), new=1),
        _request(
            *(start, image_ids(1), text_ids(2, 7), image_ids(2), text_ids(3, 8)),
            pixels=torch.cat((one, two)),
            new=6,
        ),
        _request(start, image_ids(1), text_ids(3, 9), pixels=tile_pixels(1, seed=9), new=10),
        _request(start, image_ids(2)[:, :-1], pixels=two, new=5),  # ends with its image
        _request(text_ids(17, 10), new=5),
    ]


def _alone(model: Model, request: Request) -> list[int]:
    """The answer by `generate` of transformers, the only row of its batch."""
    ids = torch.as_tensor(request.input_ids)[None]
    images = {} if request.pixel_values is None else {"pixel_values": request.pixel_values}
    if request.visual_token_mask is not None:
        images["visual_token_mask"] = request.visual_token_mask[None]
    with torch.no_grad():
        out = model.generate(
            ids,
            **images,
            max_new_tokens=request.sampling.max_new_tokens,
            do_sample=False,
            eos_token_id=None,
            repetition_penalty=request.sampling.repetition_penalty,
        )
    found: list[int] = out[0, ids.shape[1] :].tolist()
    return found


def _drain(engine: Engine) -> list[Generation]:
    ended = []
    while engine.num_waiting or engine.num_running:
        ended += engine.step()
    return ended


def _assert_alone(model: Model, requests: Sequence[Request], results: Sequence[Result]) -> None:
    for number, (request, result) in enumerate(zip(requests, results, strict=True)):
        assert list(result.ids) == _alone(model, request), number
        assert result.finish_reason == "length"


# ------------------------------------------------------------------ the same tokens


@pytest.mark.parametrize("attention", ["eager", "sdpa", "blocked"])
@pytest.mark.parametrize("prefix_bytes", [0, 2**20])
@pytest.mark.parametrize("experts", [("ffn",), ALL_EXPERTS], ids=["v1", "all"])
def test_engine_equals_generate_whoever_comes_and_goes(
    attention: str, prefix_bytes: int, experts: tuple[str, ...]
) -> None:
    model, requests = tiny_model(experts, attention), _mixed()
    engine = Engine(model, max_rows=4, prefix_bytes=prefix_bytes)
    generations = [engine.submit(request) for request in requests[:3]]
    ended = engine.step() + engine.step()
    dropped = engine.submit(_request(text_ids(6, 20), new=50))
    generations += [engine.submit(request) for request in requests[3:5]]
    ended += engine.step()
    dropped.cancel()
    never = engine.submit(_request(text_ids(6, 21)))
    never.cancel()
    ended += engine.step()
    generations += [engine.submit(request) for request in requests[5:]]
    ended += _drain(engine)
    _assert_alone(model, requests, [generation.result for generation in generations])
    assert dropped.result.finish_reason == never.result.finish_reason == "cancelled"
    assert never.result.ids == ()
    assert sorted(map(id, ended)) == sorted(map(id, [*generations, dropped, never]))


def test_engine_equals_one_by_one_with_all_there_is_at_once() -> None:
    """Joining, leaving, waiting for memory, seeds, stop ids and texts, samples of one prompt."""
    model = tiny_model()
    greedy = _mixed()
    expected = [_alone(model, request) for request in greedy]
    warm = Sampling(temperature=1.5, top_k=40, max_new_tokens=7, seed=3)
    stopped = replace(greedy[3], decode=_spell, stop_strings=[_spell(expected[3][4:6])])
    ended = replace(greedy[6], stop_ids={expected[6][5]})
    seeded = [replace(request, sampling=warm) for request in (greedy[0], greedy[5])]
    samples = replace(greedy[1], sampling=warm).samples(4)
    requests = [*greedy[:3], stopped, *samples, ended, *seeded, *greedy[3:]]
    longest = max(len(r.input_ids) + r.sampling.max_new_tokens for r in requests)
    tokens = 4 * longest  # where max_rows would allow more
    engine = Engine(model, max_rows=9, kv_bytes=tokens * Engine(model).bytes_per_token)
    generations, dropped, num_waited = [], [], 0
    coming = iter(requests)
    while len(generations) < len(requests) or engine.num_waiting or engine.num_running:
        for request in islice(coming, 1):  # one comes in every step
            generations.append(engine.submit(request))
            if len(generations) % 4 == 0:
                dropped.append(engine.submit(seeded[1]))
        engine.step()
        num_waited += engine.num_waiting > 0
        for one in dropped:
            if len(one.ids) == 2:
                one.cancel()
    assert num_waited > 3 and all(one.result.finish_reason == "cancelled" for one in dropped)
    for request, generation in zip(requests, generations, strict=True):
        (alone,) = Engine(model, max_rows=1, prefix_bytes=0).generate([request])
        found = generation.result
        assert (found.ids, found.text, found.finish_reason) == (
            (alone.ids, alone.text, alone.finish_reason)
        )
    greedy_results = [generations[requests.index(request)].result for request in greedy]
    assert [list(result.ids) for result in greedy_results] == expected
    assert [g.result.finish_reason for g in generations].count("stop") == 2


def _spell(ids: list[int]) -> str:
    return " ".join(map(str, ids))


def test_engine_cancelled_answer_is_what_there_was() -> None:
    model = tiny_model()
    engine = Engine(model)
    request = _request(text_ids(6, 20), new=20)
    generation, other = engine.submit(request), engine.submit(_mixed()[0])
    for _ in range(3):
        engine.step()
    generation.cancel()
    assert generation in engine.step() and engine.num_running == 1
    _drain(engine)
    found = generation.result.ids
    assert len(found) == 3 and list(found) == _alone(model, request)[:3]
    assert list(other.result.ids) == _alone(model, other.request)


@pytest.mark.parametrize("attention", ["eager", "sdpa", "blocked"])
@pytest.mark.parametrize("layers", [[1, 0], [1, 1]], ids=str)
def test_engine_equals_generate_with_sliding_layers(attention: str, layers: list[int]) -> None:
    model = tiny_model(attention=attention, sliding_layers=layers, sliding_window=6)
    requests = _mixed()
    engine = Engine(model)
    _assert_alone(model, requests, engine.generate(requests))
    again = engine.generate(requests)
    _assert_alone(model, requests, again)
    assert sum(result.num_cached > 6 for result in again) >= 4


@pytest.mark.parametrize(
    "options",
    [
        {"image_attention": "bidirectional"},
        {"visual_position_step": 0.25},
        {"image_attention": "bidirectional", "visual_position_step": 0.5},
    ],
    ids=str,
)
def test_engine_equals_generate_with_an_image_layout(options: dict[str, Any]) -> None:
    model, requests = tiny_model(), _mixed()
    for name, value in options.items():
        setattr(model.config, name, value)
    engine = Engine(model)
    for _ in range(2):
        results = engine.generate(requests)
        _assert_alone(model, requests, results)
    assert sum(result.num_cached > 6 for result in results) >= 4


@pytest.mark.parametrize("length", [8, 12, 18])
def test_engine_equals_generate_beyond_dynamic_scaling(length: int) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 4.0}
    model = tiny_model(rope_parameters=rope, max_position_embeddings=length)
    requests = _mixed()
    engine = Engine(model)
    for _ in range(2):
        results = engine.generate(requests)
        _assert_alone(model, requests, results)
        assert not any(r.num_cached for r in results if r.num_prompt > length)


@pytest.mark.parametrize(
    "options", [{}, {"image_attention": "bidirectional", "visual_position_step": 0.5}], ids=str
)
def test_engine_equals_generate_in_chunks(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    monkeypatch.setattr(reading, "TOKENS_PER_PASS", 6)
    monkeypatch.setattr(image_layout, "_CHUNK_TOKENS", 6)
    model, requests = tiny_model(), _mixed()
    for name, value in options.items():
        setattr(model.config, name, value)
    _assert_alone(model, requests, Engine(model).generate(requests))


def test_engine_long_prompt_widens_no_other() -> None:
    model = tiny_model()
    read: list[tuple[int, ...]] = []
    model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(tuple(kwargs["inputs_embeds"].shape[:2])),
        with_kwargs=True,
    )
    requests = [_request(text_ids(n, n), new=1) for n in (9, 300, 12)]
    Engine(model).generate(requests)
    assert read == [(2, 12), (1, 300)]


def _always_answer(model: Model, token: int, score: float = 1.0) -> None:
    head = torch.nn.Linear(64, VOCAB)
    head.weight.data.zero_()
    head.bias.data.zero_()
    head.bias.data[token] = score
    model.lm_head = head


def test_engine_generated_image_token_is_text() -> None:
    model = tiny_model()
    _always_answer(model, IMAGE_TOKEN)
    visual: list[int] = []
    model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: visual.append(kwargs["routing"].num_visual), with_kwargs=True
    )
    (result,) = Engine(model).generate([_mixed()[1]])
    assert result.ids == (IMAGE_TOKEN,) * 4
    assert visual == [4, 0, 0, 0]


def test_engine_takes_generated_image_tokens_of_a_prompt_as_text() -> None:
    model = tiny_model()
    ids = torch.cat((text_ids(3, 1), torch.full((1, 2), IMAGE_TOKEN), text_ids(2, 2)), dim=1)
    nowhere = torch.zeros(ids.shape[1], dtype=torch.bool)
    requests = [_request(ids, visual_token_mask=nowhere), _mixed()[1]]
    _assert_alone(model, requests, Engine(model).generate(requests))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("options", [{}, {"visual_position_step": 0.25}], ids=str)
def test_engine_on_a_gpu_gives_the_same_tokens(options: dict[str, Any]) -> None:
    model, requests = tiny_model(attention="sdpa"), _mixed()
    for name, value in options.items():
        setattr(model.config, name, value)
    expected = [_alone(model, request) for request in requests]
    engine = Engine(model.to("cuda"), max_rows=4)
    assert [list(result.ids) for result in engine.generate(requests)] == expected


# ------------------------------------------------------------------ memory


def test_engine_keeps_to_its_memory_and_to_the_order() -> None:
    model, requests = tiny_model(), [*_mixed(), *_mixed()]
    per_token = Engine(model).bytes_per_token
    assert per_token == 2 * 2 * 2 * 16 * 4  # keys and values, layers, heads, width, fp32
    expected = [_alone(model, request) for request in requests]
    longest = max(len(r.input_ids) + r.sampling.max_new_tokens for r in requests)
    for tokens in (longest, 2 * longest + 5, 5 * longest):
        engine = Engine(model, kv_bytes=tokens * per_token, prefix_bytes=0)
        generations = [engine.submit(request) for request in requests]
        begun: list[int] = []
        most_rows = 0
        while engine.num_waiting or engine.num_running:
            engine.step()
            most_rows = max(most_rows, engine.num_running)
            assert engine.cache.num_bytes <= engine.kv_bytes
            begun += [n for n, g in enumerate(generations) if g.ids and n not in begun]
        assert begun == list(range(len(requests)))
        assert most_rows >= tokens // longest - 1
        assert [list(generation.result.ids) for generation in generations] == expected


def test_engine_refuses_what_never_fits() -> None:
    model = tiny_model()
    engine = Engine(model, kv_bytes=20 * Engine(model).bytes_per_token)
    engine.submit(_request(text_ids(12), new=8))
    with pytest.raises(PromptError, match=r"13 tokens and 8 new ones need 10,752 bytes.*10,240"):
        engine.submit(_request(text_ids(13), new=8))
    assert len(_drain(engine)) == 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"input_ids": image_ids(2)[0], "pixel_values": tile_pixels(1)}, "8 image tokens.* 4;"),
        ({"input_ids": image_ids(1)[0]}, "4 image tokens but 0 tiles"),
        ({"input_ids": [1, VOCAB]}, f"ids 1 to {VOCAB}"),
        ({"input_ids": [-1]}, "ids -1 to -1"),
        ({"input_ids": [[1]]}, r"shape \(1, 1\)"),
        (
            {
                "input_ids": image_ids(1)[0],
                "pixel_values": tile_pixels(1),
                "feature_order": torch.tensor([0, 1, 2, 2]),
            },
            "each of 0 to 3 once",
        ),
        ({"input_ids": [3], "visual_token_mask": torch.zeros(2, dtype=torch.bool)}, "mask.*2"),
    ],
)
def test_engine_refuses_wrong_prompts_at_the_door(fields: dict[str, Any], message: str) -> None:
    engine = Engine(tiny_model())
    with pytest.raises(PromptError, match=message):
        engine.submit(Request(**fields))
    assert engine.num_waiting == 0


def test_engine_refuses_what_it_cannot_work_with() -> None:
    with pytest.raises(ConfigError, match="attn_implementation='flex_attention'"):
        Engine(tiny_model(attention="flex_attention"))
    for wrong in ({"max_rows": 0}, {"kv_bytes": 0}, {"prefix_bytes": -1}):
        with pytest.raises(ConfigError, match="expected"):
            Engine(tiny_model(), **wrong)


# ------------------------------------------------------------------ choosing


def test_engine_seed_gives_the_same_answer_in_any_company() -> None:
    model = tiny_model()
    warm: dict[str, Any] = {"temperature": 1.5, "top_k": 40, "top_p": 0.95, "max_new_tokens": 10}
    seeded = _request(text_ids(5, 2), sampling=Sampling(**warm, seed=7))
    (alone,) = Engine(model).generate([seeded])
    others = [
        *_mixed()[:3],
        _request(text_ids(4, 3), sampling=Sampling(**warm)),
        _request(text_ids(4, 3), sampling=Sampling(**{**warm, "top_k": 5}, seed=3)),
        _request(text_ids(5, 2), sampling=Sampling(**warm, seed=8)),
    ]
    results = Engine(model).generate([*others, seeded])
    assert results[-1].ids == alone.ids != results[-2].ids
    _assert_alone(model, others[:3], results[:3])


def test_engine_penalty_equals_transformers() -> None:
    model = tiny_model()
    sampling = Sampling(repetition_penalty=0.5, max_new_tokens=8)
    requests = [
        _request(text_ids(5, 2), sampling=sampling),
        _mixed()[2],
        _request(text_ids(9, 4), sampling=sampling),
    ]
    _assert_alone(model, requests, Engine(model).generate(requests))


def test_engine_logprobs_are_those_of_a_full_forward() -> None:
    model = tiny_model()
    request = _request(text_ids(5, 2), has_logprobs=True)
    result, other = Engine(model).generate([request, _mixed()[1]])
    assert other.logprobs is None and result.logprobs is not None
    ids = torch.tensor([[*text_ids(5, 2)[0].tolist(), *result.ids]])
    with torch.no_grad():
        log_p = model(ids).logits.log_softmax(-1)[0, 4:-1]
    expected = log_p.gather(1, torch.tensor(result.ids)[:, None]).squeeze(1)
    torch.testing.assert_close(torch.tensor(result.logprobs), expected, atol=1e-4, rtol=0)


# ------------------------------------------------------------------ errors


def test_engine_error_of_a_callback_ends_its_request_alone() -> None:
    model = tiny_model()
    engine = Engine(model)

    def fail(piece: str) -> None:
        raise KeyboardInterrupt

    bad = engine.submit(_request(text_ids(4, 1), decode=str, on_text=fail))
    good = engine.submit(_mixed()[3])
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    assert bad.result.finish_reason == "cancelled" and engine.num_running == 1
    assert set(_drain(engine)) == {bad, good}
    assert list(good.result.ids) == _alone(model, good.request)


@pytest.mark.parametrize(("failing_pass", "num_answered"), [(0, 3), (3, 4)])
def test_engine_failure_in_a_pass_mixes_nothing_up(failing_pass: int, num_answered: int) -> None:
    """Pass 0 reads the prompt that is given up; pass 3 decodes, and is made again."""
    model = tiny_model()
    engine = Engine(model)
    generations = [engine.submit(request) for request in _mixed()[:2]]
    engine.step()
    generations += [engine.submit(request) for request in (_mixed()[2], _mixed()[5])]
    passes = iter(range(100))

    def fail(*_: Any) -> None:
        if next(passes) == failing_pass:
            raise RuntimeError("out of memory")

    hook = model.model.language_model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        _drain(engine)
    hook.remove()
    _drain(engine)
    answered = [g for g in generations if g.finish_reason != "cancelled"]
    assert len(answered) == num_answered
    _assert_alone(model, [g.request for g in answered], [g.result for g in answered])


@pytest.mark.parametrize(("failing_choice", "num_answered"), [(1, 3), (2, 4)])
def test_engine_interrupt_while_choosing_mixes_nothing_up(
    monkeypatch: pytest.MonkeyPatch, failing_choice: int, num_answered: int
) -> None:
    """Choice 1 is of a prompt's first token; before choice 2, tokens were read."""
    model, requests = tiny_model(), [_mixed()[n] for n in (0, 1, 5, 8)]
    engine = Engine(model)
    choices = iter(range(100))

    def choose(*args: Any) -> list[int]:
        if next(choices) == failing_choice:
            raise KeyboardInterrupt
        return choose_tokens(*args)

    monkeypatch.setattr(engine_module, "choose_tokens", choose)
    generations = [engine.submit(requests[0])]
    engine.step()
    generations.insert(1, engine.submit(requests[1]))
    with pytest.raises(KeyboardInterrupt):
        _drain(engine)
    generations += [engine.submit(request) for request in requests[2:]]
    _drain(engine)
    answered = [g for g in generations if g.finish_reason != "cancelled"]
    assert len(answered) == num_answered
    _assert_alone(model, [g.request for g in answered], [g.result for g in answered])


@pytest.mark.parametrize("failing_pass", [0, 2])
def test_engine_logits_that_are_no_numbers_end_their_request_alone(failing_pass: int) -> None:
    """Nor do keys and values that are none reach who takes its place."""
    model = tiny_model(attention="sdpa")
    engine = Engine(model)
    requests = [_mixed()[3], _mixed()[0], _mixed()[6]]
    generations = [engine.submit(request) for request in requests]
    passes = iter(range(100))

    def fail(module: object, args: object, out: Tensor) -> Tensor:
        if next(passes) == failing_pass:
            out[0] = float("nan")  # a row of the first request
        return out

    hook = model.model.language_model.layers[0].self_attn.v_proj.register_forward_hook(fail)
    with pytest.raises(CheckpointError, match="not finite"):
        _drain(engine)
    hook.remove()
    _drain(engine)
    later = engine.generate(_mixed())
    assert generations[0].result.finish_reason == "cancelled"
    _assert_alone(model, requests[1:], [g.result for g in generations[1:]])
    _assert_alone(model, _mixed(), later)


def test_engine_generate_that_is_refused_leaves_nothing_behind() -> None:
    engine = Engine(tiny_model())
    with pytest.raises(PromptError):
        engine.generate([*_mixed(), _request(image_ids(1))])
    engine.step()
    assert engine.num_waiting == engine.num_running == 0
