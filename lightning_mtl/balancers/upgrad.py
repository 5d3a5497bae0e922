"""UPGrad: make every task's gradient harmless to all tasks, then average."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from lightning_mtl.balancers.base import GramBalancer, Tasks
from lightning_mtl.linalg import divided, project_on_dual_cone, unit_gram


class UPGrad(GramBalancer):
    r"""Project every gradient on the dual cone :math:`\{v : J v \ge 0\}`, and add the projections, weighted.

    Args:
        num_tasks: ``T``.
        preference: weight of each projection, >= 0: one number, ``T`` of them, or a mapping of task names; by default
            one over the number of tasks that are present.
        every_n_steps: solve in every n-th step only.

    Shapes: gram ``[T, T]``, losses ``[T]`` (unused) -> weights ``[T]``, >= 0.
    State: that of :class:`GramBalancer`.
    Update: mean scale; scale-free; heads keep their own gradient.
    Promises: :math:`g_t^\top d \ge 0` for every task, up to the rounding of the gradients: no task gets worse to first
    order. Zero only where weights > 0 on all gradients combine them to zero. If no gradients conflict, their mean.
    Linear in each task's length while the angles stay.
    Raises: ``ValueError`` if a preference is negative or not finite.
    Paper: Quinton and Rey, 2024, arXiv:2406.16232, equation 3 and section 4.

    Example:
        >>> import torch
        >>> UPGrad(2).combine(torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]]), torch.ones(2))
        tensor([0.2924, 1.9006, 1.9006])
    """

    preference: Tensor

    def __init__(
        self,
        num_tasks: int,
        preference: float | Sequence[float] | Mapping[str, float] | None = None,
        every_n_steps: int = 1,
    ) -> None:
        super().__init__(num_tasks, every_n_steps)
        self._setting("preference", preference, 1.0, low=0.0)

    def weights(self, gram: Tensor, losses: Tensor, tasks: Tasks) -> Tensor:
        unit, norms = unit_gram(gram.numpy())
        projected = project_on_dual_cone(unit, np.diag((norms > 0).astype(float)), self.resolution)
        preference = self._or_equal_shares("preference", tasks)
        return torch.from_numpy(divided((preference * norms) @ projected, norms))
