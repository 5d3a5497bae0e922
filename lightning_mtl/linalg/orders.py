"""Random orders in which every task meets the others."""

from __future__ import annotations

import numpy as np
import torch

Array = np.ndarray


def random_orders(num_tasks: int, seed: int) -> Array:
    """For each task a random order of the others, equal wherever the seed is.

    Shapes: ``[T, T - 1]``.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand((num_tasks, num_tasks - 1), generator=generator).numpy().argsort(axis=1)
    return order + (order >= np.arange(num_tasks)[:, None])
