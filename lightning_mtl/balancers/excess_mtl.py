"""ExcessMTL: weigh the tasks by how far they still are from where they can get."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_mtl.balancers.base import RowBalancer, Tasks
from lightning_mtl.checks import check_integer, check_number
from lightning_mtl.linalg import proportions


class ExcessMTL(RowBalancer):
    r"""Weights that grow with an estimate of each task's excess risk.

    The estimate is :math:`e_t = \sum_k g_{t,k}^2 / \sqrt{\sum_\tau g_{t,k}(\tau)^2}` over the coordinates ``k``,
    relative to the first one, :math:`\hat e_t = e_t / e_t(0)`. The weights follow
    :math:`w_t \leftarrow w_t e^{\eta \hat e_t}` and are normalised to sum 1.

    Args:
        num_tasks: ``T``.
        eta: step size of the weights, > 0.
        warmup_steps: steps with equal weights at first, after which the estimate is the reference (the paper warms up
            for 3 epochs); a task's own counter.

    Shapes: rows ``[T, N]``, losses ``[T]`` (unused) -> update ``[N]``.
    State: that of :class:`RowBalancer`, ``squares`` ``[T, N]``, and ``first``, ``seen`` and ``task_weights``, ``[T]``.
    Update: the weights sum to 1 over the tasks that are present, so it has mean scale; scale-free; heads keep their own
    gradient.
    Raises: ``ValueError`` if an option is out of range.
    Paper: He et al., ICML 2024, arXiv:2402.02009, algorithm 1 and equation 5.

    Example:
        >>> import torch
        >>> ExcessMTL(2).combine(torch.tensor([[2.0, 0.0], [0.0, 4.0]]), torch.ones(2))
        tensor([1., 2.])
    """

    squares: Tensor
    first: Tensor
    seen: Tensor
    task_weights: Tensor
    growing = ("squares",)

    def __init__(self, num_tasks: int, eta: float = 1.0, warmup_steps: int = 0) -> None:
        super().__init__(num_tasks)
        check_number(eta, "eta", self, low=0.0, exclusive=True)
        check_integer(warmup_steps, "warmup_steps", self, low=0)
        self.eta, self.warmup_steps = eta, warmup_steps
        self.register_buffer("squares", torch.zeros((num_tasks, 0)))
        for name in ("first", "seen"):
            self.register_buffer(name, torch.zeros(num_tasks, dtype=torch.float64))
        self.register_buffer("task_weights", torch.full((num_tasks,), 1 / num_tasks, dtype=torch.float64))

    def update(self, rows: Tensor, losses: Tensor, tasks: Tasks) -> Tensor:
        # Divided by its largest entry first: squares of small gradients vanish in float32.
        squares = self._grown("squares", rows)
        squares[tasks] = torch.hypot(squares[tasks], rows)
        past = squares[tasks]
        excess = torch.where(past > 0, rows * (rows / past), 0).double().sum(1)
        self.seen[tasks] += 1
        first = self.first[tasks]
        starts = (self.seen[tasks] > self.warmup_steps) & (first == 0)
        first = torch.where(starts, excess, first)
        self.first[tasks] = first
        moved = (self.seen[tasks] > self.warmup_steps) & (first > 0) & ~starts
        growth = torch.where(moved, self.eta * excess / torch.where(first > 0, first, 1.0), 0.0)
        before, total = proportions(self.task_weights[tasks])
        # Only the proportions count, so the largest exponent is 0.
        weights, _ = proportions(before * torch.exp(growth - growth.max()))
        # Absent tasks keep their share.
        self.task_weights[tasks] = weights * total
        self.last_weights[tasks] = weights
        return weights.to(rows.dtype) @ rows
