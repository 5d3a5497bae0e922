"""What the loss balancers have in common that learn one number per task."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor, nn

from lightning_mtl.balancers.base.balancer import ALL, Tasks
from lightning_mtl.balancers.base.loss import LossBalancer
from lightning_mtl.checks import check_number
from lightning_mtl.linalg import adam_step

_ADAM = ("first_moment", "second_moment", "updates")


class LearnedBalancer(LossBalancer):
    r"""Minimise :math:`\sum_t (a_t e^{x_t} \ell_t - b_t x_t)` in the network and in the learned :math:`x_t = \pm s_t`.

    Without ``lr``, ``s`` is a parameter of the user's optimizer; with it state, which Adam moves after each backward
    along the derivative, by its closed form. A task whose loss is exactly 0 is absent: it has no best ``s``.
    """

    # It is linear, but without the mean of the losses over the ranks `s` would have another gradient on each rank, and
    # in a loop of one's own it is in no DDP module.
    linear_in_losses = False

    def __init__(self, num_tasks: int, name: str, start: float, sign: int, lr: float | None) -> None:
        super().__init__(num_tasks)
        self.lr, self._learned, self._sign = lr, name, sign
        if lr is None:
            self.register_parameter(name, nn.Parameter(torch.full((num_tasks,), float(start))))
            return
        check_number(lr, "lr", self, low=0.0, exclusive=True)
        self.register_buffer(name, torch.full((num_tasks,), float(start), dtype=torch.float64))
        for state in _ADAM:
            self.register_buffer(state, torch.zeros(num_tasks, dtype=torch.float64))

    @abstractmethod
    def factors(self, tasks: Tasks) -> tuple[Tensor | float, Tensor | float]:
        """``a`` and ``b`` of the present tasks, ``[P]`` or one number."""

    def objective(self, losses: Tensor, tasks: Tasks = ALL) -> Tensor:
        a, b = self.factors(tasks)
        learned = getattr(self, self._learned).to(losses.dtype)
        if tasks is not ALL:
            learned = learned[tasks]
        x = learned if self._sign > 0 else -learned
        terms = a * torch.exp(x) * losses - b * x
        return terms @ (losses.detach() != 0).to(terms.dtype)

    def advance(self, losses: Tensor, present: Tensor | None = None) -> None:
        if self.lr is not None:  # else there is nothing to move
            super().advance(losses, present)

    def observe(self, losses: Tensor, tasks: Tasks = ALL) -> None:
        assert self.lr is not None
        learned, *adam = (getattr(self, name) for name in (self._learned, *_ADAM))
        (a, b), x = self.factors(tasks), self._sign * learned[tasks]
        gradient = self._sign * (a * torch.exp(x) * losses.double() - b)
        first, second, updates = (state[tasks] for state in adam)
        step, *moments = adam_step(gradient, first, second, updates, self.lr)
        for state, value in zip((learned, *adam), (learned[tasks] - step, *moments), strict=True):
            state[tasks] = torch.where(losses != 0, value, state[tasks])
