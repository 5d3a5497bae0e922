"""Moving average of any balancer's weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_mtl.balancers.base import Tasks
from lightning_mtl.balancers.wrapping import Wrapper
from lightning_mtl.checks import check_number


class MovingAverage(Wrapper):
    r"""Smooth the weights over time: :math:`\lambda_k = \alpha \lambda_{k-1} + (1 - \alpha) \hat\lambda_k` (CR-MOGM).

    Args:
        num_tasks: ``T``.
        balancer: whose weights :math:`\hat\lambda` are averaged: a name, a mapping with class_path and init_args, or a
            balancer.
        alpha: how much of the past is kept, in [0, 1]; the paper's 0.9.
        every_n_steps: solve in every n-th step only.

    Shapes: gram ``[T, T]``, losses ``[T]`` -> weights ``[T]``.
    State: that of :class:`GramBalancer`, the inner balancer's, ``averages`` and ``seen`` ``[T]``.
    Update: the scale of the inner balancer's; scale-free if that is, and for methods whose weights change with the size
    of the gradients in the long run only. A task's first average is its first weight.
    Raises: ``ValueError`` if ``alpha`` is out of range or the balancer needs more than one gram.
    Paper: Zhou et al., NeurIPS 2022, "On the Convergence of Stochastic Multi-Objective Gradient Manipulation and
    Beyond", algorithm 1. Departure: the paper lets ``alpha`` follow the learning rate; here it is constant.

    Example:
        >>> import torch
        >>> MovingAverage(2, "mgda").combine(torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.ones(2))
        tensor([0.4000, 0.8000])
    """

    averages: Tensor
    seen: Tensor

    def __init__(self, num_tasks: int, balancer: Any = "mgda", alpha: float = 0.9, every_n_steps: int = 1) -> None:
        super().__init__(num_tasks, balancer, every_n_steps)
        check_number(alpha, "alpha", self, low=0.0, high=1.0)
        self.alpha = alpha
        for name in ("averages", "seen"):
            self.register_buffer(name, torch.zeros(num_tasks, dtype=torch.float64))

    def weights(self, gram: Tensor, losses: Tensor, tasks: Tasks) -> Tensor:
        new = self._inner_weights(self.inner, gram, losses, tasks)
        kept = self.alpha * self.averages[tasks] + (1 - self.alpha) * new
        average = torch.where(self.seen[tasks] > 0, kept, new)
        self.averages[tasks] = average
        self.seen[tasks] += 1
        return average
