"""IMTL-L: learn one scale per task, so that all scaled losses become equal."""

from __future__ import annotations

from torch import Tensor

from lightning_mtl.balancers.base import LearnedBalancer, Tasks


class IMTLL(LearnedBalancer):
    r"""Minimise :math:`\sum_t (e^{s_t} \ell_t - s_t)` in the network and in the learned scales :math:`s_t`.

    For fixed losses the best scale is :math:`s_t = -\log \ell_t`: every scaled loss is then 1, whatever its unit.

    Args:
        num_tasks: ``T``.
        lr: of an Adam of the balancer's own that moves the :math:`s_t`, where a library makes the optimizer; by default
            they are the user's optimizer's.

    Shapes: losses ``[T]`` -> objective ``[]``.
    State: ``log_scale`` ``[T]``, a parameter that starts at 0: it must be in a parameter group of the optimizer, best
    without weight decay, which would pull every weight back to 1. With ``lr`` no parameter, and Adam's
    ``first_moment``, ``second_moment`` and ``updates`` beside it, ``[T]``.
    Update: weights ``exp(log_scale)``, positive, no fixed scale; heads are weighted. The scale of an absent task, and
    of one whose loss is exactly 0, does not move, except by the optimizer's own momentum. A loss < 0 has no best scale:
    its scale grows without end.
    Raises: ``ValueError`` if ``lr`` is not > 0.
    Paper: Liu et al., "Towards Impartial Multi-task Learning", ICLR 2021, section 3.2. Only the balance of losses;
    the paper also combines it with one of gradients.

    Example:
        >>> import torch
        >>> IMTLL(2)(torch.tensor([1.0, 3.0])).item()
        4.0
    """

    log_scale: Tensor

    def __init__(self, num_tasks: int, lr: float | None = None) -> None:
        super().__init__(num_tasks, "log_scale", start=0.0, sign=1, lr=lr)

    def factors(self, tasks: Tasks) -> tuple[float, float]:
        return 1.0, 1.0
