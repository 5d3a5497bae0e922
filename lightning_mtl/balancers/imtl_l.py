"""IMTL-L: learn one scale per task, so that all scaled losses become equal."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_mtl.balancers.base import ALL, LossBalancer, Tasks


class IMTLL(LossBalancer):
    r"""Minimise :math:`\sum_t (e^{s_t} \ell_t - s_t)` in the network and in the learned scales :math:`s_t`.

    For fixed losses the best scale is :math:`s_t = -\log \ell_t`: every scaled loss is then 1, whatever its unit.

    Args:
        num_tasks: ``T``.

    Shapes: losses ``[T]`` -> objective ``[]``.
    State: ``log_scale`` ``[T]``, a parameter that starts at 0: it must be in a parameter group of the optimizer, best
    without weight decay, which would pull every weight back to 1.
    Update: weights ``exp(log_scale)``, positive, no fixed scale; heads are weighted. An absent task's scale does not
    move, except by the optimizer's own momentum. A loss <= 0 has no best scale: its scale grows without end.
    Paper: Liu et al., "Towards Impartial Multi-task Learning", ICLR 2021, section 3.2. Only the balance of losses;
    the paper also combines it with one of gradients.

    Example:
        >>> import torch
        >>> IMTLL(2)(torch.tensor([1.0, 3.0])).item()
        4.0
    """

    # It is linear, but without the mean of the losses over the ranks `log_scale` would have another gradient on each
    # rank, and in a loop of one's own it is in no DDP module.
    linear_in_losses = False

    def __init__(self, num_tasks: int) -> None:
        super().__init__(num_tasks)
        self.log_scale = nn.Parameter(torch.zeros(num_tasks))

    def objective(self, losses: Tensor, tasks: Tasks = ALL) -> Tensor:
        log_scale = self.log_scale[tasks].to(losses.dtype)
        return (torch.exp(log_scale) * losses - log_scale).sum()
