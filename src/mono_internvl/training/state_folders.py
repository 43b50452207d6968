"""States of a running stage as sharded folders: every process writes what it holds.

A state is `step_*/` in the run's folder: configuration, processor and what the state says of
itself, and in `shards/` the tensors of model, optimizer and objective, one file a process, by
`torch.distributed.checkpoint`. So it is read by any number of processes, whatever number wrote it.

It is written in the background under a hidden name and forced to disk; last comes the file that
says what the state is, with the sizes of all others, then the rename. A folder with the right name
is whole. It is renamed again before it is deleted. The data position is the step: the order of
records is arithmetic.

Nothing is pickled on the disk: the writer is the one that PyTorch has for safetensors, whose
headers say which part of a tensor a file holds, and not its own format with a `.metadata` pickle.
"""

from __future__ import annotations

import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.optim import Optimizer

from mono_internvl.distributed import barrier, rank
from mono_internvl.errors import TrainingStateError
from mono_internvl.model.modeling import MonoInternVLForConditionalGeneration
from mono_internvl.processing.processor import MonoInternVLProcessor
from mono_internvl.training import earlier_states
from mono_internvl.training.checkpointing import (
    ModelAndProcessor,
    RunState,
    hidden,
    make_whole,
    not_written,
    remove_state,
)
from mono_internvl.training.objectives.objective import State
from mono_internvl.training.state import SavedState, read_state

SHARDS = "shards"
_STATE_NAME = re.compile(r"step_\d{8,}")
_MODEL, _OPTIMIZER, _OBJECTIVE = "model.", "optimizer.", "objective."
"""What the names of stored tensors begin with."""
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


class StateFolders:
    """Sharded states in the run's folder, written while training goes on.

    Args:
        run: The folder.
        keep_last: How many of the latest states stay.
        keep_every: Of the others, those of a multiple of so many steps stay, also when the stage is
            finished; 0 keeps none.
    """

    def __init__(self, run: Path, keep_last: int = 1, keep_every: int = 0) -> None:
        self.run, self.keep_last, self.keep_every = run, keep_last, keep_every
        # One process alone is what is meant, not an oversight.
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        self._writing: Future[None] | None = None
        self._group: dist.ProcessGroup | None = None

    def latest(self) -> SavedState | None:
        """See `Checkpointing`.

        Raises:
            TrainingStateError: A state is damaged, or a file stands where a state has to.
        """
        states = [read_state(folder) for folder in state_folders(self.run)]
        return max(states, key=lambda state: state.step, default=None)

    def load_model(self, saved: SavedState, attention: str) -> ModelAndProcessor:
        """See `Checkpointing`.

        Raises:
            TrainingStateError: The state is damaged.
        """
        if saved.files is None:
            return earlier_states.load_model(saved.folder, attention)
        check_files(saved)
        kind = MonoInternVLForConditionalGeneration
        model = kind.without_weights(saved.folder, attention)
        with torch.no_grad():
            wanted = {_MODEL + name: p.detach() for name, p in model.named_parameters()}
            _read(saved, wanted, (_MODEL,))
        return model, MonoInternVLProcessor.from_pretrained(saved.folder)

    def restore(
        self, saved: SavedState, model: nn.Module, optimizer: Optimizer, objective: State
    ) -> State:
        """See `Checkpointing`.

        Raises:
            TrainingStateError: What was saved is not of this optimizer and objective.
        """
        if saved.files is None:
            earlier_states.load_optimizer(saved.folder, model, optimizer)
            if not objective:
                return objective
            return earlier_states.load_objective(saved.folder, objective)
        names = {id(p): name for name, p in model.named_parameters()}
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        moments = {
            names[id(p)]: {
                key: torch.zeros(1) if key == "step" else torch.zeros_like(p.detach())
                for key in _MOMENTS
            }
            for p in parameters
        }
        carried = {n: torch.zeros_like(x).reshape(_stored_shape(x)) for n, x in objective.items()}
        wanted = _named(moments) | {_OBJECTIVE + name: x for name, x in carried.items()}
        _read(saved, wanted, (_OPTIMIZER, _OBJECTIVE))
        for of_one in moments.values():
            of_one["step"] = of_one["step"].reshape(())
        # PyTorch knows where each belongs: a fused step wants its count beside the parameter,
        # another one on the CPU. It numbers the parameters in this order.
        state = {index: moments[names[id(p)]] for index, p in enumerate(parameters)}
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
        return {name: x.reshape(objective[name].shape) for name, x in carried.items()}

    def save(self, state: RunState) -> None:
        """See `Checkpointing`.

        Raises:
            TrainingStateError: The disk is full, or was while the last state was written; the one
                before that is whole.
        """
        self.wait()
        folder = self.run / f"step_{state.step:08d}"
        temporary = hidden(folder, "new")
        if rank() == 0:
            try:
                shutil.rmtree(temporary, ignore_errors=True)
                (temporary / SHARDS).mkdir(parents=True)
                state.model.config.save_pretrained(temporary)
                state.model.generation_config.save_pretrained(temporary)
                state.processor.save_pretrained(temporary)
            except OSError as error:
                shutil.rmtree(temporary, ignore_errors=True)
                raise not_written(folder, state.step, error) from error
        barrier()  # the folder is there
        if self._group is None and dist.is_initialized():
            # Of its own: what is written in the background must not meet what training exchanges.
            self._group = dist.new_group(backend="gloo")
        said = state.to_dict()
        whole: Future[None] = Future()

        def finish(written: Future[Any]) -> None:
            try:
                written.result()
                if rank() == 0:
                    make_whole(temporary, folder, {**said, "files": _sizes(temporary)})
                    self._remove_older()
            except (CheckpointException, Exception) as error:
                if rank() == 0:
                    shutil.rmtree(temporary, ignore_errors=True)
                whole.set_exception(not_written(folder, state.step, _cause(error)))
            else:
                whole.set_result(None)

        writer = dcp.HuggingFaceStorageWriter(str(temporary / SHARDS), save_distributed=True)
        tensors = _tensors_of(state)
        writing = dcp.async_save(tensors, storage_writer=writer, process_group=self._group)
        assert isinstance(writing, Future)
        self._writing = whole
        writing.add_done_callback(finish)

    def wait(self) -> None:
        """See `Checkpointing`.

        Raises:
            TrainingStateError: It could not be written; the state before it is whole.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def clear(self) -> None:
        """See `Checkpointing`; what `keep_every` asks for stays."""
        if rank() == 0:
            for folder in state_folders(self.run):
                if not self._is_kept(folder):
                    remove_state(folder)

    def _is_kept(self, folder: Path) -> bool:
        return bool(self.keep_every) and _step(folder) % self.keep_every == 0

    def _remove_older(self) -> None:
        for folder in state_folders(self.run)[: -self.keep_last]:
            if not self._is_kept(folder):
                remove_state(folder)


def state_folders(run: Path) -> list[Path]:
    """The whole states of a stage's run folder, earliest first.

    Raises:
        TrainingStateError: A file stands where a state has to.
    """
    # What else is in the folder, a copy `step_00000010_mine`, is its user's.
    found = [path for path in run.glob("step_*") if _STATE_NAME.fullmatch(path.name)]
    for path in found:
        if not path.is_dir():
            raise TrainingStateError(f"{path}: is no folder but has a state's name; move it away")
    return sorted(found, key=_step)


def check_files(saved: SavedState) -> None:
    """Hold the files of a state to what it says of them.

    Raises:
        TrainingStateError: One is missing or has another size.
    """
    for name, size in (saved.files or {}).items():
        file = saved.folder / name
        found = file.stat().st_size if file.is_file() else None
        if found != size:
            what = "missing" if found is None else f"{found} bytes"
            raise _damaged(saved, f"{name} is {what}, written were {size}")


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))


def _sizes(folder: Path) -> dict[str, int]:
    """Bytes of all files below a folder, by their paths in it."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}


def _stored_shape(x: Tensor) -> tuple[int, ...]:
    """Scalars are stored as vectors of one: of others, parts cannot be asked for."""
    return tuple(x.shape) or (1,)


def _named(moments: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {
        f"{_OPTIMIZER}{name}|{key}": tensor
        for name, of_one in moments.items()
        for key, tensor in of_one.items()
    }


def _tensors_of(state: RunState) -> dict[str, Any]:
    """Everything of a state that is a tensor, by the names it is stored under."""
    parameters = dict(state.model.named_parameters())
    names = {id(p): name for name, p in parameters.items()}
    found = {_MODEL + name: p.detach() for name, p in parameters.items()}
    if state.optimizer is not None:
        moments = {names[id(p)]: of_one for p, of_one in state.optimizer.state.items()}
        found |= _named(moments)
    found |= {_OBJECTIVE + name: tensor for name, tensor in state.objective.items()}
    return {name: x.reshape(_stored_shape(x)) for name, x in found.items()}


def _read(saved: SavedState, wanted: dict[str, Tensor], kinds: tuple[str, ...]) -> None:
    """Fill tensors, or this process's shards of them, with what a state holds under their names.

    Raises:
        TrainingStateError: The state is damaged, or holds others of their kind.
    """
    with _reading(saved):
        reader = dcp.HuggingFaceStorageReader(str(saved.folder / SHARDS))
        stored: Any = reader.read_metadata().state_dict_metadata
    shapes = {name: tuple(x.size) for name, x in stored.items() if name.startswith(kinds)}
    for name in sorted(shapes.keys() | wanted.keys()):
        what = name.partition(".")[2].replace("|", ": ") + f" ({name.partition('.')[0]})"
        if name not in shapes:
            raise _damaged(saved, f"no {what}")
        if name not in wanted:
            raise _damaged(saved, f"{what} is unknown to this stage")
        if shapes[name] != tuple(wanted[name].shape):
            raise _damaged(
                saved, f"{what} has the shape {shapes[name]}, expected {tuple(wanted[name].shape)}"
            )
    with _reading(saved):
        dcp.load(wanted, storage_reader=reader)  # type: ignore[arg-type]


@contextmanager
def _reading(saved: SavedState) -> Iterator[None]:
    try:
        yield
    except (CheckpointException, Exception) as error:
        raise _damaged(saved, f"not readable ({_cause(error)})") from error


def _damaged(saved: SavedState, what: str) -> TrainingStateError:
    return TrainingStateError(
        f"{saved.folder}: {what}; delete the folder to go on from an earlier state or start over"
    )


def _cause(error: BaseException) -> BaseException:
    """What was wrong in the first process that failed, without the report of all of them."""
    if isinstance(error, CheckpointException) and error.failures:
        failed = next(iter(error.failures.values()))
        return failed[0] if isinstance(failed, tuple) else failed
    return error
