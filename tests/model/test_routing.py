"""Routing as data: every row once, through its own module, back in its place."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mono_internvl.experts import Routing
from mono_internvl.model.layers import route

masks = st.lists(st.booleans(), min_size=1, max_size=40).map(torch.tensor)


@given(masks)
@settings(max_examples=60, deadline=None)
def test_routing_takes_every_row_once(mask: torch.Tensor) -> None:
    routing = Routing.from_mask(mask)
    assert routing.num_visual == int(mask.sum())
    assert routing.num_text == int((~mask).sum())
    if routing.row_order is None:
        assert routing.text_rows is None and routing.visual_rows is None
        assert 0 in (routing.num_text, routing.num_visual)
        return
    assert routing.text_rows is not None and routing.visual_rows is not None
    assert not mask[routing.text_rows].any() and mask[routing.visual_rows].all()
    gathered = torch.cat((routing.text_rows, routing.visual_rows))
    assert torch.equal(gathered[routing.row_order], torch.arange(mask.numel()))


@given(masks)
@settings(max_examples=60, deadline=None)
def test_route_equals_masked_sum_of_both(mask: torch.Tensor) -> None:
    torch.manual_seed(0)
    text, visual = nn.Linear(6, 6), nn.Linear(6, 6)
    x = torch.randn(mask.numel(), 6)
    expected = torch.where(mask[:, None], visual(x), text(x))
    assert torch.allclose(route(x, Routing.from_mask(mask), text, visual), expected, atol=1e-6)
    assert torch.equal(route(x, Routing.from_mask(mask), text, None), text(x))


def test_route_sends_no_row_through_the_other_module() -> None:
    text, visual = nn.Linear(4, 4), nn.Linear(4, 4)
    rows: dict[str, int] = {}
    text.register_forward_hook(lambda m, args, out: rows.update(text=args[0].shape[0]))
    visual.register_forward_hook(lambda m, args, out: rows.update(visual=args[0].shape[0]))
    x = torch.randn(5, 4)
    route(x, Routing.from_mask(torch.tensor([False, True, True, False, True])), text, visual)
    assert rows == {"text": 2, "visual": 3}
    for is_visual, used in ((False, "text"), (True, "visual")):
        rows.clear()
        route(x, Routing.from_mask(torch.full((5,), is_visual)), text, visual)
        assert rows == {used: 5}


def test_route_keeps_overflow_of_one_expert_from_the_other() -> None:
    text, visual = nn.Linear(2, 2), nn.Linear(2, 2)
    visual.weight.data.fill_(float("inf"))
    out = route(torch.ones(2, 2), Routing.from_mask(torch.tensor([False, True])), text, visual)
    assert torch.isfinite(out[0]).all() and not torch.isfinite(out[1]).any()


def test_routing_of_batch_counts_flattened_rows() -> None:
    mask = torch.zeros(2, 3, dtype=torch.bool)
    mask[1, 0] = True
    routing = Routing.from_mask(mask)
    assert routing.visual_rows is not None and routing.visual_rows.tolist() == [3]


@pytest.mark.parametrize("mask", [[False, True], [True, True], [False, False]])
def test_routing_to_device_keeps_content(mask: list[bool]) -> None:
    routing = Routing.from_mask(torch.tensor(mask)).to(torch.device("meta"))
    assert (routing.num_text, routing.num_visual) == (mask.count(False), mask.count(True))
    for rows in (routing.text_rows, routing.visual_rows, routing.row_order):
        assert rows is None or rows.device.type == "meta"


def test_all_text_routing() -> None:
    assert Routing.all_text(7) == Routing(num_text=7, num_visual=0)
