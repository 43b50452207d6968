"""Every tolerance of the parity tests, with what was measured and what it would catch.

`measured` is the worst case over the committed golden data (fp32, CPU, eager and sdpa), as
`test_model_parity.py` computes it; `rejects` is a planted fault of `test_faults.py` in the same
unit, so that a tolerance is visibly far above the one and far below the other.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Tolerance:
    """How far ours may be from the reference.

    Attributes:
        atol: Largest absolute difference.
        rtol: Added to it, relative to the reference's value.
        measured: Largest difference seen.
        rejects: A fault that the tolerance rejects, and the difference it makes.
    """

    atol: float
    rtol: float
    measured: float
    rejects: str


LOGITS = Tolerance(
    2e-4, 0.0, measured=4.8e-6, rejects="one visual token of 48 through the text expert: 0.13"
)
SCORES = Tolerance(
    2e-4, 0.0, measured=3.6e-6, rejects="visual tokens through the text expert, ids equal: 1.0"
)
HIDDEN_STATES = Tolerance(
    2e-4, 0.0, measured=2.9e-6, rejects="no dynamic rope beyond the trained length: 0.66"
)
LOSS = Tolerance(
    1e-4, 0.0, measured=9.6e-7, rejects="one visual token of 48 through the text expert: 1.7e-3"
)
GRAD_NORM = Tolerance(
    1e-6, 1e-3, measured=6.5e-6, rejects="visual tokens through the text expert: norm 0 for a norm"
)
# Of a gradient divided by the largest absolute entry of the reference's.
GRADIENT = Tolerance(1e-4, 0.0, measured=2.2e-6, rejects="gradient of wqkv fused contiguously: 1.3")
FEATURES = Tolerance(
    2e-5, 0.0, measured=9.6e-7, rejects="visual tokens in the order of pixel shuffle v1: 2.3"
)
# Moving numbers about, without arithmetic.
EXACT = Tolerance(0.0, 0.0, measured=0.0, rejects="any other order of patches or tokens")
