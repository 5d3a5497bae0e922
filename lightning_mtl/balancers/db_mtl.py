"""DB-MTL: gradients of the logarithms of the losses, all as long as the longest."""

from __future__ import annotations

from torch import Tensor

from lightning_mtl.balancers.base import GramBalancer, Tasks
from lightning_mtl.linalg import log_weights, to_longest


class DBMTL(GramBalancer):
    r"""Gradients of the logarithms of the losses, all as long as the longest.

    Dual balancing without a memory: :math:`d = \max_u \|h_u\| \sum_t h_t / \|h_t\|` with
    :math:`h_t = g_t / (\ell_t + 10^{-8})`.

    Args:
        num_tasks: ``T``.
        every_n_steps: solve in every n-th step only.

    Shapes: gram ``[T, T]``, losses ``[T]`` -> weights ``[T]``, >= 0.
    State: that of :class:`GramBalancer`.
    Update: sum scale; scale-free in the rows; the direction does not change if a loss and its gradient are multiplied
    by one number. Heads get the gradient of the logarithm of their loss.
    Promises: every gradient is equally long in the sum; one of zero is left out.
    Raises: ``ValueError`` if a loss is < 0.
    Paper: Lin et al., 2023, arXiv:2308.12029, algorithm 1 with beta = 0; ``db_mtl_average`` keeps the paper's moving
    average.

    Example:
        >>> import torch
        >>> DBMTL(2).combine(torch.tensor([[4.0, 0.0], [0.0, 1.0]]), torch.tensor([2.0, 1.0]))
        tensor([2., 2.])
    """

    def weights(self, gram: Tensor, losses: Tensor, tasks: Tasks) -> Tensor:
        norms = gram.diagonal().clamp(min=0).sqrt()
        scale = log_weights(losses, self)
        return scale * to_longest(norms * scale)

    def private_weights(self, losses: Tensor, present: Tensor | None = None) -> Tensor:
        return log_weights(losses, self, present)
