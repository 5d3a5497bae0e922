"""Bound the length of any balancer's update of the shared parameters."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_mtl.balancers.base import Tasks
from lightning_mtl.balancers.wrapping import Wrapper
from lightning_mtl.checks import check_number


class ClipUpdate(Wrapper):
    r"""Scale the weights down where the update :math:`d = \sum_t w_t g_t` would be longer than ``max_norm``.

    Nash-MTL and FAMO were published with such a clip at 1. It differs from ``Trainer(gradient_clip_val=...)``: it sees
    the update of the shared parameters in each backward, before gradients are accumulated and without the heads.

    Args:
        num_tasks: ``T``.
        balancer: a name, a mapping with class_path and init_args, or a balancer.
        max_norm: largest length of the update, > 0.
        every_n_steps: solve in every n-th step only.

    Shapes: gram ``[T, T]``, losses ``[T]`` -> weights ``[T]``.
    State: that of :class:`GramBalancer` and the inner balancer's.
    Update: the inner balancer's, or that with length ``max_norm``; so it is not scale-free. Heads as with the inner
    one.
    Raises: ``ValueError`` if ``max_norm`` is not > 0 or the balancer needs more than one gram.
    Source: the official code of Nash-MTL, arXiv:2202.01017, and FAMO, arXiv:2306.03792.

    Example:
        >>> import torch
        >>> ClipUpdate(2, "fixed", max_norm=2.5).combine(torch.tensor([[3.0, 0.0], [0.0, 4.0]]), torch.ones(2))
        tensor([1.5000, 2.0000])
    """

    def __init__(self, num_tasks: int, balancer: Any = "nash", max_norm: float = 1.0, every_n_steps: int = 1) -> None:
        super().__init__(num_tasks, balancer, every_n_steps)
        check_number(max_norm, "max_norm", self, low=0.0, exclusive=True)
        self.max_norm = max_norm

    def weights(self, gram: Tensor, losses: Tensor, tasks: Tasks) -> Tensor:
        weights = self._inner_weights(self.inner, gram, losses, tasks)
        length = float((weights @ gram @ weights).clamp(min=0).sqrt())
        return weights * min(1.0, self.max_norm / length) if length > 0 else weights
