"""ConFIG: the direction with equal cosines to all task gradients."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lightning_mtl.balancers.base import GramBalancer, Tasks
from lightning_mtl.linalg import divided, equal_angles, unit_gram


class ConFIG(GramBalancer):
    r"""Follow :math:`d = (\sum_t g_t^\top u)\, u`, where the unit vector ``u`` has the same cosine with every gradient.

    Args:
        num_tasks: ``T``.
        every_n_steps: solve in every n-th step only.

    Shapes: gram ``[T, T]``, losses ``[T]`` (unused) -> weights ``[T]``.
    State: that of :class:`GramBalancer`.
    Update: sum scale (one task: its gradient); scale-free; heads keep their own gradient.
    Promises: equal, non-negative cosines with all gradients if none depends on the others. Otherwise they are equal in
    least squares only, and the direction is turned round where the gradients' sum goes the other way: the tasks gain
    together, :math:`\sum_t g_t^\top d \ge 0`. A gradient of zero is left out. If nothing is left, zero.
    Paper: Liu et al., ICLR 2025, arXiv:2408.11104, equation 2 and section 3.2.

    Example:
        >>> import torch
        >>> ConFIG(2).combine(torch.tensor([[4.0, 0.0], [0.0, 1.0]]), torch.ones(2))
        tensor([2.5000, 2.5000])
    """

    def weights(self, gram: Tensor, losses: Tensor, tasks: Tasks) -> Tensor:
        unit, norms = unit_gram(gram.numpy())
        aim = equal_angles(unit, self.resolution)
        seen = unit @ aim
        square = float(aim @ seen)
        if square <= 0:
            return torch.zeros_like(losses)
        return torch.from_numpy(divided(aim, norms) * float(np.dot(norms, seen)) / square)
