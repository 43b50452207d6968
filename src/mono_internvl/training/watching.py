"""What is watched while a stage trains: bad steps, losses of sources, rates; and who is told."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from mono_internvl.configuration.model import MonoInternVLConfig
from mono_internvl.costs.accelerators import peak_tflops_of
from mono_internvl.costs.training import SampleShape, step_flops
from mono_internvl.data.batches import Batch
from mono_internvl.distributed import gathered, rank, world_size
from mono_internvl.errors import ConfigError, TrainingStateError
from mono_internvl.runs.json_lines import to_line

Watch = Literal["tensorboard", "wandb"]

BAD_STEPS_FILE = "bad_steps.jsonl"
"""In a run's folder: every step whose loss or gradient was not to be trusted, with its records."""

_SMOOTHING = 0.98
_LEAST_STEPS = 20
"""Steps after which a running mean of the loss says what a leap is."""
_MOST_IN_A_ROW = 10
"""Bad steps one behind the other after which skipping them is no way out."""
_MOST_SHOWN = 16
"""Record ids in an error; the file has all."""


@dataclass
class StepGuard:
    """Tells the steps whose loss or gradient is not to be trusted.

    Attributes:
        max_loss_ratio: Of a step's loss to the running mean of those before.
        mean: Of the losses of good steps, the recent ones more.
        num_good: Steps in it.
        num_in_a_row: Bad steps since the last good one.
    """

    max_loss_ratio: float
    mean: float = 0.0
    num_good: int = 0
    num_in_a_row: int = 0

    def judge(self, loss: float, grad_norm: float) -> str:
        """Why a step is bad; empty if it is good, which then counts for those that follow."""
        why = ""
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            why = "not finite"
        elif self.num_good >= _LEAST_STEPS and loss > self.max_loss_ratio * self.mean:
            why = f"loss {loss / self.mean:.1f} times the mean of the steps before"
        if why:
            self.num_in_a_row += 1
            return why
        self.num_in_a_row = 0
        self.num_good += 1
        share = max(1 - _SMOOTHING, 1 / self.num_good)
        self.mean += share * (loss - self.mean)
        return why

    @property
    def is_lost(self) -> bool:
        """Whether so many steps in a row were bad that skipping more leads nowhere."""
        return self.num_in_a_row >= _MOST_IN_A_ROW

    def to_dict(self) -> dict[str, float]:
        """Plain data for a saved state; numbers come back to the bit."""
        return {"mean": self.mean, "num_good": self.num_good, "num_in_a_row": self.num_in_a_row}

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any], max_loss_ratio: float) -> StepGuard:
        """The guard of a saved state; an older one without begins anew."""
        names = ("mean", "num_good", "num_in_a_row")
        return cls(max_loss_ratio, **{name: saved[name] for name in names if name in saved})


def note_bad_step(
    file: Path, row: Mapping[str, Any], micro: Sequence[Batch], losses: Sequence[float]
) -> list[str]:
    """List a bad step with the records that may have done it; called in all processes alike.

    Args:
        file: JSON lines.
        row: Of the step.
        micro: The micro-batches of this process.
        losses: Of each of them.

    Returns:
        Ids of the records of those, in all processes, whose own loss is not finite; of all where
        every one is.
    """
    own = [
        (math.isfinite(loss), record_id)
        for batch, loss in zip(micro, losses, strict=True)
        for record_id in batch.record_ids
    ]
    of_all = [pair for said in gathered(own) for pair in said]
    ids = [i for is_finite, i in of_all if not is_finite] or [i for _, i in of_all]
    if rank() == 0:
        with file.open("a", encoding="utf-8") as out:
            out.write(to_line({**finite_row(row), "records": ids}))
    return ids


def bad_step_error(
    stage: str, row: Mapping[str, Any], record_ids: Sequence[str], file: Path
) -> TrainingStateError:
    """What to raise of a bad step that ends a run."""
    shown = ", ".join(record_ids[:_MOST_SHOWN]) + (", ..." if record_ids[_MOST_SHOWN:] else "")
    return TrainingStateError(
        f"stage {stage!r}: loss {row['loss']} and gradient norm {row['grad_norm']} at step "
        f"{row['step']} (records {shown}): {row['bad_step']}; lower the learning rate, or look at "
        f'these records, all listed in {file}, or go on without such steps: on_bad_step="skip"'
    )


def finite_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row as JSON has it: there, no number is infinite; it is null."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in row.items()
    }


class SourceLosses:
    """Adds up what the labels of each source lose, over the micro-batches of a step.

    A loss is a weighted sum over labels, so what one of them loses is the derivative by its weight.
    An objective that does not weigh labels tells nothing of sources.

    Args:
        num_sources: How many there are.
    """

    def __init__(self, num_sources: int):
        self.num_sources = num_sources
        self.sums: Tensor | None = None

    def weights(self, micro: Sequence[Batch]) -> Tensor:
        """(sources,) weight of the labels of each, of this process."""
        found = torch.zeros(self.num_sources)
        for batch in micro:
            if batch.source_ids is not None:
                found.index_add_(0, batch.source_ids.flatten(), batch.loss_weight.flatten())
        return found

    def weighing(self, batch: Batch) -> Batch:
        """The batch, with weights that a derivative is taken by."""
        return replace(batch, loss_weight=batch.loss_weight.detach().requires_grad_())

    def add(self, batch: Batch, denominator: Tensor) -> None:
        """Take what a backward pass has left in a batch; nothing waits for the device."""
        weight = batch.loss_weight
        if weight.grad is None or batch.source_ids is None:
            return
        lost = weight.grad * weight.detach() * denominator  # (B, T)
        if self.sums is None:
            self.sums = lost.new_zeros(self.num_sources)
        self.sums.index_add_(0, batch.source_ids.flatten(), lost.flatten())


@dataclass(frozen=True)
class OwedFlops:
    """Operations that a token of a step owes, forward and backward; see `costs.training`.

    Attributes:
        per_visual: Visual token.
        per_text: Text token.
        per_label: Label, beside what its token owes.
        per_pair: Pair of a token and one that it attends to.
    """

    per_visual: float
    per_text: float
    per_label: float
    per_pair: float

    @classmethod
    def of(cls, config: MonoInternVLConfig, learned: Collection[str]) -> OwedFlops | None:
        """Of a stage, by the names of what learns; None for a model with a vision tower."""
        tile = config.num_image_tokens_per_tile
        if config.vision_config.kind == "vit":
            return None
        base, visual, text, label = (
            step_flops(config, learned, shape)
            for shape in (
                SampleShape(tile, 8, 2),
                SampleShape(2 * tile, 8, 2),
                SampleShape(tile, 9, 2),
                SampleShape(tile, 9, 3),
            )
        )
        products = [one.linear + one.patch_embedding for one in (base, visual, text, label)]
        tokens = tile + 8
        long = step_flops(config, learned, SampleShape(tile, 8, 7))
        return cls(
            per_visual=(products[1] - products[0]) / tile,
            per_text=float(products[2] - products[0]),
            per_label=float(products[3] - products[2]),
            # As if the last layer attended from every token, too.
            per_pair=long.attention / (tokens * (tokens + 1) / 2),
        )

    def of_step(self, tokens: int, visual: int, labels: int, pairs: int) -> float:
        """Operations of a whole step of so many tokens, the visual ones among them."""
        text = tokens - visual
        products = self.per_visual * visual + self.per_text * text + self.per_label * labels
        return products + self.per_pair * pairs


def attended_pairs(batch: Batch) -> int:
    """Pairs of tokens that attend; of padded samples, whose lengths vary, at least so many."""
    if batch.position_ids is not None:
        return int((batch.position_ids + 1).sum())
    samples = max(1, len(batch.record_ids) + batch.num_pairs)
    return batch.num_tokens * (batch.num_tokens // samples + 1) // 2


def peak_flops(device: str) -> float | None:
    """Dense bf16 operations per second of a device, by its data sheet; None where none is known."""
    if torch.device(device).type != "cuda":
        return None
    peak = peak_tflops_of(torch.cuda.get_device_name(device))
    return None if peak is None else 1e12 * peak


def rates_of(
    row: Mapping[str, Any],
    shape: Sequence[int],
    seconds: float,
    owed: OwedFlops | None,
    device: str,
) -> dict[str, float]:
    """What a step did in each of its seconds.

    Args:
        row: Its counts.
        shape: Visual tokens, labels and pairs of tokens that attend, of all processes.
        seconds: That it took.
        owed: What a token owes, if it is known.
        device: Of this process; all have one like it.

    Returns:
        Tokens and images per second; where the device's peak is known the model FLOPs utilization,
        as arXiv 2204.02311, appendix B, defines it.
    """
    found = {f"{name}_per_s": row[name] / seconds for name in ("tokens", "images")}
    peak = peak_flops(device)
    if owed is None or peak is None:
        return found
    rate = owed.of_step(row["tokens"], *shape) / seconds
    return {**found, "mfu": rate / (peak * world_size())}


class Watcher(Protocol):
    """Somebody who is told every row of a run's metrics."""

    def write(self, row: Mapping[str, Any]) -> None:
        """Take a row."""
        ...

    def close(self) -> None:
        """No row comes any more."""
        ...


class TensorBoard:
    """Scalars for TensorBoard, in `tensorboard/` of the run's folder.

    Args:
        run: The folder.
        first: Steps taken before; what an earlier call wrote of later ones is not shown.
    """

    def __init__(self, run: Path, first: int):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(run / "tensorboard"), purge_step=first + 1)

    def write(self, row: Mapping[str, Any]) -> None:
        """See `Watcher`."""
        for name, value in scalars(row).items():
            self.writer.add_scalar(name, value, row["step"])

    def close(self) -> None:
        """See `Watcher`."""
        self.writer.close()


class WeightsAndBiases:
    """Scalars for Weights & Biases; the run there goes on when the run here does.

    Args:
        run: The folder.
        settings: Of the stage, shown beside the curves.
    """

    def __init__(self, run: Path, settings: Mapping[str, Any]):
        import wandb

        file = run / "wandb.json"
        number = json.loads(file.read_text())["id"] if file.is_file() else wandb.util.generate_id()
        file.write_text(json.dumps({"id": number}) + "\n")
        name = f"{run.parent.name}/{run.name}"
        self.run = wandb.init(
            project="mono-internvl",
            name=name,
            id=number,
            resume="allow",
            dir=str(run),
            config=dict(settings),
        )

    def write(self, row: Mapping[str, Any]) -> None:
        """See `Watcher`."""
        self.run.log(scalars(row), step=row["step"])

    def close(self) -> None:
        """See `Watcher`."""
        self.run.finish()


_PACKAGES: dict[str, tuple[str, str]] = {
    "tensorboard": ("tensorboard", "pip install 'mono-internvl[watch]'"),
    "wandb": ("wandb", "pip install wandb"),
}


def check_watch(names: Sequence[str]) -> None:
    """Refuse what nobody listens to, before anything is trained.

    Raises:
        ConfigError: No such name, or its package is not installed.
    """
    for name in names:
        if name not in _PACKAGES:
            raise ConfigError(f"--watch {name}: expected one of {', '.join(_PACKAGES)}")
        package, how = _PACKAGES[name]
        if importlib.util.find_spec(package) is None:
            raise ConfigError(f"--watch {name}: the package {package} is not installed; {how}")


@contextmanager
def watchers(
    names: Sequence[str], run: Path, first: int, settings: Mapping[str, Any]
) -> Iterator[list[Watcher]]:
    """Those who are told of a stage's rows, while it trains.

    Args:
        names: Who, see `Watch`.
        run: The stage's folder.
        first: Steps that were taken before.
        settings: The stage's fields.
    """
    with ExitStack() as stack:
        found: list[Watcher] = []
        for name in names:
            is_board = name == "tensorboard"
            one: Watcher = TensorBoard(run, first) if is_board else WeightsAndBiases(run, settings)
            stack.callback(one.close)
            found.append(one)
        yield found


def scalars(row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a metrics row by name; those of sources as `losses/NAME`."""
    found = {n: x for n, x in row.items() if isinstance(x, int | float) and n != "step"}
    of_sources = {f"losses/{source}": x for source, x in row.get("losses", {}).items()}
    return {name: float(value) for name, value in {**found, **of_sources}.items()}
