"""MoCo: the common descent direction of gradients that are tracked over time."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_mtl.balancers.base import RowBalancer, Tasks
from lightning_mtl.checks import check_choice, check_number
from lightning_mtl.linalg import gram, onto_simplex, proportions


class MoCo(RowBalancer):
    r"""The common descent direction of gradients that are tracked over time.

    Track each gradient, :math:`y_t \leftarrow y_t - \beta_k (y_t - g_t)`, move the weights towards the point of
    smallest norm, :math:`\lambda \leftarrow \Pi_\Delta(\lambda - \gamma_k (Y Y^\top + \rho I) \lambda)`, and follow
    :math:`\sum_t \lambda_t y_t`.

    Args:
        num_tasks: ``T``.
        beta, beta_decay: :math:`\beta_k = \beta / k^{decay}` at step ``k``, in (0, 1].
        gamma, gamma_decay: the same for the weights' step size.
        rho: regularisation of the weights, >= 0.
        projection: "simplex" as in the paper, or "softmax" of the moved weights, as in much other code.

    Shapes: rows ``[T, N]``, losses ``[T]`` (unused) -> update ``[N]``.
    State: that of :class:`RowBalancer`, ``tracked`` ``[T, N]``, ``task_weights`` and ``seen`` ``[T]``.
    Update: the weights sum to 1 over the tasks that are present: mean scale. Not scale-free, because ``gamma`` has a
    unit. Heads keep their own gradient. A task's first gradient is tracked as it is, times :math:`\beta_1`.
    Raises: ``ValueError`` if an option is out of range.
    Paper: Fernando et al., ICLR 2023, "Mitigating Gradient Bias in Multi-objective Learning", algorithm 1. Other code
    rescales the gradients to their losses first; the paper does not.

    Example:
        >>> import torch
        >>> MoCo(2, beta=1.0).combine(torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.ones(2))
        tensor([0.8500, 0.5750])
    """

    tracked: Tensor
    task_weights: Tensor
    seen: Tensor
    growing = ("tracked",)

    def __init__(
        self,
        num_tasks: int,
        beta: float = 0.5,
        beta_decay: float = 0.5,
        gamma: float = 0.1,
        gamma_decay: float = 0.5,
        rho: float = 0.0,
        projection: str = "simplex",
    ) -> None:
        super().__init__(num_tasks)
        check_number(beta, "beta", self, low=0.0, high=1.0, exclusive=True)
        check_number(gamma, "gamma", self, low=0.0, exclusive=True)
        for name, value in {"beta_decay": beta_decay, "gamma_decay": gamma_decay, "rho": rho}.items():
            check_number(value, name, self, low=0.0)
        check_choice(projection, ("simplex", "softmax"), "projection", self)
        self.beta, self.beta_decay, self.gamma, self.gamma_decay = beta, beta_decay, gamma, gamma_decay
        self.rho, self.projection = rho, projection
        self.register_buffer("tracked", torch.zeros((num_tasks, 0)))
        self.register_buffer("seen", torch.zeros(num_tasks, dtype=torch.float64))
        self.register_buffer("task_weights", torch.full((num_tasks,), 1 / num_tasks, dtype=torch.float64))

    def update(self, rows: Tensor, losses: Tensor, tasks: Tasks) -> Tensor:
        tracked = self._grown("tracked", rows)
        self.seen[tasks] += 1
        beta = (self.beta / self.seen[tasks] ** self.beta_decay).to(rows.dtype)[:, None]
        tracked[tasks] = torch.lerp(tracked[tasks], rows, beta)
        current = tracked[tasks]
        weights, total = proportions(self.task_weights[tasks])
        slope = (gram(current) + self.rho * torch.eye(len(weights), device=rows.device)) @ weights
        moved = weights - self.gamma / (int(self.step) + 1) ** self.gamma_decay * slope
        moved = onto_simplex(moved, self.projection)
        # Absent tasks keep their share.
        self.task_weights[tasks] = moved * total
        self.last_weights[tasks] = moved
        return moved.to(rows.dtype) @ current
