"""MGDA: the shortest vector in the convex hull of the task gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_mtl.balancers.base import GramBalancer, Tasks
from lightning_mtl.checks import check_choice
from lightning_mtl.linalg import min_norm

_NORMALIZATIONS = ("none", "l2", "loss", "loss+")


class MGDA(GramBalancer):
    r"""Follow :math:`d = \sum_t w_t g_t` with :math:`w = \arg\min_{w \in \Delta} \|\sum_t w_t g_t\|`.

    Args:
        num_tasks: ``T``.
        normalization: what each gradient is divided by before the weights are looked for: "none"; "l2", its norm;
            "loss", its loss; "loss+", both. The weights are applied to the gradients as they are.
        every_n_steps: solve in every n-th step only.

    Shapes: gram ``[T, T]``, losses ``[T]`` (used by "loss" and "loss+", as absolute values) -> weights ``[T]``.
    State: that of :class:`GramBalancer`.
    Update: weights >= 0 that sum to 1, so it has mean scale; scale-free; heads keep their own gradient.
    Promises: with "none" the exact point of smallest norm, ``d @ g_t >= d @ d`` for every task (so no task gets worse
    to first order); zero exactly where some combination of the gradients is. A task with gradient zero is such a
    point, and stops the shared parameters.
    Paper: Desideri, C. R. Math. 350 (2012); Sener and Koltun, NeurIPS 2018, arXiv:1810.04650, algorithm 2; the
    normalizations are those of their code, which like this one applies the weights to the raw gradients. Others apply
    them to the normalized ones.

    Example:
        >>> import torch
        >>> MGDA(2).combine(torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.ones(2))
        tensor([0.4000, 0.8000])
    """

    def __init__(self, num_tasks: int, normalization: str = "none", every_n_steps: int = 1) -> None:
        super().__init__(num_tasks, every_n_steps)
        check_choice(normalization, _NORMALIZATIONS, "normalization", self)
        self.normalization = normalization

    def weights(self, gram: Tensor, losses: Tensor, tasks: Tasks) -> Tensor:
        if self.normalization == "none":
            return torch.from_numpy(min_norm(gram.numpy()))
        divisor = torch.ones_like(losses)
        if self.normalization in ("l2", "loss+"):
            divisor = divisor * gram.diagonal().clamp(min=0).sqrt()
        if self.normalization in ("loss", "loss+"):
            divisor = divisor * losses.abs()
        # A gradient or loss of zero cannot be divided by; its row stays what it is.
        divisor = torch.where(divisor > 0, divisor, 1.0)
        return torch.from_numpy(min_norm((gram / divisor / divisor[:, None]).numpy()))
