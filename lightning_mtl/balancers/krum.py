"""Krum: average the gradients that lie close to others."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_mtl.balancers.base import GramBalancer, Tasks
from lightning_mtl.checks import check_integer


class Krum(GramBalancer):
    r"""Give each task the sum of the squared distances to its nearest neighbours, and average the best-placed tasks.

    Args:
        num_tasks: ``T``.
        num_outliers: ``f``, how many gradients may be anything; ``T - f - 2`` neighbours are looked at (at least one).
        num_selected: ``m``, how many gradients are averaged; 1 is Krum, more is Multi-Krum.
        every_n_steps: solve in every n-th step only.

    Shapes: gram ``[T, T]``, losses ``[T]`` (unused) -> weights ``[T]``: ``1 / m`` or 0.
    State: that of :class:`GramBalancer`.
    Update: mean scale; scale-free; heads keep their own gradient.
    Promises: ``m`` tasks (or all that are present, if fewer) with equal weights that sum to 1. Ties go to the tasks
    that come first.
    Raises: ``ValueError`` if ``num_outliers`` or ``num_selected`` is out of range.
    Paper: Blanchard et al., NeurIPS 2017, arXiv:1703.02757, section 4. It is made for workers that may lie, not for
    tasks; here it is a robust mean.

    Example:
        >>> import torch
        >>> Krum(3).combine(torch.tensor([[1.0, 0.0], [1.1, 0.0], [-50.0, 9.0]]), torch.ones(3))
        tensor([1., 0.])
    """

    def __init__(self, num_tasks: int, num_outliers: int = 0, num_selected: int = 1, every_n_steps: int = 1) -> None:
        super().__init__(num_tasks, every_n_steps)
        check_integer(num_outliers, "num_outliers", self, low=0)
        check_integer(num_selected, "num_selected", self, low=1)
        self.num_outliers, self.num_selected = num_outliers, num_selected

    def weights(self, gram: Tensor, losses: Tensor, tasks: Tasks) -> Tensor:
        count = len(gram)
        squares = gram.diagonal()
        distances = (squares + squares[:, None] - 2 * gram).clamp(min=0)
        neighbours = max(count - self.num_outliers - 2, 1)
        # The nearest of all is the row itself, at distance 0.
        scores = distances.sort(dim=1).values[:, 1 : 1 + neighbours].sum(1)
        chosen = scores.argsort(stable=True)[: self.num_selected]
        weights = torch.zeros_like(losses)
        weights[chosen] = 1 / len(chosen)
        return weights
