"""How several processes train one model, behind one small protocol: whole copies, or shards."""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from mono_internvl.distributed import all_sum, world_size
from mono_internvl.errors import ConfigError
from mono_internvl.model.layers import DecoderLayer

Parallel = Literal["ddp", "fsdp", "fsdp_offload"]
"""What can be asked for. "ddp": every process holds the whole model and optimizer; "fsdp": weights,
gradients and moments are shared out (ZeRO-3); "fsdp_offload": the shares lie in host memory."""


class Parallelism(Protocol):
    """How several processes train one model; every method is called in all of them alike."""

    def wrap(self, module: nn.Module) -> nn.Module:
        """A module whose gradients are, after a backward pass, their mean over all processes.

        The parameters may be exchanged for others under the same names.
        """
        ...

    def no_sync(self, wrapped: nn.Module) -> AbstractContextManager[None]:
        """Within, backward passes add up the gradients of this process alone."""
        ...

    def all_sum(self, values: Tensor) -> Tensor:
        """The sum over all processes; may be in place."""
        ...


class DataParallel:
    """Every process holds the whole model; PyTorch averages gradients. One alone needs nothing."""

    def wrap(self, module: nn.Module) -> nn.Module:
        """See `Parallelism`."""
        if world_size() == 1:
            return module
        # A batch without images leaves the visual experts of this process unused.
        return DistributedDataParallel(
            module, find_unused_parameters=True, gradient_as_bucket_view=True
        )

    def no_sync(self, wrapped: nn.Module) -> AbstractContextManager[None]:
        """See `Parallelism`."""
        return wrapped.no_sync() if world_size() > 1 else nullcontext()  # type: ignore[operator]

    def all_sum(self, values: Tensor) -> Tensor:
        """See `Parallelism`."""
        return all_sum(values)


class FullyShard:
    """Every process holds a share of weights, gradients and moments: PyTorch's `fully_shard`.

    A decoder layer is gathered before it runs and let go behind it, the next one meanwhile; what is
    outside the layers (embeddings, projector, head) is one more unit, gathered in fp32 so that the
    residual stream is as exact as with `DataParallel`. One process alone needs nothing.

    Gradients are exchanged after every micro-batch: to add up whole ones would take the memory that
    sharding spares.

    Args:
        precision: "bf16" gathers the layers in bf16, which is what autocast multiplies in; sums of
            gradients are fp32 in any case.
        offload: Keep the shares, and the optimizer's work, in host memory.
    """

    def __init__(self, precision: str = "fp32", *, offload: bool = False):
        self.gathered_in = torch.bfloat16 if precision == "bf16" else None
        self.offload = offload

    def wrap(self, module: nn.Module) -> nn.Module:
        """See `Parallelism`."""
        if world_size() == 1:
            if self.offload:
                raise ConfigError(
                    "parallel='fsdp_offload' with one process: there is nothing to share out; "
                    "start several (--processes, torchrun --nproc-per-node), or take 'ddp'"
                )
            return module
        device = next(module.parameters()).device
        if device.type != "cpu":
            torch.accelerator.set_device_index(device)
        mesh = init_device_mesh(device.type, (world_size(),))
        offload: OffloadPolicy = OffloadPolicy()
        if self.offload:
            offload = CPUOffloadPolicy(pin_memory=device.type != "cpu")
        of_layers, of_rest = (
            MixedPrecisionPolicy(gathered, torch.float32, cast_forward_inputs=False)
            for gathered in (self.gathered_in, None)
        )
        # Layers give views of their rows; nothing here changes one in place.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view", UserWarning)
        layers = [part for part in module.modules() if isinstance(part, DecoderLayer)]
        for layer in layers:
            layer.register_forward_hook(_with_every_gradient)  # before those of `fully_shard`
            fully_shard(layer, mesh=mesh, mp_policy=of_layers, offload_policy=offload)
            layer.register_forward_pre_hook(_with_gradient_of_rows, prepend=True)
        module.register_forward_hook(_with_every_gradient)
        fully_shard(module, mesh=mesh, mp_policy=of_rest, offload_policy=offload)
        for layer, following in pairwise(layers):
            assert isinstance(layer, FSDPModule) and isinstance(following, FSDPModule)
            layer.set_modules_to_forward_prefetch([following])
        return module

    def no_sync(self, wrapped: nn.Module) -> AbstractContextManager[None]:
        """See `Parallelism`; gradients are shared out all the same."""
        return nullcontext()

    def all_sum(self, values: Tensor) -> Tensor:
        """See `Parallelism`."""
        return all_sum(values)


def parallelism_of(name: Parallel, precision: str) -> Parallelism:
    """The way of a name.

    Args:
        name: See `Parallel`.
        precision: Of the stage, "bf16" or "fp32".
    """
    if name == "ddp":
        return DataParallel()
    return FullyShard(precision, offload=name == "fsdp_offload")


def local_value(x: Tensor) -> Tensor:
    """A scalar of sharded tensors, such as a norm of all of them, as an ordinary tensor."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def _with_gradient_of_rows(module: nn.Module, arguments: tuple[Any, ...]) -> Any:
    """Let the rows that enter a layer have a gradient, even if nothing before them learns.

    It is their gradient that tells when a layer is done and its own can be exchanged. Without this,
    a process with text alone would come to its first layer later than those with images.
    """
    rows, *others = arguments
    if rows.requires_grad or not torch.is_grad_enabled():
        return None
    return (rows.detach().requires_grad_(), *others)


def _with_every_gradient(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> Any:
    """Tie what a unit gives, with weight 0, to all it holds, where a part of it may not have run.

    Processes exchange the gradients of a unit in one piece, so all must have the same ones: without
    this, one with text alone would wait for ever for those with images, or add up wrong pieces.
    """
    batch_or_rows, routing = arguments[:2]
    of_batch = getattr(batch_or_rows, "routing", routing)
    if of_batch.num_visual:
        return None
    trainable = [p for p in module.parameters() if p.requires_grad and not isinstance(p, DTensor)]
    if not trainable:
        return None
    nothing = 0.0 * torch.stack([p.flatten()[0].float() for p in trainable]).sum()
    first, *others = output
    return (first + nothing.to(first.dtype), *others)
