"""GradVac: pull the cosines between task gradients up to what they usually are."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from lightning_mtl.balancers.base import GramBalancer, Tasks, in_numpy
from lightning_mtl.checks import check_choice, check_integer, check_number
from lightning_mtl.linalg import random_orders

_TINY = float(np.finfo(np.float64).tiny)


class GradVac(GramBalancer):
    r"""Pull the cosines between task gradients up to what they usually are.

    For each task, over the others in random order: if its cosine :math:`\phi` with the other's gradient is below
    the target :math:`\hat\phi`, add as much of that gradient as brings it to the target.

    The targets are moving averages, :math:`\hat\phi \leftarrow (1 - \beta) \hat\phi + \beta \phi`, started at 0 and
    moved by each pair as it is met, in the paper's order: first the correction, then the target.

    Args:
        num_tasks: ``T``.
        beta: how fast the targets follow, in [0, 1]; the paper's 0.01 (other code uses 0.5).
        granularity: targets and corrections for the "whole" of the shared parameters, per "layer" or per "tensor".
        seed: of the random orders, which depend on it and the step counter alone.
        every_n_steps: solve in every n-th step only.

    Shapes: gram ``[K, T, T]`` of the ``K`` groups, losses ``[T]`` (unused) -> weights ``[K, T]``.
    State: that of :class:`GramBalancer`, and ``targets`` ``[K, T, T]``.
    Update: sum scale; scale-free; heads keep their own gradient. Promises: a plain sum while every cosine is above its
    target; with ``beta=0`` and two tasks, PCGrad.
    Raises: ``ValueError`` if an option is out of range.
    Paper: Wang et al., ICLR 2021, arXiv:2010.05874, equation 4 and algorithm 1.

    Example:
        >>> import torch
        >>> rows = torch.tensor([[1.0, 0.0], [-1.0, 1.0]])
        >>> GradVac(2).combine(rows, torch.ones(2)).tolist()
        [0.5, 1.5]
    """

    targets: Tensor
    grouped = True
    growing = ("targets", "last_weights")

    def __init__(
        self,
        num_tasks: int,
        beta: float = 0.01,
        granularity: Literal["whole", "layer", "tensor"] = "whole",
        seed: int = 0,
        every_n_steps: int = 1,
    ) -> None:
        super().__init__(num_tasks, every_n_steps)
        check_number(beta, "beta", self, low=0.0, high=1.0)
        check_choice(granularity, ("whole", "layer", "tensor"), "granularity", self)
        check_integer(seed, "seed", self, low=0)
        self.beta, self.granularity, self.seed = beta, granularity, seed
        self.register_buffer("targets", torch.zeros((1, num_tasks, num_tasks), dtype=torch.float64))

    def weights(self, gram: Tensor, losses: Tensor, tasks: Tasks) -> Tensor:
        groups, count = gram.shape[:2]
        self._grown("targets", groups)
        # In numpy, as in PCGrad: calling torch would take most of the time.
        inner = gram.numpy()
        index = np.arange(self.num_tasks)[in_numpy(tasks)]
        norms = np.sqrt(np.maximum(inner.diagonal(axis1=1, axis2=2), 0))
        # Task i meets each of the others once: [K, T - 1, P], a turn after the other.
        rows, orders = np.arange(count), random_orders(count, self.seed + int(self.step)).T
        known = self.targets.numpy()
        others, targets = norms[:, orders], known[:, index, index[orders]]
        # A target of 1 cannot be reached; a gradient of zero has no direction.
        room = np.sqrt(np.maximum(1 - targets * targets, 0))
        possible = (others > 0) & (room > 0)
        slope, inverse = np.zeros((2, *targets.shape))
        np.divide(targets, room, out=slope, where=possible)
        np.divide(1.0, others, out=inverse, where=possible)
        amounts, cosines, lengths = np.empty((3, *targets.shape))
        # Products of the corrected gradients with the raw ones, and squares of their lengths.
        seen, squares = inner.copy(), norms * norms
        for turn, j in enumerate(orders):
            product, other, own = seen[:, rows, j], others[:, turn], np.sqrt(np.maximum(squares, 0))
            both = own * other
            phi = np.minimum(np.maximum(product / np.maximum(both, _TINY), -1), 1)
            amount = own * (slope[:, turn] * np.sqrt(1 - phi * phi) - phi) * inverse[:, turn] * (phi < targets[:, turn])
            squares = squares + amount * (2 * product + amount * other * other)
            seen += amount[:, :, None] * inner[:, j]
            amounts[:, turn], cosines[:, turn], lengths[:, turn] = amount, phi, both
        followed = (1 - self.beta) * targets + self.beta * cosines
        known[:, index, index[orders]] = np.where(lengths > 0, followed, targets)
        mix = np.zeros((groups, count, count))
        mix[:, rows, rows], mix[:, rows, orders] = 1, amounts
        return torch.from_numpy(mix.sum(1))
