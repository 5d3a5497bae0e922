"""A loss balancer, then a gradient balancer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_mtl.balancers.base import LossBalancer, Tasks
from lightning_mtl.balancers.wrapping import Wrapper, own_objective_of, private_weights_of
from lightning_mtl.checks import bad_argument


class Chain(Wrapper):
    r"""Scale the losses with one balancer's weights ``v``, and balance the gradients of the scaled losses with another.

    The second sees :math:`v v^\top \circ G` and :math:`v \circ \ell`; its weights are multiplied by ``v``. Where
    ``v`` is 0, a task is absent for it.

    Args:
        num_tasks: ``T``.
        first: a loss balancer: a name, a mapping with class_path and init_args, or a balancer.
        then: a gradient balancer that works on one gram, in the same forms.
        every_n_steps: solve in every n-th step only.

    Shapes: gram ``[T, T]``, losses ``[T]`` -> weights ``[T]``.
    State: that of :class:`GramBalancer` and of both balancers.
    Update: that of ``then`` on the scaled gradients; heads are weighted by ``v``, as a loss balancer weights them.
    Raises: ``ValueError`` if ``first`` needs gradients, or ``then`` more than one gram.

    Example:
        >>> import torch
        >>> fixed = {"class_path": "fixed", "init_args": {"weights": [0.5, 1.0]}}
        >>> Chain(2, fixed, "mgda").combine(torch.tensor([[4.0, 0.0], [0.0, 1.0]]), torch.ones(2))
        tensor([0.4000, 0.8000])
    """

    def __init__(self, num_tasks: int, first: Any = "dwa", then: Any = "pcgrad", every_n_steps: int = 1) -> None:
        super().__init__(num_tasks, then, every_n_steps, arg="then")
        self.first = self._made(first, "first")
        if not isinstance(self.first, LossBalancer):
            raise bad_argument(
                self, "first", "need the losses only", type(self.first).__name__, "Put it second, or choose another"
            )

    def weights(self, gram: Tensor, losses: Tensor, tasks: Tasks) -> Tensor:
        scale = self._inner_weights(self.first, gram, losses, tasks)
        # A gradient of zero would stop some methods: what the first weighs with 0 is absent for the second.
        counts = scale != 0
        v, gram = scale[counts], gram[counts][:, counts]
        then = torch.arange(self.num_tasks)[tasks][counts]
        scale[counts] = v * self._inner_weights(self.inner, v * gram * v[:, None], v * losses[counts], then)
        return scale

    def private_weights(self, losses: Tensor, present: Tensor | None = None) -> Tensor | None:
        scale = private_weights_of(self.first, losses, present)
        assert scale is not None
        more = private_weights_of(self.inner, scale * losses, present)
        return scale if more is None or isinstance(self.inner, LossBalancer) else scale * more

    def own_objective(self, losses: Tensor, present: Tensor | None = None) -> Tensor | None:
        first = own_objective_of(self.first, losses, present)
        scale = private_weights_of(self.first, losses, present)
        assert scale is not None
        then = own_objective_of(self.inner, scale.detach() * losses, present)
        return then if first is None else first if then is None else first + then.to(first)
