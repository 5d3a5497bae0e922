"""CAGrad: near the mean gradient, the direction that is best for the task worst off."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from lightning_mtl.balancers.base import GramBalancer, Tasks
from lightning_mtl.checks import check_choice, check_number
from lightning_mtl.linalg import cagrad_dual

#: A combination shorter than this against the sum of the lengths of its parts is zero: a gram knows its square only
#: up to rounding of that of the sum.
_NOTHING = 1e-6
_NO_MEAN = 3e-8


class CAGrad(GramBalancer):
    r"""Near the mean gradient, the direction that is best for the task worst off.

    Maximise :math:`\min_t g_t^\top d` over :math:`\|d - g_0\| \le c \|g_0\|`, where :math:`g_0` is the mean
    gradient.

    Solved through its dual: with ``w`` on the simplex, :math:`d = g_0 + c \|g_0\| g_w / \|g_w\|`,
    :math:`g_w = \sum_t w_t g_t`.

    Args:
        num_tasks: ``T``.
        c: radius of the ball, 0 <= c < 1 for a convergence guarantee; 0 is the mean gradient. The paper uses 0.4 and
            0.5.
        rescale: "none" as in the paper's algorithm, or "official": the update divided by ``1 + c**2``, as in its code.
        every_n_steps: solve in every n-th step only.

    Shapes: gram ``[T, T]``, losses ``[T]`` (unused) -> weights ``[T]``.
    State: that of :class:`GramBalancer`.
    Update: mean scale; scale-free; heads keep their own gradient.
    Promises: the exact optimum, at the distance ``c |g_0|`` from the mean. A gradient of zero counts in the mean only.
    Where a combination of the others is zero, nothing can be won for all, and the update is the mean gradient.
    Raises: ``ValueError`` if ``c`` or ``rescale`` is out of range.
    Paper: Liu et al., NeurIPS 2021, arXiv:2110.14048, section 3.1 and algorithm 1.

    Example:
        >>> import torch
        >>> CAGrad(2, c=0.5).combine(torch.tensor([[4.0, 0.0], [0.0, 1.0]]), torch.ones(2))
        tensor([2.0000, 1.5308])
    """

    def __init__(self, num_tasks: int, c: float = 0.5, rescale: str = "none", every_n_steps: int = 1) -> None:
        super().__init__(num_tasks, every_n_steps)
        check_number(c, "c", self, low=0.0)
        check_choice(rescale, ("none", "official"), "rescale", self)
        self.c, self.rescale = c, rescale

    def weights(self, gram: Tensor, losses: Tensor, tasks: Tasks) -> Tensor:
        inner = gram.numpy()
        count = len(inner)
        norms = np.sqrt(np.maximum(inner.diagonal(), 0))
        weights = np.full(count, 1 / count)
        length = math.sqrt(max(float(inner.sum()), 0.0)) / count
        if self.c * length > 0 and length > max(_NO_MEAN, self.resolution) * float(norms.sum()) / count:
            there = norms > 0
            dual = np.zeros(count)
            dual[there] = cagrad_dual(inner[there][:, there], self.c, float(there.mean()))
            norm = math.sqrt(max(float(dual @ inner @ dual), 0.0))
            if norm > max(_NOTHING, self.resolution) * float(dual @ norms):
                weights += self.c * length / norm * dual
        if self.rescale == "official":
            weights = weights / (1 + self.c**2)
        return torch.from_numpy(weights)
