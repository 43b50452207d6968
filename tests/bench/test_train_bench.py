"""`bench train`: what a stage's step owes is what it executes, and its row says so."""

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mono_internvl.bench.models import Setting, prompt_of, random_model, size_of
from mono_internvl.bench.train import bench_stages, bench_step, stage_size
from mono_internvl.costs.training import SampleShape, step_flops
from mono_internvl.errors import ConfigError
from mono_internvl.recipes.evip import EVIP
from mono_internvl.training.recipe import Rule, Stage
from mono_internvl.training.rules import apply_rules

CPU = torch.device("cpu")
TINY = size_of("tiny")
HEAD_ALONE = dataclasses.replace(EVIP.stages[0], rules=(Rule(r"lm_head\.", 1e-4), Rule(".*", None)))
UPPER_LAYER = dataclasses.replace(
    EVIP.stages[0], rules=(Rule(r"layers\.1\.self_attn\.o_proj", 1e-4), Rule(".*", None))
)
SETTING = Setting(TINY, torch.float32, CPU, 1, "mono-internvl bench train")


@pytest.mark.parametrize("variant", ["v1", "v1.5"])
@pytest.mark.parametrize(
    "stage", [*EVIP.stages, HEAD_ALONE, UPPER_LAYER], ids=("s11", "s12", "s13", "s2", "head", "o")
)
def test_owed_operations_are_those_executed(stage: Stage, variant: str) -> None:
    model = random_model(TINY, variant, torch.float32, CPU, "blocked").train()
    groups = apply_rules(model, model.config, stage)
    prompt = prompt_of(TINY, model.config, torch.float32, CPU)
    labels = prompt.input_ids.clone()
    labels[:, : TINY.tokens - 3] = -100
    with FlopCounterMode(display=False) as counter:
        model(
            prompt.input_ids, prompt.pixel_values, labels=labels, logits_to_keep=None
        ).loss.backward()
    executed = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    text = TINY.text_before + TINY.text_after
    names = [name for group in groups for name in group.names]
    owed = step_flops(model.config, names, SampleShape(TINY.visual_tokens, text, 3))
    # Queries of the last layer are made for all rows; owed are those of rows with a label.
    unread = {"v1": (TINY.tokens - 3, 0), "v1.5": (text - 3, TINY.visual_tokens)}[variant]
    more = 0
    for rows, part in zip(unread, ("q_proj", "q_proj_visual"), strict=True):
        name = f"model.language_model.layers.1.self_attn.{part}.weight"
        has_before = stage is not HEAD_ALONE and stage is not UPPER_LAYER
        more += 2 * TINY.width**2 * rows * (1 + has_before + (name in names))
    assert owed.linear + more == executed["aten.mm"] + executed.get("aten.addmm", 0)
    convolutions = ("aten.convolution", "aten.convolution_backward")
    assert owed.patch_embedding == sum(executed.get(name, 0) for name in convolutions)


def test_owed_attention_is_causal_and_thrice_where_something_learns() -> None:
    config = random_model(TINY, "v1", torch.float32, CPU, "sdpa").config
    sample = SampleShape(8, 8, 3)
    pair = 4 * TINY.heads * config.text_config.head_dim
    once = pair * (sum(range(1, 17)) + 13 + 14 + 15)
    assert step_flops(config, ["lm_head.weight"], sample).attention == once
    learned = ["model.projector.fc1.weight"]
    assert step_flops(config, learned, sample).attention == 3 * once
    config.text_config.sliding_window, config.text_config.sliding_layers = 5, [1, 0]
    once = pair * (sum(range(1, 6)) + 11 * 5 + 13 + 14 + 15)
    assert step_flops(config, ["lm_head.weight"], sample).attention == once


def test_operations_of_what_is_not_counted_are_refused() -> None:
    config = random_model(TINY, "modular", torch.float32, CPU, "sdpa").config
    with pytest.raises(ConfigError, match="vit"):
        step_flops(config, [], SampleShape(8, 8, 3))
    config = random_model(TINY, "v1", torch.float32, CPU, "sdpa").config
    for sample in (SampleShape(7, 8, 3), SampleShape(8, 8, 8), SampleShape(8, 8, 0)):
        with pytest.raises(ConfigError, match=r"labels|a multiple of"):
            step_flops(config, [], sample)


def test_step_rows_say_attention_and_skip() -> None:
    found = [(row.notes["attention"], row.notes["last_layer_skip"]) for row in bench_step(SETTING)]
    assert found == [("eager", False), ("eager", True), ("blocked", True), ("blocked", True)]


def test_stage_rows_name_the_published_lengths() -> None:
    sizes = [stage_size(size_of("2b"), stage) for stage in EVIP.stages]
    assert [size.tokens for size in sizes] == [1425, 1925, 4096, 8192]
    assert [size.visual_tokens for size in sizes] == [1280, 1792, 3328, 6400]
    quarter = [stage_size(size_of("middle"), stage).tokens for stage in EVIP.stages]
    assert quarter == [356, 481, 1024, 2048]


def test_stage_rows_hold_rate_memory_and_operations() -> None:
    selective = dataclasses.replace(EVIP.stages[0], recompute="selective")
    plain, again = (next(bench_stages(SETTING, [s])) for s in (EVIP.stages[0], selective))
    notes = plain.notes
    assert notes["tokens_per_second"] == pytest.approx(
        notes["samples"] * notes["tokens"] / plain.p50, rel=1e-2
    )
    assert notes["peak_bytes"] and notes["owed_share_of_gemm_rate"] > 0
    assert "mfu" not in notes  # no data sheet of a CPU
    assert again.notes["recompute"] == "selective"
    assert again.notes["owed_gflop"] == notes["owed_gflop"]
    assert plain.ratio is None and plain.baseline is None
