"""Answers over HTTP, asked for as users do: with OpenAI's own client, and in plain requests."""

from __future__ import annotations

import base64
import io
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
from served import CHAT, JSON, NAME, Served, chat, data_uri, picture, user

from mono_internvl import ChatSession
from mono_internvl.generation.sampling import Sampling
from mono_internvl.serving.http.answers import token_text

QUESTION = "what colour is this?"


@pytest.fixture
def client(served: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=served.url, api_key="none", max_retries=0)


def _alone(session: ChatSession, question: str, *pictures: Any, **options: Any) -> Any:
    session.reset()
    session.sampling = Sampling(max_new_tokens=8)
    return session.ask(question, list(pictures), **options)


def _text(answer: dict[str, Any]) -> str:
    text: str = answer["choices"][0]["message"]["content"]
    return text


def test_answer_is_that_of_a_chat(client: openai.OpenAI, session: ChatSession) -> None:
    pictures = [picture(0), picture(1)]
    found = client.chat.completions.create(**chat(user(QUESTION, *map(data_uri, pictures))))
    expected = _alone(session, QUESTION, *pictures)
    (choice,) = found.choices
    assert choice.message.content == expected.text
    assert choice.message.role == "assistant" and choice.finish_reason == expected.finish_reason
    assert found.usage is not None and found.model == NAME
    assert found.usage.prompt_tokens == expected.tokens.prompt
    assert found.usage.completion_tokens == expected.tokens.generated
    assert found.usage.total_tokens == expected.tokens.prompt + expected.tokens.generated


def test_a_conversation_goes_on(served: Served, session: ChatSession) -> None:
    first = _alone(session, QUESTION, picture(0))
    messages = [
        {"role": "developer", "content": "be brief"},
        user(QUESTION, data_uri(picture(0))),
        {"role": "assistant", "content": first.text},
        user("and this?", data_uri(picture(1))),
    ]
    status, _, answer = served.ask(chat(*messages))
    prompt = session.processor.encode_prompt(
        [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": [_image(0), {"type": "text", "text": QUESTION}]},
            {"role": "assistant", "content": first.text},
            {"role": "user", "content": [_image(1), {"type": "text", "text": "and this?"}]},
        ]
    )
    assert status == 200 and answer["usage"]["prompt_tokens"] == prompt["input_ids"].shape[1]


def _image(seed: int) -> dict[str, Any]:
    return {"type": "image", "image": picture(seed)}


def test_stream_says_the_same(client: openai.OpenAI) -> None:
    request = chat(user(QUESTION, data_uri(picture(0))), logprobs=True, top_logprobs=2)
    whole = client.chat.completions.create(**request)
    stream = client.chat.completions.create(
        **request, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    choices = [chunk.choices[0] for chunk in chunks if chunk.choices]
    assert choices[0].delta.role == "assistant"
    assert "".join(c.delta.content or "" for c in choices) == whole.choices[0].message.content
    assert [c.finish_reason for c in choices if c.finish_reason] == ["length"]
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[-1].usage is not None and whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    tokens = [token for c in choices if c.logprobs for token in c.logprobs.content or ()]
    assert whole.choices[0].logprobs is not None
    expected = whole.choices[0].logprobs.content or []
    assert [token.token for token in tokens] == [token.token for token in expected]
    assert len(tokens) == 8


def test_logprobs_are_of_the_model(served: Served) -> None:
    _, _, answer = served.ask(chat(user(QUESTION), logprobs=True, top_logprobs=3))
    content = answer["choices"][0]["logprobs"]["content"]
    for token in content:
        likeliest = [one["logprob"] for one in token["top_logprobs"]]
        assert len(likeliest) == 3 and likeliest == sorted(likeliest, reverse=True)
        assert token["logprob"] == likeliest[0] <= 0  # greedy
        assert token["token"] == token["top_logprobs"][0]["token"]
        assert token["bytes"] is None or bytes(token["bytes"]).decode() == token["token"]
    _, _, bare = served.ask(chat(user(QUESTION), logprobs=True))
    assert bare["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []


def test_tokens_spell_the_text(session: ChatSession) -> None:
    tokenizer = session.processor.tokenizer
    ids = tokenizer.encode_plain("a red one, two").ids
    assert "".join(token_text(tokenizer, index) for index in ids).strip() == "a red one, two"


def test_samples_follow_their_seed(served: Served) -> None:
    def texts(seed: int) -> list[str]:
        request = chat(user(QUESTION), n=3, temperature=1.5, seed=seed, top_p=0.95)
        _, _, answer = served.ask(request)
        assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
        assert answer["usage"]["completion_tokens"] > 3
        return [choice["message"]["content"] for choice in answer["choices"]]

    assert texts(1) == texts(1) != texts(2)
    assert len(set(texts(1))) > 1


def test_stream_of_several_answers(client: openai.OpenAI) -> None:
    request = chat(user(QUESTION), n=3, temperature=1.5, seed=4)
    texts = ["", "", ""]
    ends = []
    for chunk in client.chat.completions.create(**request, stream=True):
        (choice,) = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        ends += [choice.index] if choice.finish_reason else []
    whole = client.chat.completions.create(**request)
    assert texts == [choice.message.content for choice in whole.choices]
    assert sorted(ends) == [0, 1, 2]


@pytest.mark.parametrize("is_list", [False, True])
def test_stop_cuts_the_answer(served: Served, is_list: bool) -> None:
    text = _text(served.ask(chat(user(QUESTION)))[2])
    stop = text[len(text) // 2 :][:3]
    _, _, answer = served.ask(chat(user(QUESTION), stop=[stop, "unsaid"] if is_list else stop))
    assert _text(answer).strip() == text[: text.index(stop)].strip()
    assert answer["choices"][0]["finish_reason"] == "stop"


def test_either_name_bounds_the_answer(served: Served) -> None:
    request = chat(user(QUESTION))
    for name in ("max_tokens", "max_completion_tokens"):
        _, _, answer = served.ask({**request, "max_tokens": None, name: 2})
        assert answer["usage"]["completion_tokens"] == 2
    _, _, answer = served.ask({**request, "max_tokens": 10**30})
    assert answer["usage"]["total_tokens"] <= 512  # what the model reads


def test_image_in_base64_and_in_low_detail(served: Served, session: ChatSession) -> None:
    wide = picture(3).resize((168, 56))
    buffer = io.BytesIO()
    wide.save(buffer, "PNG")
    plain = base64.b64encode(buffer.getvalue()).decode()
    _, _, answer = served.ask(chat(user(QUESTION, plain)))
    assert _text(answer) == _alone(session, QUESTION, wide).text
    low = user(QUESTION, plain)
    low["content"][0]["image_url"]["detail"] = "low"
    _, _, answer = served.ask(chat(low))
    assert (
        answer["usage"]["prompt_tokens"]
        == _alone(session, QUESTION, wide, max_tiles=1).tokens.prompt
    )


def test_an_image_is_read_once_for_all_questions(served: Served) -> None:
    uri = data_uri(picture(77))
    _, _, first = served.ask(chat(user(QUESTION, uri)))
    _, _, later = served.ask(chat(user("say one two three", uri)))
    _, _, other = served.ask(chat(user("say one two three", data_uri(picture(78)))))
    cached = [
        answer["usage"]["prompt_tokens_details"]["cached_tokens"]
        for answer in (first, later, other)
    ]
    assert cached[1] >= cached[0] + 4  # visual tokens
    assert cached[2] == cached[0]


def test_clients_side_by_side_get_what_they_get_alone(served: Served) -> None:
    words = ("one", "two", "three", "four", "five", "six", "red", "blue")
    requests = [
        chat(
            user(f"say {word} {QUESTION}", *([data_uri(picture(i % 3))] * (i % 3))),
            max_tokens=4 + i % 5,
        )
        for i, word in enumerate(words * 3)
    ]
    alone = [_text(served.ask(request)[2]) for request in requests]
    assert len(set(alone)) > 4
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda request: _text(served.ask(request)[2]), requests))
    assert together == alone
    served.wait_until_idle()
    assert served.service.admission.bytes == 0


def test_models_health_and_metrics(served: Served, client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).id == NAME
    assert served.ask(None, path="/health", method="GET")[2] == {"status": "ok"}
    before = served.ask(None, path="/metrics", method="GET")[2]
    served.ask(chat(user(QUESTION)))
    served.ask({**chat(user(QUESTION)), "stream": True})
    after = served.ask(None, path="/metrics", method="GET")[2]
    for name, more in (
        (f'mono_internvl_responses_total{{path="{CHAT}",status="200"}}', 2),
        ("mono_internvl_generated_tokens_total", 16),
        ("mono_internvl_answer_seconds_count", 2),
        ("mono_internvl_first_text_seconds_count", 1),
    ):
        assert _metric(after, name) - _metric(before, name) == more, name
    assert _metric(after, "mono_internvl_answers_under_way") == 0
    assert _metric(after, "mono_internvl_prefix_bytes") > 0


def _metric(text: str, name: str) -> float:
    return next(
        (float(line.split()[-1]) for line in text.splitlines() if line.startswith(name + " ")), 0.0
    )


def test_errors_reach_the_client_as_its_own(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="there is no 'gpt'"):
        client.chat.completions.create(model="gpt", messages=[{"role": "user", "content": "hi"}])
    with pytest.raises(openai.BadRequestError, match="temperature") as error:
        client.chat.completions.create(**chat(user("hi"), temperature=3.0))
    assert error.value.param == "temperature"


def test_stream_is_one_of_events(served: Served) -> None:
    _, headers, text = served.ask(chat(user(QUESTION), stream=True), headers=JSON)
    assert headers["content-type"].startswith("text/event-stream")
    events = text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(json.loads(event.removeprefix("data: ")) for event in events[:-2])
