"""How several processes train one model, behind one small protocol."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mono_internvl.distributed import all_sum, world_size


class Parallelism(Protocol):
    """How several processes train one model; every method is called in all of them alike."""

    def wrap(self, module: nn.Module) -> nn.Module:
        """A module whose gradients are, after a backward pass, their mean over all processes."""
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
