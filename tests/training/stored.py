"""Tensors of a saved state on the disk, looked at and changed; states as they once were written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from mono_internvl.training.state import STATE_FILE, read_state
from mono_internvl.training.state_folders import SHARDS, StateFolders

Change = Callable[[dict[str, Tensor]], object]


def shard(state: Path) -> Path:
    """The only file of tensors of a state that one process wrote."""
    (file,) = (state / SHARDS).glob("*.safetensors")
    return file


def change(state: Path, how: Change) -> None:
    """Change the tensors of a state that one process wrote."""
    file = shard(state)
    with safe_open(file, framework="pt") as opened:
        said = opened.metadata()
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    how(tensors)
    offsets = json.loads(said["DCP_SHARDING_INFO"])
    kept = {
        name: offsets.get(name, {"saved_offsets": [0] * x.dim()}) for name, x in tensors.items()
    }
    save_file(tensors, file, metadata={**said, "DCP_SHARDING_INFO": json.dumps(kept)})
    say(state, files=lambda files: {**files, f"{SHARDS}/{file.name}": file.stat().st_size})


def say(state: Path, **fields: Callable[[object], object]) -> None:
    """Change what a state says of itself."""
    file = state / STATE_FILE
    said = json.loads(file.read_text())
    file.write_text(json.dumps({**said, **{name: of(said[name]) for name, of in fields.items()}}))


def as_written_before(state: Path, optimizer_file: str = "optimizer.state") -> None:
    """Turn a state that one process wrote into the earlier layout, whose files it wrote alone."""
    model, _ = StateFolders(state.parent).load_model(read_state(state), "sdpa")
    stored = {name: tensor.clone() for name, tensor in load_file(shard(state)).items()}
    shard(state).unlink()
    (state / SHARDS).rmdir()
    model.save_pretrained(state)
    moments = {
        name.removeprefix("optimizer."): x.reshape(()) if name.endswith("|step") else x
        for name, x in stored.items()
        if name.startswith("optimizer.")
    }
    save_file(moments, state / optimizer_file)
    carried = {
        n.removeprefix("objective."): x for n, x in stored.items() if n.startswith("objective.")
    }
    if carried:
        save_file(carried, state / "objective.state")
    said = json.loads((state / STATE_FILE).read_text())
    del said["files"]
    (state / STATE_FILE).write_text(json.dumps(said))
