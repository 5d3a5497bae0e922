"""PCGrad: cut from each task gradient the part that opposes another task."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lightning_mtl.balancers.base import GramBalancer, Tasks
from lightning_mtl.checks import check_integer
from lightning_mtl.linalg import random_orders


class PCGrad(GramBalancer):
    r"""Project every task gradient off the tasks it conflicts with, then add the results.

    For each task ``i``, over the other tasks ``j`` in random order: if the cut gradient opposes the *original*
    gradient of ``j``, its component along that gradient is removed.

    Args:
        num_tasks: ``T``.
        seed: of the random orders. They depend on ``seed`` and the step counter alone: equal on every rank, and
            the same after a resume.
        every_n_steps: solve in every n-th step only.

    Shapes: gram ``[T, T]``, losses ``[T]`` (unused) -> weights ``[T]``.
    State: that of :class:`GramBalancer`.
    Update: sum scale; scale-free (``s`` times the rows gives ``s`` times the update); heads keep their own
    gradient. Promises: a plain sum when nothing conflicts; no task of two gets worse to first order. With more
    tasks a projection can bring an earlier conflict back, so nothing is promised.
    Paper: Yu et al., NeurIPS 2020, arXiv:2001.06782, algorithm 1. As there, ``j != i``: the authors' code and
    most others also visit ``j = i``, which cancels a gradient that an earlier projection turned against itself.

    Example:
        >>> import torch
        >>> rows = torch.tensor([[1.0, 0.0], [-1.0, 1.0]])
        >>> PCGrad(2).combine(rows, torch.ones(2)).tolist()
        [0.5, 1.5]
    """

    def __init__(self, num_tasks: int, seed: int = 0, every_n_steps: int = 1) -> None:
        super().__init__(num_tasks, every_n_steps)
        check_integer(seed, "seed", self, low=0)
        self.seed = seed

    def weights(self, gram: Tensor, losses: Tensor, tasks: Tasks) -> Tensor:
        num = len(gram)
        # In numpy: with a handful of numbers per operation, calling torch would take most of the time.
        inner = gram.numpy()
        if inner.min() >= 0:
            return torch.ones_like(losses)
        squared = inner.diagonal()
        inverse = np.divide(1.0, squared, out=np.zeros(num), where=squared > 0)
        # Row i of `mix` writes the cut gradient of task i as a combination of the raw ones.
        mix = np.eye(num)
        rows, orders = np.arange(num), self._orders(num)
        # The cut of task i never looks at the cut of another, so all tasks take their k-th turn together.
        for turn in range(num - 1):
            j = orders[:, turn]
            opposed = (mix * inner[j]).sum(1)
            mix[rows, j] -= np.minimum(opposed, 0.0) * inverse[j]
        return torch.from_numpy(mix.sum(0))

    def _orders(self, num: int) -> np.ndarray:
        """For each task a random order of the others: ``[P, P - 1]``."""
        return random_orders(num, self.seed + int(self.step))
