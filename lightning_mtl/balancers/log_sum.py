"""The sum of the logarithms of the losses: indifferent to the unit of each loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from lightning_mtl.balancers.base import ALL, LossBalancer, Tasks
from lightning_mtl.linalg import one_or_nan


class LogSum(LossBalancer):
    r"""Minimise :math:`\sum_t \log (\ell_t - b_t)`, so that a loss in another unit changes nothing.

    Its weights are :math:`1 / (\ell_t - b_t)`: every task takes part with its relative progress. So a task whose loss
    comes near its offset gets a weight that drowns the others, and a step as long as that: give such a task a floor.

    Args:
        num_tasks: ``T``.
        loss_offset: ``b``: a number, a sequence of ``T``, or a mapping of task names (a task left out has 0). For
            losses that can go negative pass a lower bound.
        floor: in the same forms, > 0: the weight of a task is at most one over it, and the logarithm goes on as a
            straight line below. The default only keeps weights finite, because any other has a unit.

    Shapes: losses ``[T]`` -> objective ``[]``. State: none.
    Update: no fixed scale, it grows as the losses shrink; heads are weighted. Unchanged if a loss (with its offset and
    floor) and its gradient are multiplied by the same number. An absent task is left out, and so is one whose loss is
    exactly 0 or at its offset.
    Raises: ``ValueError`` if an offset, a floor or a task name is wrong, or a loss is below its offset (on the CPU in
    any step, elsewhere in the first).
    Paper: the scale-invariant baseline of Navon et al., ICML 2022, arXiv:2202.01017, section 6; offset and floor are
    ours.

    Example:
        >>> import torch
        >>> LogSum(2).weights(torch.tensor([2.0, 4.0]))
        tensor([0.5000, 0.2500])
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
        logs, _ = self._log_above(losses, tasks, "loss_offset")
        return logs.sum() * one_or_nan(losses)
