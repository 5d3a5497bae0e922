"""FairGrad: alpha-fair progress of the tasks."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_mtl.balancers.base import GramBalancer, Tasks
from lightning_mtl.checks import check_number
from lightning_mtl.linalg import fair_weights


class FairGrad(GramBalancer):
    r"""Follow :math:`d = \sum_t w_t g_t` with :math:`w > 0` and :math:`G w = w^{-1/\alpha}`.

    Args:
        num_tasks: ``T``.
        alpha: fairness, > 0: 1 is Nash bargaining, towards 0 the sum of the gradients, towards infinity max-min. The
            paper tries 1 to 10. Below 1 what a short gradient gains against a long one cancels: where lengths differ by
            ``R``, numbers in double precision meet the equations to about :math:`10^{-16} R^{(1 - \alpha) / \alpha}`,
            for 0.2 and ``R`` = 10^4 not at all. Up to 50 they are met where lengths differ by 10^6; at 100, where
            weights would differ by more than doubles can, not even for 10^4.
        every_n_steps: solve in every n-th step only.

    Shapes: gram ``[T, T]``, losses ``[T]`` (unused) -> weights ``[T]``, > 0.
    State: that of :class:`GramBalancer`.
    Update: ``s`` times the rows gives :math:`s^{(\alpha - 1) / (\alpha + 1)}` times the update; heads keep their own
    gradient.
    Promises: :math:`w_t (G w)_t^{\alpha} = 1` for every task, so every task gets better to first order. Where some
    gradients cancel these tasks gain nothing, and the others bargain beside them, as in :class:`Nash`. A gradient of
    zero gets weight 0.
    Raises: ``ValueError`` if ``alpha`` is not > 0.
    Paper: Ban and Ji, ICML 2024, arXiv:2402.15638, equation 5 and algorithm 1. Departure: solved by Newton on the
    convex problem that the equation belongs to, not by bounded least squares.

    Example:
        >>> import torch
        >>> FairGrad(2, alpha=1.0).combine(torch.tensor([[4.0, 0.0], [0.0, 1.0]]), torch.ones(2))
        tensor([1., 1.])
    """

    def __init__(self, num_tasks: int, alpha: float = 1.0, every_n_steps: int = 1) -> None:
        super().__init__(num_tasks, every_n_steps)
        check_number(alpha, "alpha", self, low=0.0, exclusive=True)
        self.alpha = alpha

    def weights(self, gram: Tensor, losses: Tensor, tasks: Tasks) -> Tensor:
        return torch.from_numpy(fair_weights(gram.numpy(), 1.0 / self.alpha, self.resolution))
