"""States as earlier versions wrote them: one process's files, weights in the released layout.

Runs go on from them; nothing writes them any more.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from mono_internvl.errors import TrainingStateError
from mono_internvl.training.checkpointing import ModelAndProcessor, load_checkpoint
from mono_internvl.training.objectives.objective import State

# In the safetensors format, but not by name: engines read every `*.safetensors` beside config.json
# as weights of the model.
OPTIMIZER_FILE = "optimizer.state"
OBJECTIVE_FILE = "objective.state"
_EARLIER_OPTIMIZER_FILE = "optimizer.safetensors"  # states of version 0.1 go on from it


def load_model(folder: Path, attention: str) -> ModelAndProcessor:
    """The model, in fp32 on the CPU, and the processor of such a state."""
    model, processor = load_checkpoint(folder, attention)
    # Weights that are views of files: a state is deleted while its weights are used.
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data = tensor.data.clone()
    return model, processor


def load_optimizer(folder: Path, model: nn.Module, optimizer: Optimizer) -> None:
    """Put saved moments back into a fresh optimizer over the same parameters.

    Raises:
        TrainingStateError: They do not belong to these parameters.
    """
    file = folder / OPTIMIZER_FILE
    if not file.exists() and (folder / _EARLIER_OPTIMIZER_FILE).exists():
        file = folder / _EARLIER_OPTIMIZER_FILE
    tensors = _read_tensors(file)
    names = {id(p): name for name, p in model.named_parameters()}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for index, parameter in enumerate(parameters):  # so does `state_dict` number them
        name = names[id(parameter)]
        state[index] = {}
        for key in ("step", "exp_avg", "exp_avg_sq"):
            tensor = tensors.pop(f"{name}|{key}", None)
            if tensor is None:
                raise TrainingStateError(f"{folder}: no {key} for parameter {name}")
            if key != "step" and tensor.shape != parameter.shape:
                raise TrainingStateError(
                    f"{folder}: {key} of {name} is {tuple(tensor.shape)}, the parameter "
                    f"{tuple(parameter.shape)}; delete the folder to start over"
                )
            # A copy: what was read is a view of the file, which is deleted with the state.
            state[index][key] = (
                _like(parameter, tensor.clone()) if key != "step" else tensor.clone()
            )
    if tensors:
        raise TrainingStateError(f"{folder}: moments of unknown parameter {min(tensors)}")
    # PyTorch knows where each belongs: a fused step wants its count beside the parameter, another
    # one on the CPU.
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def load_objective(folder: Path, initial: State) -> State:
    """What the objective carried.

    Raises:
        TrainingStateError: It is not of this objective.
    """
    saved = _read_tensors(folder / OBJECTIVE_FILE)
    shapes, expected = ({n: tuple(t.shape) for n, t in s.items()} for s in (saved, initial))
    if shapes != expected:
        raise TrainingStateError(
            f"{folder / OBJECTIVE_FILE}: holds {shapes}, the objective carries {expected}; delete "
            "the folder to start over"
        )
    # Copies: what was read are views of the file, which is deleted with the state.
    return {name: tensor.clone() for name, tensor in saved.items()}


def _like(parameter: nn.Parameter, tensor: Tensor) -> Tensor:
    """A tensor that every process holds, shared out as a parameter is."""
    if not isinstance(parameter, DTensor):
        return tensor
    mesh, placements = parameter.device_mesh, parameter.placements
    here = tensor.to(mesh.device_type)
    return distribute_tensor(here, mesh, placements, src_data_rank=None)


def _read_tensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise TrainingStateError(
            f"{file}: not readable ({error}); delete the folder to start over"
        ) from error
