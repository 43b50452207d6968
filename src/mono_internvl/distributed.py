"""One process or several: who am I, and how several are started on one machine."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import socket
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from threading import Thread
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from mono_internvl.compute import choose_device
from mono_internvl.errors import MonoInternVLError

# Read by the new processes when they start: no hints about parameters without gradient, no bars of
# several processes through each other; and glibc keeps freed activations instead of returning
# them to the system and faulting them in again at every step.
_ENVIRONMENT = {
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 32),
    "MALLOC_TOP_PAD_": str(1 << 27),
}


def rank() -> int:
    """Index of this process, 0 if it is alone."""
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


def from_first(text: str) -> str:
    """What the first process says, in every process."""
    said = [text]
    if dist.is_initialized():
        dist.broadcast_object_list(said)
    return said[0]


def gathered(value: Any) -> list[Any]:
    """What every process says, in the order of their numbers; it must be picklable."""
    if not dist.is_initialized():
        return [value]
    said = [None] * dist.get_world_size()
    dist.all_gather_object(said, value)
    return said


def own_device(device: str) -> str:
    """The device of this process: "cuda" or "xpu" is one for each process here, in turn.

    Raises:
        ConfigError: There is no such device.
    """
    chosen = str(choose_device(device))
    if chosen not in ("cuda", "xpu"):
        return chosen
    count = max(1, getattr(torch, chosen).device_count())
    return f"{chosen}:{int(os.environ.get('LOCAL_RANK', '0')) % count}"


@contextmanager
def process_group() -> Iterator[None]:
    """Join the group that `torchrun` (or `run_processes`) describes in the environment, if any.

    NCCL moves CUDA tensors where every process of this machine has a GPU of its own; gloo does all
    else.
    """
    if dist.is_initialized() or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    here = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
    has_nccl = torch.cuda.device_count() >= here and dist.is_nccl_available()
    dist.init_process_group("cpu:gloo,cuda:nccl" if has_nccl else "gloo")
    try:
        yield
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)
        raise
    finally:
        # What trained must go before the group: a `DistributedDataParallel` that frees the group
        # last waits, holding the interpreter, for a thread that needs the interpreter to end.
        gc.collect()
        dist.destroy_process_group()


def run_processes(
    function: Callable[..., Any], processes: int, *args: Any, threads: int | None = None
) -> None:
    """Run `function(*args)` in `processes` processes, joined in one group.

    With one process it runs here, as one of `torchrun`'s if that started us. The function and its
    arguments must be picklable; an exception in any process ends all and is raised here.

    Args:
        function: What to run.
        processes: How many.
        *args: What it gets.
        threads: Of each process; unless given, one for each of several, and for one alone as many
            as PyTorch is set to.

    Raises:
        MonoInternVLError, OSError: As `function` raised it in one of the processes.
    """
    if processes == 1:
        if threads is not None:
            torch.set_num_threads(threads)
        with process_group():
            function(*args)
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    _share_environment()
    errors = torch.multiprocessing.get_context("spawn").SimpleQueue()
    arguments = (function, processes, port, threads or 1, args, errors)
    try:
        torch.multiprocessing.spawn(_process, arguments, nprocs=processes)
    except (ProcessRaisedException, ProcessExitedException) as failure:
        if not errors.empty():
            raise errors.get() from failure
        raise


def run_side_by_side(
    function: Callable[..., Any], tasks: Sequence[tuple[Any, ...]], processes: int
) -> None:
    """Run `function(*task)` for every task, `processes` at a time, each alone in its process.

    Tasks that need nothing of each other cost less CPU this way than several processes that share
    one of them, and wait for each other at every step. Tasks begin in order. With one process, or
    one task, all run here. The function and the tasks must be picklable. Where one fails, those
    under way are waited for, no other begins, and the error is raised here.
    """
    count = min(processes, len(tasks))
    if count <= 1:
        for task in tasks:
            function(*task)
        return
    _share_environment()
    spawn = multiprocessing.get_context("spawn")
    ranks = spawn.SimpleQueue()
    for local_rank in range(count):
        ranks.put(local_rank)
    with ProcessPoolExecutor(count, spawn, _begin_worker, (ranks,)) as pool:
        running = [pool.submit(function, *task) for task in tasks]
        try:
            for task_done in as_completed(running):
                task_done.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _share_environment() -> None:
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def _begin(local_rank: int, threads: int) -> None:
    """In a new process: whose GPU it takes, how many threads, and how it ends."""
    os.environ["LOCAL_RANK"] = str(local_rank)
    torch.set_num_threads(threads)
    # The death of the parent arrives as SIGINT, which jobs in the background of a shell ignore.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _begin_worker(ranks: Any) -> None:
    _begin(ranks.get(), threads=1)
    Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A pool's process would wait for tasks of a parent that was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)  # an exception in a task would end the task alone


def _process(
    index: int,
    function: Callable[..., Any],
    processes: int,
    port: int,
    threads: int,
    args: tuple[Any, ...],
    errors: Any,
) -> None:
    _begin(index, threads)
    os.environ |= {
        "RANK": str(index),
        "WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    try:
        with process_group():
            function(*args)
    except (MonoInternVLError, OSError) as error:
        errors.put(error)
        raise
