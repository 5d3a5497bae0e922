"""Six yes-or-no questions about a handwritten digit, their answers, and a loss that knows of missing ones."""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor

ATTRIBUTES = {  # which digits have it; no two digits have the same six
    "even": (0, 2, 4, 6, 8),
    "prime": (2, 3, 5, 7),
    "ge5": (5, 6, 7, 8, 9),
    "loop": (0, 6, 8, 9),
    "straight": (1, 4, 7),
    "mult3": (0, 3, 6, 9),
}
ANSWERS = torch.tensor([[float(digit in yes) for yes in ATTRIBUTES.values()] for digit in range(10)])  # [10, 6]


def digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's digits: images with mean 0 and variance 1 over all pixels ``[1797, 64]``, and names ``[1797]``."""
    bunch = load_digits()
    images = (bunch.data - bunch.data.mean()) / bunch.data.std()
    return torch.as_tensor(images, dtype=torch.float32), torch.as_tensor(bunch.target, dtype=torch.long)


def label_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of each label over the rows that have it, NaN = missing: ``[S, N, K]`` twice -> ``[S, K]``."""
    there = ~labels.isnan()
    losses = F.binary_cross_entropy_with_logits(logits, labels.nan_to_num(0.0), reduction="none")
    return (losses * there).sum(1) / there.sum(1).clamp(min=1)
