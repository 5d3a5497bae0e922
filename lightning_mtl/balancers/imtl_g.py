"""IMTL-G: the update that advances equally far along every task's gradient."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lightning_mtl.balancers.base import GramBalancer, Tasks
from lightning_mtl.linalg import divided, equal_angles, unit_gram

_PARALLEL = 1e-12


class IMTLG(GramBalancer):
    r"""Weights with :math:`\sum_t w_t = 1` for which the update has the same projection on every unit gradient.

    With the unit gram ``C`` and norms ``n``: ``w`` is proportional to :math:`C^{-1} 1 / n`.

    Args:
        num_tasks: ``T``.
        every_n_steps: solve in every n-th step only.

    Shapes: gram ``[T, T]``, losses ``[T]`` (unused) -> weights ``[T]``.
    State: that of :class:`GramBalancer`.
    Update: the weights sum to 1 and may be negative; mean scale; scale-free; heads keep their own gradient.
    Promises: equal projections, as far as the gradients allow it (if some of them depend on each other: in least
    squares). They are negative where only that has the sum 1, as the paper defines it: then every task gets worse;
    :class:`ConFIG` has the same line with the other sign. Where no combination with sum 1 has equal projections, the
    weights are 0. A gradient of zero gets 0.
    Paper: Liu et al., ICLR 2021, "Towards Impartial Multi-task Learning", section 3.1 and algorithm 1.

    Example:
        >>> import torch
        >>> IMTLG(2).combine(torch.tensor([[4.0, 0.0], [0.0, 1.0]]), torch.ones(2))
        tensor([0.8000, 0.8000])
    """

    def weights(self, gram: Tensor, losses: Tensor, tasks: Tasks) -> Tensor:
        unit, norms = unit_gram(gram.numpy())
        weights = divided(equal_angles(unit, self.resolution), norms)
        total = weights.sum()
        if abs(total) <= max(_PARALLEL, self.resolution) * np.abs(weights).sum():
            return torch.zeros_like(losses)
        return torch.from_numpy(weights / total)
