"""Trimmed mean: per coordinate, the mean without the extremes."""

from __future__ import annotations

from torch import Tensor

from lightning_mtl.balancers.base import RowBalancer, Tasks
from lightning_mtl.checks import bad_argument, check_integer


class TrimmedMean(RowBalancer):
    r"""Per coordinate leave out the ``b`` largest and the ``b`` smallest gradients, and take the mean of the rest.

    Args:
        num_tasks: ``T``.
        num_trimmed: ``b``; ``2 b < T``; by default 1 (two tasks: 0). With fewer tasks present, as many as leave one.

    Shapes: rows ``[T, N]``, losses ``[T]`` (unused) -> update ``[N]``.
    State: that of :class:`RowBalancer`. Update: mean scale; scale-free; heads keep their own gradient.
    Raises: ``ValueError`` if ``num_trimmed`` leaves nothing.
    Paper: Yin et al., ICML 2018, arXiv:1803.01498, definition 2. Made for workers that may lie; here a robust mean.

    Example:
        >>> import torch
        >>> TrimmedMean(3, num_trimmed=1).combine(torch.tensor([[1.0], [2.0], [90.0]]), torch.ones(3))
        tensor([2.])
    """

    def __init__(self, num_tasks: int, num_trimmed: int | None = None) -> None:
        super().__init__(num_tasks)
        if num_trimmed is None:
            num_trimmed = 1 if num_tasks > 2 else 0
        check_integer(num_trimmed, "num_trimmed", self, low=0)
        if 2 * num_trimmed >= num_tasks:
            raise bad_argument(
                self,
                "num_trimmed",
                f"be less than half the number of tasks, {num_tasks}",
                num_trimmed,
                "Trim fewer, so that something is left",
            )
        self.num_trimmed = num_trimmed

    def update(self, rows: Tensor, losses: Tensor, tasks: Tasks) -> Tensor:
        trimmed = min(self.num_trimmed, (len(rows) - 1) // 2)
        if trimmed == 0:
            return rows.mean(0)
        return rows.sort(dim=0).values[trimmed:-trimmed].mean(0)
