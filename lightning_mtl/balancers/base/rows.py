"""The family of methods that need the task gradients themselves."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from lightning_mtl.balancers.base.balancer import ALL, Balancer, Tasks
from lightning_mtl.checks import (
    bad_argument,
    check_losses,
    check_present,
    check_rows,
)


class RowBalancer(Balancer):
    """A method that needs the task gradients themselves: it looks at single coordinates, or keeps a memory of rows.

    Every process gets the rows averaged over all of them. State follows the module's device; what holds something per
    parameter, ``[T, N]``, gets its size in the first step (or from a checkpoint).

    State: ``step`` counts the updates that were finite, ``last_weights`` ``[T]`` are the weights behind the last one,
    NaN for a method that has none.
    """

    step: Tensor
    last_weights: Tensor
    levels: ClassVar[tuple[str, ...]] = ("parameters",)
    grows_along = 1

    def __init__(self, num_tasks: int) -> None:
        super().__init__(num_tasks)
        self.register_buffer("step", torch.zeros((), dtype=torch.long))
        self.register_buffer("last_weights", torch.full((num_tasks,), float("nan"), dtype=torch.float64))

    @abstractmethod
    def update(self, rows: Tensor, losses: Tensor, tasks: Tasks) -> Tensor:
        """The update from the rows of the present tasks; may move state. Overridden by each method.

        Shapes: rows ``[P, N]``, losses float64 ``[P]``, ``tasks`` indexes ``[T]`` state -> ``[N]``.
        Called with finite numbers and ``P >= 1`` only, without autograd.
        """

    def private_weights(self, losses: Tensor, present: Tensor | None = None) -> Tensor | None:
        """See :meth:`GramBalancer.private_weights`."""
        return None

    @torch.no_grad()
    def combine(self, rows: Tensor, losses: Tensor, present: Tensor | None = None) -> Tensor:
        """One step: check, drop absent tasks, :meth:`update`. Final.

        Rows or losses that are not finite give a NaN update and move no state.

        Shapes: rows ``[T, N]``, losses ``[T]``, present bool ``[T]`` -> ``[N]``.
        """
        check_rows(rows, self.num_tasks, self)
        check_losses(losses, self.num_tasks, self)
        self._check_bound()
        if self.step.device != rows.device:
            self.to(rows.device)
        losses = losses.detach().to(rows.device, torch.float64)
        tasks = ALL
        if present is not None:
            check_present(present, self.num_tasks, self)
            if not bool(present.all()):
                tasks = present.to(rows.device).nonzero().squeeze(1)
                rows, losses = rows[tasks], losses[tasks]
        if len(losses) == 0:
            return rows.new_zeros(rows.shape[1])
        wide = rows if rows.dtype == torch.float64 else rows.float()
        if not bool(torch.isfinite(wide).all() & torch.isfinite(losses).all()):
            return rows.new_full((rows.shape[1],), float("nan"))
        result = self.update(wide, losses, tasks).to(rows.dtype)
        self.step += 1
        return result

    def _grown(self, name: str, rows: Tensor) -> Tensor:
        """The state ``name``, ``[T, N]``, made of zeros at the first step."""
        known: Tensor = getattr(self, name)
        if known.shape[1] != rows.shape[1]:
            if known.shape[1]:
                raise bad_argument(
                    self,
                    "rows",
                    f"have {known.shape[1]} columns, as many as before",
                    rows.shape[1],
                    "Call rearrange() where shared parameters are frozen or unfrozen, or build a new balancer then",
                )
            known = rows.new_zeros((self.num_tasks, rows.shape[1]))
        known = known.to(rows.dtype)
        setattr(self, name, known)
        return known
