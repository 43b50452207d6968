"""Nothing inside the model waits for the device, and `torch.compile` sees one graph."""

import importlib.util
from typing import Any

import pytest
import torch
import toy_experts
from test_setting import IMAGE_TOKEN, logits_inputs, small_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import StaticCache

from mono_internvl.bench.dense import DENSE, register_dense
from mono_internvl.errors import PromptError
from mono_internvl.experts import Routing
from mono_internvl.model.modeling import MonoInternVLForConditionalGeneration

WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal")
EXPERTS = ("ffn", "qkv", "o")
TOY = toy_experts.register()
register_dense()


class WaitingOperators(TorchDispatchMode):
    """Names of the operators that would bring a value from the device to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.split(".")[0]
        if name in WAITING or (name == "index" and any(_is_mask(i) for i in args[1])):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def _is_mask(index: Tensor | None) -> bool:
    return index is not None and index.dtype == torch.bool


def _routed() -> tuple[Tensor, Tensor, Routing]:
    ids, pixels = logits_inputs()
    return ids, pixels, Routing.from_mask(ids == IMAGE_TOKEN)


def _model(name: str, rope: str = "default") -> MonoInternVLForConditionalGeneration:
    model = small_model(EXPERTS)
    model.config.text_config.rope_parameters = {
        "rope_type": rope,
        "rope_theta": 10_000.0,
        "factor": 2.0,
    }
    model.set_experts_implementation(name)
    return model


@torch.no_grad()
@pytest.mark.parametrize("name", ["eager", TOY, DENSE])
def test_forward_with_routing_never_waits(name: str) -> None:
    model = _model(name)
    ids, pixels, routing = _routed()
    expected = model(ids, pixels).logits
    with WaitingOperators() as waiting:
        found = model(ids, pixels, routing=routing).logits
    assert waiting.found == []
    assert torch.equal(found, expected)


@torch.no_grad()
def test_forward_without_routing_waits_before_the_first_layer_only() -> None:
    model = _model(TOY)
    ids, pixels, _ = _routed()
    seen: list[int] = []
    waiting = WaitingOperators()
    for hook in (
        model.model.language_model.layers[0].register_forward_pre_hook,
        model.model.language_model.layers[-1].register_forward_hook,
    ):
        hook(lambda *args: seen.append(len(waiting.found)))
    with waiting:
        model(ids, pixels)
    assert seen[0] > 0 and seen[0] == seen[1] == len(waiting.found)


@torch.no_grad()
@pytest.mark.parametrize("rope", ["default", "dynamic"])
def test_decoding_step_never_waits(rope: str) -> None:
    model = _model("auto", rope)
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=16)
    ids, pixels, routing = _routed()
    model(ids, pixels, past_key_values=cache, routing=routing)
    positions = torch.full((ids.shape[0], 1), ids.shape[1])
    with WaitingOperators() as waiting:
        model(ids[:, -1:], past_key_values=cache, position_ids=positions)
        model(ids[:, -1:], past_key_values=cache, logits_to_keep=1)
    assert waiting.found == []
    model.config.text_config.max_position_embeddings = 15  # less than the cache has room for
    with waiting:
        model(ids[:, -1:], past_key_values=cache, position_ids=positions)
    assert bool(waiting.found) is (rope == "dynamic")


def test_routing_of_another_prompt_is_refused() -> None:
    ids, pixels, _ = _routed()
    with pytest.raises(PromptError, match="3 image tokens but the images give 8 features"):
        _model("auto")(ids, pixels, routing=Routing.from_mask(torch.arange(ids.numel()) < 3))


def _graph_breaks(model: torch.nn.Module, *inputs: Tensor, **options: Any) -> int:
    torch._dynamo.reset()
    with torch.no_grad():
        return int(torch._dynamo.explain(model)(*inputs, **options).graph_break_count)


@pytest.mark.parametrize("name", ["eager", TOY])
def test_compiled_forward_has_no_graph_break(name: str) -> None:
    model = _model(name)
    ids, pixels, routing = _routed()
    assert _graph_breaks(model, ids, pixels, routing=routing, use_cache=False) == 0
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        expected = model(ids, pixels).logits
        found = compiled(ids, pixels, routing=routing, use_cache=False).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_graph_breaks_are_counted() -> None:
    ids, pixels, _ = _routed()
    assert _graph_breaks(_model("eager"), ids, pixels, use_cache=False) > 0


def test_compiled_training_step_gives_the_gradients() -> None:
    torch._dynamo.reset()
    model = _model(TOY)
    ids, pixels, routing = _routed()
    gradients = []
    for forward in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        model.zero_grad()
        forward(ids, pixels, routing=routing, use_cache=False).logits.square().mean().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["eager", TOY, "triton", "auto"])
@torch.no_grad()
def test_decoding_step_is_captured_as_a_cuda_graph(name: str) -> None:
    if name == "triton" and importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed (extra `gpu`)")
    model = _model(name, "dynamic").cuda()
    ids, pixels, routing = _routed()
    ids, routing = ids.cuda(), routing.to(torch.device("cuda"))

    def prefilled() -> StaticCache:
        cache = StaticCache(config=model.config.get_text_config(), max_cache_len=16)
        model(ids, pixels.cuda(), past_key_values=cache, routing=routing)
        return cache

    token, positions = ids[:, -1:].clone(), torch.full((ids.shape[0], 1), ids.shape[1]).cuda()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # as torch asks for before a capture
        expected = model(token, past_key_values=prefilled(), position_ids=positions).logits
    torch.cuda.current_stream().wait_stream(stream)
    cache, graph = prefilled(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = model(token, past_key_values=cache, position_ids=positions).logits
    graph.replay()
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
