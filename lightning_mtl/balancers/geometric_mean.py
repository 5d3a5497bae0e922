"""The geometric mean of the losses (GLS): one scale for all tasks, without a weight to tune."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from lightning_mtl.balancers.base import ALL, LossBalancer, Tasks
from lightning_mtl.linalg import one_or_nan


class GeometricMean(LossBalancer):
    r"""Minimise :math:`G = \big(\prod_t (\ell_t - b_t)\big)^{1/T}`, taken in the log domain.

    Its weights are :math:`G / (T (\ell_t - b_t))`: those of ``LogSum``, times ``G / T``, so that steps shrink as the
    losses do. A task whose loss alone comes near its offset still gets a weight that drowns the others: give it a
    floor.

    Args:
        num_tasks: ``T``.
        loss_offset: ``b``: a number, a sequence of ``T``, or a mapping of task names (a task left out has 0). For
            losses that can go negative pass a lower bound.
        floor: in the same forms, > 0: the weight of a task is at most ``G / T`` over it, and the logarithm goes on as
            a straight line below. The default only keeps weights finite, because any other has a unit.

    Shapes: losses ``[T]`` -> objective ``[]``. State: none.
    Update: mean scale; heads are weighted. If a loss (with its offset and floor) and its gradient are multiplied
    by ``c``, the update is multiplied by ``c ** (1 / T)`` and keeps its direction. An absent task is left out, and so
    is one whose loss is exactly 0 or at its offset; ``T`` is then the number of the others.
    Raises: ``ValueError`` if an offset, a floor or a task name is wrong, or a loss is below its offset (on the CPU in
    any step, elsewhere in the first).
    Paper: Chennupati et al., CVPR Workshops 2019, arXiv:1904.08492; offset and floor are ours.

    Example:
        >>> import torch
        >>> GeometricMean(2)(torch.tensor([2.0, 8.0])).item()
        4.0
    """

    loss_offset: Tensor

    def __init__(
        self,
        num_tasks: int,
        loss_offset: float | Sequence[float] | Mapping[str, float] | None = None,
        floor: float | Sequence[float] | Mapping[str, float] | None = None,
    ) -> None:
        super().__init__(num_tasks)
        self._setting("loss_offset", loss_offset, 0.0)
        self._set_floor(floor)

    def objective(self, losses: Tensor, tasks: Tasks = ALL) -> Tensor:
        logs, counts = self._log_above(losses, tasks, "loss_offset")
        mean = (logs.sum() / counts.sum().clamp(min=1)).exp()
        return mean * (counts.any() * one_or_nan(losses))
