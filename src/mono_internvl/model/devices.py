"""Which device a name means, and whether it is there."""

import torch

from mono_internvl.errors import ConfigError


def choose_device(name: str) -> torch.device:
    """The device of a name; "auto" takes CUDA if there is any.

    Raises:
        ConfigError: The name is unknown, or there is no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device={name!r}; expected auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device={name!r}; expected auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"device={name!r}: this machine has {torch.cuda.device_count()} CUDA devices that "
            f"torch {torch.__version__} can use; take device='cpu'"
        )
    return device
