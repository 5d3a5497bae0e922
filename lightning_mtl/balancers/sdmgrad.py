"""SDMGrad: near a preferred direction, the common descent of two independent batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from lightning_mtl.balancers.base import GramBalancer, Tasks
from lightning_mtl.checks import check_integer, check_number
from lightning_mtl.linalg import cross_gram, project_on_simplex, proportions


class SDMGrad(GramBalancer):
    r"""Near a preferred direction, the common descent of two independent batches.

    Move ``w`` by projected stochastic gradient steps on :math:`\tfrac12 \|J^\top (w + \lambda \tilde w)\|^2`, and
    follow :math:`J^\top (w + \lambda \tilde w) / (1 + \lambda)`.

    The gradient, :math:`J_1 J_2^\top (w + \lambda \tilde w)`, is unbiased because its factors come from two independent
    samples. It is divided by the square of the mean gradient norm, so that the step size has no unit.

    Args:
        num_tasks: ``T``.
        pull: :math:`\lambda`, how much the preferred direction counts, >= 0; the paper's experiments use 0.3.
        preference: :math:`\tilde w`, divided by its sum over the tasks that are present: one number, ``T`` of them, or
            a mapping of task names.
        lr, momentum, iterations: of the inner steps (the official code's 10, 0.5 and 20).
        every_n_steps: solve in every n-th step only.

    Shapes: gram ``[2T, 2T]`` of the halves' rows, losses ``[T]`` (unused) -> weights ``[T]``.
    State: that of :class:`GramBalancer`, and ``task_weights`` ``[T]``, from which the next step starts.
    Update: mean scale; scale-free; heads keep their own gradient. The two samples are the halves of the batch, and the
    step is made with both of them (the paper draws a third).
    Raises: ``ValueError`` if an option is out of range.
    Paper: Xiao, Ban and Ji, NeurIPS 2023, arXiv:2305.18409, algorithm 1 and section 6.1.

    Example:
        >>> import torch
        >>> halves = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
        >>> SDMGrad(2).combine(halves, torch.ones(2))
        tensor([1., 1.])
    """

    task_weights: Tensor
    preference: Tensor
    halves = True
    levels = ("parameters",)

    def __init__(
        self,
        num_tasks: int,
        pull: float = 0.3,
        preference: float | Sequence[float] | Mapping[str, float] | None = None,
        lr: float = 10.0,
        momentum: float = 0.5,
        iterations: int = 20,
        every_n_steps: int = 1,
    ) -> None:
        super().__init__(num_tasks, every_n_steps)
        check_number(pull, "pull", self, low=0.0)
        check_number(lr, "lr", self, low=0.0, exclusive=True)
        check_number(momentum, "momentum", self, low=0.0, high=1.0)
        check_integer(iterations, "iterations", self, low=1)
        self.pull, self.lr, self.momentum, self.iterations = pull, lr, momentum, iterations
        self._setting("preference", preference, 1.0, low=0.0)
        self.register_buffer("task_weights", torch.full((num_tasks,), 1 / num_tasks, dtype=torch.float64))

    def weights(self, gram: Tensor, losses: Tensor, tasks: Tasks) -> Tensor:
        cross = cross_gram(gram).numpy()
        # The mean norm, from both halves: the cross products of one task may be negative.
        norms = gram.diagonal().clamp(min=0).sqrt().numpy()
        size = float((norms[: len(cross)] + norms[len(cross) :]).mean())
        start, share = proportions(self.task_weights[tasks])
        weights = start.numpy()
        preference = self.preference[tasks].numpy()
        preference = preference / preference.sum() if preference.sum() > 0 else weights
        speed = np.zeros_like(weights)
        for _ in range(self.iterations if size > 0 else 0):
            speed = self.momentum * speed + cross @ (weights + self.pull * preference) / size**2
            weights = project_on_simplex(weights - self.lr * speed)
        # Absent tasks keep their share.
        self.task_weights[tasks] = torch.from_numpy(weights) * share
        return torch.from_numpy((weights + self.pull * preference) / (1 + self.pull))
