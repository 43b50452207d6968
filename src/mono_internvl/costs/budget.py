"""`mono-internvl plan`: what a recipe costs on a cluster, before any money is spent.

Samples are as long as a stage lets them be unless their tokens are given, so that every figure is
an upper bound. Operations are those that are owed (`costs.training`): frozen weights owe no
gradient, and recomputation is nothing owed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass

from mono_internvl.configuration.model import MonoInternVLConfig
from mono_internvl.costs.accelerators import Accelerator
from mono_internvl.costs.inference import skeleton
from mono_internvl.costs.kept import KeptBytes, Sketch
from mono_internvl.costs.training import SampleShape, step_flops
from mono_internvl.errors import ConfigError
from mono_internvl.training.recipe import Recipe, Stage
from mono_internvl.training.rules import apply_rules

JPEG_BYTES_OF_PIXEL = 0.25
"""Of pictures as the web has them; ours, for the volume of data alone."""
BYTES_OF_TOKEN = 4
"""Of text; ours, likewise."""
USABLE_MEMORY = 0.9
"""Of a device: temporaries and what the allocator wastes need the rest; ours."""
_PIXELS_OF_TOKEN = 28 * 28
_DAY_S = 86_400
_FP32 = 4


@dataclass(frozen=True)
class Fleet:
    """What a recipe is to run on.

    Attributes:
        gpus: How many.
        gpu: Of what kind.
        mfu: Operations owed per second over the peak rate, from 0 to 1.
    """

    gpus: int
    gpu: Accelerator
    mfu: float

    def __post_init__(self) -> None:
        if self.gpus < 1:
            raise ConfigError(f"gpus={self.gpus}; expected a number >= 1")
        if not 0 < self.mfu <= 1:
            raise ConfigError(f"mfu={self.mfu}; expected a number above 0 and up to 1")

    def days(self, flops: float) -> float:
        """How long so many operations take."""
        return flops / (self.peak * self.mfu * _DAY_S)

    def mfu_of(self, flops: float, days: float) -> float:
        """The ratio of the peak rate at which so many operations take so many days."""
        return flops / (self.peak * days * _DAY_S)

    @property
    def peak(self) -> float:
        """Operations per second of all of them."""
        return self.gpus * self.gpu.peak_tflops * 1e12


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU in a training step; temporaries and what the allocator wastes come on top.

    Attributes:
        weights: fp32, frozen ones included, and those of a reference where there is one.
        gradients: fp32, of what is trainable.
        moments: Two in fp32 for each of these.
        kept: For the backward pass, weights in bf16 included.
    """

    weights: int
    gradients: int
    moments: int
    kept: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.weights + self.gradients + self.moments + self.kept


@dataclass(frozen=True)
class Layout:
    """How a step is laid out on the fleet.

    Attributes:
        accumulation: Micro-batches of a step on each GPU; 0 where packing decides.
        samples: Of a micro-batch; 1 is a packed row.
        recompute: As in the stage, or "full".
        is_sharded: Whether weights, gradients and moments are spread over all GPUs.
        memory: Of one GPU.
        fits: Whether it has so much.
    """

    accumulation: int
    samples: int
    recompute: str
    is_sharded: bool
    memory: Memory
    fits: bool


@dataclass(frozen=True)
class StageBudget:
    """What a stage costs.

    Attributes:
        name: Of the stage.
        sample: Tokens of every sample.
        samples: Of all steps.
        tokens: Of all samples.
        flops: Operations owed.
        days: On the fleet, at its ratio of the peak rate.
        data_bytes: Pictures and texts of all samples, each counted once.
        trainable: Parameters.
        checkpoint_bytes: Of the finished stage.
        state_bytes: Of a state that is saved meanwhile.
        layouts: The best one with replicated weights, and the best one with sharded weights.
    """

    name: str
    sample: SampleShape
    samples: int
    tokens: int
    flops: float
    days: float
    data_bytes: int
    trainable: int
    checkpoint_bytes: int
    state_bytes: int
    layouts: tuple[Layout, ...]


def budget(
    recipe: Recipe,
    config: MonoInternVLConfig,
    fleet: Fleet,
    *,
    tokens: tuple[int, int] | None = None,
    records: int | None = None,
) -> list[StageBudget]:
    """What the stages of a recipe cost, in order.

    Args:
        recipe: What is to be trained.
        config: Of the model; without a vision tower.
        fleet: What it runs on.
        tokens: Visual and text tokens of a mean sample; as long as each stage allows unless given.
        records: Of one pass over the data, where stages count epochs.

    Raises:
        ConfigError: A stage counts epochs and `records` is not given, its batch does not divide
            among the GPUs, or `tokens` are no sample.
        RecipeError: The rules do not fit the model.
    """
    sketch = Sketch(config)
    return [_stage_budget(stage, sketch, config, fleet, tokens, records) for stage in recipe.stages]


def longest_sample(stage: Stage, config: MonoInternVLConfig) -> SampleShape:
    """A sample with as many tiles, the thumbnail among them, and tokens as a stage lets it have.

    All of its text but what encloses the image has a label. Where the tiles fill it, so many are
    left out that a sixteenth of it is text.
    """
    per_tile, separator = config.num_image_tokens_per_tile, int(config.has_image_marks)
    if config.has_image_marks:  # most newlines where tiles stand one below the other
        per_tile += math.isqrt(per_tile)
    tiles = min(stage.max_tiles + 1, (stage.max_tokens * 15 // 16 - separator) // per_tile)
    visual = tiles * per_tile + separator if tiles else 0
    return _shape(visual, stage.max_tokens - visual, tiles if separator else None)


def _shape(visual: int, text: int, tiles: int | None = None) -> SampleShape:
    if text < 4:
        raise ConfigError(f"text={text}; expected 4 tokens or more of a sample")
    return SampleShape(visual, text, text - 2, tiles)


def _stage_budget(
    stage: Stage,
    sketch: Sketch,
    config: MonoInternVLConfig,
    fleet: Fleet,
    tokens: tuple[int, int] | None,
    records: int | None,
) -> StageBudget:
    if not stage.steps and records is None:
        raise ConfigError(
            f"stage {stage.name!r} counts {stage.epochs:g} epochs; say with --records how many "
            "records its data have"
        )
    stage = stage.resolved(records or 0)
    if tokens is not None and tokens[0] and config.has_image_marks:
        raise ConfigError(
            f"tokens={tokens}: with tiling={config.tiling!r} they depend on the shapes of images; "
            "leave them out, and the longest sample of each stage is taken"
        )
    sample = longest_sample(stage, config) if tokens is None else _shape(*tokens)
    if sample.visual_tokens + sample.text_tokens > stage.max_tokens:
        raise ConfigError(
            f"stage {stage.name!r}: a sample of {sample.visual_tokens} visual and "
            f"{sample.text_tokens} text tokens; it takes {stage.max_tokens} at most"
        )
    model = skeleton(config)
    learned = [name for group in apply_rules(model, config, stage) for name in group.names]
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    trainable, total = sum(sizes[name] for name in learned), sum(sizes.values())
    samples = stage.steps * stage.batch_size
    of_step = step_flops(config, learned, sample).total
    if stage.objective.needs_reference:
        of_step += step_flops(config, (), sample).total  # forward alone
    flops = float(of_step * samples)
    of_data = samples if records is None else min(samples, records)
    thumbnail = min(sample.visual_tokens, config.num_image_tokens_per_tile)
    of_sample = (sample.visual_tokens - thumbnail or thumbnail) * _PIXELS_OF_TOKEN
    layouts = list(_layouts(stage, sketch, fleet, sample, trainable, total))
    return StageBudget(
        name=stage.name,
        sample=sample,
        samples=samples,
        tokens=samples * (sample.visual_tokens + sample.text_tokens),
        flops=flops,
        days=fleet.days(flops),
        data_bytes=round(
            of_data * (of_sample * JPEG_BYTES_OF_PIXEL + sample.text_tokens * BYTES_OF_TOKEN)
        ),
        trainable=trainable,
        checkpoint_bytes=_FP32 * total,
        state_bytes=_FP32 * (total + 2 * trainable),
        layouts=tuple(layouts),
    )


def _layouts(
    stage: Stage,
    sketch: Sketch,
    fleet: Fleet,
    sample: SampleShape,
    trainable: int,
    total: int,
) -> Iterator[Layout]:
    """With replicated and with sharded weights, each the first that fits, else the smallest."""
    if stage.packing == "none" and stage.batch_size % fleet.gpus:
        raise ConfigError(
            f"stage {stage.name!r}: its {stage.batch_size} samples of a step do not divide among "
            f"{fleet.gpus} GPUs; choose another number of GPUs"
        )
    models = 2 if stage.objective.needs_reference else 1
    kept = list(_micro_batches(stage, sketch, fleet, sample))
    for is_sharded in (False, True):
        parts = fleet.gpus if is_sharded else 1
        chosen: Layout | None = None
        for accumulation, samples, recompute, of_backward in kept:
            memory = Memory(
                weights=_FP32 * total * models // parts,
                gradients=_FP32 * trainable // parts,
                moments=2 * _FP32 * trainable // parts,
                kept=of_backward,
            )
            fits = memory.total <= USABLE_MEMORY * fleet.gpu.memory_bytes
            chosen = Layout(accumulation, samples, recompute, is_sharded, memory, fits)
            if fits:
                break
        assert chosen is not None
        yield chosen


def _micro_batches(
    stage: Stage, sketch: Sketch, fleet: Fleet, sample: SampleShape
) -> Iterator[tuple[int, int, str, int]]:
    """Accumulation, samples of a micro-batch, recomputation, bytes kept: from most to least."""
    if stage.packing != "none":  # a row is a micro-batch, whatever it is made of
        row = dataclasses.replace(stage, max_tokens=stage.packed_tokens)
        sizes = [(0, 1, sketch.kept_bytes(row, longest_sample(row, sketch.config), 1))]
    else:
        of_gpu = stage.batch_size // fleet.gpus
        first = max(1, of_gpu // stage.accumulation)
        one, two = (sketch.kept_bytes(stage, sample, count) for count in (1, 2))
        sizes = [
            (of_gpu // count, count, _of(one, two, count))
            for count in range(first, 0, -1)
            if of_gpu % count == 0
        ]
    ways = [stage.recompute] if stage.recompute == "full" else [stage.recompute, "full"]
    for way in ways:
        for accumulation, count, kept in sizes:
            yield accumulation, count, way, kept.recomputed if way == "full" else kept.total


def _of(one: KeptBytes, two: KeptBytes, count: int) -> KeptBytes:
    """What so many samples keep: the weights in bf16 are kept once."""

    def line(at_one: int, at_two: int) -> int:
        return at_one + (count - 1) * (at_two - at_one)

    return KeptBytes(
        layer=line(one.layer, two.layer),
        rest=line(one.rest, two.rest),
        layer_input=line(one.layer_input, two.layer_input),
        num_layers=one.num_layers,
    )
