"""Batches of prompts: bounded padded size, and no prompt lost."""

import pytest

from mono_internvl.evaluation.prompts import EncodedPrompt, batches


@pytest.mark.parametrize(
    ("lengths", "sizes"),
    [
        ([10] * 7, [4, 3]),
        ([10, 10, 3000, 10, 10], [2, 1, 2]),  # a long one stands alone
        ([4000] * 4, [2, 2]),  # 4 prompts of 2,048 tokens at most
        ([10**6], [1]),
        ([], []),
    ],
)
def test_batches_bound_the_padded_size(lengths: list[int], sizes: list[int]) -> None:
    prompts = [EncodedPrompt(i, [0] * length, None) for i, length in enumerate(lengths)]
    found = list(batches(prompts, 4))
    assert [len(batch) for batch in found] == sizes
    assert [prompt for batch in found for prompt in batch] == prompts
