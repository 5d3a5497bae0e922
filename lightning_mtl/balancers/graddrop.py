"""GradDrop: per coordinate, keep the gradients of one sign, drawn by how pure the sign is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_mtl.balancers.base import RowBalancer, Tasks
from lightning_mtl.checks import check_integer


class GradDrop(RowBalancer):
    r"""Per coordinate, keep the gradients of one sign, drawn by how pure the sign is.

    Per coordinate draw a sign, positive with :math:`P = \tfrac12 (1 + \sum_t g_t / \sum_t |g_t|)`, and add the
    gradients that have it.

    Args:
        num_tasks: ``T``.
        leak: share of a gradient that always passes, in [0, 1]: one number, ``T`` of them, or a mapping of task names;
            0 by default.
        seed: of the draws, which depend on it and the step counter alone.

    Shapes: rows ``[T, N]``, losses ``[T]`` (unused) -> update ``[N]``.
    State: that of :class:`RowBalancer`.
    Update: sum scale; scale-free; heads keep their own gradient. Promises: a plain sum where all signs agree; the order
    of the tasks does not matter.
    Paper: Chen et al., NeurIPS 2020, arXiv:2010.06808, algorithm 1. Departure: the paper drops gradients of the
    features, summed over the batch and multiplied with their signs; here, as in other code for any parameters, those of
    the shared parameters.

    Example:
        >>> import torch
        >>> GradDrop(2).combine(torch.tensor([[1.0, 2.0], [3.0, -2.0]]), torch.ones(2)).abs()
        tensor([4., 2.])
    """

    leak: Tensor

    def __init__(
        self, num_tasks: int, leak: float | Sequence[float] | Mapping[str, float] | None = None, seed: int = 0
    ) -> None:
        super().__init__(num_tasks)
        self._setting("leak", leak, 0.0, low=0.0, high=1.0)
        check_integer(seed, "seed", self, low=0)
        self.seed = seed

    def update(self, rows: Tensor, losses: Tensor, tasks: Tasks) -> Tensor:
        size = rows.abs().sum(0)
        purity = 0.5 * (1 + torch.where(size > 0, rows.sum(0) / size, 0))
        # Drawn where the rows are: equal on every rank with the same kind of device.
        generator = torch.Generator(rows.device).manual_seed(self.seed + int(self.step))
        draw = torch.rand(rows.shape[1], generator=generator, dtype=torch.float32, device=rows.device).to(rows)
        chosen = torch.where(purity > draw, rows > 0, rows < 0)
        leak = self.leak[tasks].to(rows)[:, None]
        return (rows * (leak + (1 - leak) * chosen)).sum(0)
