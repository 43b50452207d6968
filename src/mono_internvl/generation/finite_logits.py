"""Logits that are no numbers choose no token: damaged weights are said, not answered with.

Legend: B prompts, V vocabulary.
"""

import torch
from torch import Tensor

from mono_internvl.errors import CheckpointError


def check_finite(logits: Tensor) -> None:
    """Refuse logits of a forward pass that overflowed or began with damaged weights.

    Args:
        logits: (B, V) as the model gave them.

    Raises:
        CheckpointError: The largest of a prompt is nan or infinite.
    """
    # The maximum of a row is nan where any of it is.
    if not bool(torch.isfinite(logits.amax(-1)).all()):
        raise CheckpointError(
            f"the model's logits are not finite numbers in {logits.dtype}; load it with "
            "dtype='float32', and if they still are not, its weights are damaged: get them anew"
        )
