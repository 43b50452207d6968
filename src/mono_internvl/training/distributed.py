"""One process or several: who am I, and how several are started on one machine."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def rank() -> int:
    """Number of this process, 0 if it is alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    """Wait for the others."""
    if dist.is_initialized():
        dist.barrier()


def all_sum(values: Tensor) -> Tensor:
    """Sum over all processes, in place; the tensor itself if there is one."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


@contextmanager
def process_group(device: str = "cpu") -> Iterator[None]:
    """Join the group that `torchrun` (or `run_processes`) describes in the environment, if any."""
    if dist.is_initialized() or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def run_processes(function: Callable[..., None], processes: int, *args: Any) -> None:
    """Run `function(*args)` in `processes` processes of one thread each, joined in one group.

    With one process it runs here. The function and its arguments must be picklable; an exception in
    any process ends all and is raised here.
    """
    if processes == 1:
        function(*args)
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(_process, (function, processes, port, args), nprocs=processes)


def _process(
    number: int, function: Callable[..., None], processes: int, port: int, args: tuple[Any, ...]
) -> None:
    os.environ |= {
        "RANK": str(number),
        "LOCAL_RANK": str(number),
        "WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    with process_group():
        function(*args)
