"""The family of methods that need the losses only."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from lightning_mtl.balancers.base.balancer import ALL, Balancer, Tasks
from lightning_mtl.checks import (
    check_losses,
    check_present,
    check_rows,
)
from lightning_mtl.linalg.logs import LEAST_LOSS, log_losses


class LossBalancer(Balancer):
    """A method that needs the losses only: it is a scalar function of them, and one ordinary backward runs.

    Its weights are the partial derivatives of that function, so heads are weighted as the encoder is.
    State follows the losses' device (unless ``state_on_cpu``).

    State moves in the backward only: ``objective`` leaves it alone, ``observe`` moves it afterwards.
    """

    #: Whether the objective is linear in the losses; then averaging over ranks needs no communication.
    linear_in_losses: ClassVar[bool] = False
    #: Whether a loss of exactly 0 with zero gradient leaves objective and state alone.
    indifferent_to_absent: ClassVar[bool] = False
    #: Least loss above its bound, for those that take logarithms.
    floor: Tensor
    _looked = False

    @abstractmethod
    def objective(self, losses: Tensor, tasks: Tasks = ALL) -> Tensor:
        """The scalar to minimise. Overridden by each method.

        Shapes: losses ``[P]`` of the present tasks, ``tasks`` indexes ``[T]`` state with them -> ``[]``.
        """

    def observe(self, losses: Tensor, tasks: Tasks = ALL) -> None:
        """Move state after a backward. Overridden by methods that have any.

        Called without autograd and with ``P >= 1``; what is written from losses that are not finite is undone.
        Shapes: as in :meth:`objective`.
        """

    @torch.no_grad()
    def advance(self, losses: Tensor, present: Tensor | None = None) -> None:
        """One step is done: move the state, except that of absent tasks or if a loss is not finite. Final.

        Shapes: losses ``[T]``, present bool ``[T]``.
        """
        if type(self).observe is LossBalancer.observe:
            return
        tasks = ALL
        if present is not None:
            tasks = present.to(losses.device).nonzero().squeeze(1)
            losses = losses[tasks]
        if len(losses) == 0:
            return
        before = {name: value.clone() for name, value in self.named_state() if name not in self._settings}
        self.observe(losses.detach(), tasks)
        # Not a branch, for which the host would have to wait.
        finite = torch.isfinite(losses).all()
        for name, value in self.named_state():
            if name in before:
                value.copy_(torch.where(finite.to(value.device), value, before[name]))

    def forward(self, losses: Tensor, present: Tensor | None = None) -> Tensor:
        """Check, drop absent tasks, and call :meth:`objective`. Final.

        Shapes: losses ``[T]``, present bool ``[T]`` -> ``[]``.
        """
        check_losses(losses, self.num_tasks, self)
        self._check_bound()
        if not self.state_on_cpu:
            self._move_state(losses.device)
        if present is None:
            return self.objective(losses)
        check_present(present, self.num_tasks, self)
        if self.indifferent_to_absent:
            # Cut off, not left out: no device sync, and the weight of an absent task is 0.
            return self.objective(torch.where(present.to(losses.device), losses, 0))
        tasks = present.to(losses.device).nonzero().squeeze(1)
        if len(tasks) == 0:
            # DDP waits for the balancer's own parameters too.
            return losses.sum() * 0 + sum((p.sum() * 0 for p in self.parameters()), losses.new_zeros(()))
        return self.objective(losses[tasks], tasks)

    def weights(self, losses: Tensor, present: Tensor | None = None) -> Tensor:
        """The weights ``d objective / d losses``: shapes losses ``[T]`` -> ``[T]``, detached."""
        with torch.enable_grad():
            leaf = losses.detach().clone().requires_grad_()
            (grad,) = torch.autograd.grad(self(leaf, present), leaf)
        return grad

    def combine(self, rows: Tensor, losses: Tensor, present: Tensor | None = None) -> Tensor:
        check_rows(rows, self.num_tasks, self)
        losses = losses.to(rows.device)
        weights = self.weights(losses, present).to(rows.dtype)
        self.advance(losses, present)
        return weights @ rows

    def _set_floor(self, floor: object) -> None:
        """The argument ``floor``."""
        self._setting("floor", floor, LEAST_LOSS, low=LEAST_LOSS)

    def _log_above(self, losses: Tensor, tasks: Tasks, bound: str) -> tuple[Tensor, Tensor]:
        """The logarithms of the losses above the setting ``bound``, and who counts.

        Not a task whose loss is exactly 0, or at its bound: there is no gradient there, and no logarithm; 0 stands for
        it. Below the setting ``floor`` see :func:`log_losses`.

        Shapes: losses ``[P]`` -> ``[P]`` in their dtype, bool ``[P]``.
        """
        above = losses - getattr(self, bound)[tasks].to(losses.dtype)
        counts = (losses.detach() != 0) & (above.detach() != 0)
        everybody = losses.device.type == "cpu" and bool(counts.all())
        shown = above if everybody else torch.where(counts, above, 1)
        logs = log_losses(shown, self, bound, self.floor[tasks].to(losses.dtype), first=not self._looked)
        self._looked = True
        return (logs if everybody else torch.where(counts, logs, 0)), counts
