"""A device is named, found, or refused before anything is loaded."""

import pytest
import torch

from mono_internvl.errors import ConfigError
from mono_internvl.model.devices import choose_device
from mono_internvl.training.distributed import own_device


@pytest.mark.parametrize("name", ["abacus", "meta", "", "cuda:x", "cuda:0", "cuda"])
def test_choose_device_refuses_the_unknown_and_the_absent(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ConfigError, match=f"device='{name}'"):
        choose_device(name)
    with pytest.raises(ConfigError, match=f"device='{name}'"):
        own_device(name)


def test_own_device_shares_the_gpus_among_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    found = []
    for rank in range(3):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        found.append(own_device("cuda"))
    assert found == ["cuda:0", "cuda:1", "cuda:0"]
    assert own_device("cuda:1") == "cuda:1"
    assert own_device("cpu") == "cpu"
