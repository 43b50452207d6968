"""An answer on its way: where it ends, what of its text is certain, how its tokens are drawn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mono_internvl.errors import ConfigError, PromptError
from mono_internvl.generation.few_rows import FewRows
from mono_internvl.generation.request import Generation, Request
from mono_internvl.generation.sampling import Sampling, choose_tokens


def _letters(ids: list[int]) -> str:
    return "".join(map(chr, ids))


def _say(text: str, **fields: Any) -> tuple[Generation, list[str]]:
    pieces: list[str] = []
    generation = Generation(Request([1], decode=_letters, on_text=pieces.append, **fields))
    for letter in text:
        if generation.finish_reason is None:
            generation.take(ord(letter))
    return generation, pieces


def test_generation_stop_id_is_no_part_of_the_answer() -> None:
    generation, pieces = _say("one.two", stop_ids={ord(".")})
    result = generation.result
    assert (result.text, result.finish_reason) == ("one", "stop")
    assert "".join(pieces) == "one" and len(result.ids) == 3


@pytest.mark.parametrize("stop", ["END", "\nUser", "e\n"])
def test_generation_stop_string_is_never_handed_out(stop: str) -> None:
    said = f"some{stop[0]}thing {stop} else"
    generation, pieces = _say(said, stop_strings=("never", stop))
    expected, given = said.partition(stop)[0], "".join(pieces)
    assert generation.result.text == given == expected
    assert generation.result.finish_reason == "stop"


def test_generation_text_held_back_for_a_stop_string_comes_at_the_end() -> None:
    generation, pieces = _say("abc EN", stop_strings=("END",), sampling=Sampling(max_new_tokens=6))
    assert "".join(pieces) == generation.result.text == "abc EN"
    assert generation.finish_reason == "length" and "E" not in "".join(pieces[:-1])


def test_generation_has_no_result_before_its_end() -> None:
    generation = Generation(Request([1]))
    with pytest.raises(PromptError, match="not ended"):
        _ = generation.result
    generation.cancel()
    assert generation.result.text is None and generation.result.num_prompt == 1


def test_request_refuses_what_it_cannot_do() -> None:
    with pytest.raises(PromptError, match="empty"):
        Request([])
    with pytest.raises(ConfigError, match="on_text without decode"):
        Request([1], on_text=print)
    with pytest.raises(ConfigError, match="stop_strings without decode"):
        Request([1], stop_strings=("a",))
    with pytest.raises(ConfigError, match="one is empty"):
        Request([1], stop_strings=("",), decode=_letters)


def test_choose_tokens_follows_the_probabilities() -> None:
    wanted = torch.tensor([0.5, 0.3, 0.0, 0.2])
    generator = torch.Generator().manual_seed(0)
    n = 2000
    found = choose_tokens(
        wanted.log().expand(n, 4), [Sampling(temperature=1.0)] * n, [()] * n, [generator] * n
    )
    counts = torch.bincount(torch.tensor(found), minlength=4) / n
    assert counts[2] == 0
    torch.testing.assert_close(counts, wanted, atol=0.04, rtol=0)


@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}])
def test_choose_tokens_limits_are_greedy(options: dict[str, Any]) -> None:
    logits = torch.randn(5, 50, generator=torch.Generator().manual_seed(0))
    sampling = Sampling(**{"temperature": 1.0, **options})
    found = choose_tokens(logits, [sampling] * 5, [()] * 5, [None] * 5)
    assert found == logits.argmax(-1).tolist()


@pytest.mark.parametrize("rows", [1, 3, 4, 8, 32, 33])
def test_few_rows_gives_the_same_numbers(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(rows)
    x, w, b = (torch.randn(*shape, generator=generator) for shape in ((rows, 64), (96, 64), (96,)))
    plain, w = w, torch.nn.Parameter(w, requires_grad=False)
    expected = [F.linear(x, w), F.linear(x, w, b)]
    calls: list[str] = []

    def counted(name: str) -> Callable[..., Tensor]:
        original = getattr(torch, name)
        return lambda *args: (calls.append(name), original(*args))[1]  # type: ignore[func-returns-value]

    for name in ("mm", "addmm"):
        monkeypatch.setattr(torch, name, counted(name))
    with FewRows():
        found = [F.linear(x, w), F.linear(x, w, b)]
        F.linear(x, plain)
        F.linear(x.bfloat16(), torch.nn.Parameter(w.bfloat16()))
        with torch.autocast("cpu", torch.bfloat16):
            assert F.linear(x, w).dtype == torch.bfloat16
    assert calls == (["mm", "addmm"] if 4 <= rows <= 32 else [])
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.is_contiguous()
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=0)
