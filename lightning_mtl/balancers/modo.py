"""MoDo: weights that move by the inner products of two independent batches."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_mtl.balancers.base import GramBalancer, Tasks
from lightning_mtl.checks import check_choice, check_number
from lightning_mtl.linalg import cross_gram, onto_simplex, proportions


class MoDo(GramBalancer):
    r"""Weights that move by the inner products of two independent batches.

    Double sampling: :math:`\lambda \leftarrow \Pi_\Delta(\lambda - \gamma (J_1 J_2^\top \lambda + \rho \lambda))`,
    where :math:`J_1` and :math:`J_2` are the task gradients on two independent samples; then follow
    :math:`\sum_t \lambda_t g_t`.

    Args:
        num_tasks: ``T``.
        gamma: step size of the weights, > 0.
        rho: regularisation of the weights, >= 0 (0 as in the paper's experiments; other code has 0.1).
        projection: "simplex" as in the paper, or "softmax" of the moved weights, as in other code.
        every_n_steps: move the weights in every n-th step only.

    Shapes: gram ``[2T, 2T]`` of the halves' rows, losses ``[T]`` (unused) -> weights ``[T]``.
    State: that of :class:`GramBalancer`, and ``task_weights`` ``[T]``.
    Update: the weights sum to 1 over the tasks that are present: mean scale. Not scale-free, because ``gamma`` has a
    unit. Heads keep their own gradient. The two samples are the halves of the batch, and the step is made with both of
    them (the paper draws a third).
    Raises: ``ValueError`` if an option is out of range.
    Paper: Chen et al., NeurIPS 2023 and JMLR 25 (2024), arXiv:2305.20057, algorithm 1.

    Example:
        >>> import torch
        >>> halves = torch.tensor([[1.0, 0.0], [0.0, 0.5], [1.0, 0.0], [0.0, 0.5]])
        >>> MoDo(2).combine(halves, torch.ones(2))
        tensor([0.8500, 0.5750])
    """

    task_weights: Tensor
    halves = True
    levels = ("parameters",)

    def __init__(
        self,
        num_tasks: int,
        gamma: float = 0.1,
        rho: float = 0.0,
        projection: str = "simplex",
        every_n_steps: int = 1,
    ) -> None:
        super().__init__(num_tasks, every_n_steps)
        check_number(gamma, "gamma", self, low=0.0, exclusive=True)
        check_number(rho, "rho", self, low=0.0)
        check_choice(projection, ("simplex", "softmax"), "projection", self)
        self.gamma, self.rho, self.projection = gamma, rho, projection
        self.register_buffer("task_weights", torch.full((num_tasks,), 1 / num_tasks, dtype=torch.float64))

    def weights(self, gram: Tensor, losses: Tensor, tasks: Tasks) -> Tensor:
        weights, total = proportions(self.task_weights[tasks])
        moved = weights - self.gamma * (cross_gram(gram) @ weights + self.rho * weights)
        moved = onto_simplex(moved, self.projection)
        # Absent tasks keep their share.
        self.task_weights[tasks] = moved * total
        return moved
