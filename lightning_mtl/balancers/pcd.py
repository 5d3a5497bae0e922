"""PCD: follow the primary task, but give each secondary task its share."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from lightning_mtl.balancers.base import GramBalancer, Tasks, in_numpy
from lightning_mtl.checks import bad_argument, check_number
from lightning_mtl.linalg import divided, nonnegative_qp, unit_gram

#: A direction whose squared length is this small against its parts is what rounding leaves of zero.
_NOTHING = 1e-14
#: How far, as a share of the longest gradient, a constraint may be missed that counts as met.
_MET = 1e-6
#: A moving average that keeps everything never starts.
_LONGEST = 1 - 1e-9


class PCD(GramBalancer):
    r"""Follow the primary task, but give each secondary task its share.

    Priority-constrained descent: among the directions with :math:`\tilde g_j^\top d \ge \tau_j \|\tilde g_j\|^2`
    for each secondary task the one nearest to the primary gradient, as long as that.

    Args:
        num_tasks: ``T``.
        primary: which task comes first: its name, or its place in the order; by default the first main task.
        tau: the share in [0, 1] of the progress along its own gradient that a secondary task is promised: one number,
            ``T`` of them (the primary's is not used), or a mapping of task names; 0.02 by default.
        beta: how much of the moving average of the squared norms is kept per step, in [0, 1). Gradients are divided by
            its root (:math:`\tilde g`).
        every_n_steps: solve in every n-th step only.

    Shapes: gram ``[T, T]``, losses ``[T]`` (unused) -> weights ``[T]``, >= 0.
    State: that of :class:`GramBalancer`, ``squares`` and ``updates`` of the moving averages, ``[T]``.
    Update: as long as the primary gradient; scale-free, and free of the unit of each secondary loss, while these units
    are the same in all steps; heads keep their own gradient.
    Promises: every secondary task advances (for ``tau > 0``), as far as the constraints do not contradict each other;
    if they do, or if nothing is left, the primary gradient alone. A primary gradient of zero: zero. Without the primary
    task in a batch, the mean of the others.
    Raises: ``ValueError`` if an option is out of range, no task has the name, or the task is an auxiliary one.
    Paper: "Not All Objectives Are Born Equal: Priority-Constrained Descent", TMLR 2026, arXiv:2606.29521. Departure: no
    constant is added to the moving average, so that no unit matters.

    Example:
        >>> import torch
        >>> PCD(2, tau=0.0).combine(torch.tensor([[1.0, 0.0], [-1.0, 1.0]]), torch.ones(2))
        tensor([0.7071, 0.7071])
    """

    tau: Tensor
    squares: Tensor
    updates: Tensor

    def __init__(
        self,
        num_tasks: int,
        primary: int | str | None = None,
        tau: float | Sequence[float] | Mapping[str, float] = 0.02,
        beta: float = 0.999,
        every_n_steps: int = 1,
    ) -> None:
        super().__init__(num_tasks, every_n_steps)
        check_number(beta, "beta", self, low=0.0, high=_LONGEST)
        self.primary, self.beta = primary, beta
        self._place(primary, "primary")
        self._setting("tau", tau, 0.02)
        if not bool(((self.tau >= 0) & (self.tau <= 1)).all()):
            raise bad_argument(self, "tau", "lie in [0, 1]", self.tau.tolist(), "Choose smaller shares")
        for name in ("squares", "updates"):
            self.register_buffer(name, torch.zeros(num_tasks, dtype=torch.float64))

    def weights(self, gram: Tensor, losses: Tensor, tasks: Tasks) -> Tensor:
        unit, norms = unit_gram(gram.numpy())
        usual, index = self._usual(norms, tasks), np.arange(self.num_tasks)[in_numpy(tasks)]
        primary = index == self._place(self.primary, "primary")
        if not primary.any():
            return torch.full_like(losses, 1 / len(losses))
        place = int(primary.argmax())
        others = ~primary & (norms > 0)
        if norms[place] > 0 and others.any():
            # In unit rows: |g~| = norms / usual.
            length = divided(norms, usual)
            wanted = self.tau.numpy()[index][others] * length[others] - unit[others, place] * length[place]
            inside = unit[others][:, others]
            pushes = nonnegative_qp(inside, -wanted[None], self.resolution)[0]
            made = inside @ pushes - wanted
            mixed = np.zeros(len(norms))
            mixed[place], mixed[others] = length[place], pushes
            square = float(mixed @ unit @ mixed)
            kept = made.min() >= -max(_MET, self.resolution) * length.max()
            if kept and square > max(_NOTHING, self.resolution**2) * float(mixed.sum()) ** 2:
                return torch.from_numpy(divided(mixed, norms) * (norms[place] / math.sqrt(square)))
        return torch.from_numpy(primary.astype(float))

    def _usual(self, norms: np.ndarray, tasks: Tasks) -> np.ndarray:
        """Move the moving averages of the squared norms; their roots, without the bias of a start at zero."""
        at, squares, updates = in_numpy(tasks), self.squares.numpy(), self.updates.numpy()
        squares[at] = now = self.beta * squares[at] + (1 - self.beta) * norms * norms
        updates[at] += 1
        usual: np.ndarray = np.sqrt(now / (1 - self.beta ** updates[at]))
        return usual
