"""Fixed weights: equal unless given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_mtl.balancers.base import ALL, LossBalancer, Tasks
from lightning_mtl.checks import bad_argument


class Fixed(LossBalancer):
    r"""Weigh the losses with numbers that never change: :math:`L = \sum_t w_t \ell_t`.

    With equal weights of 1 this is ordinary joint training. It is the baseline that every other method has to
    beat, and hand-tuned weights often are hard to beat.

    Args:
        num_tasks: ``T``.
        weights: a mapping of task names to weights (a task left out keeps 1), a sequence of ``T`` weights in
            task order, or ``None`` for 1 each. Weights may be 0 or negative, not NaN or infinite.

    Shapes: losses ``[T]`` -> objective ``[]``. State: none.
    Update: sum scale; heads are weighted.
    Raises: ``ValueError`` if a name is not a task, if there are not ``T`` weights, or if one is not finite.

    Example:
        >>> import torch
        >>> Fixed(2, weights=[1.0, 0.5])(torch.tensor([2.0, 4.0])).item()
        4.0
    """

    task_weights: Tensor
    linear_in_losses = True
    indifferent_to_absent = True

    def __init__(self, num_tasks: int, weights: Mapping[str, float] | Sequence[float] | None = None) -> None:
        super().__init__(num_tasks)
        self._given = dict(weights) if isinstance(weights, Mapping) else weights
        # A setting, not state: a checkpoint must not bring an old one back.
        self.register_buffer("task_weights", self._resolve(), persistent=False)

    def bind(self, names: Sequence[str]) -> None:
        super().bind(names)
        if isinstance(self._given, dict):
            self.task_weights.copy_(self._resolve())

    def objective(self, losses: Tensor, tasks: Tasks = ALL) -> Tensor:
        if isinstance(self._given, dict) and self.names is None:
            raise bad_argument(
                self,
                "weights",
                "be a sequence where the task names are not known",
                "a mapping",
                "Call bind(names) first, or pass the weights in task order",
            )
        return losses @ self.task_weights[tasks].to(losses.dtype)

    def _resolve(self) -> Tensor:
        weights = torch.tensor(self._by_task(self._given, 1.0, "weights", float), dtype=torch.float64)
        if not bool(torch.isfinite(weights).all()):
            raise bad_argument(self, "weights", "be finite", weights.tolist(), "Remove the NaN or infinite entry")
        return weights
