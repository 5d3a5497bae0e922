"""Where weights that have moved come back to the simplex."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_mtl.linalg.simplex import project_on_simplex


def onto_simplex(moved: Tensor, projection: str) -> Tensor:
    """The nearest point of the simplex ("simplex"), or the softmax ("softmax").

    Shapes: ``[T]`` -> ``[T]``, >= 0, summing to 1, in the dtype and on the device of ``moved``.
    """
    if projection == "softmax":
        return moved.softmax(0)
    return torch.from_numpy(project_on_simplex(moved.numpy(force=True))).to(moved)
