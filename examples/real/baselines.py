"""What pixels alone reach: two classifiers that know nothing of shapes, beside the model's figures.

Until a model beats them it has learnt colour and coarse shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.linear_model import LogisticRegression

NEAREST, REGRESSION = "nearest neighbour, 8x8 pixels", "logistic regression, 16x16 pixels"


def pixel_baselines(
    root: Path,
    fits: Sequence[Sequence[tuple[str, str]]],
    asked: dict[str, list[tuple[str, str]]],
) -> dict[str, dict[str, float]]:
    """Accuracy of the two classifiers, in favour of them: the better of several fits each time.

    Args:
        root: Folder of the pictures.
        fits: Sets of training pictures with their names; each classifier is fitted to each.
        asked: Held-out pictures with their names, by kind.

    Returns:
        Kind -> classifier -> accuracy.
    """
    best: dict[str, dict[str, float]] = {kind: {NEAREST: 0.0, REGRESSION: 0.0} for kind in asked}
    for fit in fits:
        names = np.array([name for _, name in fit])
        near, far = (_pixels(root, [image for image, _ in fit], side) for side in (8, 16))
        mean = far.mean(axis=0)
        model = LogisticRegression(max_iter=300, C=0.1).fit(far - mean, names)
        for kind, questions in asked.items():
            images, truths = [image for image, _ in questions], [name for _, name in questions]
            small = _pixels(root, images, 8)
            distances = -2 * small @ near.T + (near**2).sum(1)[None]
            said = {
                NEAREST: names[distances.argmin(axis=1)],
                REGRESSION: model.predict(_pixels(root, images, 16) - mean),
            }
            for name, answers in said.items():
                reached = float(np.mean(answers == np.array(truths)))
                best[kind][name] = max(best[kind][name], reached)
    return best


def _pixels(root: Path, images: Sequence[str], side: int) -> np.ndarray:
    """(N, side * side * 3) fp32 in [0, 1]."""
    rows = []
    for image in images:
        small = Image.open(root / image).convert("RGB").resize((side, side), Image.Resampling.BOX)
        rows.append(np.asarray(small, np.float32).ravel() / 255)
    return np.stack(rows)
