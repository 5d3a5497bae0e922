"""DB-MTL as published: moving averages of the gradients of the log losses, all as long as the longest."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_mtl.balancers.base import RowBalancer, Tasks
from lightning_mtl.checks import check_number
from lightning_mtl.linalg import log_weights, to_longest


class DBMTLAverage(RowBalancer):
    r"""Moving averages of the gradients of the log losses, all as long as the longest.

    Dual balancing: :math:`\hat h_t \leftarrow \beta_k \hat h_t + (1 - \beta_k) g_t / (\ell_t + 10^{-8})`, then
    :math:`d = \max_u \|\hat h_u\| \sum_t \hat h_t / \|\hat h_t\|`.

    Args:
        num_tasks: ``T``.
        beta, beta_decay: :math:`\beta_k = \beta / k^{decay}` at a task's step ``k``; ``beta`` in [0, 1]. 0 is the
            :class:`DBMTL` that needs no memory.

    Shapes: rows ``[T, N]``, losses ``[T]`` -> update ``[N]``.
    State: that of :class:`RowBalancer`, ``averages`` ``[T, N]`` and ``seen`` ``[T]``.
    Update: sum scale; scale-free in the rows; heads get the gradient of the logarithm of their loss.
    Raises: ``ValueError`` if an option is out of range or a loss is < 0.
    Paper: Lin et al., 2023, arXiv:2308.12029, algorithm 1. Departure: a task's first average is its first gradient, not
    that mixed with zero, which only its direction would not show.

    Example:
        >>> import torch
        >>> DBMTLAverage(2).combine(torch.tensor([[4.0, 0.0], [0.0, 1.0]]), torch.tensor([2.0, 1.0]))
        tensor([2., 2.])
    """

    averages: Tensor
    seen: Tensor
    growing = ("averages",)

    def __init__(self, num_tasks: int, beta: float = 0.9, beta_decay: float = 0.0) -> None:
        super().__init__(num_tasks)
        check_number(beta, "beta", self, low=0.0, high=1.0)
        check_number(beta_decay, "beta_decay", self, low=0.0)
        self.beta, self.beta_decay = beta, beta_decay
        self.register_buffer("averages", torch.zeros((num_tasks, 0)))
        self.register_buffer("seen", torch.zeros(num_tasks, dtype=torch.float64))

    def update(self, rows: Tensor, losses: Tensor, tasks: Tasks) -> Tensor:
        scaled = log_weights(losses, self).to(rows.dtype)[:, None] * rows
        averages = self._grown("averages", rows)
        self.seen[tasks] += 1
        beta = self.beta / self.seen[tasks] ** self.beta_decay
        beta = torch.where(self.seen[tasks] == 1, 0.0, beta).to(rows.dtype)[:, None]
        averages[tasks] = beta * averages[tasks] + (1 - beta) * scaled
        current = averages[tasks]
        return to_longest(current.double().norm(dim=1)).to(rows.dtype) @ current

    def private_weights(self, losses: Tensor, present: Tensor | None = None) -> Tensor:
        return log_weights(losses, self, present)
