"""FAMO: spend the step so that all losses fall at the same relative rate, without a second backward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_mtl.balancers.base import ALL, LossBalancer, Tasks
from lightning_mtl.checks import check_number
from lightning_mtl.linalg import adam_step, one_or_nan

_MOVING = ("logits", "first_moment", "second_moment", "updates")


class FAMO(LossBalancer):
    r"""Weigh relative progress by :math:`z = \mathrm{softmax}(\xi)`, learned from how the losses moved.

    With :math:`D_t = \ell_t - b_t` the weights are :math:`\frac{z_t / D_t}{\sum_u z_u / D_u}`. From the drop
    :math:`\delta_t` of :math:`\log D_t` since the last step, :math:`\xi` makes an Adam step along
    :math:`(\partial z / \partial \xi)^\top \delta + \gamma \xi`: who improved most loses weight.

    Args:
        num_tasks: ``T``.
        gamma: decay of :math:`\xi`, >= 0.
        lr: of the Adam that moves :math:`\xi`.
        min_losses: ``b``, lower bounds of the losses: a number, a sequence of ``T``, or a mapping of task names (a
            task left out has 0).
        floor: in the same forms, > 0: what a smaller :math:`D_t` counts as. Without one, a loss that comes near its
            bound takes all the weight; the default only keeps numbers finite, because any other has a unit.

    Shapes: losses ``[T]`` -> objective ``[]``, the weighted mean of the losses.
    State: ``logits``, ``last_logs`` (NaN before a task's first step), Adam's ``first_moment``,
    ``second_moment`` and ``updates``, all ``[T]``.
    Update: mean scale, the weights are positive and sum to 1; heads are weighted. Its direction stays the same if a
    loss (with its bound) and its gradient are multiplied by a number. An absent task, and one whose loss is exactly
    0 or at its bound, is left out of both softmaxes; when it is back, its drop counts from its last step.
    Raises: ``ValueError`` if an argument is out of range, or a loss is below its bound (on the CPU in any step,
    elsewhere in the first).
    Paper: Liu et al., NeurIPS 2023, arXiv:2306.03792, algorithm 1. Departure: the drop is read off the next batch
    instead of a second forward on the same one, as its authors' code does where a step sees all data.

    Example:
        >>> import torch
        >>> balancer = FAMO(2)
        >>> balancer.advance(torch.tensor([1.0, 1.0]))
        >>> balancer.weights(torch.tensor([0.5, 1.0]))  # (2, 1) / 3 before the first task lost weight for improving
        tensor([0.6555, 0.3445])
    """

    logits: Tensor
    first_moment: Tensor
    second_moment: Tensor
    updates: Tensor
    last_logs: Tensor
    min_losses: Tensor

    def __init__(
        self,
        num_tasks: int,
        gamma: float = 1e-3,
        lr: float = 0.025,
        min_losses: float | Sequence[float] | Mapping[str, float] | None = None,
        floor: float | Sequence[float] | Mapping[str, float] | None = None,
    ) -> None:
        super().__init__(num_tasks)
        check_number(gamma, "gamma", self, low=0.0)
        check_number(lr, "lr", self, low=0.0, exclusive=True)
        self.gamma, self.lr = gamma, lr
        for name in _MOVING:
            self.register_buffer(name, torch.zeros(num_tasks, dtype=torch.float64))
        self.register_buffer("last_logs", torch.full((num_tasks,), float("nan"), dtype=torch.float64))
        self._setting("min_losses", min_losses, 0.0)
        self._set_floor(floor)

    def objective(self, losses: Tensor, tasks: Tasks = ALL) -> Tensor:
        logs, counts = self._logs(losses.detach(), tasks)
        scores = (self._moved(logs, counts, tasks)[0] - logs).masked_fill(~counts, -torch.inf)
        weights = torch.softmax(scores, 0).where(counts, 0) * one_or_nan(losses)
        return losses @ weights.to(losses.dtype)

    def observe(self, losses: Tensor, tasks: Tasks = ALL) -> None:
        logs, counts = self._logs(losses, tasks)
        for name, value in zip(_MOVING, self._moved(logs, counts, tasks), strict=True):
            getattr(self, name)[tasks] = value
        self.last_logs[tasks] = torch.where(counts & logs.isfinite(), logs, self.last_logs[tasks])

    def _logs(self, losses: Tensor, tasks: Tasks) -> tuple[Tensor, Tensor]:
        logs, counts = self._log_above(losses.double(), tasks, "min_losses")
        return logs.maximum(self.floor[tasks].log()), counts

    def _moved(self, logs: Tensor, counts: Tensor, tasks: Tasks) -> tuple[Tensor, ...]:
        """The logits of this step and the Adam state that belongs to them; a task without a drop keeps its own."""
        old = tuple(getattr(self, name)[tasks] for name in _MOVING)
        logits, first, second, updates = old
        drop = self.last_logs[tasks] - logs
        known = counts & drop.isfinite()
        drop = torch.where(known, drop, 0)
        # The logits that are kept are those of the last step. Nobody known: the softmax of nothing is NaN.
        share = torch.softmax(logits.masked_fill(~known, -torch.inf), 0).nan_to_num(0)
        gradient = share * (drop - share @ drop) + self.gamma * logits
        step, *moments = adam_step(gradient, first, second, updates, self.lr)
        return tuple(torch.where(known, *pair) for pair in zip((logits - step, *moments), old, strict=True))
