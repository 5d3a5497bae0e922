"""Nash-MTL: the bargain in which every task gains the same share."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_mtl.balancers.base import GramBalancer, Tasks
from lightning_mtl.linalg import fair_weights


class Nash(GramBalancer):
    r"""Follow :math:`d = \sum_t w_t g_t` with :math:`w > 0` and :math:`G w = 1 / w`: the Nash bargaining solution.

    Args:
        num_tasks: ``T``.
        every_n_steps: bargain in every n-th step only, as the paper does to save time.

    Shapes: gram ``[T, T]``, losses ``[T]`` (unused) -> weights ``[T]``, > 0.
    State: that of :class:`GramBalancer`.
    Update: its length is the square root of the number of tasks (that gain), whatever the gradients: it does **not**
    scale with them. Multiplying one task's loss by a constant changes nothing. Published runs clip it to norm 1:
    ``ClipUpdate(num_tasks, "nash", max_norm=1.0)``. Heads keep their own gradient; the official code weights them:
    ``weight_heads=True``.
    Promises: :math:`w_t (G w)_t = 1` for every task, so every task gets better to first order. Where the gradients of
    some tasks cancel (a combination with weights > 0 is zero, as far as their rounding tells) there is no bargain; the
    update is then the limit that a vanishing disagreement leads to: these tasks gain nothing, and the others bargain at
    a right angle to their gradients. A gradient of zero gets weight 0.
    Paper: Navon et al., ICML 2022, arXiv:2202.01017, claim 3.2 and algorithm 1. Departure: the equation is the
    optimality condition of a convex problem and is solved by Newton, not by a sequence of linearised programs.

    Example:
        >>> import torch
        >>> Nash(2).combine(torch.tensor([[4.0, 0.0], [0.0, 1.0]]), torch.ones(2))
        tensor([1., 1.])
    """

    def weights(self, gram: Tensor, losses: Tensor, tasks: Tasks) -> Tensor:
        return torch.from_numpy(fair_weights(gram.numpy(), 1.0, self.resolution))
