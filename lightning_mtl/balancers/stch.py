"""Smooth Tchebycheff scalarisation: minimise the worst weighted loss, smoothly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_mtl.balancers.base import ALL, LossBalancer, Tasks
from lightning_mtl.checks import bad_argument, check_integer, check_number
from lightning_mtl.linalg import one_or_nan


class STCH(LossBalancer):
    r"""Minimise a smooth maximum over the tasks; the smaller ``mu``, the more the worst task counts.

    With ``warmup_epochs=0`` the paper's form, :math:`\mu \log \sum_t \exp(\lambda_t (\ell_t - z_t) / \mu)`. Otherwise
    that of its multi-task runs: first :math:`\sum_t \log(\ell_t - z_t)`, then
    :math:`T \mu \log \sum_t \exp(T \lambda_t \log((\ell_t - z_t) / n_t) / \mu)`, where :math:`n_t` is the mean of
    :math:`\ell_t - z_t` over the last warm-up epoch.

    Args:
        num_tasks: ``T``.
        mu: smoothness, > 0.
        preference: > 0, one number, a sequence of ``T``, or a mapping of task names (a task left out has
            1); divided by their sum over the present tasks they are :math:`\lambda`, by default ``1 / T`` each.
        reference: ``z``, below which no loss can go, in the same forms; 0 by default.
        warmup_epochs: 4 as published; 0 for the paper's form, which depends on the units of the losses.
        floor: in the same forms, > 0: with a warm-up, :math:`\log(\ell_t - z_t)` has at most the slope one over it, and
            goes on as a straight line below. Without one, a loss that comes near its reference drowns the others
            during the warm-up; the default only keeps weights finite, because any other has a unit.

    Shapes: losses ``[T]`` -> objective ``[]``.
    State: ``nadir`` (``n``, NaN until known), ``loss_sums`` and ``loss_counts`` of the epoch, all ``[T]``,
    and ``epochs`` that have ended. A plain loop has to call ``end_epoch()``.
    Update: weights are positive; without a warm-up :math:`w_t \le \lambda_t`, else there is no fixed scale, but the
    direction stays the same if a loss (with its reference) and its gradient are multiplied by a number; heads are
    weighted. An absent task is left out, and so is one whose loss is exactly 0 (with a warm-up also at its reference).
    One without ``n_t`` after the warm-up takes its present loss for it.
    Raises: ``ValueError`` if an argument is out of range, or, with a warm-up, a loss is below its reference (on the
    CPU in any step, elsewhere in the first).
    Paper: Lin et al., ICML 2024, arXiv:2402.19078. Departures: its code takes ``n`` from one epoch more, and
    knows no preference after a warm-up.

    Example:
        >>> import torch
        >>> STCH(2, mu=0.1, warmup_epochs=0).weights(torch.tensor([1.0, 2.0]))
        tensor([0.0033, 0.4967])
    """

    preference: Tensor
    reference: Tensor
    nadir: Tensor
    loss_sums: Tensor
    loss_counts: Tensor
    epochs: Tensor

    def __init__(
        self,
        num_tasks: int,
        mu: float = 1.0,
        preference: float | Sequence[float] | Mapping[str, float] | None = None,
        reference: float | Sequence[float] | Mapping[str, float] | None = None,
        warmup_epochs: int = 4,
        floor: float | Sequence[float] | Mapping[str, float] | None = None,
    ) -> None:
        super().__init__(num_tasks)
        check_number(mu, "mu", self, low=0.0, exclusive=True)
        check_integer(warmup_epochs, "warmup_epochs", self, low=0)
        self.mu, self.warmup_epochs = mu, warmup_epochs
        self._setting("preference", preference, 1.0)
        self._setting("reference", reference, 0.0)
        self._set_floor(floor)
        for name, start in (("nadir", float("nan")), ("loss_sums", 0.0), ("loss_counts", 0.0)):
            self.register_buffer(name, torch.full((num_tasks,), start, dtype=torch.float64))
        self.register_buffer("epochs", torch.zeros((), dtype=torch.long))

    def objective(self, losses: Tensor, tasks: Tasks = ALL) -> Tensor:
        terms, counts = losses.double() - self.reference[tasks], losses != 0
        size: Tensor | int = 1
        if self.warmup_epochs:
            logs, counts = self._log_above(losses.double(), tasks, "reference")
            nadir = self.nadir[tasks].log()
            terms, size = logs - torch.where(nadir.isnan(), logs.detach(), nadir), counts.sum().double()
        preference = torch.where(counts, self.preference[tasks], 0)
        share = preference / torch.where(counts.any(), preference.sum(), 1)
        exponents = (size * share * terms / self.mu).masked_fill(~counts, -torch.inf)
        smooth = torch.where(counts.any(), size * self.mu * torch.logsumexp(exponents, 0), 0)
        if self.warmup_epochs:
            # Not a branch, for which the host would have to wait.
            smooth = torch.where(self.epochs < self.warmup_epochs, logs.sum(), smooth)
        return (smooth * one_or_nan(losses)).to(losses.dtype)

    def observe(self, losses: Tensor, tasks: Tasks = ALL) -> None:
        above = losses.double() - self.reference[tasks]
        counts = (losses != 0) & (above != 0)
        self.loss_sums[tasks] += torch.where(counts, above, 0)
        self.loss_counts[tasks] += counts

    def end_epoch(self) -> None:
        self.epochs += 1
        due = self.nadir.isnan() & (self.epochs >= self.warmup_epochs)
        self.nadir.copy_(torch.where(due, self.loss_sums / self.loss_counts, self.nadir))
        self.loss_sums.zero_()
        self.loss_counts.zero_()

    def _setting_values(self, name: str) -> Tensor:
        values = super()._setting_values(name)
        if name == "preference" and not bool((values > 0).all()):
            raise bad_argument(self, name, "be > 0", values.tolist(), "Leave out a task that shall not count")
        return values
